"""Runs a program with the mpirun of this environment."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0


def mpirun(ranks: int, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on `ranks` ranks of this host, even if it has fewer cores."""
    command = [
        str(Path(sys.executable).parent / "mpirun"),
        *("--oversubscribe", "--bind-to", "none"),
        *("-n", str(ranks)),
        *(sys.executable, "-W", "ignore", *arguments),
    ]
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        **variables,
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
