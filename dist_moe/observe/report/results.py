"""The results of a run in a few numbers, the same on the page and in the terminal."""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from dist_moe.observe.report.lines import StepLine
from dist_moe.observe.report.runs import RunData
from dist_moe.text import plain_text

LAST_SHARE = 0.1
"""The share of the logged steps, at the end of a run, over which a result of training is averaged."""
NOT_RESULTS = frozenset(
    {
        *("validation_loss", "bits_per_byte", "tokens", "examples", "bytes", "max_vio_global", "max_vio_global_floor"),
        *("load_cov", "load_cov_floor", "load_deviation_percent", "load_deviation_percent_floor"),
        *("experts_per_token", "experts_per_token_p50", "experts_per_token_p99", "unrouted_percent"),
    }
)
"""Numbers of an evaluation that have a row of their own, or none; all others are metrics of the task."""


class Result(NamedTuple):
    """One number of one run.

    Attributes:
        value: The number; None where the run has none.
        floor: What uniform random routing is expected to show; None for a number without one.
    """

    value: float | None
    floor: float | None = None


class Measure(NamedTuple):
    """A number that every run may have.

    Attributes:
        key: Its name in metrics.jsonl, and in the JSON of `dist-moe compare`.
        title: For people, with the unit.
        meaning: What it is.
        digits: After the decimal point.
        read: Finds it in a run.
    """

    key: str
    title: str
    meaning: str
    digits: int
    read: Callable[[RunData, str], Result]

    def text(self, result: Result) -> str:
        """Format a number with its floor; "-" where there is none."""
        value = number(result.value, self.digits)
        return value if result.floor is None else f"{value} (floor {number(result.floor, self.digits)})"


class Row(NamedTuple):
    """One measure of every run, in the order of the runs."""

    measure: Measure
    results: tuple[Result, ...]


def number(value: float | None, digits: int) -> str:
    """Format a number with thousands separated; "-" where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def result_rows(runs: Sequence[RunData]) -> list[Row]:
    """Return the results of runs, those that a newcomer looks for first; without those that no run has."""
    first, *others = MEASURES
    rows = [
        Row(measure, tuple(measure.read(run, measure.key) for run in runs))
        for measure in (first, *_metrics_of_the_task(runs), *others)
    ]
    return [row for row in rows if any(result.value is not None for result in row.results)]


def _metrics_of_the_task(runs: Sequence[RunData]) -> list[Measure]:
    """Return the numbers of the last evaluations that depend on the task, under any name."""
    names = dict.fromkeys(name for run in runs for name in task_metrics(run))
    return [Measure(name, metric_title(name), "of the last evaluation", 4, validation_result) for name in names]


def task_metrics(run: RunData) -> list[str]:
    """Return the names of the metrics of the task, such as accuracy, in the last evaluation of a run."""
    metrics = run.metrics.validations[-1].metrics if run.metrics.validations else {}
    return [name for name in metrics if name not in NOT_RESULTS and not name.endswith("_floor")]


def metric_title(name: str) -> str:
    """Format the name of a metric for people."""
    return plain_text(name).replace("_", " ")


def loss_unit(run: RunData) -> str:
    """Return the unit of the loss of a run's task; "" for a mean squared error."""
    kind = run.value("config", "task", "kind")
    return {"classification": "nats", "regression": ""}.get(kind if isinstance(kind, str) else "", "nats/token")


def validation_result(run: RunData, key: str) -> Result:
    """Return a number of the last evaluation."""
    metrics = run.metrics.validations[-1].metrics if run.metrics.validations else {}
    return Result(metrics.get(key), metrics.get(f"{key}_floor"))


def steps_at_end(run: RunData) -> list[StepLine]:
    """Return the last tenth of the logged steps that were taken, at least one."""
    taken = run.taken
    return taken[-max(1, round(LAST_SHARE * len(taken))) :]


