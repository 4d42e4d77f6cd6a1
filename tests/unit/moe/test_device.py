"""What a GPU runs for an MoE layer, on the CPU's tensors: equal results, and no host that waits for the device."""

import pytest
import torch
from torch import Tensor

from dist_moe.comm.mesh import Mesh
from dist_moe.model.routing import count_record
from dist_moe.moe.dispatch import MOST_SLOTS_UNREAD, dispatch
from dist_moe.moe.kernels import ANY_DEVICE
from dist_moe.moe.select import Rule, ThresholdRouting, TopK
from tests.dist.layers import PADDED, on
from tests.host_reads import HostReads, Operators
from tests.layer_operators import MOST_OPERATORS, TOKENS, WIDTH, Layer, layer_operators

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)
RULES: dict[str, Rule] = {
    "top-K": TopK(2, "sigmoid", normalize=True),
    "groups": TopK(2, "sigmoid", groups=4, topk_groups=2),
    "threshold": ThresholdRouting(0.5, 4),
}


def run(rule: Rule, dtype: torch.dtype, masked: bool) -> list[Tensor]:
    """One forward and backward -> the result, the load and all gradients."""
    layer = Layer(rule, dtype, ALONE)
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    probe_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    layer.router.open_record(torch.arange(TOKENS) % 3 > 0 if masked else None)
    mixed_TD = layer(hidden_TD)
    counts = count_record(layer.router, layer.router.close_record(), needs_margins=True)
    mixed_TD.backward(probe_TD)
    gradients = [leaf.grad for leaf in (hidden_TD, *layer.parameters()) if leaf.grad is not None]
    assert len(gradients) == 4
    return [mixed_TD.detach(), *(count for count in counts if count is not None), *gradients]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_device_computes_what_the_cpu_does(rule: str, masked: bool, dtype: torch.dtype) -> None:
    with on(PADDED):
        wanted = run(RULES[rule], dtype, masked)
    with on(ANY_DEVICE):
        found = run(RULES[rule], dtype, masked)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_trap_T52_on_a_device_the_host_waits_for_nothing(rule: str, masked: bool) -> None:
    with on(ANY_DEVICE), HostReads() as reads, Operators() as operators:
        run(RULES[rule], torch.float32, masked)
    assert reads.names == [] and operators.waiting == []


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_takes_few_operators(rule: str) -> None:
    names = layer_operators(0, 1, RULES[rule])
    assert len(names) <= MOST_OPERATORS, names


def test_trap_T52_on_a_device_a_token_with_many_slots_gets_rows_for_those_that_are_filled() -> None:
    ids_TK = torch.full((TOKENS, 2 * MOST_SLOTS_UNREAD), -1)
    ids_TK[:, 3], ids_TK[::2, 5] = 1, 2
    with on(ANY_DEVICE):
        dispatched = dispatch(torch.ones(TOKENS, WIDTH), ids_TK, torch.ones(ids_TK.shape), 4, ALONE)
    assert len(dispatched.rows_QD) == TOKENS + TOKENS // 2
