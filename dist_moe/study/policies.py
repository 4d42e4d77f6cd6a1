"""The study of policies: the same model trained under every balancing policy with the same seeds.

Each run is `dist-moe train` in a separate process with one worker and one thread; several run concurrently. Completed
runs are not repeated, so an interrupted study resumes.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dist_moe.config import load_config, resolve
from dist_moe.errors import UserError, needs_folder
from dist_moe.files import open_no_link
from dist_moe.study.tables import format_mean
from dist_moe.text import counted

POLL_S = 0.5
SOFTMAX = ("router.score=softmax",)
THRESHOLD = (*SOFTMAX, "router.selection=threshold", "router.threshold=0.4")


@dataclass(frozen=True)
class PolicyVariant:
    """A policy and its routing.

    Attributes:
        name: In tables and figures.
        overrides: Changes to the configuration of the study.
    """

    name: str
    overrides: tuple[str, ...]


VARIANTS = (
    PolicyVariant("none", ("balance.policy=none",)),
    PolicyVariant(
        "auxiliary, micro-batch",
        ("balance.policy=auxiliary", "balance.auxiliary_loss=0.01", "balance.auxiliary_scope=micro_batch"),
    ),
    PolicyVariant(
        "auxiliary, global batch",
        ("balance.policy=auxiliary", "balance.auxiliary_loss=0.01", "balance.auxiliary_scope=global_batch"),
    ),
    PolicyVariant("loss-free, sign", ()),
    PolicyVariant("loss-free, proportional, softmax", (*SOFTMAX, "balance.rule=proportional", "balance.rate=0.05")),
    PolicyVariant("loss-free, shares", ("balance.shares={0: 0.2, 1: 0.2}",)),
    PolicyVariant("momentum", ("balance.policy=momentum",)),
    PolicyVariant("quantile", ("balance.policy=quantile",)),
    PolicyVariant("EMA quantile", ("balance.policy=ema_quantile",)),
    PolicyVariant("expert thresholds", ("router.selection=expert_threshold", "balance.policy=expert_threshold")),
    PolicyVariant("orthogonality", ("balance.policy=none", "balance.orthogonality_loss=0.1")),
    PolicyVariant("threshold", (*THRESHOLD, "balance.policy=none")),
    PolicyVariant("threshold + adaptive weights", (*THRESHOLD, "balance.policy=adaptive_weight", "balance.rate=0.3")),
)


@dataclass(frozen=True)
class Result:
    """The results of one run, from its metrics.jsonl. The load is that of the whole held-out text.

    Attributes:
        variant: Name of the policy.
        seed: Of the run.
        validation_loss: Nats per token.
        max_vio: MaxVio_global, mean over layers.
        max_vio_worst: Of the worst layer.
        max_vio_floor: Expected value under uniform random routing.
        deviation_percent: Standard deviation of the experts' shares, mean over layers.
        deviation_percent_worst: Of the worst layer.
        deviation_percent_floor: Expected value under uniform random routing.
        experts_per_token: Mean over tokens and layers.
        tokens_per_s: Of the logged steps after the first.
        commit: Of the code that made the run; None outside of a git repository.
    """

    variant: str
    seed: int
    validation_loss: float
    max_vio: float
    max_vio_worst: float
    max_vio_floor: float
    deviation_percent: float
    deviation_percent_worst: float
    deviation_percent_floor: float
    experts_per_token: float
    tokens_per_s: float
    commit: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run: its folder, its command line, and its resolved configuration."""

    variant: PolicyVariant
    seed: int
    folder: Path
    argv: tuple[str, ...]
    config: dict[str, Any]


def plan_runs(config: Path, out: Path, seeds: int, overrides: Sequence[str]) -> list[Run]:
    """Plan every policy with every seed, seed by seed.

    Raises:
        ConfigError: One of the configurations is invalid.
    """
    runs = []
    for seed in range(seeds):
        for variant in VARIANTS:
            folder = out / variant.name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            changes = [
                *variant.overrides,
                *overrides,
                f"run.seed={seed}",
                f"run.dir={folder}",
                "run.threads=1",
                "checkpoint.resume=never",
                "observe.tensorboard=false",
            ]
            resolved = resolve(load_config(config, changes), workers=1).config.model_dump(mode="json")
            argv = (sys.executable, "-m", "dist_moe", "train", str(config), *changes)
            runs.append(Run(variant, seed, folder, argv, resolved))
    return runs


