"""Small runs that stop and resume in the workers of the pool, and comparisons of their checkpoints."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dist_moe.checkpoint.async_saver import save_checkpoint
from dist_moe.checkpoint.resume import find_checkpoint, load_model, restore
from dist_moe.checkpoint.training_state import read_counters
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import Resolved, load_config, resolve
from dist_moe.engine.train_state import TrainState
from dist_moe.train.loop import run
from dist_moe.train.setup import build_task, engine_settings, start_training, tokenize
from dist_moe.worker.rank_info import RankInfo

ROOT = Path(__file__).parents[2]
SMALL = (
    "data.sequence_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.schedule_steps=20",
    "train.warmup_steps=3",
    "observe.interval=1",
    "observe.tensorboard=false",
    "observe.validation_sequences=4",
    "checkpoint.interval=0",
)


def write_text(folder: Path) -> Path:
    """Write a text of 120 short documents -> the file."""
    path = folder / "text.jsonl"
    words = ["expert", "token", "load", "bias", "router", "gate", "rank", "step"]
    with path.open("w") as file:
        for number in range(120):
            text = " ".join(words[(number * number + position * 3) % len(words)] for position in range(4 + number % 9))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def write_examples(folder: Path) -> Path:
    """Write 90 sentences of different lengths, whose class a word decides -> the file."""
    path = folder / "examples.jsonl"
    words = {"good": "wonderful", "bad": "dreadful", "fair": "middling"}
    rows = []
    for number in range(90):
        label = list(words)[number % 3]
        text = " ".join(["film", words[label], *(["indeed"] * (number % 5))])
        rows.append({"text": text, "label": label, "key": str(number)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def overrides_of(text: Path, folder: Path, *further: str) -> list[str]:
    """The overrides of a run on this text into this folder; later ones win."""
    return [*SMALL, f"data.sources=[{text}]", f"run.dir={folder}", *further]


def command(text: Path, folder: Path, *further: str) -> list[str]:
    """The command of a worker of such a run."""
    return [sys.executable, "-m", "dist_moe", "train", "configs/debug.yaml", *overrides_of(text, folder, *further)]


def train(rank: int, world_size: int, text: Path, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train into `folder` as one rank of the pool's group; later overrides win."""
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder, *overrides)), world_size)
    run(resolved, RankInfo(rank, world_size, rank, world_size, "env"))


def train_and_read(rank: int, world_size: int, text: Path, folder: Path, overrides: Sequence[str] = ()) -> str:
    """Train as `train` does -> what the rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(rank, world_size, text, folder, overrides)
    return printed.getvalue()


@contextlib.contextmanager
def started(rank: int, world_size: int, overrides: Sequence[str]) -> Iterator[tuple[Resolved, TrainState]]:
    """A run of configs/debug.yaml with these overrides, started or resumed, before its next step."""
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides), world_size)
    config, tokenized = resolved.config, tokenize(resolved.config)
    mesh = make_mesh(resolved.expert_parallel)
    checkpoint = find_checkpoint(config, tokenized, mesh, torch.device("cpu"))
    task = build_task(resolved, tokenized, mesh)
    if checkpoint is not None:
        load_model(checkpoint, task, mesh)
    settings = engine_settings(resolved, torch.device("cpu"))
    with start_training(config, task, tokenized, mesh, settings) as training:
        if checkpoint is not None:
            restore(checkpoint, training)
        yield resolved, training


def resave(rank: int, world_size: int, text: Path, folder: Path, source: Path, overrides: Sequence[str] = ()) -> None:
    """Load the checkpoint `source` and save it again into the run `folder`, without a step in between."""
    all_overrides = overrides_of(text, folder, f"checkpoint.resume={source}", *overrides)
    with started(rank, world_size, all_overrides) as (_, training):
        save_checkpoint(training, read_counters(source / "state").step)


def elements(checkpoint: Path) -> dict[str, Tensor]:
    """Every weight ("model:NAME") and optimizer tensor ("KIND:NAME"), flattened, independent of the layout."""
    found: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for label, tensor in tensors(checkpoint).items():
        file, _, name = label.partition(" ")
        if file.startswith("model/"):
            found[f"model:{name}"] = tensor.reshape(-1)
        elif "rank-" in file and not name.startswith("random:"):
            kind_and_name, _, start = name.rpartition(":")
            parts.setdefault(kind_and_name, []).append((int(start), tensor))
    for name, slices in parts.items():
        slices.sort(key=lambda part: part[0])
        ends = [start + len(tensor) for start, tensor in slices]
        assert [start for start, _ in slices] == [0, *ends[:-1]], f"{name} has a gap or an overlap"
        found[name] = torch.cat([tensor for _, tensor in slices])
    return found


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    """The logged steps of a run by number, the last one of repeated steps; an incomplete last line is ignored."""
    complete, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    lines = [json.loads(line) for line in complete.splitlines()]
    return {line["step"]: line for line in lines if line["event"] == "step"}


def same_bits(first: Path, second: Path) -> list[str]:
    """The names of tensors of two checkpoints that differ in a bit, or are in one of them only; empty if none does."""
    ours, theirs = tensors(first), tensors(second)
    assert ours, f"{first} holds no tensors"
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(bits(ours[name]), bits(theirs[name]))
    ]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by "FILE NAME"."""
    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.relative_to(checkpoint)} {name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
