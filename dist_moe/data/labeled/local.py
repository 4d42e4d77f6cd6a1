"""Labeled examples in local files: .jsonl, .csv, .tsv, and the folder of a GLUE task."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_moe.data.files import json_lines, local_files, readable
from dist_moe.data.labeled.example import NEEDED, Columns, Example, SplitName, find_columns
from dist_moe.errors import DataError
from dist_moe.text import listed
from dist_moe.untrusted import printable

LARGEST_CELL = 1 << 26
"""The most characters of a cell of a table."""
SUFFIXES = (".jsonl", ".csv", ".tsv")
GLUE_FILES: Mapping[str, SplitName] = {
    "train.tsv": "train",
    "dev.tsv": "validation",
    "dev_matched.tsv": "validation",  # of MNLI; dev_mismatched.tsv is of other genres
}
COLA_COLUMNS = ("source", "label", "mark", "sentence")  # the one file of GLUE without a header
UNLABELED = ("-", "")  # MNLI's pairs without a majority of the annotators


def is_glue_folder(path: Path) -> bool:
    """Whether a folder has the files of a GLUE task."""
    return (path / "train.tsv").is_file()


def labeled_files(pattern: str) -> list[tuple[str, Path]]:
    """Return (name, path) of the files that a path or glob matches, sorted by name. Raises DataError.

    The name is the path below the fixed folder of the pattern.
    """
    folder = Path(pattern)
    if is_glue_folder(folder):
        return [(name, folder / name) for name in GLUE_FILES if (folder / name).is_file()]
    return local_files(pattern, SUFFIXES, f"give files with the {NEEDED}")


def read_labeled_files(files: list[tuple[str, Path]], in_splits: bool) -> Iterator[Example]:
    """Yield the examples of `labeled_files`.

    Args:
        files: Names and paths.
        in_splits: Whether they are the files of a GLUE task, which has its own splits.

    Raises:
        DataError: With file:line, where an example cannot be read.
    """
    for name, path in files:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif in_splits:
            yield from _read_glue(path, GLUE_FILES[name])
        else:
            yield from _read_table(path)


def _read_jsonl(path: Path) -> Iterator[Example]:
    columns = None
    for where, row in json_lines(path, f"give the {NEEDED}"):
        if not isinstance(row, dict):
            raise DataError(where, "is not an object", f"give the {NEEDED}")
        found = find_columns(row.keys(), where)
        columns = columns or found
        if found != columns:
            rule = f"has {_fields(found)}, and the first line of the file {_fields(columns)}"
            raise DataError(where, rule, "give every line the same fields")
        yield columns.example(row, where)


def _fields(columns: Columns) -> str:
    """Name the fields of an example."""
    return listed([repr(name) for name in columns if name is not None], last="and")


def _read_table(path: Path) -> Iterator[Example]:
    """Yield the examples of a table with a header, its cells quoted where they need to be."""
    where = printable(str(path))
    csv.field_size_limit(LARGEST_CELL)  # of the module, whose own limit is shorter than some articles
    with readable(path), path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            columns = find_columns(reader.fieldnames or (), f"{where}:1")
            for row in reader:
                yield columns.example(row, f"{where}:{reader.line_num}")
        except (csv.Error, UnicodeDecodeError) as error:
            rule = f"cannot be read as a table in UTF-8 ({error})"
            raise DataError(
                f"{where}:{reader.line_num + 1}", rule, "write it again with a program for tables"
            ) from None


def _read_glue(path: Path, split: SplitName) -> Iterator[Example]:
    """Yield the examples of a file of a GLUE task: tabs alone separate, and a quotation mark is part of the text.

    Files of GLUE have a few lines with fewer columns than their header, which are passed over, as by its own readers.
    """
    where = printable(str(path))
    try:
        with readable(path):
            # Not as a text file, which would end a line at a carriage return inside a text, too.
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(where, f"is not UTF-8 ({error})", "convert the file to UTF-8") from None
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    is_cola = len(rows[0]) == len(COLA_COLUMNS) and rows[0][1] in ("0", "1")
    names = COLA_COLUMNS if is_cola else rows.pop(0)
    columns = find_columns(names, f"{where}:1")
    needed = {columns.text, columns.label, columns.text_pair or columns.text}
    for number, row in enumerate(rows, start=1 if is_cola else 2):
        cells = dict(zip(names, row, strict=False))
        if needed <= cells.keys() and cells[columns.label].strip() not in UNLABELED:
            yield columns.example(cells, f"{where}:{number}", split)