def train_all(runs: Sequence[Run], jobs: int, log: Callable[[str], None]) -> list[Result]:
    """Train the runs that are not complete.

    Args:
        runs: To train.
        jobs: Concurrent processes.
        log: Receives a line for each completed run.

    Returns:
        The results in the order of `runs`.

    Raises:
        UserError: A run failed; the message has the end of its output. The others are terminated, as on Ctrl-C.
    """
    waiting = [run for run in runs if read_result(run) is None]
    log(f"{counted(len(runs), 'run')}, {len(runs) - len(waiting)} of them already complete")
    active: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active[_start(run)] = (run, time.monotonic())
            time.sleep(POLL_S)
            for process in [process for process in active if process.poll() is not None]:
                run, began_s = active.pop(process)
                log(f"{_result_line(run, process.returncode)} ({time.monotonic() - began_s:.0f} s)")
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
    return list(_results(runs))


def _start(run: Run) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        with needs_folder(run.folder, "--out"):
            run.folder.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(open(run.folder / "output.txt", "wb", opener=open_no_link))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(run.argv, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _result_line(run: Run, code: int) -> str:
    result = read_result(run)
    if code != 0 or result is None:
        output = (run.folder / "output.txt").read_text(errors="replace")[-2000:]
        name = f"{run.variant.name}, seed {run.seed}"
        raise UserError(f"{name} ended with exit code {code}; the end of its output:\n{output}")
    return (
        f"{run.variant.name}, seed {run.seed}: loss {result.validation_loss:.4f}, "
        f"MaxVio_global {result.max_vio:.3f}, {result.experts_per_token:.2f} experts per token"
    )


def _results(runs: Sequence[Run]) -> Iterator[Result]:
    for run in runs:
        result = read_result(run)
        if result is None:
            raise RuntimeError(f"{run.folder} has no result any more; run the study again")
        yield result


def read_result(run: Run) -> Result | None:
    """Read the result of a run that is complete, with the same command line and configuration; None otherwise."""
    metrics, description_file = run.folder / "metrics.jsonl", run.folder / "run.json"
    if not metrics.is_file() or not description_file.is_file():
        return None
    description = json.loads(description_file.read_text())
    if tuple(description["argv"][1:]) != run.argv[3:] or description["config"] != run.config:
        return None
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step" and line["step"] > 1]
    validations = [line for line in lines if line["event"] == "validation"]
    return _result(run, description["source"], validations[-1], steps) if validations and steps else None


def _result(run: Run, source: dict[str, Any], validation: dict[str, Any], steps: list[dict[str, Any]]) -> Result:
    return Result(
        variant=run.variant.name,
        seed=run.seed,
        validation_loss=math.nan if validation["validation_loss"] is None else validation["validation_loss"],
        max_vio=validation["max_vio_global"],
        max_vio_worst=max(validation["max_vio_global_per_layer"]),
        max_vio_floor=validation["max_vio_global_floor"],
        deviation_percent=validation["load_deviation_percent"],
        deviation_percent_worst=max(validation["load_deviation_percent_per_layer"]),
        deviation_percent_floor=validation["load_deviation_percent_floor"],
        experts_per_token=validation["experts_per_token"],
        tokens_per_s=1 / fmean(1 / line["tokens_per_s"] for line in steps),
        commit=source["commit"],
    )


HEADINGS = (
    "policy",
    "loss",
    "MaxVio",
    "worst",
    "floor",
    "deviation %",
    "worst",
    "floor",
    "experts per token",
    "tokens/s",
)


def table_rows(results: Sequence[Result]) -> list[list[str]]:
    """Build one row per policy with the columns of `HEADINGS`: means over seeds, and after ± their standard deviation.

    The loss is in nats per token; MaxVio_global and load deviation are given as the mean over layers, of the worst
    layer, and as the floor.
    """
    names = dict.fromkeys(result.variant for result in results)
    return [[name, *_cells([result for result in results if result.variant == name])] for name in names]


def _cells(results: Sequence[Result]) -> list[str]:
    digits = {
        "validation_loss": 4,
        "max_vio": 3,
        "max_vio_worst": 3,
        "max_vio_floor": 3,
        "deviation_percent": 2,
        "deviation_percent_worst": 2,
        "deviation_percent_floor": 2,
        "experts_per_token": 2,
        "tokens_per_s": 0,
    }
    return [format_mean([getattr(result, name) for result in results], count) for name, count in digits.items()]


def ratio_by_seed(results: Sequence[Result], field: str, numerator: str, denominator: str) -> tuple[float, float]:
    """Divide a result of one policy by that of another, seed by seed -> (mean, smallest)."""
    by_seed = {(result.variant, result.seed): float(getattr(result, field)) for result in results}
    seeds = sorted({result.seed for result in results})
    ratios = [by_seed[numerator, seed] / by_seed[denominator, seed] for seed in seeds]
    return fmean(ratios), min(ratios)
