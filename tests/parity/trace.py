"""What a run leaves on disk, read back, and compared: closely with the reference, exactly with its repetition."""

import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.parity.setting import STEPS

TOLERANCE = 1e-4
"""Largest relative difference of a loss or a gradient norm from the reference."""
DIFFERENT_SHARE = 0.001
"""Largest share of a later step's assignments that may differ from the reference; in step 1 none may."""

Loads = tuple[tuple[int, ...], ...]  # [L][E] assignments


@dataclass(frozen=True)
class Trace:
    """A run: one value per step in each of the first three, then what it was saved with.

    losses: nats per token, and the validation loss at the end. norms: global 2-norms before clipping. loads:
    assignments over all workers. biases: the selection bias of each layer, by its name in the file. files: sha256
    of each file of weights.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    loads: tuple[Loads, ...]
    biases: dict[str, tuple[float, ...]]
    files: dict[str, str]

    def unequal(self, other: "Trace") -> list[str]:
        """The fields that are not equal bit for bit."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


@dataclass(frozen=True)
class Difference:
    """How far a run is from the reference.

    loss, norm: largest relative difference. first: whether the loads of step 1 are equal. share: largest share of a
    step's assignments that differ. biases: whether they are equal. shortest: the smallest norm, in units of the
    clipping.
    """

    loss: float
    norm: float
    first: bool
    share: float
    biases: bool
    shortest: float

    def faults(self) -> list[str]:
        """What breaks the rule; a value that is not finite breaks it too."""
        rules = {
            f"losses differ by {self.loss:.1e}, more than {TOLERANCE}": self.loss <= TOLERANCE,
            f"norms differ by {self.norm:.1e}, more than {TOLERANCE}": self.norm <= TOLERANCE,
            "loads differ in step 1": self.first,
            f"{self.share:.2%} of a step's assignments differ": self.share <= DIFFERENT_SHARE,
            "biases differ though all loads are equal": self.biases or self.share > 0,
            f"clipping keeps {1 / self.shortest:.2f} of a gradient, more than half": self.shortest > 2,
        }
        return [fault for fault, held in rules.items() if not held]


def read_trace(folder: Path) -> Trace:
    """The trace of the run that wrote `folder`. ValueError if it did not log every step and its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    ends = [line for line in lines if line["event"] == "validation"]
    if [step["step"] for step in steps] != list(range(1, STEPS + 1)) or len(ends) != 1:
        raise ValueError(f"{folder} does not hold {STEPS} logged steps and one validation")
    weights = sorted((folder / "checkpoints" / f"step-{STEPS:06d}" / "model").glob("*.safetensors"))
    return Trace(
        losses=(*(_number(step["loss"]) for step in steps), _number(ends[0]["validation_loss"])),
        norms=tuple(_number(step["grad_norm"]) for step in steps),
        loads=tuple(tuple(map(tuple, step["load"])) for step in steps),
        biases={name: bias for path in weights for name, bias in _biases(path).items()},
        files={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    )


def compare(trace: Trace, reference: Trace, clipping: float) -> Difference:
    """The difference of a run, which clips to a norm of `clipping`, from the reference."""
    shares = [_share(ours, theirs) for ours, theirs in zip(trace.loads, reference.loads, strict=True)]
    return Difference(
        loss=_largest(trace.losses, reference.losses),
        norm=_largest(trace.norms, reference.norms),
        first=trace.loads[0] == reference.loads[0],
        share=max(shares),
        biases=trace.biases == reference.biases,
        shortest=min(trace.norms) / clipping,
    )


def _largest(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    relative = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(relative) if all(map(math.isfinite, relative)) else math.nan


def _share(ours: Loads, theirs: Loads) -> float:
    """The assignments that went to another expert, by what is seen of it in the loads, over all of them."""
    pairs = [pair for layer in zip(ours, theirs, strict=True) for pair in zip(*layer, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / 2 / sum(b for _, b in pairs)


def _biases(path: Path) -> dict[str, tuple[float, ...]]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("e_score_correction_bias")]  # noqa: SIM118
        return {name: tuple(file.get_tensor(name).tolist()) for name in names}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
