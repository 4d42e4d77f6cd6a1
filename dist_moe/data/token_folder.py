"""Folders of tokenized data in the cache: made once for all processes, and either complete or absent."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dist_moe.data.cache import file_sha256, needs_cache
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.mmap_files import content_digest, same_content
from dist_moe.data.sources import SourceRecord
from dist_moe.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from dist_moe.errors import DataError
from dist_moe.files import file_lock, write_atomically

RECORD = "manifest.json"
"""What is in a folder; written last, it marks the folder as complete."""
Settings = dict[str, Any]
"""All that decides the tokens. Equal settings have one folder, whose name is their hash, `fingerprint`."""


def made_once(cache: Path, settings: Settings, write: Callable[[Path, Settings], None]) -> Path:
    """Return the folder of the settings, which is written now unless the cache has it whole.

    Several processes may call this concurrently: one writes, the others wait. What a killed process left, or a damaged
    folder, is removed first.

    Args:
        cache: The folder of the cache.
        settings: All that decides the tokens.
        write: Writes all files into an empty folder; it gets the settings with their fingerprint.
    """
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "tokens" / fingerprint
    # Without the lock, which a cache on a read-only disk does not allow.
    if tokens_are_whole(folder):
        return folder
    with needs_cache(cache), file_lock(folder.with_name(fingerprint + ".lock")):
        if not tokens_are_whole(folder):
            partial = _emptied(folder)
            write(partial, settings | {"fingerprint": fingerprint})
            partial.rename(folder)
    return folder


def _emptied(folder: Path) -> Path:
    """Remove a damaged folder and what a killed process left -> the empty folder in which its files are written."""
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    return partial


def tokenizer_settings(
    kind: str, vocabulary: int, pretrained: Path | None, byte_level: bool = True
) -> tuple[Tokenizer | None, Settings]:
    """Return the pretrained tokenizer (None for another kind), and the settings of a tokenizer that decide the tokens.

    Args:
        kind: bytes, bpe or pretrained.
        vocabulary: Tokens of the bpe vocabulary; for pretrained, the most that its tokenizer may have.
        pretrained: The folder of the pretrained tokenizer.
        byte_level: As `load_tokenizer`.

    Raises:
        DataError: The pretrained tokenizer cannot be used.
    """
    settings: Settings = {"tokenizer": kind}
    if kind == "bpe":
        return None, settings | {"vocabulary": vocabulary, "tokenizers": tokenizers.__version__}
    if kind != "pretrained":
        return None, settings
    tokenizer = pretrained_tokenizer(pretrained, vocabulary, byte_level)
    digest = hashlib.sha256(tokenizer.files["tokenizer.json"].encode()).hexdigest()
    of_file = {"tokenizer_sha256": digest, "end": tokenizer.end_id, "tokenizers": tokenizers.__version__}
    return tokenizer, settings | of_file


def pretrained_tokenizer(folder: Path | None, vocabulary: int, byte_level: bool = True) -> Tokenizer:
    """Load the tokenizer of a pretrained model, and check that the model has an embedding for each of its ids.

    byte_level: as `load_tokenizer`.
    """
    if folder is None:
        raise DataError("data.tokenizer=pretrained", "needs a pretrained model", "set model.pretrained")
    tokenizer = load_tokenizer(folder, byte_level)
    if tokenizer.vocab_size > vocabulary:
        rule = f"has {tokenizer.vocab_size} tokens, and the model {vocabulary}"
        raise DataError(str(folder / "tokenizer.json"), rule, "give the folder of a model with its own tokenizer")
    return tokenizer


def make_tokenizer(settings: Settings, given: Tokenizer | None, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """Return the tokenizer of the settings: the given one, or one that is trained on texts, or that of bytes."""
    if given is not None:
        return given
    return train_bpe(texts(), settings["vocabulary"]) if settings["tokenizer"] == "bpe" else byte_tokenizer()


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the tokens in files."""
    return np.dtype(np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32)


def write_record(
    folder: Path, settings: Settings, records: Sequence[SourceRecord], tokenizer: Tokenizer, **content: Any
) -> None:
    """Write the record of a folder, after all its other files.

    Args:
        folder: With the tokenizer in `tokenizer`.
        settings: With their fingerprint.
        records: The sources.
        tokenizer: What the tokens were made with.
        content: What else is in the record.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    record = {
        "settings": settings,
        "records": [asdict(record) for record in records],
        "dtype": token_dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        **content,
        "files": {path.name: path.stat().st_size for path in paths},
        "digests": {path.name: content_digest(path) for path in paths},
    }
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a folder that is whole."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record


def sources_of(record: dict[str, Any]) -> tuple[SourceRecord, ...]:
    """Return the sources of a record."""
    return tuple(SourceRecord(**each) for each in record["records"])


def tokens_are_whole(folder: Path) -> bool:
    """Whether all files have the sizes and digests of the record, and the tokenizer its hash.

    A record of an earlier version has no digests of the token files; then only their sizes are compared.
    """
    try:
        record = read_record(folder)
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        tokenizer_sha256 = file_sha256(folder / "tokenizer" / "tokenizer.json")
        whole = sizes == record["files"] and tokenizer_sha256 == record["tokenizer_sha256"]
        return whole and same_content(folder, record.get("digests", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
