"""Short runs of one worker with checkpoints, and what of them a run would go on from."""

import subprocess
from pathlib import Path

import torch

from dist_moe.checkpoint.resume import Checkpoint, find_checkpoint
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config, resolve
from dist_moe.train.setup import tokenize
from tests.dist.loaded import run_loaded
from tests.dist.resumable import ROOT, command, overrides_of

ALONE, CPU = Mesh(1, 0, 1), torch.device("cpu")
MORE = "state/rank-00001.safetensors"
WEIGHTS, STATE = "model/model-00001-of-00001.safetensors", "state/rank-00000.safetensors"


def train(text: Path, run: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    return run_loaded(command(text, run, *changes), text.parent)


def find(text: Path, run: Path, *changes: str) -> Checkpoint | None:
    config = settings(text, run, *changes)
    return find_checkpoint(config, tokenize(config), ALONE, CPU)


def settings(text: Path, run: Path, *changes: str) -> Config:
    return resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, run, *changes)), 1).config


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:06d}"
