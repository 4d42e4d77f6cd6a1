"""Tokenizes documents into memory-mapped files, once for all processes, and opens them."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dist_moe.data.files import is_text_file
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.mmap_files import MmapFile
from dist_moe.data.source_manifest import write_source_manifest
from dist_moe.data.sources import SourceRecord, fetch_sources, read_sources
from dist_moe.data.split import SALT, Documents, Part, Split, choose_split
from dist_moe.data.token_folder import (
    Settings,
    made_once,
    make_tokenizer,
    read_record,
    sources_of,
    token_dtype,
    tokenizer_settings,
    tokens_are_whole,
    write_record,
)
from dist_moe.data.tokenizer import (
    PIECE_CHARACTERS,
    TRAINING_CHARACTERS,
    Tokenizer,
    cut_pieces,
)
from dist_moe.data.writer import SplitWriter
from dist_moe.errors import DataError

# Part of the fingerprint: increase it when the files, or how they are made, change.
FORMAT = 1
SPLITS = ("train", "validation")
UNDIVIDED = ("all",)
# Documents are tokenized in groups of about this many characters, so that short ones use all cores too.
GROUP_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """The N documents of one split, each followed by one end token, as arrays mapped from files.

    Attributes:
        tokens: uint16 or uint32 [tokens], all documents in the order of their sources.
        starts_N1: int64 [N + 1]; document i is tokens[starts[i]:starts[i+1]].
        domains_N: int64 [N], indices into `domains`.
        domains: The names of the domains, shared by both splits.
        end_id: The id of the end token.
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
    """The tokenizer, and the tokens of both splits.

    Attributes:
        tokenizer: What the tokens were made with.
        train: The split for training; all of the text where it is not divided.
        validation: The split for validation; all of the text where it is not divided.
        records: The sources, as they were when they were read.
        fingerprint: Equal fingerprints mean equal tokens.
        folder: Where the files are; `open_tokenized` opens it again.
        files: The mapped files of both splits.
        notes: What the user should know about the text.
    """

    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    records: tuple[SourceRecord, ...]
    fingerprint: str
    folder: Path
    files: tuple[MmapFile, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(
    sources: Sequence[str],
    tokenizer: Literal["bytes", "bpe", "pretrained"],
    vocabulary: int,
    validation_fraction: float | None,
    cache: Path,
    pretrained: Path | None = None,
) -> TokenizedData:
    """Fetch, split and tokenize the sources, or only open the tokens where the cache has them already.

    Several processes may call this concurrently: one does the work, the others wait. Memory holds one group of
    documents at a time.

    Args:
        sources: Names of sources, or paths and globs of local files.
        tokenizer: Which tokenizer; bpe is trained on the training split.
        vocabulary: Tokens of the bpe vocabulary; for pretrained, the most that its tokenizer may have.
        validation_fraction: The probability that a document belongs to the validation split, 0 < f < 1; None: the
            text is not divided.
        cache: The folder for fetched sources and tokens.
        pretrained: The folder of the pretrained tokenizer.

    Raises:
        DataError: A source or the tokenizer cannot be used, or a split would be empty.
    """
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise DataError(f"data.validation_fraction={validation_fraction}", "is not between 0 and 1", "use 0.1")
    records = fetch_sources(sources, cache)
    settings: Settings = {
        "format": FORMAT,
        "sources": [[record.name, record.version, record.sha256] for record in records],
        "validation_fraction": validation_fraction,
        "salt": SALT,
    }
    if any(map(is_text_file, sources)):
        settings |= {"domains": "stems"}  # tokens of an earlier version have the folder's name
    given, of_tokenizer = tokenizer_settings(tokenizer, vocabulary, pretrained)
    write = partial(_write, records=records, cache=cache, given=given)
    return _open(made_once(cache, settings | of_tokenizer, write))


def open_tokenized(folder: Path) -> TokenizedData:
    """Open a folder that `prepare` made, and map its files. Raises DataError if it is incomplete or damaged."""
    if not tokens_are_whole(folder):
        raise DataError(str(folder), "is not a folder of tokenized data, or is damaged", "prepare the data again")
    return _open(folder)


def _open(folder: Path) -> TokenizedData:
    record = read_record(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    files: list[MmapFile] = []
    corpora = [_open_split(folder, split, record, tokenizer.end_id, files) for split in record["splits"]]
    return TokenizedData(
        *(tokenizer, corpora[0], corpora[-1], sources_of(record), record["settings"]["fingerprint"], folder),
        files=tuple(files),
        notes=tuple(record.get("notes", ())),
    )


def document_names(folder: Path, split: str, indices: Collection[int]) -> dict[int, str]:
    """Return the names of documents of a split by index, as their source gives them; empty if they cannot be read.

    folder: that of the tokens.
    """
    try:
        with (folder / f"{split}.documents.jsonl").open(encoding="utf-8") as lines:
            return {index: str(json.loads(line)["name"]) for index, line in enumerate(lines) if index in indices}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _open_split(folder: Path, split: str, record: dict[str, Any], end_id: int, files: list[MmapFile]) -> Corpus:
    def map_array(kind: str, dtype: str) -> np.ndarray:
        files.append(MmapFile(folder / f"{split}.{kind}"))
        return files[-1].array(dtype)

    return Corpus(
        tokens=map_array("tokens", record["dtype"]),
        starts_N1=map_array("starts", "int64"),
        domains_N=map_array("domains", "int64"),
        domains=tuple(record["domains"]),
        end_id=end_id,
        text_bytes=record["splits"][split]["text_bytes"],
    )


def _write(
    folder: Path, settings: Settings, records: Sequence[SourceRecord], cache: Path, given: Tokenizer | None
) -> None:
    """Write the token files and, last, their record.

    given: the tokenizer, where it is not made here.
    """
    documents = partial(read_sources, [record.name for record in records], cache)
    split = choose_split(documents, settings["validation_fraction"])
    tokenizer = make_tokenizer(settings, given, partial(_training_pieces, split, documents, records))
    tokenizer.save(folder / "tokenizer")
    domains: dict[str, int] = {}
    names = UNDIVIDED if settings["validation_fraction"] is None else SPLITS
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(folder, name, token_dtype(tokenizer))) for name in names]
        for piece, ids in _encoded(split.parts(documents()), tokenizer):
            writer = writers[piece.part.held_out]
            writer.add(ids, piece.text)
            if piece.is_last:
                document = piece.part.document
                domain = domains.setdefault(document.domain, len(domains))
                writer.end(document.name, document.domain, domain, tokenizer.end_id)
    for writer in writers:
        _refuse_short(writer)
    write_source_manifest(folder, records)
    splits = {writer.split: writer.totals() for writer in writers}
    notes = {"notes": [split.note]} if split.note else {}
    write_record(folder, settings, records, tokenizer, domains=list(domains), splits=splits, **notes)


