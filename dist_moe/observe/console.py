"""What a person sees of a run in the terminal: progress, warnings, evaluations and the final summary."""

import contextlib
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


class RunConsole:
    """Shows a run; for one process of the run, as a context manager.

    On a terminal, one live line is redrawn at each logged step; elsewhere each logged step is its own line.

    Args:
        steps: optimizer steps of the whole run.
        first_step: steps done before this process began.
        console: where to write; by default standard output.
        clock: seconds that only grow, for the estimate of the time left.
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
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        self._started_s = self._clock()
        if self._console.is_terminal:
            # Drawn at each logged step, not by a thread of its own that would take time from the run.
            self._progress = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
            )
            self._progress.add_task("starting", total=self._steps, completed=self._first_step)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, line: str) -> None:
        """Print one line as it is, above the live line if there is one."""
        self._print(line, markup=False, highlight=False, soft_wrap=True)

    def _print(self, what: object, **how: Any) -> None:
        """Print it; where standard output is a file on a disk that fails, a line is not worth the run."""
        with contextlib.suppress(OSError):
            self._console.print(what, **how)

    def warn(self, lines: list[str]) -> None:
        """Print each line as a warning."""
        for line in lines:
            self._print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)

    def print_error(self, line: str) -> None:
        """Print one line as a warning."""
        self.warn([line])

    def step(self, metrics: StepMetrics) -> None:
        """Show one logged step."""
        line = step_line(metrics, self._steps, self._left_s(metrics.step))
        if self._progress is None:
            self.say(line)
            return
        self._progress.update(self._progress.task_ids[0], completed=metrics.step, description=line, refresh=True)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Show one evaluation as a line."""
        self.say(evaluation_line(metrics))

    def summary(self, metrics: EvaluationMetrics, paths: Mapping[str, Path], tensorboard: Path | None) -> None:
        """Print the end of the run: quality, balance of each layer, and where the results lie.

        Args:
            metrics: the last evaluation.
            paths: what lies where, by a short name.
            tensorboard: the folder of event files; None if there are none.
        """
        self._print(summary_table(metrics))
        self.say(f"validation loss  {metrics.validation_loss:.4f} nats/token after {metrics.step} steps")
        self.say(f"bits per byte    {metrics.bits_per_byte:.4f}")
        for name, path in paths.items():
            self.say(f"{name:<16} {path}")
        if tensorboard is not None:
            self.say(f"{'curves':<16} tensorboard --logdir {tensorboard}")

    def _left_s(self, step: int) -> float | None:
        done = step - self._first_step
        if done <= 0:
            return None
        return (self._clock() - self._started_s) / done * (self._steps - step)


def step_line(metrics: StepMetrics, steps: int, left_s: float | None) -> str:
    """One logged step as a line.

    Args:
        metrics: the step.
        steps: of the whole run.
        left_s: seconds the rest of the run will take; None if nobody can tell yet.
    """
    parts = [
        f"step {metrics.step:>{len(str(steps))}}/{steps}",
        f"loss {metrics.loss:.4f}",
        f"{metrics.tokens_per_s:,.0f} tokens/s",
    ]
    if metrics.load:
        parts.append(f"MaxVio {metrics.max_vio:.3f} (floor {metrics.max_vio_floor:.3f})")
    if metrics.threshold is not None:
        parts.append(f"experts/token {metrics.experts_per_token:.2f}")
        parts.append(f"threshold {metrics.threshold:.3f}")
    if metrics.auxiliary_loss:
        parts.append(f"auxiliary loss {metrics.auxiliary_loss:.3g}")
    if metrics.skipped_steps:
        parts.append(f"skipped {metrics.skipped_steps}" + (" (this one too)" if metrics.skipped else ""))
    parts.append(f"left {duration(left_s)}")
    return "  ".join(parts)


def evaluation_line(metrics: EvaluationMetrics) -> str:
    """One evaluation as a line."""
    line = (
        f"validation after {metrics.step} steps  loss {metrics.validation_loss:.4f}  "
        f"bits/byte {metrics.bits_per_byte:.4f}"
    )
    if not metrics.load:
        return line
    return f"{line}  MaxVio_global {metrics.max_vio_global:.3f} (floor {metrics.max_vio_global_floor:.3f})"


def summary_table(metrics: EvaluationMetrics) -> Table:
    """Of each layer, and as a mean: MaxVio_global beside its floor, the deviation, the least and most loaded expert.

    Where tokens took different numbers of experts, how many they took too.
    """
    title = f"Load over {metrics.tokens:,} validation tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    varies = sum(count > 0 for count in metrics.experts_per_token_histogram) > 1
    headings = ["layer", "MaxVio_global", "floor", "deviation", "least / mean", "most / mean"]
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
    for layer, (load, value, floor, deviation, taken) in enumerate(rows):
        mean = sum(load) / len(load)
        ends = [f"{count / mean:.2f} (expert {load.index(count)})" if mean else "-" for count in (min(load), max(load))]
        cells = [str(layer), f"{value:.3f}", f"{floor:.3f}", f"{deviation:.2f} %", *ends, f"{taken:.2f}"]
        table.add_row(*cells[: len(table.columns)])
    if metrics.load:
        table.add_section()
        means = [f"{metrics.max_vio_global:.3f}", f"{metrics.max_vio_global_floor:.3f}"]
        cells = ["mean", *means, f"{metrics.load_deviation_percent:.2f} %", "", "", f"{metrics.experts_per_token:.2f}"]
        table.add_row(*cells[: len(table.columns)])
    return table


def duration(seconds: float | None) -> str:
    """A length of time as h:mm:ss, or m:ss below an hour; `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
