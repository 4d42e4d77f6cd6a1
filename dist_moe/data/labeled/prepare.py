"""Tokenizes labeled examples into memory-mapped files, once for all processes, and opens them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from dist_moe.config.sections.task import TaskConfig
from dist_moe.data.corpus import SPLITS
from dist_moe.data.labeled.example import Example, sorted_labels
from dist_moe.data.labeled.join import join, special_tokens
from dist_moe.data.labeled.sources import fetch_labeled, labeled_source_files, read_labeled
from dist_moe.data.load_tokenizer import load_tokenizer
from dist_moe.data.mmap_files import MmapFile
from dist_moe.data.source_manifest import write_source_manifest
from dist_moe.data.sources import SourceRecord
from dist_moe.data.split import SALT, in_validation
from dist_moe.data.token_folder import (
    Settings,
    made_once,
    make_tokenizer,
    read_record,
    sources_of,
    token_dtype,
    tokenizer_settings,
    write_record,
)
from dist_moe.data.tokenizer import Tokenizer
from dist_moe.errors import DataError
from dist_moe.text import counted, listed

# Part of the fingerprint: increase it when the files, or how they are made, change.
FORMAT = 4
KINDS = {"starts": "int64", "pair_starts": "int64", "labels": "float64"}


@dataclass(frozen=True)
class Examples:
    """The N examples of one split, as arrays mapped from files.

    Attributes:
        tokens: uint16 or uint32 [tokens], of all examples in the order of their sources.
        starts_N1: int64 [N + 1]; example i is tokens[starts[i]:starts[i+1]].
        pair_starts_N: int64 [N], where its second text begins, counted from its own start.
        labels_N: float64 [N], the index of its class, or its value.
        end_id: The id of the end token.
    """

    tokens: np.ndarray
    starts_N1: np.ndarray
    pair_starts_N: np.ndarray
    labels_N: np.ndarray
    end_id: int

    @property
    def count(self) -> int:
        """The number of examples (N)."""
        return len(self.labels_N)


@dataclass(frozen=True)
class LabeledData:
    """The tokenizer, and the tokens and labels of both splits.

    Attributes:
        tokenizer: What the tokens were made with.
        train: The split for training; all examples where they are not divided.
        validation: The split for validation; all examples where they are not divided.
        labels: The names of the classes, by index; none for a regression.
        records: The sources, as they were when they were read.
        fingerprint: Equal fingerprints mean equal tokens and labels.
        folder: Where the files are.
        files: The mapped files of both splits.
        notes: What the user should know about the examples.
    """

    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    labels: tuple[str, ...]
    records: tuple[SourceRecord, ...]
    fingerprint: str
    folder: Path
    files: tuple[MmapFile, ...] = ()
    notes: tuple[str, ...] = ()


def prepare_labeled(
    sources: Sequence[str],
    task: TaskConfig,
    tokenizer: Literal["bytes", "bpe", "pretrained"],
    vocabulary: int,
    length: int,
    validation_fraction: float | None,
    cache: Path,
    pretrained: Path | None = None,
) -> LabeledData:
    """Fetch, split and tokenize labeled examples, or only open them where the cache has them already.

    Several processes may call this concurrently: one does the work, the others wait.

    Args:
        sources: Names of sources, or paths and globs of local files.
        task: Its kind, and the names of the classes, if they are given.
        tokenizer: Which tokenizer; bpe is trained on the training split.
        vocabulary: Tokens of the bpe vocabulary; for pretrained, the most that its tokenizer may have.
        length: The most tokens of an example.
        validation_fraction: Of the examples of sources that have no splits; None: nothing is divided.
        cache: The folder for fetched sources and tokens.
        pretrained: The folder of the pretrained tokenizer.

    Raises:
        DataError: A source or the tokenizer cannot be used, a label is unknown, or a split would be empty.
    """
    records = fetch_labeled(sources, cache)
    settings: Settings = {
        "labeled_format": FORMAT,
        "task": task.kind,
        "labels": task.labels,
        "sources": [[record.name, record.version, record.sha256] for record in records],
        "tokenizers": tokenizers.__version__,
        "length": length,
        "validation_fraction": validation_fraction,
        "salt": SALT,
    }
    given, of_tokenizer = tokenizer_settings(tokenizer, vocabulary, pretrained, byte_level=False)
    write = partial(_write, records=records, task=task, cache=cache, given=given)
    return _open(made_once(cache, settings | of_tokenizer, write))


def _open(folder: Path) -> LabeledData:
    record = read_record(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", byte_level=False)
    files: list[MmapFile] = []

    def map_array(split: str, kind: str, dtype: str) -> np.ndarray:
        files.append(MmapFile(folder / f"{split}.{kind}"))
        return files[-1].array(dtype)

    def open_split(split: str) -> Examples:
        starts_N1, pair_starts_N, labels_N = (map_array(split, kind, dtype) for kind, dtype in KINDS.items())
        return Examples(
            map_array(split, "tokens", record["dtype"]), starts_N1, pair_starts_N, labels_N, tokenizer.end_id
        )

    splits = [open_split(split) for split in record["splits"]]
    return LabeledData(
        tokenizer,
        splits[0],
        splits[-1],
        tuple(record["labels"]),
        sources_of(record),
        record["settings"]["fingerprint"],
        folder,
        tuple(files),
        tuple(record["notes"]),
    )


def _write(
    folder: Path,
    settings: Settings,
    records: Sequence[SourceRecord],
    task: TaskConfig,
    cache: Path,
    given: Tokenizer | None,
) -> None:
    """Write the files of the examples and, last, their record."""
    fraction = settings["validation_fraction"]
    examples = [example for record in records for example in read_labeled(record.name, cache)]
    splits = divide(examples, fraction)
    labels = class_names(splits, task)
    tokenizer = make_tokenizer(settings, given, partial(_texts, next(iter(splits.values()))))
    tokenizer.save(folder / "tokenizer")
    length = settings["length"]
    if length <= (least := special_tokens(tokenizer, any(each.text_pair is not None for each in examples))):
        rule = f"has no room for a text in addition to the {counted(least, 'special token')} of a row"
        raise DataError(f"data.sequence_length={length}", rule, f"give {least + 1} or more")
    totals = {
        split: _write_split(folder, split, part, label_values(part, labels, task), tokenizer, length)
        for split, part in splits.items()
    }
    write_source_manifest(folder, records, labeled_source_files)
    notes = [note for split, total in totals.items() if (note := _cut_note(split, total, length))]
    if fraction is not None and all(each.split for each in examples):
        notes.append(OWN_SPLITS)
    write_record(folder, settings, records, tokenizer, labels=labels, splits=totals, notes=notes)


OWN_SPLITS = "the validation split is that of the sources; data.validation_fraction does not apply"


def divide(examples: Sequence[Example], fraction: float | None) -> dict[str, list[Example]]:
    """Return the examples of each split: those of their source where it has both, else by a hash of their keys.

    What is held out is ordered by another hash, of key and texts, so that its first part, which a run may evaluate
    alone, is of all classes and keys also where a source is sorted.

    Raises:
        DataError: A split is empty, or there is no example.
    """
    if not examples:
        raise DataError("data.sources", "have no example", "give files with examples")
    if fraction is None:
        return {"all": sorted(examples, key=place_of)}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for each in examples:
        held_out = each.split == "validation" if each.split else in_validation(each.key, fraction)
        splits[SPLITS[held_out]].append(each)
    if empty := [split for split, part in splits.items() if not part]:
        rule = f"leaves the {empty[0]} split without an example, of {len(examples):,}"
        raise DataError(f"data.validation_fraction={fraction}", rule, "give another fraction, or more examples")
    return {**splits, SPLITS[1]: sorted(splits[SPLITS[1]], key=place_of)}


def place_of(example: Example) -> bytes:
    """Return what held-out examples are sorted by."""
    parts = ("order", example.key, example.text, example.text_pair or "")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()


def class_names(splits: dict[str, list[Example]], task: TaskConfig) -> list[str]:
    """Return the names of the classes by index: those of `task.labels`, or else of the examples; none for a regression.

    Raises:
        DataError: There is a single class, an example has another label, or a class is not in the training split.
    """
    if task.kind == "regression":
        return []
    found = {each.label for part in splits.values() for each in part}
    labels = list(task.labels or sorted_labels(found))
    if unknown := sorted(found - set(labels)):
        rule = f"does not have the label {listed(map(repr, unknown), last='and', most=3)} of an example"
        raise DataError(f"task.labels={labels}", rule, "add it, or leave task.labels out")
    if len(labels) < 2:
        rule = f"have one label for all examples, {labels[0]!r}"
        raise DataError("data.sources", rule, "give examples of two classes or more")
    trained = {each.label for each in splits.get(SPLITS[0], ())}
    # Without a split for training the examples are those of an evaluation, which may lack a class of the model.
    if SPLITS[0] in splits and (missing := [label for label in labels if label not in trained]):
        rule = f"has no training example of {listed(map(repr, missing), last='and', most=3)}"
        raise DataError("data.sources", rule, "give examples of each class, or leave it out of task.labels")
    return labels


def label_values(examples: Sequence[Example], labels: Sequence[str], task: TaskConfig) -> np.ndarray:
    """Return the index of each example's class, or its value, as float64 [N]. Raises DataError."""
    if task.kind == "classification":
        index = {label: number for number, label in enumerate(labels)}
        return np.array([index[each.label] for each in examples], dtype=np.float64)
    values = np.empty(len(examples), dtype=np.float64)
    for number, each in enumerate(examples):
        try:
            values[number] = float(each.label)
        except ValueError:
            values[number] = np.nan
        if not np.isfinite(values[number]):
            rule = f"has the label {each.label!r} (of {each.text[:40]!r}), which is not a finite number"
            raise DataError("data.sources", rule, "set task.kind=classification, or give numbers")
    return values


