"""Byte-level tokenizers (256 single bytes, or a BPE trained here); text that spells the end token stays
text."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dist_moe.errors import DataError

END = "<|endoftext|>"
BYTES = 256
MINIMUM_VOCABULARY = BYTES + 1
# An encoded piece costs about a hundred bytes of memory per token, so long texts are encoded in pieces.
PIECE_CHARACTERS = 65_536
PIECES_AT_ONCE = 16
# The pre-tokenizer (GPT-2's pattern) never joins a visible character to the white space after it, and looks
# ahead only from white space: between the two, a cut changes no token.
CUT = re.compile(r"[!-~](?=[ \n])")
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer; text that spells one of its special tokens stays text.

    end_id: id of the token that ends a document. files: what `save` writes, by name. cut: where a long text may be
    cut, so that no token spans the cut.
    """

    backend: tokenizers.Tokenizer
    end_id: int
    files: Mapping[str, str]
    cut: re.Pattern[str] = CUT

    @cached_property
    def vocab_size(self) -> int:
        """The highest id and one; the end token and other special ones included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes_V(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64; 0 for special tokens. They sum to the bytes of the UTF-8 text
        (as its normal form has them, if the tokenizer has one)."""
        token_bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            token_bytes_V[token_id] = len(token)  # each character of the byte-level alphabet is one byte
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            token_bytes_V[token_id] = 0 if added.special else len(added.content.encode())
        return token_bytes_V

    @cached_property
    def _ids_are_bytes(self) -> bool:
        vocabulary = self.backend.get_vocab(with_added_tokens=False)
        return vocabulary == {character: byte for byte, character in enumerate(byte_alphabet())}

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 [tokens]; no end token is added, and none comes from text that spells it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [tokens of that text], as `encode` gives them; the texts' pieces share the
        cores."""
        if self._ids_are_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        ids_by_text: list[list[np.ndarray]] = [[] for _ in texts]
        pieces = ((index, piece) for index, text in enumerate(texts) for piece in cut(text, PIECE_CHARACTERS, self.cut))
        while group := list(islice(pieces, PIECES_AT_ONCE)):
            encoded = self.backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (index, _), piece_ids in zip(group, encoded, strict=True):
                ids_by_text[index].append(np.array(piece_ids.ids, dtype=np.int64))
        return [np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64) for ids in ids_by_text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; end tokens stand for nothing, and bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode([int(each) for each in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> list[Path]:
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` opens to the
        same ids -> both."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_text(content, encoding="utf-8")
        return [folder / name for name in self.files]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, id = byte, and the end token 256."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    return _finish(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def train_bpe(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) of at most `vocabulary` tokens, end
    token included.

    The same texts give the same tokenizer. It is smaller than asked where the texts hold too few pairs that
    occur twice. Raises DataError below 257 tokens.
    """
    if vocabulary < MINIMUM_VOCABULARY:
        raise DataError(
            f"data.vocabulary={vocabulary}",
            f"is below the {BYTES} bytes and the end token",
            f"use {MINIMUM_VOCABULARY} or more",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, min_frequency=2, initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _finish(backend)


def cut(text: str, size: int, where: re.Pattern[str] = CUT) -> Iterator[str]:
    """The text in pieces of at least `size` characters (the last may be shorter), cut only where no token
    can span."""
    start = 0
    while start < len(text):
        found = where.search(text, start + size - 1)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


def byte_alphabet() -> list[str]:
    """The visible character that stands for each of the 256 bytes in a byte-level vocabulary (GPT-2's
    encoder.py)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(BYTES) if byte not in visible]
    return [chr(byte) if byte in visible else chr(BYTES + hidden.index(byte)) for byte in range(BYTES)]


def _finish(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    backend.encode_special_tokens = True
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(SETTINGS, indent=2) + "\n",
    }
    return Tokenizer(backend, backend.get_vocab()[END], files)
