"""Terminal output of a run: progress, warnings, evaluations and the final summary."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.observe.metrics import StepMetrics
from dist_moe.policies.shares import TargetShares, equal_shares, extreme_loads
from dist_moe.text import counted

LIVE_TEXT_WIDTH = 44
"""Columns for the step and the remaining time of a long run, with a margin."""
REDRAW_S = 0.2
NOT_FINITE = (
    "the validation loss is nan: on this text the model has a value that is not finite; look for skipped steps above, "
    "and start again with a smaller train.learning_rate, or with train.precision=fp32"
)


class RunConsole:
    """Prints the progress of a run. A context manager, for one process of the run.

    Each logged step is a line. On a terminal a live line below them has a bar and the remaining time, and moves with
    each step; it is removed before the results.

    Args:
        steps: Optimizer steps of the whole run.
        first_step: Steps completed before this process.
        console: Where to write; standard output by default.
        clock: Monotonic clock in seconds, for the estimate of the remaining time.
    """

    def __init__(
        self,
        steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._first_step = first_step
        self._console = console or Console()
        self._clock = clock
        self._started_s = clock()
        self._drawn_s = -math.inf
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        self._started_s = self._clock()
        if self._console.is_terminal:
            # Redrawn by steps rather than by a thread, which would take time from training. The bar takes what the
            # text leaves of a narrow terminal.
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=max(1, min(40, self._console.width - LIVE_TEXT_WIDTH))),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._progress.add_task("starting", total=self._steps, completed=self._first_step)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_live_line()

    def _remove_live_line(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def log(self, line: str) -> None:
        """Print one line without markup, above the live line if there is one."""
        self._print(line, markup=False, highlight=False, soft_wrap=True)

    def warn(self, *lines: str) -> None:
        """Print each line as a warning."""
        for line in lines:
            self._print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)

    def _print(self, content: object, **options: Any) -> None:
        # Standard output may be a file on a full disk; losing output must not end the run.
        with contextlib.suppress(OSError):
            self._console.print(content, **options)

    def advance(self, step: int) -> None:
        """Move the live line, if there is one, to a step that is done; redrawn at most every `REDRAW_S` seconds."""
        if self._progress is None:
            return
        last = step >= self._steps
        if not last and self._clock() - self._drawn_s < REDRAW_S:
            return
        self._drawn_s = self._clock()
        text = f"{counter(step, self._steps)}  left {format_duration(self._remaining_s(step))}"
        text = f"{text}  evaluating" if last else text
        with contextlib.suppress(OSError):
            self._progress.update(self._progress.task_ids[0], completed=step, description=text, refresh=True)

    def step(self, metrics: StepMetrics) -> None:
        """Print one logged step."""
        self.log(step_line(metrics, self._steps, self._remaining_s(metrics.step)))

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Print one evaluation."""
        self.log(evaluation_line(metrics))

    def summary(
        self,
        metrics: EvaluationMetrics,
        paths: Mapping[str, Path | str],
        tensorboard: Path | None,
        target_shares: TargetShares = equal_shares,
    ) -> None:
        """Print the results of the run: loss, load of each layer, and the paths of its files.

        Args:
            metrics: The last evaluation.
            paths: Files and folders, by a short name.
            tensorboard: The folder of event files; None if there are none.
            target_shares: The target shares of the experts of a layer.
        """
        self._remove_live_line()
        self._print(summary_table(metrics, target_shares))
        trained = f" after {counted(metrics.step, 'step')}" if metrics.step else ""
        unit = (
            "mean squared error"
            if metrics.pearson is not None
            else "nats/text"
            if metrics.task_metrics
            else "nats/token"
        )
        self.log(f"validation loss  {metrics.validation_loss:.4f} {unit}{trained}")
        for name, value in metrics.task_metrics.items():
            self.log(f"{name.replace('_', ' '):<16} {value:.4f}")
        if not metrics.task_metrics:
            self.log(f"bits per byte    {metrics.bits_per_byte:.4f}")
        if math.isnan(metrics.validation_loss):
            self.warn(NOT_FINITE)
        for name, path in paths.items():
            self.log(f"{name:<16} {path}")
        if tensorboard is not None:
            self.log(f"{'curves':<16} tensorboard --logdir {tensorboard}")

    def _remaining_s(self, step: int) -> float | None:
        completed = step - self._first_step
        if completed <= 0:
            return None
        return (self._clock() - self._started_s) / completed * (self._steps - step)


