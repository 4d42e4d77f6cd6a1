"""Checkpoints of DeepSpeed: time and memory of saving and loading a model of its own MoE layers."""

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from benchmarks.checkpoint.memory import Peak, folder_bytes, measure_cost
from benchmarks.checkpoint.size import EXPERTS, LAYERS, MOE_WIDTH, TOKENS, WIDTH
from dist_moe.engine.deepspeed import _clear_deepspeed, _forbid_compilation, _quieten


class Expert(nn.Module):
    """A gated expert of the same size as that of dist_moe."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, MOE_WIDTH, bias=False), nn.Linear(WIDTH, MOE_WIDTH, bias=False)
        self.down = nn.Linear(MOE_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Model(nn.Module):
    """MoE layers with residuals, and dense layers of about the size of the rest of dist_moe's model."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS * 5))
        self.layers = nn.ModuleList(
            MoE(WIDTH, Expert(), num_experts=EXPERTS, ep_size=ep_size, k=2, min_capacity=0) for _ in range(LAYERS)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the mean of the squared outputs."""
        for dense in self.dense:
            x_TD = x_TD + dense(x_TD)
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD)[0]
        return x_TD.square().mean()


def measure(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    """Measure a save after two steps, and a load into a second engine -> seconds and MiB of this rank."""
    tag = "deepspeed"
    with Peak() as start:
        engine = start_engine(world_size, rank)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    _, save = measure_cost(lambda: engine.save_checkpoint(str(folder), tag=tag))
    destroy(engine)
    engine = start_engine(world_size, rank)
    _, load = measure_cost(lambda: engine.load_checkpoint(str(folder), tag=tag))
    pairs = zip(before, engine.module.parameters(), strict=True)
    assert all(torch.equal(saved, loaded) for saved, loaded in pairs), "DeepSpeed loads what it saved"
    parameters = sum(p.numel() for p in engine.module.parameters())
    destroy(engine)
    return {
        "save_s": save.seconds,
        "save_peak_mib": save.peak_mib,
        "load_s": load.seconds,
        "load_peak_mib": load.peak_mib,
        "checkpoint_mib": folder_bytes(folder) / 2**20,
        "parameters": parameters,
        "start_mib": start.mib,
    }


def start_engine(world_size: int, rank: int) -> Any:
    """Return an engine after two steps."""
    _quieten()
    _forbid_compilation()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = Model(world_size)
    groups = [{"name": "all", "params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(groups), lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for step in range(2):
        torch.manual_seed(step * world_size + rank)
        loss = engine(torch.randn(TOKENS, WIDTH))
        engine.backward(loss)
        engine.step()
    return engine


def destroy(engine: Any) -> None:
    """Free the engine, and DeepSpeed's global state of the process."""
    engine.destroy()
    _clear_deepspeed()
