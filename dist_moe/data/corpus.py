"""Tokenised documents in memory-mapped files: made once, then opened by every process that asks."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from dist_moe.data.cache import file_sha256, locked
from dist_moe.data.files import Document
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.mmap_files import MmapFile, content_digest, same_content
from dist_moe.data.source_manifest import write_origin
from dist_moe.data.sources import SourceRecord, fetch_sources, read_documents
from dist_moe.data.split import SALT, in_validation
from dist_moe.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from dist_moe.data.writer import SplitWriter
from dist_moe.errors import DataError

# Part of the key under which tokens are kept: raise it when the files or the way to make them change.
FORMAT = 1
SPLITS = ("train", "validation")
# Documents are tokenised in groups of about this many characters, so that short ones share the cores too.
GROUP_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """The documents of one split, each followed by one end token; N documents, the arrays mapped from files.

    tokens: uint16 or uint32, all documents in file order. starts_N1: int64, document i is
    tokens[starts[i]:starts[i+1]]. domains_N: int64, index into `domains`, which both splits share.
    text_bytes: UTF-8 bytes of all texts.
    """

    tokens: np.ndarray
    starts_N1: np.ndarray
    domains_N: np.ndarray
    domains: tuple[str, ...]
    end_id: int
    text_bytes: int


@dataclass(frozen=True)
class TokenizedData:
    """Tokenizer and both splits; equal fingerprints mean equal tokens. `folder` opens again with
    `open_prepared`. mapped: the files of both splits."""

    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    records: tuple[SourceRecord, ...]
    fingerprint: str
    folder: Path
    mapped: tuple[MmapFile, ...] = ()


def prepare(
    sources: Sequence[str],
    tokenizer: Literal["bytes", "bpe", "pretrained"],
    vocabulary: int,
    validation_fraction: float,
    cache: Path,
    pretrained: Path | None = None,
) -> TokenizedData:
    """Fetch, split, tokenise and open, or only open what the cache folder already holds.

    Safe in several processes at once (one works, the others wait); memory holds one group of documents at a
    time. vocabulary: tokens, for bpe, which is trained on the training split; for pretrained, the most that the
    tokenizer in the folder `pretrained` may have. validation_fraction: 0 < f < 1, the chance of a document to fall
    to validation. Raises DataError, also if a split would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"data.validation_fraction={validation_fraction}", "is not between 0 and 1", "use 0.1")
    records = fetch_sources(sources, cache)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "sources": [[record.name, record.version, record.sha256] for record in records],
        "tokenizer": tokenizer,
        "validation_fraction": validation_fraction,
        "salt": SALT,
    }
    if tokenizer == "bpe":
        settings |= {"vocabulary": vocabulary, "tokenizers": tokenizers.__version__}
    opened = None
    if tokenizer == "pretrained":
        opened = _opened(pretrained, vocabulary)
        digest = hashlib.sha256(opened.files["tokenizer.json"].encode()).hexdigest()
        settings |= {"tokenizer_sha256": digest, "end": opened.end_id, "tokenizers": tokenizers.__version__}
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "tokens" / fingerprint
    with locked(folder.with_name(fingerprint + ".lock")):
        if not _is_whole(folder):
            _make(folder, records, settings | {"fingerprint": fingerprint}, cache, opened)
    return _open(folder)


def _opened(folder: Path | None, vocabulary: int) -> Tokenizer:
    """The tokenizer of a pretrained model, whose ids the model knows."""
    if folder is None:
        raise DataError("data.tokenizer=pretrained", "is the tokenizer of no model", "set model.pretrained")
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > vocabulary:
        rule = f"has {tokenizer.vocab_size} tokens, and the model {vocabulary}"
        raise DataError(str(folder / "tokenizer.json"), rule, "give the folder of a model with its own tokenizer")
    return tokenizer


def open_prepared(folder: Path) -> TokenizedData:
    """Open what `prepare` made, mapping its files; DataError if the folder is not whole."""
    if not _is_whole(folder):
        raise DataError(str(folder), "is not a folder of prepared tokens, or a damaged one", "prepare the data again")
    return _open(folder)


