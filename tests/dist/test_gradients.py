"""Gradients of one step on two ranks against transformers, and a control of the comparison."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.utils import is_moe_param
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_moe.checkpoint.format.hf_weights import save_weights
from dist_moe.comm.mesh import Mesh, make_mesh
from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.engine.deepspeed import EngineSettings, start_engine
from dist_moe.model.build import parameter_groups
from tests.dist.pool import RankPool
from tests.dist.small import Case, Trace, make_task, named_weights, part, ragged_batch, run_case
from tests.dist.test_engine import assert_gradients, decays, expected, gradients_of, initial

ROWS_APART = Case(expert_parallel=2, zero_stage=1, accumulation=4)  # two ranks: each row is a micro-batch
EXPERT = re.compile(r"\.experts\.\d+\.")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model by transformers alone, in fp64: none of our routing, dispatch or experts."""
    folder = tmp_path_factory.mktemp("plain")
    save_weights(make_task(Case(), Mesh(1, 0, 1)).model, Mesh(1, 0, 1), folder, balanced=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


@pytest.fixture(scope="module")
def step(ranks: RankPool) -> list[Trace]:
    """One SGD step on two ranks with four micro-batches each."""
    return ranks.run(run_case, 2, ROWS_APART)


def mean_of_nll(model: Any, first: int, rows: int) -> Tensor:
    """-ln p in nats, the mean over the label tokens of some rows of the global batch; 0 where there are none."""
    batch = part(ragged_batch(), first, rows)
    logits_BSV = model(input_ids=batch.tokens_BS, position_ids=batch.positions_BS, use_cache=False).logits
    nll: Tensor = F.cross_entropy(logits_BSV.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum")
    return nll / (batch.targets_BS != IGNORE_INDEX).sum().clamp(min=1)


def plain_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` under the names of tests/dist/small.py, experts one by one."""
    model.zero_grad()
    loss.backward()
    named = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            named[f"model.{name}"] = parameter.grad.clone()
            continue
        for expert, gradient in enumerate(parameter.grad):
            named["model." + name.replace(".experts.", f".experts.{expert}.")] = gradient.clone()
    return named


def without_decay(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients in an SGD update, less the weight decay that is in it too."""
    return {name: g - 0.1 * initial()[name].double() if decays(name) else g for name, g in found.items()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of a tensor in units of its own norm (of a thousandth of the whole norm, if that is more)."""
    assert found.keys() <= wanted.keys() and found
    floor = 1e-3 * float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    return max(float((g - wanted[name]).norm()) / max(float(wanted[name].norm()), floor) for name, g in found.items())


def test_the_reference_of_the_engine_tests_is_transformers_own_gradient(plain_model: Any) -> None:
    _, _, reference = expected()
    wanted = plain_gradients(plain_model, mean_of_nll(plain_model, 0, 8))
    assert reference.keys() == wanted.keys()
    assert worst(reference, wanted) < 1e-5


def test_trap_T47_the_gradient_is_that_of_the_mean_over_all_label_tokens(plain_model: Any, step: list[Trace]) -> None:
    found = without_decay(gradients_of(step, 1.0))
    means = [mean_of_nll(plain_model, row, 1) for row in range(8)]
    assert worst(found, plain_gradients(plain_model, mean_of_nll(plain_model, 0, 8))) < 2e-4
    assert worst(found, plain_gradients(plain_model, torch.stack(means).mean())) > 0.1, "rows have equal labels"


def test_trap_T23_router_and_input_gradients_are_whole(plain_model: Any, step: list[Trace]) -> None:
    """The router's gradient comes through the gate weights, that of the layers below through all experts of a token."""
    wanted = plain_gradients(plain_model, mean_of_nll(plain_model, 0, 8))
    found = without_decay(gradients_of(step, 1.0))
    routers = {name: gradient for name, gradient in found.items() if name.endswith(".gate.weight")}
    below = {name: g for name, g in found.items() if ".layers.0." in name or "embed_tokens" in name}
    assert len(routers) == 2 and len(below) > 8
    assert worst(routers, wanted) < 2e-4
    assert worst(below, wanted) < 2e-4


def test_trap_T50_the_comparison_sees_expert_gradients_off_by_the_ep_degree(ranks: RankPool) -> None:
    """Under SGD with clipping active; under Adam, whose first step is the sign of the gradient, it could not."""
    _, norm, wanted = expected()
    case = Case(expert_parallel=2, zero_stage=0, clipping=0.2 * norm)
    found = gradients_of(ranks.run(run_case, 2, case), case.learning_rate)
    assert_gradients(found, 0.2, 2e-4)
    for degree in (0.5, 2.0):
        off = {
            name: gradient + 0.2 * (degree - 1) * wanted[name] if EXPERT.search(name) else gradient
            for name, gradient in found.items()
        }
        with pytest.raises(AssertionError, match=EXPERT.pattern):
            assert_gradients(off, 0.2, 2e-4)
    after = []
    for degree in (1.0, 2.0):
        expert = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.float64))
        expert.grad = degree * wanted["model.model.layers.1.mlp.experts.3.gate_up_proj"][:16]
        torch.optim.AdamW([expert], lr=1.0, eps=1e-12).step()
        after.append(expert.detach())
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)


def optimizer_view(rank: int, world_size: int, stage: int) -> tuple[int, set[str], set[str], dict[str, Tensor]]:
    """What the started engine's optimizer holds -> parameters in all, its MoE groups' names, its other groups'
    names, and this rank's weights."""
    mesh = make_mesh(2)
    task = make_task(Case(), mesh)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    settings = EngineSettings(stage, 4, 1, "adamw", 0.0, bf16=False)
    with start_engine(task, parameter_groups(task.model, 0.1), settings, mesh) as engine:
        optimizer = engine._engine.optimizer
        groups = [group["params"] for group in optimizer.param_groups]
        if stage > 0:  # there the groups hold flat shards
            groups = optimizer.bit16_groups
        experts = [bool(group.get("moe", False)) for group in optimizer.param_groups]
        grouped = [(names[id(p)], moe) for group, moe in zip(groups, experts, strict=True) for p in group]
        assert len(grouped) == len(dict(grouped)) == len(names), "a parameter is missing, or in two groups"
        assert all(is_moe_param(p) == moe for g, moe in zip(groups, experts, strict=True) for p in g)
        weights = named_weights(task, mesh)
    return (
        len(grouped),
        {n for n, moe in grouped if moe},
        {n for n, moe in grouped if not moe},
        weights,
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_trap_T25_experts_are_in_the_optimizer_and_in_its_moe_groups(ranks: RankPool, stage: int) -> None:
    """The start of the engine does not overwrite rank 1's experts by those of rank 0."""
    views = ranks.run(optimizer_view, 2, stage)
    for count, experts, others, weights in views:
        assert count == len(experts) + len(others)
        assert len(experts) == 4 and all(".experts.local." in name for name in experts)
        assert not any(".experts.local." in name for name in others)
        assert all(torch.equal(weight, initial()[name]) for name, weight in weights.items())
    ours, theirs = (set(filter(EXPERT.search, view[3])) for view in views)
    assert len(ours) == len(theirs) == 24 and not ours & theirs


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_trap_T25_experts_of_different_ranks_stay_their_own(ranks: RankPool, stage: int) -> None:
    case = Case(expert_parallel=2, zero_stage=stage, optimizer="adamw", learning_rate=1e-2, steps=2)
    traces = ranks.run(run_case, 2, case)
    moved = {name: weight - initial()[name] for trace in traces for name, weight in trace.weights.items()}
    experts = [name for name in moved if EXPERT.search(name)]
    assert len(experts) == 48
    for name in experts:
        assert moved[name].any(), f"{name} did not move"
        assert moved[name].abs().max() < 0.05, f"{name} is not where two steps of 0.01 could bring it"
