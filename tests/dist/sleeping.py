"""A process that sleeps; called with a path, it starts a loaded one that does, and writes down its id."""

import os
import sys
import time
from pathlib import Path

from tests.dist.loaded import LoadedProcess

if __name__ == "__main__":
    if len(sys.argv) > 1:
        process = LoadedProcess([sys.executable, "-m", "tests.dist.sleeping"], os.environ)
        partial = Path(sys.argv[1]).with_suffix(".partial")
        partial.write_text(str(process.pid))
        partial.rename(sys.argv[1])
    time.sleep(600)
