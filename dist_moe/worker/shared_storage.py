"""Operations on shared storage, tried again where it fails for a moment."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

TRANSIENT = {
    errno.ESTALE,
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
}
"""What NFS, Lustre and FUSE file systems give while a server restarts or a file handle is out of date."""
T = TypeVar("T")
LIMIT_S = 5.0
FIRST_PAUSE_S = 0.05
LARGEST_PAUSE_S = 0.5


def try_again(operation: Callable[[], T], limit_s: float = LIMIT_S) -> T:
    """Call an operation until it has no transient error, for at most `limit_s`; then its error is raised.

    Raises:
        OSError: The error of the operation.
    """
    deadline_s, pause_s = time.monotonic() + limit_s, FIRST_PAUSE_S
    while True:
        try:
            return operation()
        except OSError as error:
            if error.errno not in TRANSIENT or time.monotonic() >= deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LARGEST_PAUSE_S)
