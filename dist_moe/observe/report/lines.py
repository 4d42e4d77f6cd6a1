"""Reads the lines of metrics.jsonl and events.jsonl as untrusted input, in memory that is bounded by the steps.

A line that cannot be used is passed over, and the report says so: a run in progress may have written a part of its last
line, a disk may have lost some, and a file may come from another version.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dist_moe.errors import reason_of
from dist_moe.section import broken_fields
from dist_moe.text import counted
from dist_moe.untrusted import parse_json, printable

LARGEST_LINE = 1 << 26
MOST_STEPS, MOST_EVENTS = 1_000_000, 10_000
MOST_METRICS, LONGEST_NAME = 100, 60
LARGEST = 1e30
"""Numbers of files beyond it would overflow in sums and products of a chart."""
Number = Annotated[FiniteFloat, Field(ge=-LARGEST, le=LARGEST)] | None
"""A number, or null where it was not finite, or where the version that wrote the line had no such number."""
Step = Annotated[int, Field(ge=0, lt=1 << 62)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Layers = Annotated[list[Annotated[list[Count], Field(min_length=1)]], Field(max_length=10_000)]


class _Line(BaseModel):
    """What is read of a line; other fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class StepLine(_Line):
    """What is read of the record of a step; the load is read again when it is drawn."""

    step: Annotated[int, Field(ge=1, lt=1 << 62)]
    skipped: bool = False
    loss: Number = None
    auxiliary_loss: Number = None
    learning_rate: Number = None
    grad_norm: Number = None
    tokens: Count | None = None
    tokens_per_s: Number = None
    step_ms: Number = None
    threshold: Number = None
    max_vio: Number = None
    max_vio_floor: Number = None
    max_vio_computation: Number = None
    max_vio_computation_floor: Number = None
    load_deviation_percent: Number = None
    load_deviation_percent_floor: Number = None
    dead_experts: Number = None
    dead_experts_floor: Number = None
    rank_load: Number = None
    rank_load_floor: Number = None
    experts_per_token: Number = None
    unrouted_percent: Number = None
    bias_min: Number = None
    """The smallest bias of an expert in any layer after the step; None where no layer has one."""
    bias_max: Number = None
    bias_abs_mean: Number = None
    """The mean absolute bias, over the layers that have one."""


class LoadLine(_Line):
    """The load [L][E] of a step or an evaluation, in assignments."""

    step: Step
    load: Layers = []


class ValidationLine(LoadLine):
    """What is read of the record of an evaluation. `metrics` are all of its single numbers by name."""

    metrics: dict[str, Annotated[FiniteFloat, Field(ge=-LARGEST, le=LARGEST)]] = {}
    max_vio_global_per_layer: list[Number] = []
    max_vio_global_floor_per_layer: list[Number] = []
    load_deviation_percent_per_layer: list[Number] = []
    experts_per_token_per_layer: list[Number] = []


class CheckpointLine(_Line):
    """The record of a checkpoint."""

    step: Step
    bytes: Count | None = None
    stall_ms: Number = None
    write_ms: Number = None


class EventLine(_Line):
    """A line of events.jsonl."""

    event: Annotated[str, Field(max_length=40)]
    step: Step
    time: Annotated[str, Field(max_length=40)] = ""
    text: Annotated[str, Field(max_length=10_000)] = ""
    workers: Count | None = None
    expert_parallel: Count | None = None
    launcher: Annotated[str, Field(max_length=200)] | None = None
    resumed_from: Annotated[str, Field(max_length=4096)] | None = None


@dataclass
class Metrics:
    """The content of metrics.jsonl. Of a step that was repeated after a restart, the last record is valid.

    Attributes:
        steps: The logged steps, in order.
        offsets: Where the line of each of them begins in the file.
        validations: The evaluations, in order.
        checkpoints: The checkpoints, in order of the file.
        problems: What could not be read, in words.
    """

    steps: list[StepLine] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    validations: list[ValidationLine] = field(default_factory=list)
    checkpoints: list[CheckpointLine] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def begin_again(self, step: int) -> None:
        """Remove what an earlier process logged from this step on."""
        while self.steps and self.steps[-1].step >= step:
            self.steps.pop()
            self.offsets.pop()
        while self.validations and self.validations[-1].step >= step:
            self.validations.pop()


