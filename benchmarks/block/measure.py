"""Measures a case of the MoE block in a process of its own, whose allocator is set by its environment."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.cases import BlockCase
from benchmarks.environment import cores
from benchmarks.row import Row
from benchmarks.step.programs import KEPT_MEMORY, with_path

LIMIT_S = 900.0


def measure_block(case: BlockCase, rounds: int) -> list[Row]:
    """Measure a case; the last row is the limit, the bare grouped matmuls.

    Raises:
        RuntimeError: The process failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        asked, answer = Path(name) / "case.json", Path(name) / "rows.json"
        asked.write_text(json.dumps(asdict(case)))
        program = ("-W", "ignore", "-m", "benchmarks.block", str(asked), str(rounds), str(answer))
        argv = ("taskset", "-c", str(cores()[0]), sys.executable, *program)
        environment = with_path() | {"DS_ACCELERATOR": "cpu"} | (KEPT_MEMORY if case.allocator == "kept" else {})
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode != 0 or not answer.is_file():
            raise RuntimeError(f"{case.name} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-12:]))
        return [Row(**row) for row in json.loads(answer.read_text())]
