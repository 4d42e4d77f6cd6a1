"""Layers whose experts are those that a table names for the id of each token: DeepSeek-V4's first ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dist_moe
from dist_moe.balancing.losses import RoutingLosses
from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.export import export
from dist_moe.checkpoint.format.hf_weights import load_weights, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.model.convert import find_layers
from dist_moe.model.family.hash_router import HashRouter
from dist_moe.model.routing import count_record, routing_loss
from dist_moe.probe.layers import FoundLayer
from dist_moe.probe.router_probe import probe_router
from tests.families.small import EXPERTS, TOP_K, VOCABULARY, small_config
from tests.family_models import ALONE, converted, difference, logits, random_model

FAMILY, TABLE = "deepseek_v4", "ffn.gate.tid2eid"
SAME = 2e-5


def draw_tables(model: Any) -> dict[str, Tensor]:
    """Give the tables of a model of transformers, which are 0 at first, random experts; return them by module."""
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid")}
    for seed, table_VK in enumerate(tables.values()):
        generator = torch.Generator().manual_seed(seed)
        table_VK.copy_(torch.rand(len(table_VK), EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K])
    return {name.removesuffix(".gate.tid2eid"): table for name, table in tables.items()}


def write_folder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Write the folder of a small model with random weights and tables."""
    theirs: Any = random_model(FAMILY).theirs
    tables = draw_tables(theirs)
    theirs.save_pretrained(folder)
    return theirs, tables


def fixed(model: Any) -> dict[str, HashRouter]:
    """The layers with a table."""
    return {layer.name: layer.router for layer in find_layers(model) if isinstance(layer.router, HashRouter)}


def test_the_experts_of_a_token_are_those_of_the_table_in_the_folder(tmp_path: Path) -> None:
    theirs, tables = write_folder(tmp_path)
    for mesh in (ALONE, Mesh(2, 1, 2)):
        routers = fixed(load_weights(tmp_path, mesh))
        assert routers.keys() == tables.keys() and len(tables) < len(find_layers(load_weights(tmp_path, ALONE)))
        assert all(torch.equal(router.table_VK, tables[name]) for name, router in routers.items())
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


def test_a_new_model_has_different_experts_for_a_token_the_same_for_a_seed() -> None:
    config = small_config(FAMILY, mlp_layer_types=["hash_moe", "hash_moe", "moe"])
    first, second = (fixed(converted(config)) for _ in range(2))
    tables = [router.table_VK for router in first.values()]
    assert len(tables) == 2 and not torch.equal(*tables)
    for table_VK, name in zip(tables, second, strict=True):
        assert table_VK.shape == (VOCABULARY, TOP_K) and table_VK.max() < EXPERTS
        assert all(len(set(row_K)) == TOP_K for row_K in table_VK.tolist())
        assert torch.equal(table_VK, second[name].table_VK)


def records_of(model: Any, tokens: Tensor, mask_T: Tensor | None = None) -> list[tuple[Any, Any]]:
    """Run a model; return (router, record) of each layer."""
    found = [layer.router for layer in find_layers(model)]
    for router in found:
        router.open_record(mask_T)
    model(input_ids=tokens, use_cache=False)
    return [(router, router.close_record()) for router in found]


def test_trap_T120_counts_are_those_of_the_table_without_padding() -> None:
    """The logits would select other experts."""
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    mask_T = torch.arange(48) % 7 > 0
    for router, record in records_of(converted(small_config(FAMILY)), tokens, mask_T):
        counts = count_record(router, record, needs_margins=False)
        assert counts.load_E.sum() == TOP_K * mask_T.sum() and not counts.k_histogram_K[:-1].any()
        if isinstance(router, HashRouter):
            expected_E = router.table_VK[tokens.flatten()[mask_T]].flatten().bincount(minlength=EXPERTS)
            assert torch.equal(counts.load_E, expected_E)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch", "sequence"])
def test_trap_T120_no_balance_loss_changes_the_gate_weights_of_a_table(scope: Any) -> None:
    model = converted(small_config(FAMILY)).train()
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    for router, record in records_of(model, tokens):
        router.last_load.random_(1, 99)
        counts = count_record(router, record, needs_margins=False)
        for losses in (RoutingLosses(balance=1.0, scope=scope), RoutingLosses(balance=1.0, scope=scope, z=1.0)):
            loss = routing_loss(losses, router, record, counts, sequences=2)
            z = routing_loss(RoutingLosses(z=1.0), router, record, counts, sequences=2) if losses.z else 0.0
            assert bool(loss == z) == isinstance(router, HashRouter)


