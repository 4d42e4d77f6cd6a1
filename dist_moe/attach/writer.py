"""TensorBoard's event files of a load: the curves and pictures of `dist-moe train`, without those of its own loop."""

import atexit
import math
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch import Tensor

from dist_moe.attach.load import Load
from dist_moe.errors import UserError, needs_folder
from dist_moe.observe.metrics import Progress, StepMetrics, step_metrics
from dist_moe.observe.routing.observer import bias_distribution
from dist_moe.observe.tensorboard import TensorBoardWriter


class LoadWriter:
    """Writes the load of steps for TensorBoard. A context manager; without one, `close` is called when Python exits.

    Ranks other than 0 write nothing.

    Args:
        log_dir: A folder of its own for the event files, which is created.
        interval: Steps between the points of the curves.
        picture_interval: Steps between pictures of the load; 0 for none.

    Raises:
        UserError: The folder cannot be written, or an interval is out of range.
    """

    def __init__(self, log_dir: str | Path, interval: int = 1, picture_interval: int = 100) -> None:
        if interval < 1 or picture_interval < 0:
            raise UserError(
                f"interval={interval}, picture_interval={picture_interval}: steps between points are 1 or more, and "
                "between pictures 0 (none) or more"
            )
        self._folder, self._interval, self._picture_interval = Path(log_dir), interval, picture_interval
        self._writer: TensorBoardWriter | None = None
        self._tokens: Tensor | int = 0
        if _is_first_rank():
            with needs_folder(self._folder, "log_dir"):
                self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, load: Load) -> None:
        """Write the load of a step, where it is due."""
        if not _is_first_rank():
            return
        self._tokens = self._tokens + load.counts[0].k_histogram_K.sum()  # on the device, which is not waited for
        if load.step % self._interval:
            return
        if self._writer is None:
            self._writer = TensorBoardWriter(self._folder, load.step - 1 if load.step > 1 else None, load_alone=True)
            self._writer.__enter__()
            atexit.register(self.close)
        metrics = _metrics(load, int(self._tokens))
        self._writer.step(metrics)
        if self._picture_interval and load.step % self._picture_interval < self._interval:
            self._writer.pictures(metrics, bias_distribution(bias for bias in load.biases if bias is not None))

    def close(self) -> None:
        """Write what is left, and close the files."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            atexit.unregister(self.close)
        self._writer = None


def _metrics(load: Load, tokens: int) -> StepMetrics:
    """Return a step of `dist-moe train` with this load, in which what a balancer does not know is NaN."""
    unknown = math.nan
    progress = Progress(
        step=load.step,
        loss=unknown,
        auxiliary_loss=0.0,
        learning_rate=unknown,
        grad_norm=unknown,
        tokens=tokens,
        tokens_per_s=unknown,
        step_ms=unknown,
        skipped=not load.taken,
        skipped_steps=0,
        balance_rate=load.rate,
        threshold=None,
    )
    return step_metrics(
        progress,
        load_L=[counts.load_E for counts in load.counts],
        k_histogram_L=[counts.k_histogram_K for counts in load.counts],
        microbatch_vio_L=[(unknown, unknown)] * len(load.counts),
        bias_L=load.biases,
        expert_parallel=1,
    )


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
