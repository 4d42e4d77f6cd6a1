"""A temporary folder that leaves nothing behind."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents for the block, and remove what was made afterwards.

    Parents that other processes have put files into are kept.
    """
    created = [path for path in folder.parents if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
