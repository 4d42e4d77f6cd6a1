"""What one rank writes of a checkpoint: collected from the run, copied if training is to go on, and written."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_moe.checkpoint.format.hf_weights import config_files, shard_tensors
from dist_moe.checkpoint.format.manifest import FileEntry, entry
from dist_moe.checkpoint.format.shard_reader import write_tensors
from dist_moe.checkpoint.training_state import COUNTERS, counters_of, state_tensors
from dist_moe.config import dump_config
from dist_moe.data.tokenizer import Tokenizer
from dist_moe.engine.train_state import TrainState

MODEL, STATE, CONFIG = "model", "state", "config.yaml"

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """tensors: by name, by path below the checkpoint's folder. texts: likewise. tokenizer: rank 0's, for `model/`."""

    tensors: Tensors
    texts: dict[str, str]
    tokenizer: Tokenizer | None = None

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for of_file in self.tensors.values() for tensor in of_file.values())

    def write(self, folder: Path) -> dict[str, FileEntry]:
        """Write everything below `folder`, and see that it reaches the disk -> size and digest, by path.

        Errors: OSError, SafetensorError, CheckpointError as `write_tensors`.
        """
        for inner in (MODEL, STATE):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        written = [write_tensors(folder / name, tensors) for name, tensors in self.tensors.items()]
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
        if self.tokenizer is not None:
            written += self.tokenizer.save(folder / MODEL)
        return {str(path.relative_to(folder)): entry(path) for path in written}


def collect(training: TrainState, step: int) -> Snapshot:
    """What this rank has to write of the run after `step`; the tensors are views of what training changes."""
    config, mesh, model = training.config, training.engine.mesh, training.task.model
    balanced = config.balance.policy not in ("none", "auxiliary")
    tensors = {f"{MODEL}/{name}": part for name, part in shard_tensors(model, mesh, balanced).items()}
    tensors |= {f"{STATE}/{name}": part for name, part in state_tensors(training).items()}
    if mesh.rank != 0:
        return Snapshot(tensors, {})
    texts = {f"{MODEL}/{name}": text for name, text in config_files(model, balanced).items()}
    texts[f"{STATE}/{COUNTERS}"] = counters_of(training, step).model_dump_json(indent=1) + "\n"
    texts[CONFIG] = dump_config(config)
    return Snapshot(tensors, texts, training.prepared.tokenizer)


class StagingBuffer:
    """Memory of the host that holds a copy of a rank's tensors, and is used again for the next one.

    Fresh memory costs the system several times what the copying costs. It stays as large as the largest copy.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same contents, which training changes no more. The copy of before is overwritten."""
        copied: Tensors = {}
        for file, name, tensor in _each(snapshot.tensors):
            copied.setdefault(file, {})[name] = self._room(file, name, tensor).copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(snapshot, tensors=copied)

    def _room(self, file: str, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get((file, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # Pinned, so that the device copies by itself.
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[file, name] = kept
        return kept


def _each(tensors: Tensors) -> Iterator[tuple[str, str, Tensor]]:
    for file, of_file in tensors.items():
        for name, tensor in of_file.items():
            yield file, name, tensor
