"""TensorBoard event files of a run: curves, curves per layer, heat maps of the load, and the hyperparameters."""

import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_moe.errors import needs_folder, reason_of
from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.observe.metrics import StepMetrics
from dist_moe.observe.pictures.load import draw_load

PROBE_BYTES = 1 << 16
_VALIDATION_TAGS = ("validation/loss", "validation/bits_per_byte", "validation/max_vio_global")
# Tag -> field of StepMetrics or EvaluationMetrics; a curve of each layer has the tag "<group>/layer_NN".
_STEP_TAGS = {
    "train/loss": "loss",
    "train/auxiliary_loss": "auxiliary_loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens": "tokens",
    "train/skipped_steps": "skipped_steps",
    "speed/tokens_per_s": "tokens_per_s",
    "speed/step_ms": "step_ms",
}
_BALANCE_TAGS = {
    "balance/max_vio": "max_vio",
    "balance/max_vio_floor": "max_vio_floor",
    "balance/max_vio_computation": "max_vio_computation",
    "balance/max_vio_computation_floor": "max_vio_computation_floor",
    "balance/load_cov": "load_cov",
    "balance/load_cov_floor": "load_cov_floor",
    "balance/load_deviation_percent": "load_deviation_percent",
    "balance/load_deviation_percent_floor": "load_deviation_percent_floor",
    "balance/load_entropy": "load_entropy",
    "balance/load_entropy_floor": "load_entropy_floor",
    "balance/dead_experts": "dead_experts",
    "balance/dead_experts_floor": "dead_experts_floor",
    "balance/rank_load": "rank_load",
    "balance/rank_load_floor": "rank_load_floor",
    "balance/rate": "balance_rate",
    "balance/threshold": "threshold",
    "balance/experts_per_token": "experts_per_token",
    "balance/experts_per_token_p50": "experts_per_token_p50",
    "balance/experts_per_token_p99": "experts_per_token_p99",
}
_BALANCE_LAYER_TAGS = {
    "max_vio": "max_vio_per_layer",
    "max_vio_floor": "max_vio_floor_per_layer",
    "max_vio_computation": "max_vio_computation_per_layer",
    "max_vio_computation_floor": "max_vio_computation_floor_per_layer",
    "load_deviation_percent": "load_deviation_percent_per_layer",
    "load_deviation_percent_floor": "load_deviation_percent_floor_per_layer",
    "rank_load": "rank_load_per_layer",
    "rank_load_floor": "rank_load_floor_per_layer",
    "experts_per_token": "experts_per_token_per_layer",
}
_EVALUATION_TAGS = {"validation/loss": "validation_loss", "validation/bits_per_byte": "bits_per_byte"}
_EVALUATION_BALANCE_TAGS = {
    "validation/max_vio_global": "max_vio_global",
    "validation/max_vio_global_floor": "max_vio_global_floor",
    "validation/load_cov": "load_cov",
    "validation/load_cov_floor": "load_cov_floor",
    "validation/load_deviation_percent": "load_deviation_percent",
    "validation/load_deviation_percent_floor": "load_deviation_percent_floor",
    "validation/experts_per_token": "experts_per_token",
    "validation/experts_per_token_p50": "experts_per_token_p50",
    "validation/experts_per_token_p99": "experts_per_token_p99",
}
_EVALUATION_LAYER_TAGS = {
    "max_vio_global": "max_vio_global_per_layer",
    "max_vio_global_floor": "max_vio_global_floor_per_layer",
    "load_deviation_percent_global_floor": "load_deviation_percent_floor_per_layer",
    "load_deviation_percent_global": "load_deviation_percent_per_layer",
    "experts_per_token_global": "experts_per_token_per_layer",
}
# Title -> tag of a value that is drawn together with its floor.
_WITH_FLOOR = {
    "MaxVio and its floor": "balance/max_vio",
    "MaxVio_computation and its floor": "balance/max_vio_computation",
    "Load CoV and its floor": "balance/load_cov",
    "Load deviation in percent and its floor": "balance/load_deviation_percent",
    "Load entropy and its floor": "balance/load_entropy",
    "Dead experts and their floor": "balance/dead_experts",
    "Rank load and its floor": "balance/rank_load",
    "MaxVio_global and its floor": "validation/max_vio_global",
    "Load deviation of the validation in percent and its floor": "validation/load_deviation_percent",
}
_CHARTS_WITH_FLOOR = {"balance": {title: ["Multiline", [tag, f"{tag}_floor"]] for title, tag in _WITH_FLOOR.items()}}