def _write_split(
    folder: Path,
    split: str,
    examples: Sequence[Example],
    labels_N: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
) -> dict[str, int]:
    """Write the arrays of a split and the list of its examples; return its totals."""
    dtype, starts, pair_starts, cut = token_dtype(tokenizer), [0], [], 0
    with (folder / f"{split}.tokens").open("xb") as tokens, (folder / f"{split}.documents.jsonl").open("xb") as lines:
        for example, joined in zip(examples, join(examples, tokenizer, length), strict=True):
            tokens.write(joined.ids.astype(dtype).tobytes())
            starts.append(starts[-1] + len(joined.ids))
            pair_starts.append(joined.pair_start)
            cut += joined.is_cut
            lines.write(json.dumps({"name": example.key, "label": example.label}).encode() + b"\n")
    arrays = {"starts": starts, "pair_starts": pair_starts, "labels": labels_N}
    for kind, values in arrays.items():
        with (folder / f"{split}.{kind}").open("xb") as file:
            file.write(np.asarray(values, dtype=KINDS[kind]).tobytes())
    return {"examples": len(examples), "tokens": starts[-1], "cut": cut}


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    for each in examples:
        yield each.text
        if each.text_pair is not None:
            yield each.text_pair


def _cut_note(split: str, total: dict[str, int], length: int) -> str:
    if not total["cut"]:
        return ""
    share = 100 * total["cut"] / total["examples"]
    return (
        f"{total['cut']:,} of {total['examples']:,} {split} examples ({share:.1f} %) are longer than "
        f"data.sequence_length={length} and cut to it"
    )
