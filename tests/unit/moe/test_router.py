"""The router: its record, its mask, the precision of its bias and its logits, and its result."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_moe.balancing.counts import count_routing
from dist_moe.moe.router import Router
from dist_moe.moe.select import TopK
from dist_moe.scores import Score


def make_router(experts: int = 4, top_k: int = 2, score: Score = "sigmoid", width: int = 8) -> Router:
    """A router with random weights."""
    router = Router(experts, width, TopK(top_k=top_k, score=score))
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, width, generator=torch.Generator().manual_seed(0)))
    return router


def load_of(router: Router) -> Tensor:
    """load_E of the record that is open, which this closes."""
    return count_routing(router.close_record().ids_TK, router.num_experts, router.max_experts_per_token).load_E


def hidden(tokens: int, width: int = 8) -> Tensor:
    """Random hidden states."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))


def test_the_result_is_that_of_a_hugging_face_gate() -> None:
    router = make_router()
    logits_TE, weights_TK, ids_TK = router(hidden(6).bfloat16().view(2, 3, 8))
    assert (logits_TE.shape, logits_TE.dtype) == ((6, 4), torch.float32)
    assert (weights_TK.shape, weights_TK.dtype) == ((6, 2), torch.bfloat16)
    assert (ids_TK.shape, ids_TK.dtype) == ((6, 2), torch.int64)


def test_logits_are_computed_in_fp32_under_autocast_and_in_bf16() -> None:
    router, hidden_TD = make_router(), hidden(6)
    exact_TE = hidden_TD @ router.weight.detach().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(hidden_TD)[0], exact_TE)
    rounded_TE = hidden_TD.bfloat16().float() @ router.weight.detach().bfloat16().float().T
    assert torch.equal(router.bfloat16()(hidden_TD.bfloat16())[0], rounded_TE)


def test_trap_T23_the_gradients_of_the_logits_are_those_of_a_product() -> None:
    router, hidden_TD = make_router(), hidden(6).bfloat16().requires_grad_()
    router.bfloat16()
    probe_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    router(hidden_TD)[0].backward(probe_TE)
    wanted_TD = probe_TE @ router.weight.detach().float()
    torch.testing.assert_close(hidden_TD.grad, wanted_TD.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(router.weight.grad, (probe_TE.T @ hidden_TD.detach().float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_router_computes_no_gradient_of_its_weight(frozen: bool) -> None:
    router, hidden_TD = make_router(), hidden(6).requires_grad_()
    router.weight.requires_grad_(not frozen)
    logits_TE = router(hidden_TD)[0]
    with FlopCounterMode(display=False) as counter:
        logits_TE.sum().backward()
    assert counter.get_total_flops() == (1 if frozen else 2) * 2 * 6 * 4 * 8
    assert hidden_TD.grad is not None and (router.weight.grad is None) == frozen


@pytest.mark.parametrize("top_k", [2, 4])
def test_trap_T04_padding_is_neither_routed_nor_counted(top_k: int) -> None:
    """As many tokens as experts, and with top_k=4 as many slots too: a mask on the wrong axis would fit."""
    router, hidden_TD = make_router(experts=4, top_k=top_k), hidden(4)
    exists_T = torch.tensor([True, False, True, False])
    router.open_record(None)
    all_ids_TK = router(hidden_TD)[2]
    assert load_of(router).sum() == 4 * top_k
    router.open_record(exists_T)
    ids_TK = router(hidden_TD)[2]
    assert ids_TK.tolist() == [
        ids if exists else [-1] * top_k for ids, exists in zip(all_ids_TK.tolist(), exists_T.tolist(), strict=True)
    ]
    assert load_of(router).tolist() == all_ids_TK[exists_T].flatten().bincount(minlength=4).tolist()


def test_trap_T07_each_record_is_new_and_read_once() -> None:
    router, hidden_TD = make_router(), hidden(5)
    loads = []
    for _ in range(2):
        router.open_record(None)
        router(hidden_TD)
        loads.append(load_of(router))
    assert loads[0].tolist() == loads[1].tolist()
    assert loads[0].dtype == torch.int64 and int(loads[0].sum()) == 5 * 2
    with pytest.raises(RuntimeError, match="close_record without open_record"):
        router.close_record()


def test_a_forward_without_a_record_does_not_change_the_last_record() -> None:
    router, hidden_TD = make_router(), hidden(5)
    router.open_record(None)
    router(hidden_TD)
    load_E = load_of(router)
    router(hidden_TD)
    assert int(load_E.sum()) == 5 * 2


def test_the_mask_is_kept_after_the_record_in_training_only() -> None:
    router, hidden_TD = make_router(), hidden(3)
    exists_T = torch.tensor([True, False, True])
    for training in (True, False):
        router.train(training).open_record(exists_T)
        router(hidden_TD)
        router.close_record()
        assert (router(hidden_TD)[2] < 0).any() == training


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_trap_T18_the_bias_of_the_router_selects_and_has_no_gradient(score: Score) -> None:
    router, hidden_TD = make_router(score=score, top_k=1), hidden(5)
    plain_TE = router(hidden_TD)[0].detach()
    router.selection_bias[2] = 99.0
    logits_TE, weights_TK, ids_TK = router(hidden_TD)
    assert ids_TK.tolist() == [[2]] * 5
    scores_TE = plain_TE.sigmoid() if score == "sigmoid" else plain_TE.softmax(dim=1)
    assert torch.equal(logits_TE, plain_TE) and torch.equal(weights_TK, scores_TE[:, 2:3])
    weights_TK.sum().backward()
    assert router.weight.grad is not None and router.weight.grad[2].abs().min() > 0
    assert not router.selection_bias.requires_grad
    assert "selection_bias" not in dict(router.named_parameters())


CASTS = {
    ".bfloat16()": lambda module: module.bfloat16(),
    ".half()": lambda module: module.half(),
    ".to(bf16)": lambda module: module.to(torch.bfloat16),
    ".to(cpu, bf16)": lambda module: module.to("cpu", torch.bfloat16),
    ".double()": lambda module: module.double(),
    ".bfloat16().float()": lambda module: module.bfloat16().float(),
    "deepcopy": lambda module: copy.deepcopy(module).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_trap_T12_the_bias_stays_fp32_under_every_cast(cast: str) -> None:
    router = make_router()
    router.selection_bias += 0.5 + 1e-3
    kept = CASTS[cast](nn.Sequential(router)).get_buffer("0.selection_bias")
    assert kept.dtype == torch.float32
    assert torch.equal(kept, torch.full((4,), 0.5) + torch.tensor(1e-3)), "0.5 + 0.001 is 0.5 in bf16"


def test_trap_T12_the_bias_that_is_saved_is_the_one_that_selects() -> None:
    router = make_router(top_k=1).bfloat16()
    router.selection_bias[1] = 99.0
    assert router(hidden(3).bfloat16())[2].tolist() == [[1]] * 3
    assert router.state_dict()["selection_bias"].data_ptr() == router.selection_bias.data_ptr()
    other = make_router(top_k=1).bfloat16()
    other.load_state_dict(router.state_dict())
    assert other.selection_bias.dtype == torch.float32
    assert torch.equal(other.selection_bias, router.selection_bias)


def test_a_router_on_meta_gets_an_fp32_bias_when_it_is_materialized() -> None:
    with torch.device("meta"):
        router = Router(4, 8, TopK(top_k=2, score="sigmoid"))
    router.to_empty(device="cpu")
    assert (router.selection_bias.dtype, router.selection_bias.device.type) == (torch.float32, "cpu")
