"""What all programs of a case share: the optimizer, the text in files, and the case as a peer's worker reads it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 1e-4  # with 2e-3 routing collapses within 8 steps, and then every expert but a few is idle
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIPPING = 1.0
ZERO_STAGE = 1
STEPS_OF_TEXT = 128
COLUMNS = ("tokens", "targets", "positions")


@dataclass(frozen=True)
class PeerSetting:
    """A case as the worker of a peer reads it.

    Attributes:
        program: The name of the peer's model in `benchmarks.step.peer`.
        architecture: Hugging Face's `model_type`.
        model: Keyword arguments of its config class, with the vocabulary.
        bf16: Whether weights and activations are bf16.
        expert_parallel: Workers that share one set of experts.
        sequences: Sequences of one step on one worker.
        fused: Whether AdamW is torch's fused implementation.
        text: The folder of the text.
        scratch: A folder for files of the program.
    """

    program: str
    architecture: str
    model: dict[str, Any]
    bf16: bool
    expert_parallel: int
    sequences: int
    fused: bool
    text: str
    scratch: str

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "PeerSetting":
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text()))


class Text:
    """The token ids, targets and positions of the steps of a case, the same rows that this package's stream gives.

    Args:
        folder: Where `write_text` wrote them.
    """

    def __init__(self, folder: Path) -> None:
        self._arrays = [np.load(folder / f"{column}.npy", mmap_mode="r") for column in COLUMNS]

    def rows(self, first: int, count: int) -> list[np.ndarray]:
        """Return rows of tokens, targets (-100: no loss) and positions, each int64 [B, S]; the text repeats."""
        numbers = np.arange(first, first + count) % len(self._arrays[0])
        return [array[numbers].astype(np.int64) for array in self._arrays]


def write_text(folder: Path, batch: Any) -> None:
    """Write the columns of a `dist_moe.data.stream.Batch` of all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for column in COLUMNS:
        np.save(folder / f"{column}.npy", getattr(batch, f"{column}_BS").numpy().astype(np.int32))
