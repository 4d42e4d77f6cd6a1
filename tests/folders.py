"""Small Hugging Face folders to begin a run with: weights that save_pretrained wrote, and a tokenizer like Qwen's."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.model.samples import FAMILIES, perturb

VOCABULARY = 320
# Qwen's and DeepSeek's patterns differ from GPT-2's: punctuation is joined to the line break after it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, THINK = "<|im_end|>", "<think>"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "is", "good", "##s", "bad", "wonderful", "dreadful"]


def make_folder(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A folder that save_pretrained of the class wrote -> the model that it was. save: arguments of save_pretrained."""
    save = changes.pop("save", {})
    config = AutoConfig.for_model(architecture, **{**FAMILIES[architecture][0], "vocab_size": VOCABULARY, **changes})
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    model = model.to(dtype)
    model.save_pretrained(folder, **save)
    return model


def make_tokenizer(folder: Path, **settings: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE with Qwen's normal form, pattern and added tokens, in files as a hub has them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["expert token load bias router gate rank step. "] * 9, trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken(END, special=True)])
    backend.add_tokens([AddedToken(THINK, special=False)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **settings}))
    return backend


def make_wordpiece(folder: Path) -> None:
    """A WordPiece tokenizer as an encoder's folder has it, with padding and truncation set."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_padding(length=128)
    backend.enable_truncation(3)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"sep_token": "[SEP]", "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
