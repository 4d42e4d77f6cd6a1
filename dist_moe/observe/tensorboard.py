"""TensorBoard event files of a run: curves with their floors, pictures of the load, distributions and texts."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from dist_moe.errors import needs_folder, reason_of
from dist_moe.observe.cards import (
    CONFIG_TAG,
    DESCRIPTIONS,
    DISTRIBUTIONS,
    GUIDE,
    GUIDE_TAG,
    LAYERS_TAG,
    PICTURES,
    RESULTS,
    STALL_TAG,
    hyper_parameters,
    layers_table,
    step_curves,
    validation_curves,
    varies,
)
from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.observe.metrics import StepMetrics
from dist_moe.observe.pictures.canvas import encode_png
from dist_moe.observe.pictures.heat_map import Picture
from dist_moe.observe.pictures.load import draw_experts_over_steps, draw_layers_over_steps, draw_load, shown_layers
from dist_moe.observe.pictures.over_steps import LoadOverSteps
from dist_moe.policies.shares import TargetShares, equal_shares

PROBE_BYTES = 1 << 16
STEPS, FLOOR, VALIDATION = "", "floor", "validation"
"""Subfolders of the event files. TensorBoard draws the curves of one tag in all of them into one card."""
HISTOGRAM_BINS = 64


class TensorBoardWriter:
    """Writes event files into a folder. A context manager, for one process of the run.

    Args:
        folder: Created if it is missing.
        resumed_step: The step after which a resumed run continues; TensorBoard then hides later steps of previous
            processes. None for a run from the start.
        warn: Called once when the disk fails, and once when it works again; the values in between are lost.
        target_shares: The target shares of the experts of a layer, for the pictures of the load.
        load_alone: Write what is about the load alone, as far as it was measured.
    """

    def __init__(
        self,
        folder: str | Path,
        resumed_step: int | None = None,
        warn: Callable[[str], None] = print,
        target_shares: TargetShares = equal_shares,
        load_alone: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._purge_step = None if resumed_step is None else resumed_step + 1
        self._warn = warn
        self._open, self._load_alone = False, load_alone
        self._writers: dict[str, SummaryWriter] = {}
        self._described: set[tuple[str, str]] = set()
        self._failed = False
        self._load = LoadOverSteps(target_shares=target_shares)

    def __enter__(self) -> Self:
        self._open = True
        with needs_folder(self.folder):
            self._writer(STEPS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writers:
            self._write(self._close)
        self._open, self._writers, self._failed = False, {}, False

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write(self, work: Callable[[], None]) -> None:
        """Call a function that writes, and turn its OSError into a warning.

        After an error the thread of a SummaryWriter is dead, so the next call opens new event files.
        """
        try:
            if self._failed:
                _probe(self.folder)
                self._writers, self._purge_step = {}, None
                self._described.clear()
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

    def recall(self, loads: Iterable[tuple[int, Sequence[Sequence[int]]]]) -> None:
        """Take the load of earlier steps of this run, for the pictures over the steps.

        Args:
            loads: (step, [L][E] assignments), by step.
        """
        for step, load in loads:
            self._load.add(step, load)

    def describe(self, config: Mapping[str, Any], config_yaml: str) -> None:
        """Write the guide, the configuration as text, and its row in TensorBoard's table of runs.

        Args:
            config: The resolved configuration as nested plain values.
            config_yaml: The same as YAML.
        """
        self._write(lambda: self._describe(config, config_yaml))

    def _describe(self, config: Mapping[str, Any], config_yaml: str) -> None:
        # `add_hparams` would open a second run in a subfolder; these records belong in the run's own file.
        records = _table_of_runs(hyper_parameters(config))
        self._writer(STEPS)._get_file_writer().add_summary(Summary(value=records))
        self._writer(STEPS).add_text(GUIDE_TAG, GUIDE)
        indented = "".join(f"    {line}\n" for line in config_yaml.splitlines())
        self._writer(STEPS).add_text(CONFIG_TAG, indented)

    def step(self, metrics: StepMetrics) -> None:
        """Write the curves of one logged step."""
        if metrics.load and not metrics.skipped:
            self._load.add(metrics.step, metrics.load)
        values, floors = step_curves(metrics, self._load_alone)
        self._write(lambda: self._scalars(metrics.step, {STEPS: values, FLOOR: floors}))

    def pictures(self, metrics: StepMetrics, distributions: Mapping[str, NDArray[np.float64]]) -> None:
        """Write the pictures of the load up to a logged step, after `step`, its table of layers, and distributions.

        Args:
            metrics: The step; of a model without MoE layers, nothing is written.
            distributions: Values by name, in any shape; an empty one is omitted.
        """
        if metrics.load and len(self._load):
            self._write(lambda: self._pictures(metrics, distributions))

    def _pictures(self, metrics: StepMetrics, distributions: Mapping[str, NDArray[np.float64]]) -> None:
        pictures = {
            **{
                f"experts_over_steps_{number}": draw_experts_over_steps(self._load, layer)
                for number, layer in enumerate(shown_layers(self._load), start=1)
            },
            "layers_over_steps": draw_layers_over_steps(self._load),
            "last_step": self._draw_load(
                metrics.load, f"Load of each expert in each MoE layer, in step {metrics.step:,}"
            ),
        }
        images = [_image(f"{PICTURES}/{name}", picture) for name, picture in pictures.items()]
        self._summary(STEPS, metrics.step, images)
        self._writer(STEPS).add_text(LAYERS_TAG, layers_table(metrics, self._load.target_shares), metrics.step)
        for name, values in distributions.items():
            self._distribution(metrics.step, f"{DISTRIBUTIONS}/{name}", values)
        if varies(metrics):
            tag = f"{DISTRIBUTIONS}/experts_per_token"
            self._integers(STEPS, metrics.step, tag, metrics.experts_per_token_histogram)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Write one evaluation: its points, the picture of the load, and the histogram of experts per token."""
        self._write(lambda: self._evaluation(metrics))

    def _evaluation(self, metrics: EvaluationMetrics) -> None:
        self._scalars(metrics.step, {VALIDATION: validation_curves(metrics)})
        if not metrics.load:
            return
        picture = self._draw_load(metrics.load, f"Load over the validation text, after step {metrics.step:,}")
        image = _image(f"{PICTURES}/validation", picture)
        self._summary(STEPS, metrics.step, [image])
        if varies(metrics):
            tag = f"{DISTRIBUTIONS}/experts_per_token"
            self._integers(VALIDATION, metrics.step, tag, metrics.experts_per_token_histogram)

    def _draw_load(self, load: Sequence[Sequence[int]], title: str) -> Picture:
        return draw_load(load, title, self._load.target_shares)

    def checkpoint(self, step: int, stall_ms: float) -> None:
        """Write how long training waited for the checkpoint of a step, in milliseconds."""
        self._write(lambda: self._scalars(step, {STEPS: {STALL_TAG: stall_ms}}))

    def _writer(self, curve: str) -> SummaryWriter:
        if not self._open:
            raise RuntimeError(f"the writer of {self.folder} is not open; write inside `with TensorBoardWriter(...)`")
        if curve not in self._writers:
            self._writers[curve] = SummaryWriter(str(self.folder / curve), purge_step=self._purge_step)
        return self._writers[curve]

    def _scalars(self, step: int, curves: Mapping[str, Mapping[str, float]]) -> None:
        """Write all values of a step as one event a file; the queue of the writer takes 0.1 ms for each event."""
        for curve, values in curves.items():
            if values:
                self._summary(curve, step, [self._scalar(curve, tag, value) for tag, value in values.items()])

    def _scalar(self, curve: str, tag: str, value: float) -> Summary.Value:
        # TensorBoard keeps the description of the first value.
        if (curve, tag) in self._described:
            return Summary.Value(tag=tag, simple_value=value)
        self._described.add((curve, tag))
        return Summary.Value(tag=tag, simple_value=value, metadata=_described(tag, "scalars"))

    def _distribution(self, step: int, tag: str, values: NDArray[np.float64]) -> None:
        if not values.size:
            return
        counts, edges = np.histogram(values, HISTOGRAM_BINS)
        histogram = HistogramProto(
            min=float(values.min()),
            max=float(values.max()),
            num=values.size,
            sum=float(values.sum()),
            sum_squares=float((values**2).sum()),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._summary(STEPS, step, [_histogram(tag, histogram)])

    def _integers(self, curve: str, step: int, tag: str, counts: Sequence[int]) -> None:
        """Write one bar for each integer from 1, as high as its count; there is one that is not 0."""
        present = [number for number, count in enumerate(counts, start=1) if count]
        numbers = range(1, len(counts) + 1)
        histogram = HistogramProto(
            min=present[0],
            max=present[-1],
            num=sum(counts),
            sum=sum(number * count for number, count in zip(numbers, counts, strict=True)),
            sum_squares=sum(number**2 * count for number, count in zip(numbers, counts, strict=True)),
            bucket_limit=[number + 0.5 for number in numbers],
            bucket=list(counts),
        )
        self._summary(curve, step, [_histogram(tag, histogram)])

    def _summary(self, curve: str, step: int, values: Sequence[Summary.Value]) -> None:
        self._writer(curve)._get_file_writer().add_summary(Summary(value=values), step)


def _table_of_runs(values: Mapping[str, bool | int | float | str]) -> list[Summary.Value]:
    """Return the records for TensorBoard's table of runs: its columns, and the values of this run."""
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    columns = [
        api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
        for name, value in values.items()
    ]
    results = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(group=curve, tag=tag), display_name=name)
        for (tag, curve), name in RESULTS.items()
    ]
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in values.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], field, value)
    records = {
        metadata.EXPERIMENT_TAG: {"experiment": api_pb2.Experiment(hparam_infos=columns, metric_infos=results)},
        metadata.SESSION_START_INFO_TAG: {"session_start_info": start},
        metadata.SESSION_END_INFO_TAG: {
            "session_end_info": plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
        },
    }
    return [
        Summary.Value(
            tag=tag,
            metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content)),
            tensor=metadata.NULL_TENSOR,
        )
        for tag, content in records.items()
    ]


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


def _image(tag: str, picture: Picture) -> Summary.Value:
    height, width, channels = picture.pixels.shape
    encoded = Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=encode_png(picture.pixels)
    )
    return Summary.Value(tag=tag, image=encoded, metadata=_described(tag, "images"))


def _histogram(tag: str, histogram: HistogramProto) -> Summary.Value:
    return Summary.Value(tag=tag, histo=histogram, metadata=_described(tag, "histograms"))


def _described(tag: str, plugin: str) -> SummaryMetadata:
    return SummaryMetadata(
        summary_description=DESCRIPTIONS[tag], plugin_data=SummaryMetadata.PluginData(plugin_name=plugin)
    )
