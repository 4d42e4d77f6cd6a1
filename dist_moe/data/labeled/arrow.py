"""Labeled examples of a dataset that Hugging Face `datasets` saved to disk; only this file reads Arrow files of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_moe.config.checks.packages import ARROW_EXTRA
from dist_moe.data.labeled.example import LABEL_COLUMNS, TEXT_COLUMNS, Columns, Example, SplitName, find_columns
from dist_moe.errors import DataError, reason_of
from dist_moe.text import listed, shown
from dist_moe.untrusted import printable, read_json

SPLITS: dict[str, SplitName] = {
    "train": "train",
    "validation": "validation",
    "validation_matched": "validation",  # of MNLI
}
NO_LABEL = -1
COLUMNS = {"key", *LABEL_COLUMNS, *(name for names in TEXT_COLUMNS for name in names)}


def is_dataset_folder(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def arrow_files(folder: Path) -> list[tuple[str, Path]]:
    """Return (name below the folder, path) of the Arrow files of its splits, in their order. Raises DataError."""
    found = []
    for split in _splits(folder):
        part = folder / split if split else folder
        state = _read(part / "state.json")
        try:
            names = [str(each["filename"]) for each in state["_data_files"]]
        except (KeyError, TypeError):
            raise _unusable(part / "state.json", "names no data files") from None
        for name in names:
            if Path(name).name != name:
                raise _unusable(part / "state.json", f"names {shown(name)}, which is not a file of its folder")
            if not (part / name).is_file():
                raise _unusable(part / name, "does not exist")
            found.append((f"{split}/{name}" if split else name, part / name))
    return found


def read_arrow(folder: Path) -> Iterator[Example]:
    """Yield the examples of a dataset on disk. Raises DataError where pyarrow or a file cannot be used."""
    try:
        import pyarrow as pa
    except ImportError:
        remedy = f"install it: {ARROW_EXTRA}"
        raise DataError(f"data source {printable(str(folder))!r}", "needs the package pyarrow", remedy) from None
    for name, path in arrow_files(folder):
        try:
            yield from _read_file(pa, name, path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unusable(path, f"cannot be read ({reason_of(error)})") from None


def _read_file(pa: Any, name: str, path: Path) -> Iterator[Example]:
    split = SPLITS.get(name.partition("/")[0]) if "/" in name else None
    where, columns, names = printable(str(path)), None, []
    for number, row in enumerate(_rows(pa, path), start=1):
        if columns is None:
            columns = find_columns(row, where)
            names = _class_names(path.parent / "dataset_info.json", columns.label)
        if (example := _example(row, columns, names, f"{where}: row {number}", split)) is not None:
            yield example


def _rows(pa: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stream of record batches, with the columns that an example may need; pa: pyarrow."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        wanted = [name for name in batches.schema.names if name in COLUMNS]
        for batch in batches:
            yield from batch.select(wanted).to_pylist()


def _example(
    row: dict[str, Any], columns: Columns, names: list[str], where: str, split: SplitName | None
) -> Example | None:
    label = row[columns.label]
    if type(label) is int and label == NO_LABEL:
        return None
    if names and type(label) is int:
        if not 0 <= label < len(names):
            rule = f"has the label {label}, and its dataset_info.json {len(names)} names"
            raise DataError(where, rule, "save the dataset again")
        row = {**row, columns.label: names[label]}
    return columns.example(row, where, split)


def _splits(folder: Path) -> list[str]:
    """Return the splits to read; one without a name for a single dataset."""
    if not (folder / "dataset_dict.json").is_file():
        return [""]
    listed_splits = _read(folder / "dataset_dict.json").get("splits")
    present = [split for split in SPLITS if isinstance(listed_splits, list) and split in listed_splits]
    if "train" not in present:
        raise _unusable(folder / "dataset_dict.json", f"names no split `train` ({listed(SPLITS)} are read)")
    return present


def _class_names(path: Path, label: str) -> list[str]:
    """Return the names of a dataset's classes; none where the column of the labels is no ClassLabel."""
    if not path.is_file():
        return []
    features = _read(path).get("features")
    column = features.get(label) if isinstance(features, dict) else None
    if isinstance(column, dict) and column.get("_type") == "ClassLabel" and isinstance(column.get("names"), list):
        return [str(name) for name in column["names"]]
    return []


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, follow=True)
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be read ({reason_of(error)})") from None


def _unusable(path: Path, rule: str) -> DataError:
    return DataError(printable(str(path)), rule, "give a folder that `save_to_disk` of Hugging Face datasets wrote")