def _open(folder: Path) -> TokenizedData:
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = load_tokenizer(folder / "tokenizer")
    files: list[MmapFile] = []
    train, validation = (_open_split(folder, split, manifest, tokenizer.end_id, files) for split in SPLITS)
    records = tuple(SourceRecord(**record) for record in manifest["records"])
    return TokenizedData(
        tokenizer, train, validation, records, manifest["settings"]["fingerprint"], folder, tuple(files)
    )


def document_names(prepared: TokenizedData, split: str, indices: Collection[int]) -> dict[int, str]:
    """The names of documents of a split by index, as their source gives them; without those that cannot be read."""
    try:
        with (prepared.folder / f"{split}.documents.jsonl").open(encoding="utf-8") as lines:
            return {index: str(json.loads(line)["name"]) for index, line in enumerate(lines) if index in indices}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _open_split(folder: Path, split: str, manifest: dict[str, Any], end_id: int, files: list[MmapFile]) -> Corpus:
    def mapped(kind: str, dtype: str) -> np.ndarray:
        files.append(MmapFile(folder / f"{split}.{kind}"))
        return files[-1].array(dtype)

    return Corpus(
        tokens=mapped("tokens", manifest["dtype"]),
        starts_N1=mapped("starts", "int64"),
        domains_N=mapped("domains", "int64"),
        domains=tuple(manifest["domains"]),
        end_id=end_id,
        text_bytes=manifest["splits"][split]["text_bytes"],
    )


def _is_whole(folder: Path) -> bool:
    """Whether the files are there with their sizes and what they held, and the tokenizer with its hash.

    Tokens that were prepared before digests were listed have their sizes alone.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        tokenizer_sha256 = file_sha256(folder / "tokenizer" / "tokenizer.json")
        whole = sizes == manifest["files"] and tokenizer_sha256 == manifest["tokenizer_sha256"]
        return whole and same_content(folder, manifest.get("digests", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(
    folder: Path, records: Sequence[SourceRecord], settings: dict[str, Any], cache: Path, opened: Tokenizer | None
) -> None:
    """Write beside the folder, then rename; what a killed process or a damage left is cleared away first."""
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    _write(partial, records, settings, cache, opened)
    partial.rename(folder)


def _write(
    folder: Path, records: Sequence[SourceRecord], settings: dict[str, Any], cache: Path, opened: Tokenizer | None
) -> None:
    """Make the token files and, last, the manifest that declares them whole."""
    fraction = settings["validation_fraction"]
    if opened is not None:
        tokenizer = opened
    elif settings["tokenizer"] == "bpe":
        documents = _documents(records, cache)
        texts = (each.text for each in documents if not in_validation(each.name, fraction))
        tokenizer = train_bpe(texts, settings["vocabulary"])
    else:
        tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32)
    domains: dict[str, int] = {}
    with SplitWriter(folder, "train", dtype) as train, SplitWriter(folder, "validation", dtype) as validation:
        for document, ids in _encoded(_documents(records, cache), tokenizer):
            writer = validation if in_validation(document.name, fraction) else train
            domain = domains.setdefault(document.domain, len(domains))
            writer.add(document, domain, np.append(ids, tokenizer.end_id))
    for writer in (train, validation):
        _refuse_empty(writer, train.documents + validation.documents, fraction)
    write_origin(folder, records)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    manifest = {
        "settings": settings,
        "records": [asdict(record) for record in records],
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "domains": list(domains),
        "splits": {writer.split: writer.totals() for writer in (train, validation)},
        "files": {path.name: path.stat().st_size for path in paths},
        "digests": {path.name: content_digest(path) for path in paths},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _documents(records: Sequence[SourceRecord], cache: Path) -> Iterator[Document]:
    """The documents of all sources, without the empty ones, which have nothing to predict."""
    for record in records:
        yield from (document for document in read_documents(record.name, cache) if document.text)


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    for group in _grouped(documents):
        yield from zip(group, tokenizer.encode_batch([each.text for each in group]), strict=True)


def _grouped(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _refuse_empty(writer: SplitWriter, documents: int, fraction: float) -> None:
    if writer.documents == 0:
        change = "raise" if writer.split == "validation" else "lower"
        raise DataError(
            f"data.validation_fraction={fraction}",
            f"leaves the {writer.split} split empty: a hash of its name places each of {documents} documents",
            f"{change} data.validation_fraction, or give more documents (such as a long text cut up)",
        )
