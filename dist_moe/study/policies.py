"""The study of policies: one model trained under every balancing policy, with the same seeds, and compared.

Each run is `dist-moe train` in a process of its own, a world of one with one thread; several run side by side. A run
that has ended is not made again, so an interrupted study goes on where it was.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dist_moe.config import load_config, resolve
from dist_moe.errors import UserError

POLL_S = 0.5
SOFTMAX = ("router.score=softmax",)
THRESHOLD = (*SOFTMAX, "router.selection=threshold", "router.threshold=0.4")


@dataclass(frozen=True)
class Contender:
    """A way to route and balance; overrides: what it changes in the configuration of the study."""

    name: str
    overrides: tuple[str, ...]


CONTENDERS = (
    Contender("none", ("balance.policy=none",)),
    Contender(
        "auxiliary, micro-batch",
        ("balance.policy=auxiliary", "balance.auxiliary_loss=0.01", "balance.auxiliary_scope=micro_batch"),
    ),
    Contender(
        "auxiliary, global batch",
        ("balance.policy=auxiliary", "balance.auxiliary_loss=0.01", "balance.auxiliary_scope=global_batch"),
    ),
    Contender("loss-free, sign", ()),
    Contender("loss-free, proportional, softmax", (*SOFTMAX, "balance.rule=proportional", "balance.rate=0.05")),
    Contender("quantile", ("balance.policy=quantile",)),
    Contender("threshold", (*THRESHOLD, "balance.policy=none")),
    Contender("threshold + adaptive weights", (*THRESHOLD, "balance.policy=adaptive_weight", "balance.rate=0.3")),
)


@dataclass(frozen=True)
class Result:
    """What one run ended with, from its metrics.jsonl; load figures are of the whole held-out text.

    validation_loss: nats per token. max_vio, deviation_percent: mean over layers, then that of the worst layer, then
    the floor. experts_per_token: mean over tokens and layers. tokens_per_s: of the logged steps after the first.
    commit: of the code that made the run; None outside a git repository.
    """

    contender: str
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
    """One training: its folder, its command line, and the whole configuration that this gives."""

    contender: Contender
    seed: int
    folder: Path
    argv: tuple[str, ...]
    config: dict[str, Any]


def plan_runs(config: Path, out: Path, seeds: int, overrides: Sequence[str]) -> list[Run]:
    """Every contender with every seed, seed by seed. ConfigError where one of the configurations cannot be run."""
    runs = []
    for seed in range(seeds):
        for contender in CONTENDERS:
            folder = out / contender.name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
            changes = [
                *contender.overrides,
                *overrides,
                f"run.seed={seed}",
                f"run.dir={folder}",
                "run.threads=1",
                "checkpoint.resume=never",
                "observe.tensorboard=false",
            ]
            resolved = resolve(load_config(config, changes), workers=1).config.model_dump(mode="json")
            argv = (sys.executable, "-m", "dist_moe", "train", str(config), *changes)
            runs.append(Run(contender, seed, folder, argv, resolved))
    return runs


def train_all(runs: Sequence[Run], jobs: int, tell: Callable[[str], None]) -> list[Result]:
    """Train what has not been trained yet, `jobs` at a time -> the results in the order of `runs`.

    UserError with the end of its output where a run fails; the others are ended then, as on Ctrl-C.
    """
    waiting = [run for run in runs if read_result(run) is None]
    tell(f"{len(runs)} runs, {len(runs) - len(waiting)} of them are there already")
    going: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.pop(0)
                going[_start(run)] = (run, time.monotonic())
            time.sleep(POLL_S)
            for process in [process for process in going if process.poll() is not None]:
                run, began_s = going.pop(process)
                tell(f"{_ended(run, process.returncode)} ({time.monotonic() - began_s:.0f} s)")
    finally:
        for process in going:
            process.terminate()
        for process in going:
            process.wait()
    return list(_results(runs))


def _start(run: Run) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "output.txt").open("wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(run.argv, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _ended(run: Run, code: int) -> str:
    result = read_result(run)
    if code != 0 or result is None:
        end = (run.folder / "output.txt").read_text(errors="replace")[-2000:]
        raise UserError(f"{run.contender.name}, seed {run.seed} ended with exit code {code}; its output ends:\n{end}")
    return (
        f"{run.contender.name}, seed {run.seed}: loss {result.validation_loss:.4f}, "
        f"MaxVio_global {result.max_vio:.3f}, {result.experts_per_token:.2f} experts a token"
    )


def _results(runs: Sequence[Run]) -> Iterator[Result]:
    for run in runs:
        result = read_result(run)
        if result is None:
            raise RuntimeError(f"{run.folder} has no result; another program may have changed it")
        yield result


def read_result(run: Run) -> Result | None:
    """The result of a run that has ended with this very command line and configuration; None otherwise."""
    metrics, described = run.folder / "metrics.jsonl", run.folder / "run.json"
    if not metrics.is_file() or not described.is_file():
        return None
    description = json.loads(described.read_text())
    if tuple(description["argv"][1:]) != run.argv[3:] or description["config"] != run.config:
        return None
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step" and line["step"] > 1]
    ends = [line for line in lines if line["event"] == "validation"]
    return _result(run, description["source"], ends[-1], steps) if ends and steps else None


def _result(run: Run, source: dict[str, Any], end: dict[str, Any], steps: list[dict[str, Any]]) -> Result:
    speeds = [1 / line["tokens_per_s"] for line in steps]
    return Result(
        contender=run.contender.name,
        seed=run.seed,
        validation_loss=math.nan if end["validation_loss"] is None else end["validation_loss"],
        max_vio=end["max_vio_global"],
        max_vio_worst=max(end["max_vio_global_per_layer"]),
        max_vio_floor=end["max_vio_global_floor"],
        deviation_percent=end["load_deviation_percent"],
        deviation_percent_worst=max(end["load_deviation_percent_per_layer"]),
        deviation_percent_floor=end["load_deviation_percent_floor"],
        experts_per_token=end["experts_per_token"],
        tokens_per_s=1 / fmean(speeds),
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
    "experts a token",
    "tokens/s",
)


def rows(results: Sequence[Result]) -> list[list[str]]:
    """One row for each contender, as `HEADINGS` says: the mean over seeds, and after ± their standard deviation.

    Loss in nats a token, MaxVio_global and load deviation as the mean over layers, of the worst layer, and by chance.
    """
    names = dict.fromkeys(result.contender for result in results)
    return [[name, *_cells([one for one in results if one.contender == name])] for name in names]


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
    return [spread([getattr(result, name) for result in results], count) for name, count in digits.items()]


def spread(values: Sequence[float], digits: int) -> str:
    """`4.2358 ±0.0030`, without the deviation where it rounds to 0 or there is one value."""
    text = f"{fmean(values):,.{digits}f}"
    deviation = f"{stdev(values):,.{digits}f}" if len(values) > 1 else "0"
    return text if float(deviation.replace(",", "")) == 0 else f"{text} ±{deviation}"


def ratio(results: Sequence[Result], field: str, of: str, to: str) -> tuple[float, float]:
    """The quotient of a figure of two contenders, seed by seed -> (mean, least)."""
    by_seed = {(result.contender, result.seed): float(getattr(result, field)) for result in results}
    seeds = sorted({result.seed for result in results})
    found = [by_seed[of, seed] / by_seed[to, seed] for seed in seeds]
    return fmean(found), min(found)
