"""Settings of the Python interpreter."""

import contextlib
import gc
import sys
from collections.abc import Iterator


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
