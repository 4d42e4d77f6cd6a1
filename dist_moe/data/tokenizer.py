"""Byte-level tokenizers: 256 single bytes, or a BPE trained here. Text never becomes a special token."""

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
from dist_moe.files import write_atomically

END = "<|endoftext|>"
BYTES = 256
MINIMUM_VOCABULARY = BYTES + 1
# Encoding takes about a hundred bytes of memory per token, so long texts are encoded in pieces.
PIECE_CHARACTERS = 65_536
PIECES_AT_ONCE = 16
# A text without a place to cut is cut anyway after so many characters; two tokens of such a text may then differ.
LONGEST_PIECE = 4 * PIECE_CHARACTERS
# The pre-tokenizer (GPT-2's pattern) never joins a visible character to the white space after it, and looks ahead only
# from white space, so a cut between the two changes no token. Beyond ASCII: characters that are no white space.
CUT = re.compile("[!-~\u00a1-\u167f\u1681-\u1fff\u2030-\u205e\u2070-\u2fff\u3001-\ud7ff\U00010000-\U0010ffff](?=[ \n])")
# Training takes time quadratic in the length of a word, so longer ones (95 is the longest in the built-in sources) are
# trained on in parts. Encoding does not change.
LONGEST_WORD = 128
KINDS = (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]")
LONG_RUNS = tokenizers.Regex("|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in KINDS))
# Training takes up to 150 bytes of memory per character; of a larger text, evenly spread pieces are trained on.
TRAINING_CHARACTERS = 24 << 20
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer; text that spells one of its special tokens is encoded as text.

    Attributes:
        backend: The tokenizer of the `tokenizers` library.
        end_id: The id of the token that ends a document.
        files: The contents that `save` writes, by file name.
        cut: Where a long text may be cut, so that no token spans the cut.
    """

    backend: tokenizers.Tokenizer
    end_id: int
    files: Mapping[str, str]
    cut: re.Pattern[str] = CUT

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one, including the end token and other special tokens."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes_V(self) -> np.ndarray:
        """Bytes of text that each id decodes to, int64 [V]; 0 for special tokens.

        They sum to the bytes of the UTF-8 text (in the normal form of the tokenizer, if it has one).
        """
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
        """Encode a text -> int64 [tokens], without an end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text as `encode` does -> int64 [tokens of that text]; pieces are encoded in parallel."""
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
        """Decode ids into text; special tokens are skipped, and bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode([int(each) for each in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> list[Path]:
        """Write tokenizer.json and tokenizer_config.json -> their paths. `transformers.AutoTokenizer` opens them to a
        tokenizer with the same ids."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_atomically(folder / name, content)
        return [folder / name for name in self.files]


def byte_tokenizer() -> Tokenizer:
    """Make the tokenizer with one token per byte (id = byte) and the end token 256."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    return _finish(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def train_bpe(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2).

    The same texts give the same tokenizer. Time is linear in the text, for words of any length.

    Args:
        texts: What to train on.
        vocabulary: The most tokens, end token included. The result has fewer where too few pairs occur twice.

    Raises:
        DataError: vocabulary is below 257.
    """
    if vocabulary < MINIMUM_VOCABULARY:
        raise DataError(
            f"data.vocabulary={vocabulary}",
            f"has no room for the {BYTES} bytes and the end token",
            f"use {MINIMUM_VOCABULARY} or more",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    bounded = pre_tokenizers.Split(LONG_RUNS, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([bounded, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, min_frequency=2, initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _finish(backend)


def cut(text: str, size: int, where: re.Pattern[str] = CUT) -> Iterator[str]:
    """Yield the text in pieces of `size` to `LONGEST_PIECE` characters (the last may be shorter).

    No token spans two of them, unless the text has no place for a cut within the longest piece.
    """
    start = 0
    while start < len(text):
        end = _end(text, start, size, where)
        yield text[start:end]
        start = end


def cut_pieces(pieces: Iterable[str], size: int, where: re.Pattern[str] = CUT) -> Iterator[str]:
    """Yield what `cut` yields for the whole of a text that comes in pieces, with one of them in memory at a time."""
    held = ""
    for piece in pieces:
        held += piece
        start = 0
        while len(held) - start > LONGEST_PIECE:
            end = _end(held, start, size, where)
            yield held[start:end]
            start = end
        held = held[start:]
    yield from cut(held, size, where)


def _end(text: str, start: int, size: int, where: re.Pattern[str]) -> int:
    # The pattern looks one character ahead.
    match = where.search(text, start + size - 1, start + LONGEST_PIECE + 1)
    return match.end() if match else min(len(text), start + LONGEST_PIECE)


def byte_alphabet() -> list[str]:
    """Return the visible character that represents each of the 256 bytes in a byte-level vocabulary (GPT-2's
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
