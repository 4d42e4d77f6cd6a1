"""TensorBoard's view of a run: curves, curves per layer, pictures of the load, and the hyper-parameters."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_moe.observe.heatmap import draw_load
from dist_moe.observe.metrics import EvaluationMetrics, StepMetrics

_VALIDATION_TAGS = ("validation/loss", "validation/bits_per_byte", "validation/max_vio_global")
_CHARTS_WITH_FLOOR = {
    "balance": {
        "MaxVio and its floor": ["Multiline", ["balance/max_vio", "balance/max_vio_floor"]],
        "Load CoV and its floor": ["Multiline", ["balance/load_cov", "balance/load_cov_floor"]],
        "MaxVio_global and its floor": [
            "Multiline",
            ["validation/max_vio_global", "validation/max_vio_global_floor"],
        ],
    }
}


class TensorBoardWriter:
    """Writes event files into a folder; for one process of the run, as a context manager.

    Args:
        folder: made if it is missing.
        resumed_step: the step a resumed run continues after; TensorBoard then hides what earlier processes
            wrote for later steps. None for a run from the start.
    """

    def __init__(self, folder: str | Path, resumed_step: int | None = None) -> None:
        self.folder = Path(folder)
        self._purge_step = None if resumed_step is None else resumed_step + 1
        self._open_writer: SummaryWriter | None = None

    def __enter__(self) -> Self:
        self._open_writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        self._open_writer.add_custom_scalars(_CHARTS_WITH_FLOOR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None

    def hyper_parameters(self, config: Mapping[str, Any], config_yaml: str) -> None:
        """Show the resolved configuration, as a table to compare runs by and as text.

        Args:
            config: nested plain values; keys are joined by dots, and lists are shown as text.
            config_yaml: the same as YAML.
        """
        # `add_hparams` would open a second run below this folder; its records belong in this run's own file.
        for summary in hparams(_flat(config), dict.fromkeys(_VALIDATION_TAGS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        indented = "".join(f"    {line}\n" for line in config_yaml.splitlines())
        self._writer.add_text("config", indented)

    def step(self, metrics: StepMetrics) -> None:
        """Write the curves of one logged step, of each layer, and the picture of its load."""
        self._scalars(
            metrics.step,
            {
                "train/loss": metrics.loss,
                "train/learning_rate": metrics.learning_rate,
                "train/grad_norm": metrics.grad_norm,
                "train/tokens": metrics.tokens,
                "train/skipped_steps": metrics.skipped_steps,
                "speed/tokens_per_s": metrics.tokens_per_s,
                "speed/step_ms": metrics.step_ms,
            },
        )
        if not metrics.load:
            return
        self._scalars(
            metrics.step,
            {
                "balance/max_vio": metrics.max_vio,
                "balance/max_vio_floor": metrics.max_vio_floor,
                "balance/load_cov": metrics.load_cov,
                "balance/load_cov_floor": metrics.load_cov_floor,
                "balance/load_entropy": metrics.load_entropy,
                "balance/dead_experts": metrics.dead_experts,
                "balance/rate": metrics.balance_rate,
            },
        )
        for layer, value in enumerate(metrics.max_vio_per_layer):
            self._scalars(metrics.step, {f"max_vio/layer_{layer:02d}": value})
        for layer, bias in enumerate(metrics.bias_per_layer):
            if bias is not None:
                extremes = {f"bias_min/layer_{layer:02d}": bias.min, f"bias_max/layer_{layer:02d}": bias.max}
                self._scalars(metrics.step, extremes)
        self._writer.add_image("load/step", draw_load(metrics.load), metrics.step, dataformats="HWC")

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Write the curves of one evaluation, MaxVio_global of each layer, and the picture of its load."""
        losses = {
            "validation/loss": metrics.validation_loss,
            "validation/bits_per_byte": metrics.bits_per_byte,
        }
        self._scalars(metrics.step, losses)
        if metrics.load:
            balance = {
                "validation/max_vio_global": metrics.max_vio_global,
                "validation/max_vio_global_floor": metrics.max_vio_global_floor,
            }
            self._scalars(metrics.step, balance)
            for layer, value in enumerate(metrics.max_vio_global_per_layer):
                self._scalars(metrics.step, {f"max_vio_global/layer_{layer:02d}": value})
            self._writer.add_image("load/validation", draw_load(metrics.load), metrics.step, dataformats="HWC")

    @property
    def _writer(self) -> SummaryWriter:
        if self._open_writer is None:
            raise RuntimeError(f"the writer of {self.folder} is not open; write inside `with TensorBoardWriter(...)`")
        return self._open_writer

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, prefix=f"{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif value is not None:
            flat[name] = str(value)
    return flat
