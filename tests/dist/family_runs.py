"""Runs of small models of families: on several layouts, stopped and resumed, and evaluated between the steps."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from dist_moe.config import load_config, resolve
from dist_moe.moe.router import Router
from dist_moe.train.evaluate import evaluate, validation_set
from dist_moe.train.loop import run_step
from dist_moe.train.rank_flags import NO_FLAGS
from dist_moe.train.setup import build_run
from dist_moe.worker.rank_info import rank_info_from_env
from tests.dist.pool import RankPool
from tests.families.composite import build_composite, small_composite
from tests.families.trained import INITIALIZER_RANGE, VOCABULARY, settings_of
from tests.parity.setting import CONFIG
from tests.parity.trace import Trace
from tests.parity.train import closest_choice, train_worker

STEPS, SEQUENCES, LENGTH, CLIPPING = 6, 8, 32, 0.1
CLOSEST = 2e-6
"""How close two scores may be of which one is taken and one is not: more than rounding moves a score."""
SEEDS = 20


def model_section(family: str, folder: Path) -> dict[str, Any]:
    """The section `model`; of gemma4 the weights of a multimodal model in `folder`.

    Its attention does not divide scores by the root of the size of a head. With norms of random weights their standard
    deviation is 23, the softmax is almost that of one key, and rounding changes a gradient by 1e-4; so the norms of the
    queries are small there.
    """
    if family != "gemma4":
        return settings_of(family)
    path = folder / family
    if not path.exists():
        sizes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
        config = small_composite(family, initializer_range=INITIALIZER_RANGE, **sizes)
        assert config is not None
        model = build_composite(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.05 if name.endswith("q_norm.weight") else 1.0)
        model.save_pretrained(path)
    return {"architecture": "gemma4_text", "config": {}, "pretrained": str(path)}


def overrides_of(family: str, text: Path, folder: Path, seed: int, further: Sequence[str] = ()) -> list[str]:
    """The overrides of a run of the family on this text into this folder; later ones win."""
    return [
        *(f"model.{key}={json.dumps(value)}" for key, value in model_section(family, text.parent).items()),
        f"run.dir={folder}",
        f"run.seed={seed}",
        "run.threads=1",
        f"data.sources=[{text}]",
        f"data.sequence_length={LENGTH}",
        f"train.steps={STEPS}",
        f"train.schedule_steps={10 * STEPS}",
        f"train.warmup_steps={STEPS}",
        "train.learning_rate=3e-3",
        f"train.gradient_clipping={CLIPPING}",
        f"train.global_batch_size={SEQUENCES}",
        "train.precision=fp32",
        "balance.schedule=constant",
        "checkpoint.interval=0",
        "observe.interval=1",
        "observe.tensorboard=false",
        "observe.validation_sequences=5",
        *further,
    ]


def train_and_find_closest(rank: int, world_size: int, overrides: list[str]) -> float:
    """Train, and return the smallest distance between the last expert that a token took and the next one."""
    closest = float("inf")

    def measure(module: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal closest
        if isinstance(module, Router) and module.training and module._record is not None:
            record = module._record
            taken_T = record.ids_TK[:, 0] >= 0
            closest = min(closest, closest_choice(module, record.logits_TE.detach()[taken_T]))

    with register_module_forward_hook(measure):
        train_worker(rank, world_size, overrides)
    return closest


def find_seed(ranks: RankPool, family: str, text: Path, folder: Path, first: int) -> int:
    """The first seed, from `first` on, with which no decision of a run on one worker is close.

    Such a decision is another one on another layout, and no tolerance separates that from an error. The run is the last
    one in `folder`. RuntimeError if there is none.
    """
    for seed in range(first, first + SEEDS):
        alone = overrides_of(
            family, text, folder, seed, (f"train.micro_batch_size={SEQUENCES}", "checkpoint.resume=never")
        )
        if ranks.run(train_and_find_closest, 1, alone)[0] >= CLOSEST:
            return seed
    raise RuntimeError(f"{family}: a choice is closer than {CLOSEST} with each of {SEEDS} seeds from {first} on")


def train_and_evaluate(rank: int, world_size: int, overrides: list[str]) -> int:
    """Train with an evaluation after each step -> how many there were; no checkpoint is saved."""
    resolved = resolve(load_config(CONFIG, overrides), world_size)
    evaluations = 0
    with contextlib.redirect_stdout(io.StringIO()), build_run(resolved, rank_info_from_env(os.environ)) as run:
        data = validation_set(run.config, run.state.data)
        for step in range(1, STEPS + 1):
            run_step(run, step, NO_FLAGS)
            metrics = evaluate(run.state.task, data, run.mesh, run.state.engine.device, step)
            evaluations += metrics.validation_loss > 0
    return evaluations


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the last step of a run."""
    return folder / "checkpoints" / f"step-{STEPS:06d}"


def trace_of(folder: Path) -> Trace:
    """The trace of a whole run."""
    steps = read_steps(folder)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    checkpoint = last_checkpoint(folder)
    weights = sorted((checkpoint / "model").glob("*.safetensors"))
    with safe_open(checkpoint / "state" / "balance.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("selection_bias:")]  # noqa: SIM118
        biases = {name: tuple(file.get_tensor(name).tolist()) for name in names}
    return Trace(
        losses=tuple(step["loss"] for step in steps),
        norms=tuple(step["grad_norm"] for step in steps),
        loads=tuple(tuple(map(tuple, step["load"])) for step in steps),
        biases=biases,
        files={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    )