class TensorBoardWriter:
    """Writes event files into a folder. A context manager, for one process of the run.

    Args:
        folder: Created if it is missing.
        resumed_step: The step after which a resumed run continues; TensorBoard then hides later steps of previous
            processes. None for a run from the start.
        warn: Called once when the disk fails, and once when it works again; the values in between are lost.
    """

    def __init__(
        self, folder: str | Path, resumed_step: int | None = None, warn: Callable[[str], None] = print
    ) -> None:
        self.folder = Path(folder)
        self._purge_step = None if resumed_step is None else resumed_step + 1
        self._warn = warn
        self._open_writer: SummaryWriter | None = None
        self._failed = False

    def __enter__(self) -> Self:
        with needs_folder(self.folder):
            self._open(self._purge_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open_writer is not None:
            self._write(lambda: self._writer.close())
        self._open_writer, self._failed = None, False

    def _open(self, purge_step: int | None) -> None:
        self._open_writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        self._open_writer.add_custom_scalars(_CHARTS_WITH_FLOOR)

    def _write(self, work: Callable[[], None]) -> None:
        """Call a function that writes, and turn its OSError into a warning.

        After an error the thread of a SummaryWriter is dead, so the next call opens a new event file.
        """
        try:
            if self._failed:
                _probe(self.folder)
                self._open(None)
            work()
        except OSError as error:
            if not self._failed:
                reason = reason_of(error)
                self._warn(f"cannot write {self.folder} ({reason}); training continues, and its curves have a gap")
            self._failed = True
            return
        if self._failed:
            self._warn(f"{self.folder} can be written again")
        self._failed = False

    def hyper_parameters(self, config: Mapping[str, Any], config_yaml: str) -> None:
        """Write the resolved configuration, for TensorBoard's table of hyperparameters and as text.

        Args:
            config: Nested plain values; keys are joined by dots, and lists become text.
            config_yaml: The same as YAML.
        """
        # `add_hparams` would open a second run in a subfolder; these records belong in the run's own file.
        self._write(lambda: self._hyper_parameters(config, config_yaml))

    def _hyper_parameters(self, config: Mapping[str, Any], config_yaml: str) -> None:
        for summary in hparams(_flat(config), dict.fromkeys(_VALIDATION_TAGS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)
        indented = "".join(f"    {line}\n" for line in config_yaml.splitlines())
        self._writer.add_text("config", indented)

    def step(self, metrics: StepMetrics) -> None:
        """Write one logged step: curves, the heat map of the load, and the histogram of experts per token."""
        self._write(lambda: self._step(metrics))

    def _step(self, metrics: StepMetrics) -> None:
        values = _fields(metrics, _STEP_TAGS)
        if not metrics.load:
            self._scalars(metrics.step, values)
            return
        values |= _fields(metrics, _BALANCE_TAGS) | _layers(_fields(metrics, _BALANCE_LAYER_TAGS))
        for layer, bias in enumerate(metrics.bias_per_layer):
            if bias is not None:
                values |= {f"bias_min/layer_{layer:02d}": bias.min, f"bias_max/layer_{layer:02d}": bias.max}
        self._scalars(metrics.step, values, _image("load/step", metrics.load))
        self._histogram(metrics.step, "experts_per_token/step", metrics.experts_per_token_histogram)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Write one evaluation: curves, the heat map of the load, and the histogram of experts per token."""
        self._write(lambda: self._evaluation(metrics))

    def _evaluation(self, metrics: EvaluationMetrics) -> None:
        values = _fields(metrics, _EVALUATION_TAGS)
        if metrics.task_metrics:
            values = {"validation/loss": metrics.validation_loss}
            values |= {f"validation/{name}": value for name, value in metrics.task_metrics.items()}
        if not metrics.load:
            self._scalars(metrics.step, values)
            return
        values |= _fields(metrics, _EVALUATION_BALANCE_TAGS) | _layers(_fields(metrics, _EVALUATION_LAYER_TAGS))
        self._scalars(metrics.step, values, _image("load/validation", metrics.load))
        self._histogram(metrics.step, "experts_per_token/validation", metrics.experts_per_token_histogram)

    def checkpoint(self, step: int, times_ms: Mapping[str, float]) -> None:
        """Write the times of the checkpoint of a step, in milliseconds by name."""
        values = {f"checkpoint/{name}": value for name, value in times_ms.items()}
        self._write(lambda: self._scalars(step, values))

    @property
    def _writer(self) -> SummaryWriter:
        if self._open_writer is None:
            raise RuntimeError(f"the writer of {self.folder} is not open; write inside `with TensorBoardWriter(...)`")
        return self._open_writer

    def _scalars(self, step: int, values: Mapping[str, float | None], *more: Summary.Value) -> None:
        """Write all values of a step as one event; the queue of the writer takes 0.1 ms for each event."""
        scalars = (Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None)
        self._writer._get_file_writer().add_summary(Summary(value=[*scalars, *more]), step)

    def _histogram(self, step: int, tag: str, counts: Sequence[int]) -> None:
        """Write one bar per integer from 1, as high as its count; nothing if all counts are 0."""
        present = [number for number, count in enumerate(counts, start=1) if count]
        if not present:
            return
        numbers = range(1, len(counts) + 1)
        self._writer.add_histogram_raw(
            tag,
            min=present[0],
            max=present[-1],
            num=sum(counts),
            sum=sum(number * count for number, count in zip(numbers, counts, strict=True)),
            sum_squares=sum(number**2 * count for number, count in zip(numbers, counts, strict=True)),
            bucket_limits=[number + 0.5 for number in numbers],
            bucket_counts=list(counts),
            global_step=step,
        )


def _probe(folder: Path) -> None:
    """Raise OSError if a file cannot be written yet; opening a writer to find out would leave an empty event file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe-{os.getpid()}"
    try:
        with path.open("xb") as file:
            file.write(bytes(PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _fields(metrics: StepMetrics | EvaluationMetrics, names: Mapping[str, str]) -> dict[str, Any]:
    return {tag: getattr(metrics, name) for tag, name in names.items()}


def _layers(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {f"{group}/layer_{layer:02d}": value for group in values for layer, value in enumerate(values[group])}


def _image(tag: str, load: Sequence[Sequence[int]]) -> Summary.Value:
    """Return the heat map of a load, as a PNG that is quick to make rather than small."""
    pixels, png = draw_load(load).pixels, io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG", compress_level=1)
    height, width, channels = pixels.shape
    encoded = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
    return Summary.Value(tag=tag, image=encoded)


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