@dataclass
class _Faults:
    """Lines that cannot be used: the first of them in words, and how many there are."""

    name: str
    first: str = ""
    count: int = 0

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        self.first = self.first or f"line {number} {reason}"

    def problems(self) -> list[str]:
        if not self.count:
            return []
        more = f", and {counted(self.count - 1, 'other line')}" if self.count > 1 else ""
        return [f"{self.name}: {self.first}{more}; the report leaves {'them' if self.count > 1 else 'it'} out"]


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a regular file.
    """
    metrics, faults = Metrics(), _Faults(path.name)
    for number, offset, line in _lines(path, faults):
        try:
            record = parse_json(line)
            _add(metrics, record, offset)
        except (ValueError, OverflowError) as error:
            faults.add(number, _fault_of(error))
        if len(metrics.steps) > MOST_STEPS:
            metrics.problems.append(f"{path.name}: has more than {MOST_STEPS:,} logged steps; the report has the first")
            break
    metrics.problems += faults.problems()
    return metrics


def _add(metrics: Metrics, record: dict[str, Any], offset: int) -> None:
    match record.get("event"):
        case "step":
            step = StepLine.model_validate({**record, **_bias(record.get("bias_per_layer"))})
            metrics.begin_again(step.step)
            metrics.steps.append(step)
            metrics.offsets.append(offset)
        case "validation":
            numbers = {
                name: float(value)
                for name, value in record.items()
                if type(value) in (int, float) and name != "step" and len(name) <= LONGEST_NAME
            }
            line = ValidationLine.model_validate({**record, "metrics": dict(list(numbers.items())[:MOST_METRICS])})
            while metrics.validations and metrics.validations[-1].step >= line.step:
                metrics.validations.pop()
            metrics.validations.append(line)
        case "checkpoint":
            metrics.checkpoints.append(CheckpointLine.model_validate(record))
        case None:
            raise ValueError("it has no event")


def _bias(per_layer: Any) -> dict[str, float | None]:
    """Summarize the range of the bias of each layer over the layers that have one."""
    layers = [of_layer for of_layer in per_layer if of_layer is not None] if isinstance(per_layer, list) else []
    if not all(isinstance(of_layer, dict) for of_layer in layers):
        raise ValueError("bias_per_layer is not a list of ranges")
    found = {}
    for name, join in (("min", min), ("max", max), ("abs_mean", fmean)):
        values = [value for of_layer in layers if (value := of_layer.get(name)) is not None]
        if not all(type(value) in (int, float) for value in values):
            raise ValueError(f"the {name} of a bias is not a number")
        found[f"bias_{name}"] = float(join(values)) if values else None
    return found


def read_events(path: Path) -> tuple[list[EventLine], list[str]]:
    """Read events.jsonl -> its lines, and what could not be read.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a regular file.
    """
    # The last ones tell how the run ended.
    events, faults, count = deque[EventLine](maxlen=MOST_EVENTS), _Faults(path.name), 0
    for number, _, line in _lines(path, faults):
        try:
            events.append(EventLine.model_validate(parse_json(line)))
            count += 1
        except ValueError as error:
            faults.add(number, _fault_of(error))
    surplus = count - len(events)
    left_out = [f"{path.name}: the first {surplus:,} of {counted(count, 'event')} are left out"] if surplus else []
    return list(events), [*faults.problems(), *left_out]


def read_loads(path: Path, metrics: Metrics) -> Iterator[LoadLine]:
    """Read the load of each logged step that was taken and has one; a file that changed meanwhile ends it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a regular file.
    """
    with _open(path) as file:
        for step, offset in zip(metrics.steps, metrics.offsets, strict=True):
            if step.skipped:
                continue
            file.seek(offset)
            try:
                line = LoadLine.model_validate(parse_json(file.readline(LARGEST_LINE).decode()))
            except ValueError:
                return
            if line.load:
                yield line


def _open(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a regular file")
    return os.fdopen(handle, "rb")


def _lines(path: Path, faults: _Faults) -> Iterator[tuple[int, int, str]]:
    """Yield the number, the offset and the text of each whole line. The last one may be in progress."""
    number = offset = 0
    with _open(path) as file:
        while (line := file.readline(LARGEST_LINE)).endswith(b"\n"):
            number += 1
            try:
                yield number, offset, line.decode()
            except UnicodeDecodeError:
                faults.add(number, "is not UTF-8")
            offset += len(line)
    if len(line) == LARGEST_LINE:
        faults.add(number + 1, f"is longer than {LARGEST_LINE:,} bytes, where the report ends")


def _fault_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"is not as expected ({broken_fields(error)})"
    return f"is not as expected ({printable(reason_of(error))[:200]})"