def _training_pieces(split: Split, documents: Documents, records: Sequence[SourceRecord]) -> Iterator[str]:
    """Yield the training split in pieces, or evenly spread pieces of a large one."""
    every = -(-sum(record.bytes for record in records) // TRAINING_CHARACTERS)
    parts = (part for part in split.parts(documents()) if not part.held_out)
    pieces = (piece for part in parts for piece in cut_pieces(part.document.pieces, PIECE_CHARACTERS))
    return islice(pieces, 0, None, max(1, every))


class Piece(NamedTuple):
    """A piece of a part's text."""

    part: Part
    text: str
    is_last: bool


def _encoded(parts: Iterator[Part], tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    for group in _grouped(_pieces(parts, tokenizer)):
        yield from zip(group, tokenizer.encode_batch([each.text for each in group]), strict=True)


def _pieces(parts: Iterator[Part], tokenizer: Tokenizer) -> Iterator[Piece]:
    for part in parts:
        texts = cut_pieces(part.document.pieces, PIECE_CHARACTERS, tokenizer.cut)
        yield from (Piece(part, text, following is None) for text, following in pairwise(chain(texts, [None])) if text)


def _grouped(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _refuse_short(writer: SplitWriter) -> None:
    if writer.predicted <= 0:
        what = f"the {writer.split} split" if writer.split in SPLITS else "the text"
        rule = f"leave {what} without a token to predict: each of its documents is a single token"
        raise DataError("data.sources", rule, "give longer documents")
