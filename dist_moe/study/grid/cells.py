"""Trains the cells of a study, one after the other, through `dist-moe launch`."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from types import FrameType
from typing import Any, NamedTuple

import dist_moe
from dist_moe.config.yaml_io import render
from dist_moe.errors import UserError, needs_folder
from dist_moe.files import open_no_link, write_atomically
from dist_moe.observe.record import host, source_state, versions
from dist_moe.study.grid.plan import Cell
from dist_moe.study.grid.store import CellResult
from dist_moe.text import plain_text
from dist_moe.untrusted import parse_json, read_text

CURVES = (
    "loss",
    "max_vio",
    "max_vio_floor",
    "max_vio_computation",
    "max_vio_computation_floor",
    "load_deviation_percent",
    "load_deviation_percent_floor",
    "load_cov",
    "dead_experts",
    "rank_load",
    "experts_per_token",
    "threshold",
)
LISTS = ("load", "experts_per_token_histogram", "correct_examples")
"""What is kept of the last evaluation in addition to its numbers: load, values of each layer, what was right."""
VERSIONS = ("python", "torch", "deepspeed", "transformers")
LARGEST_METRICS = 1 << 30
CURVE_DIGITS = 5
# A launch lets its workers finish a step and save a checkpoint.
END_S = 120.0
PACKAGE = Path(dist_moe.__file__).parent
Analysis = Callable[[Path], dict[str, Any]]


def run_cell(cell: Cell, runs: Path, analyze: Analysis | None = None) -> CellResult:
    """Train one cell and measure it. Its folder keeps everything but the checkpoints.

    Args:
        cell: To train.
        runs: The folder for runs.
        analyze: Called with the folder of the run, for `CellResult.loads`.

    Raises:
        UserError: The run failed; the message has the end of its output.
    """
    folder = cell.folder(runs)
    with needs_folder(folder, "--runs"):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        config = folder / "study.yaml"
        run = {**cell.settings["run"], "dir": str(folder / "run")}
        write_atomically(config, render({**cell.settings, "run": run}))
    # Before the run, during which there may be other commits; results are in the repository, and not in the package.
    source = source_state(Path(__file__), PACKAGE)
    began_s = time.monotonic()
    _launch(cell, config, folder / "output.txt")
    wall_s = time.monotonic() - began_s
    values, curves, evaluation = read_measures(folder / "run" / "metrics.jsonl")
    loads = analyze(folder / "run") if analyze is not None else {}
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    commit, changed = source["commit"], source["dirty"]
    return CellResult(
        *(cell.case, cell.arm, cell.seed, cell.digest),
        values={**values, "wall_s": round(wall_s, 1)},
        curves=curves,
        loads={**loads, "evaluation": evaluation},
        commit=commit if isinstance(commit, str) else None,
        changed=changed if isinstance(changed, bool) else None,
        made=_made(),
    )


def _made() -> dict[str, Any]:
    known = versions()
    machine = host()
    return {
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "processor": machine["cpu"],
        "cores": machine["cores"],
        "accelerators": machine["accelerators"],
        **{name: known[name] for name in VERSIONS},
    }


def _launch(cell: Cell, config: Path, output: Path) -> None:
    argv = [sys.executable, "-m", "dist_moe", "launch", str(config), "--workers", str(cell.workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        with needs_folder(output, "--runs", "file"):
            written = stack.enter_context(open(output, "wb", opener=open_no_link))
        # In this process group, so that Ctrl-C reaches the launch, which then ends its workers.
        process = subprocess.Popen(argv, stdout=written, stderr=subprocess.STDOUT, env=environment)
        stack.enter_context(exit_on_sigterm())
        try:
            code = process.wait(timeout=cell.time_limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code != 0:
        ended = f"ended with exit code {code}" if code is not None else f"took more than {cell.time_limit_s:.0f} s"
        text = plain_text(output.read_text(encoding="utf-8", errors="replace")[-2000:])
        raise UserError(f"{cell.name} {ended}; correct the cause and start the study again; its output ends:\n{text}")


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that `finally` blocks run. Call it from the main thread."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Measures(NamedTuple):
    """What is kept of the metrics.jsonl of a run: `CellResult.values`, `.curves`, and lists of its last evaluation."""

    values: dict[str, float | None]
    curves: dict[str, list[float | None]]
    evaluation: dict[str, Any]


def read_measures(metrics: Path) -> Measures:
    """Read the measures of a finished run from its metrics.jsonl.

    Raises:
        UserError: The file has no step or no evaluation.
    """
    text = read_text(metrics, follow=True, largest=LARGEST_METRICS)
    records = [parse_json(line) for line in text.splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    evaluations = [record for record in records if record["event"] == "validation"]
    if not steps or not evaluations:
        raise UserError(f"{metrics} has {len(steps)} steps and {len(evaluations)} evaluations; a study needs both")
    values = scalars(evaluations[-1])
    later = [record for record in steps if record["step"] > 1] or steps
    values["step_ms"] = round(median(record["step_ms"] for record in later), 2)
    for name in ("max_vio", "max_vio_floor", "max_vio_computation", "max_vio_computation_floor"):
        second_half = [record[name] for record in steps[len(steps) // 2 :] if record.get(name) is not None]
        values[f"train_{name}"] = _rounded(fmean(second_half)) if second_half else None
    values["train_experts_per_token"] = _rounded(fmean(record["experts_per_token"] for record in steps))
    curves = {
        name: [_rounded(record.get(name), CURVE_DIGITS) for record in steps]
        for name in ("step", *CURVES)
        if name in steps[0]
    }
    if len(evaluations) > 1:
        for name in ("step", "validation_loss", "accuracy"):
            if name in evaluations[0]:
                curves[f"evaluation_{name}"] = [_rounded(record[name]) for record in evaluations]
    kept = (name for name in evaluations[-1] if name in LISTS or name.endswith("_per_layer"))
    return Measures(values, curves, {name: _finite(evaluations[-1][name]) for name in kept})


def scalars(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of the record of an evaluation, and the largest of the layers where it has one per layer."""
    values: dict[str, float | None] = {}
    for name, value in evaluation.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = _rounded(value)
        elif value is None:
            values[name] = None
        elif name.endswith("_per_layer") and value:
            values[f"{name.removesuffix('_per_layer')}_worst"] = _rounded(max(value))
    return values


def _rounded(value: float | None, digits: int = 7) -> float | None:
    """Round to significant digits, which keeps the file of results small; None for what JSON cannot express."""
    if value is None or not math.isfinite(value):
        return None
    return json.loads(f"{value:.{digits}g}")


def _finite(value: Any) -> Any:
    """Round the floats of a list, and replace those that JSON cannot express."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return _rounded(value) if isinstance(value, float) else value
