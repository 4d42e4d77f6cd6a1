"""What one rank writes to a checkpoint: collected from the run, copied for an asynchronous save, and written."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_moe.checkpoint.format.hf_weights import config_files, shard_tensors
from dist_moe.checkpoint.format.manifest import FileEntry, file_entry
from dist_moe.checkpoint.format.shard_reader import write_tensors
from dist_moe.checkpoint.training_state import COUNTERS_FILE, counters_of, state_tensors
from dist_moe.config import dump_config
from dist_moe.data.tokenizer import Tokenizer
from dist_moe.engine.train_state import TrainState
from dist_moe.files import write_atomically

MODEL_FOLDER, STATE_FOLDER, CONFIG_FILE = "model", "state", "config.yaml"

FileTensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint.

    Attributes:
        tensors: By file (its path below the checkpoint's folder) and name.
        texts: The content of text files by path.
        tokenizer: To be written into `model/`; on rank 0 only.
    """

    tensors: FileTensors
    texts: dict[str, str]
    tokenizer: Tokenizer | None = None

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for file_tensors in self.tensors.values() for tensor in file_tensors.values())

    def write(self, folder: Path) -> dict[str, FileEntry]:
        """Write everything below `folder` and flush it to disk.

        Returns:
            Size and digest of each file by its path below `folder`.

        Raises:
            OSError, SafetensorError, CheckpointError: As `write_tensors`.
        """
        for subfolder in (MODEL_FOLDER, STATE_FOLDER):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        written = [write_tensors(folder / name, tensors) for name, tensors in self.tensors.items()]
        for name, text in self.texts.items():
            write_atomically(folder / name, text)
            written.append(folder / name)
        if self.tokenizer is not None:
            written += self.tokenizer.save(folder / MODEL_FOLDER)
        return {str(path.relative_to(folder)): file_entry(path) for path in written}


def collect(train_state: TrainState, step: int) -> Snapshot:
    """This rank's snapshot after `step`; its tensors are views of memory that training changes."""
    config, mesh, model = train_state.config, train_state.engine.mesh, train_state.task.model
    balanced = config.balance.moves_bias
    tensors = {f"{MODEL_FOLDER}/{name}": part for name, part in shard_tensors(model, mesh, balanced).items()}
    tensors |= {f"{STATE_FOLDER}/{name}": part for name, part in state_tensors(train_state).items()}
    if mesh.rank != 0:
        return Snapshot(tensors, {})
    texts = {f"{MODEL_FOLDER}/{name}": text for name, text in config_files(model, balanced).items()}
    texts[f"{STATE_FOLDER}/{COUNTERS_FILE}"] = counters_of(train_state, step).model_dump_json(indent=1) + "\n"
    texts[CONFIG_FILE] = dump_config(config)
    return Snapshot(tensors, texts, train_state.data.tokenizer)


class StagingBuffer:
    """Host memory for a copy of a rank's snapshot, reused by the next one.

    Allocating new pages costs several times as much as copying into pages that exist, so the memory is kept; it stays
    as large as the largest snapshot.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """Copy the tensors of a snapshot to host memory, over the previous copy, so that training may change them."""
        copied: FileTensors = {}
        for file, name, tensor in _iterate(snapshot.tensors):
            copied.setdefault(file, {})[name] = self._buffer(file, name, tensor).copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(snapshot, tensors=copied)

    def _buffer(self, file: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((file, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, so that the device copies asynchronously.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._buffers[file, name] = buffer
        return buffer


def _iterate(tensors: FileTensors) -> Iterator[tuple[str, str, Tensor]]:
    for file, file_tensors in tensors.items():
        for name, tensor in file_tensors.items():
            yield file, name, tensor