def step_line(metrics: StepMetrics, steps: int, remaining_s: float | None) -> str:
    """Format one logged step.

    Args:
        metrics: The step.
        steps: Optimizer steps of the whole run.
        remaining_s: Estimated seconds to the end of the run; None if unknown.
    """
    parts = [
        counter(metrics.step, steps),
        f"loss {metrics.loss:.4f}",
        f"{metrics.tokens_per_s:,.0f} tokens/s",
    ]
    if metrics.load:
        parts.append(f"MaxVio {metrics.max_vio:.3f} (floor {metrics.max_vio_floor:.3f})")
    if metrics.threshold is not None:
        parts.append(f"experts/token {metrics.experts_per_token:.2f}")
        parts.append(f"threshold {metrics.threshold:.3f}")
    elif sum(count > 0 for count in metrics.experts_per_token_histogram) > 1 or metrics.unrouted_percent:
        none = f" (none: {metrics.unrouted_percent:.1f} %)" if metrics.unrouted_percent else ""
        parts.append(f"experts/token {metrics.experts_per_token:.2f}{none}")
    if metrics.auxiliary_loss:
        parts.append(f"auxiliary loss {metrics.auxiliary_loss:.3g}")
    if metrics.skipped_steps:
        parts.append(f"skipped {metrics.skipped_steps}" + (" (including this step)" if metrics.skipped else ""))
    parts.append(f"left {format_duration(remaining_s)}")
    return "  ".join(parts)


def counter(step: int, steps: int) -> str:
    """Format which step of the run this is, always in the same width."""
    return f"step {step:>{len(str(steps))}}/{steps}"


def evaluation_line(metrics: EvaluationMetrics) -> str:
    """Format one evaluation."""
    others = metrics.task_metrics or {"bits/byte": metrics.bits_per_byte}
    values = "  ".join(f"{name} {value:.4f}" for name, value in {"loss": metrics.validation_loss, **others}.items())
    line = f"validation after {counted(metrics.step, 'step')}  {values}"
    if not metrics.load:
        return line
    return f"{line}  MaxVio_global {metrics.max_vio_global:.3f} (floor {metrics.max_vio_global_floor:.3f})"


def summary_table(metrics: EvaluationMetrics, target_shares: TargetShares = equal_shares) -> Table:
    """Build a table of each layer and their mean: MaxVio_global, its floor, deviation, least and most loaded expert.

    Where tokens take different numbers of experts, a column shows the mean number.
    """
    what = "texts" if metrics.task_metrics else "target tokens"
    title = f"Load over the validation text ({metrics.tokens:,} {what})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    varies = sum(count > 0 for count in metrics.experts_per_token_histogram) > 1
    has_targets = any(target_shares(len(load)) is not None for load in metrics.load)
    extremes = [f"{which} / {'target' if has_targets else 'mean'}" for which in ("least", "most")]
    headings = ["layer", "MaxVio_global", "floor", "deviation", *extremes]
    for heading in [*headings, "experts\n/token"] if varies else headings:
        table.add_column(heading, justify="right")
    rows = zip(
        metrics.load,
        metrics.max_vio_global_per_layer,
        metrics.max_vio_global_floor_per_layer,
        metrics.load_deviation_percent_per_layer,
        metrics.experts_per_token_per_layer,
        strict=True,
    )
    for layer, (load, value, floor, deviation, per_token) in enumerate(rows):
        shares = target_shares(len(load))
        extremes = [
            f"{ratio:.2f} (expert {expert})" if sum(load) else "-" for expert, ratio in extreme_loads(load, shares)
        ]
        cells = [str(layer), f"{value:.3f}", f"{floor:.3f}", f"{deviation:.2f} %", *extremes, f"{per_token:.2f}"]
        table.add_row(*cells[: len(table.columns)])
    if metrics.load:
        table.add_section()
        means = [f"{metrics.max_vio_global:.3f}", f"{metrics.max_vio_global_floor:.3f}"]
        cells = ["mean", *means, f"{metrics.load_deviation_percent:.2f} %", "", "", f"{metrics.experts_per_token:.2f}"]
        table.add_row(*cells[: len(table.columns)])
    return table


def format_duration(seconds: float | None) -> str:
    """Format a time as h:mm:ss, or m:ss below an hour; `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
