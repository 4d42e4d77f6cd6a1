"""Settings of the Python interpreter, which make a start faster."""

import contextlib
import gc
import sys
from collections.abc import Iterator

UNUSED_PACKAGES = ("scipy", "sklearn")
"""What transformers imports where it is installed, for object detection and assisted generation alone."""


def hide_unused_packages() -> None:
    """Make `UNUSED_PACKAGES` impossible to import in this process, unless it has imported them.

    They would take a sixth of the start of a worker.
    """
    for name in UNUSED_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: it cannot be imported


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import torch and what needs it without garbage collections, which take a fifth of that time and find nothing.

    The objects that exist at the end of the block live as long as the process, and are exempt from later collections.
    If torch has been imported before, or an outer block does the same, nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
