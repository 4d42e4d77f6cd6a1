"""Weights folders that several ranks write together, loaded on other numbers of ranks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_moe.checkpoint.format.hf_weights import load_weights, save_weights
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.engine.deepspeed import EngineSettings, start_engine
from dist_moe.model.build import parameter_groups
from dist_moe.model.convert import MoeLayer, find_layers
from dist_moe.policies.loss_free import LossFree
from dist_moe.train.step import train_step
from tests.dist.pool import RankPool
from tests.dist.small import ROWS, Case, make_balancer, make_task, ragged_batch, share
from tests.experts import gated_experts

EXPERTS = 12


def constant(layer: int, expert: int, kind: int) -> float:
    """A unique number for each expert's projection (kind 0, 1, 2: gate, up, down)."""
    return 1000.0 * layer + 10.0 * expert + kind


def save_constants(rank: int, world_size: int, folder: Path) -> list[str]:
    """Fill each rank's experts and save together -> names of the files when the call returns."""
    mesh = make_mesh(2)
    model = make_task(Case(), mesh).model
    with torch.no_grad():
        for index, layer in enumerate(find_layers(model)):
            local = gated_experts(layer)
            for position, expert in enumerate(mesh.local_experts(EXPERTS)):
                local.gate_up_proj[position, :16] = constant(index, expert, 0)
                local.gate_up_proj[position, 16:] = constant(index, expert, 1)
                local.down_proj[position] = constant(index, expert, 2)
    save_weights(model, mesh, folder, balanced=True)
    return sorted(path.name for path in folder.iterdir())


def values(layer: MoeLayer) -> list[list[list[float]]]:
    """The values that occur in gate, up and down of each local expert."""
    local = gated_experts(layer)
    parts = (local.gate_up_proj[:, :16], local.gate_up_proj[:, 16:], local.down_proj)
    return [[weights[expert].unique().tolist() for weights in parts] for expert in range(len(local.down_proj))]


def test_trap_T41_every_expert_is_saved_once_and_loaded_on_other_layouts(ranks: RankPool, tmp_path: Path) -> None:
    """Four ranks, so that two hold each expert; saved at EP 2, loaded at EP 1, 2 and 4 and by transformers."""
    listings = ranks.run(save_constants, 4, tmp_path)
    shards = [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    named = ["config.json", "generation_config.json", *shards, "model.safetensors.index.json"]
    assert listings == [named] * 4, "complete on every rank when the call returns"
    assert not set(load_file(tmp_path / shards[0])) & set(load_file(tmp_path / shards[1]))
    for expert_parallel in (1, 2, 4):
        for rank in range(expert_parallel):
            mesh = Mesh(expert_parallel, rank, expert_parallel)
            for index, layer in enumerate(find_layers(load_weights(tmp_path, mesh))):
                wanted = [[[constant(index, e, kind)] for kind in range(3)] for e in mesh.local_experts(EXPERTS)]
                assert values(layer) == wanted
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for expert, weight in enumerate(theirs.model.layers[2].mlp.experts.down_proj):
        assert weight.unique().tolist() == [constant(1, expert, 2)]


def test_a_second_save_removes_the_files_of_the_first(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_constants, 2, tmp_path)
    model = make_task(Case(), Mesh(1, 0, 1)).model
    save_weights(model, Mesh(1, 0, 1), tmp_path, balanced=True)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    opened = load_weights(tmp_path, Mesh(1, 0, 1)).state_dict()
    assert all(torch.equal(value, opened[name]) for name, value in model.state_dict().items())


def train_and_save(rank: int, world_size: int, folder: Path, bf16: bool) -> dict[str, Tensor]:
    """Make three steps with the engine and save -> the biases in memory by their names in the file."""
    mesh = make_mesh(2)
    task = make_task(Case(), mesh)
    settings = EngineSettings(1, ROWS // world_size, 1, "adamw", 1.0, bf16=bf16)
    with start_engine(task, parameter_groups(task.model, 0.1), settings, mesh) as engine:
        balancer = make_balancer(task, Case(policy=LossFree(rate=1e-3)))
        for step in range(3):
            train_step(engine, balancer, share(ragged_batch(seed=step), mesh, 1), 1e-3)
        save_weights(task.model, mesh, folder, balanced=True)
    return {
        f"{name}.gate.e_score_correction_bias": bias_E.clone()
        for name, bias_E in zip(balancer.routers, balancer.biases, strict=True)
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_trap_T39_the_saved_bias_is_the_one_in_memory(ranks: RankPool, tmp_path: Path, bf16: bool) -> None:
    """Also where the weights are bf16: the sum of three steps of 0.001 is not representable in bf16."""
    in_memory, _ = ranks.run(train_and_save, 2, tmp_path, bf16)
    stored = load_file(tmp_path / "model-00001-of-00002.safetensors")
    assert stored["model.norm.weight"].dtype == (torch.bfloat16 if bf16 else torch.float32)
    opened = {
        f"{layer.name}.gate.e_score_correction_bias": layer.router.selection_bias
        for layer in find_layers(load_weights(tmp_path, Mesh(1, 0, 1)))
    }
    assert len(in_memory) == 2 and in_memory.keys() == opened.keys()
    for name, bias_E in in_memory.items():
        assert bias_E.any() and not torch.equal(bias_E, bias_E.bfloat16().float())
        assert torch.equal(stored[name], bias_E) and stored[name].dtype == torch.float32
        assert torch.equal(opened[name], bias_E)
