"""What a launch and its workers agree on: exit codes, variables and file names. Imports no torch."""

from pathlib import Path

LAUNCH_VARIABLE = "DIST_MOE_LAUNCH"
"""Set by a launch for its workers: where its agents connect, or, below an agent, the process of the agent."""
USER_ERROR_CODE = 2
INTERRUPTED_CODE = 130
STOPPED_CODE = 75
"""Of a worker that stopped on request after it had saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""


def error_file(run_dir: Path, rank: int) -> Path:
    """Return the file in which a worker reports its error."""
    return run_dir / "errors" / f"rank-{rank}.txt"


def record_file(run_dir: Path, rank: int) -> Path:
    """Return the file in which a worker records its process and its state."""
    return run_dir / "workers" / f"rank-{rank}.json"
