"""Short real runs of two workers, whose reports and curves are opened in the browser."""

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.encoder import encoder_run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).parent / "dist-moe"
LIMIT_S = 900
SHORT = ("observe.interval=1", "checkpoint.interval=0")
DEEP = (
    "model.config.num_hidden_layers=61",  # the first layer is dense
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.moe_intermediate_size=8",
    "train.steps=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "data.sequence_length=32",
    "observe.validation_sequences=4",
    "checkpoint.resume=never",
)
"""A model with 60 MoE layers that takes seconds."""
UNBALANCED = ("balance={policy: none}",)


def dist_moe(folder: Path, *words: str) -> str:
    """Run a command of the command line in a folder -> its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PROGRAM), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def train(folder: Path, name: str, *changes: str, config: str = "configs/debug.yaml") -> Path:
    """Train on two workers, with runs/NAME in the folder as its run.dir -> that folder."""
    dist_moe(folder, "launch", str(ROOT / config), "--workers", "2", f"run.dir=runs/{name}", *changes)
    return folder / "runs" / name


def train_classification(folder: Path) -> Path:
    """Train an upcycled encoder that classifies, as runs/classification in the folder -> that folder."""
    encoder = folder / "encoder"
    encoder.mkdir()
    examples, changes = encoder_run(encoder)
    return train(folder, "classification", f"data.sources=[{examples}]", *changes, *SHORT, "train.steps=12")