def test_trap_T120_a_bias_moves_no_token_of_a_table() -> None:
    model = converted(small_config(FAMILY)).train()
    balancer = dist_moe.balance(model, "loss_free", rate=0.1)
    (router,) = fixed(model).values()
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    load = balancer.step()
    for layer, found, counts_E in zip(find_layers(model), balancer.layers, load.counts_LE, strict=True):
        is_fixed = layer.router is router
        assert bool(layer.router.selection_bias.any()) != is_fixed
        assert (found.bias, "no bias moves" in found.reason) == ((None, True) if is_fixed else ("own", False))
        assert sum(counts_E) == TOP_K * tokens.numel()


def test_a_policy_without_a_layer_that_it_can_move_is_refused() -> None:
    model = converted(small_config(FAMILY, mlp_layer_types=["hash_moe"] * 3))
    with pytest.raises(dist_moe.UserError, match=r"no layer can be balanced: model.layers.0.mlp: .*no bias moves them"):
        dist_moe.balance(model)


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_a_table_with_another_expert_is_refused(tmp_path: Path, expert: int) -> None:
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(TABLE))
    tensors[name][5, 1] = expert
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=rf"tid2eid names expert {expert}, which is none of 0 to {EXPERTS - 1}"):
        load_weights(tmp_path, ALONE)
    tensors[name] = tensors[name].float()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"another dtype: .*tid2eid F32 instead of I64"):
        load_weights(tmp_path, ALONE)


@pytest.mark.parametrize("plain", [False, True])
def test_the_table_is_in_checkpoints_and_in_the_export(tmp_path: Path, plain: bool) -> None:
    theirs, tables = write_folder(tmp_path / "first")
    save_weights(load_weights(tmp_path / "first", ALONE), ALONE, tmp_path / "step-000001", balanced=False)
    export(tmp_path / "step-000001", tmp_path / "out", "bf16", plain=plain)
    for folder in (tmp_path / "step-000001", tmp_path / "out"):
        again = fixed(load_weights(folder, ALONE))
        assert all(torch.equal(router.table_VK, tables[name]) for name, router in again.items())
    if not plain:
        return
    opened = type(theirs).from_pretrained(tmp_path / "out")
    found = {name: each for name, each in opened.named_buffers() if name.endswith("tid2eid")}
    assert found and all(torch.equal(each, tables[name.removesuffix(".gate.tid2eid")]) for name, each in found.items())


def test_a_routed_model_has_its_tables_and_is_saved_with_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tables = write_folder(tmp_path / "first")
    dist_moe.route(model, "threshold", threshold=0.4, target_experts_per_token=TOP_K + 1.0)
    assert "model.layers.0.mlp is routed as before" in caplog.text
    routers = fixed(model)
    assert all(torch.equal(router.table_VK, tables[name]) for name, router in routers.items())
    model.save_pretrained(tmp_path / "second")
    again = dist_moe.from_pretrained(tmp_path / "second", expert_parallel=1).eval()
    assert all(torch.equal(router.table_VK, tables[name]) for name, router in fixed(again).items())
    assert difference(logits(again), logits(model.eval())) < SAME
    others = [layer.router for layer in find_layers(again) if layer.name not in routers]
    for router in others:
        assert router.threshold is not None
        router.threshold.fill_(0.25)
    assert others and not any(router.threshold for router in fixed(again).values())
    assert all(router.target_experts_per_token == TOP_K + 1 for router in others)
    balancer = dist_moe.balance(again.train(), "adaptive_weight", rate=0.1)._core
    assert balancer.threshold == 0.25


def test_a_model_with_tables_alone_is_not_routed() -> None:
    model = random_model(FAMILY, mlp_layer_types=["hash_moe"] * 3).theirs
    with pytest.raises(dist_moe.UserError, match=r"no layer can be routed by another rule: model.layers.0.mlp"):
        dist_moe.route(model)


class Segmented(nn.Module):
    """Selects by its logits, and has a table of integers for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16))
        self.register_buffer("segments", torch.arange(32 * TOP_K).view(32, TOP_K) % EXPERTS)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        return logits, *logits.softmax(dim=-1).topk(TOP_K)


def test_trap_T120_a_table_that_the_router_does_not_select_by_is_not_one() -> None:
    layer = FoundLayer("mlp", nn.Module(), Segmented(), nn.Module())
    with pytest.raises(dist_moe.UserError, match="its experts are not those of its segments"):
        probe_router(layer, None)
