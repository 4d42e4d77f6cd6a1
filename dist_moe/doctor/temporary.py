"""The folder that the doctor works in, of which nothing is left."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[None]:
    """A folder for the block, and those around it; afterwards those that were not there are gone, unless in use."""
    made = [path for path in folder.parents if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