def result_at_end(run: RunData, key: str) -> Result:
    """Return the mean of a number of training over `steps_at_end`."""
    steps = steps_at_end(run)
    return Result(_mean(steps, key), _mean(steps, f"{key}_floor"))


def _mean(steps: Sequence[StepLine], key: str) -> float | None:
    values = [value for step in steps if (value := getattr(step, key, None)) is not None]
    return fmean(values) if values else None


def _experts_per_token(run: RunData, key: str) -> Result:
    found = validation_result(run, key)
    return result_at_end(run, key) if found.value is None else found


def _if_any_unrouted(run: RunData, key: str) -> Result:
    found = _experts_per_token(run, key)
    return found if found.value or any(step.unrouted_percent for step in run.metrics.steps) else Result(None)


def _of_last_step(run: RunData, key: str) -> Result:
    value = getattr(run.metrics.steps[-1], key) if run.metrics.steps else None
    return Result(None if value is None else float(value))


def tokens_per_s(run: RunData, _: str = "") -> Result:
    """Return the tokens of the logged steps after the first / the wall time that they took; None with one step."""
    parts = [(count, step.tokens_per_s) for count, step in _intervals(run) if step.tokens_per_s]
    time = math.fsum(count / speed for count, speed in parts)
    return Result(sum(count for count, _ in parts) / time if time else None)


def step_ms(run: RunData, _: str = "") -> Result:
    """Return the wall time of a step, the mean over the steps after the first logged one; None with one step."""
    parts = [(count, step.step_ms) for count, step in _intervals(run) if step.step_ms is not None]
    steps = sum(count for count, _ in parts)
    return Result(math.fsum(count * each_ms for count, each_ms in parts) / steps if steps else None)


def _intervals(run: RunData) -> list[tuple[int, StepLine]]:
    """Return each logged step after the first, with the number of steps since the one before it."""
    return [(now.step - before.step, now) for before, now in itertools.pairwise(run.metrics.steps)]


_AT_END = f"mean over the last {LAST_SHARE:.0%} of the logged steps"
_LARGEST = "largest load of an expert / mean load - 1, mean over layers"
MEASURES = (
    Measure(
        "validation_loss",
        "validation loss",
        "cross entropy on held-out text, in nats; of a regression the mean squared error",
        4,
        validation_result,
    ),
    Measure(
        "bits_per_byte",
        "bits per byte",
        "cross entropy for each byte of held-out text, comparable over tokenizers",
        4,
        validation_result,
    ),
    Measure("loss", "training loss", f"the same on the text of training; {_AT_END}", 4, result_at_end),
    Measure("max_vio_global", "MaxVio_global", f"{_LARGEST}, over the whole held-out text", 3, validation_result),
    Measure("max_vio", "MaxVio", f"{_LARGEST}, in a step; {_AT_END}", 3, result_at_end),
    Measure(
        "load_deviation_percent",
        "load deviation, %",
        "standard deviation of the experts' shares of the assignments, over the whole held-out text; mean over layers",
        2,
        validation_result,
    ),
    Measure("dead_experts", "dead experts", f"without a token in a step, sum over layers; {_AT_END}", 1, result_at_end),
    Measure(
        "rank_load",
        "rank load",
        f"rows of the busiest expert-parallel rank in a step / their mean, 1 is even; {_AT_END}",
        3,
        result_at_end,
    ),
    Measure("experts_per_token", "experts per token", "that a token takes", 2, _experts_per_token),
    Measure(
        "unrouted_percent",
        "tokens without an expert, %",
        "of the tokens of all layers, as expert thresholds allow",
        2,
        _if_any_unrouted,
    ),
    Measure(
        "tokens_per_s",
        "tokens/s",
        "over all workers, by the wall time after the first logged step, reports and checkpoints included",
        0,
        tokens_per_s,
    ),
    Measure("step_ms", "ms per step", "the same time for each step", 0, step_ms),
    Measure("step", "steps", "the last logged step", 0, _of_last_step),
    Measure("tokens", "tokens", "trained on, over all workers since step 0", 0, _of_last_step),
)
