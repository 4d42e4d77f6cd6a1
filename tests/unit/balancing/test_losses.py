"""The auxiliary losses against slow loops, on numbers by hand, and with padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.balancing.losses import (
    balance_loss,
    entropy_loss,
    gate_shares,
    load_fractions,
    orthogonality_loss,
    sequence_balance_loss,
    z_loss,
)


def slow_balance_loss(shares: list[list[float]], ids: list[list[int]]) -> float:
    """T * E * sum over experts of (its share of the assignments) * (its mean probability), for one set of tokens."""
    kept = [token for token, taken in enumerate(ids) if any(expert >= 0 for expert in taken)]
    if not kept:
        return 0.0
    experts = len(shares[0])
    assignments = [expert for taken in ids for expert in taken if expert >= 0]
    total = 0.0
    for expert in range(experts):
        fraction = assignments.count(expert) / len(assignments)
        total += fraction * sum(shares[token][expert] for token in kept) / len(kept)
    return len(kept) * experts * total


@settings(deadline=None)
@given(sequences=st.integers(1, 3), length=st.integers(1, 5), experts=st.integers(2, 6), seed=st.integers(0, 1000))
def test_both_balance_losses_equal_a_slow_loop(sequences: int, length: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = sequences * length
    shares_TE = gate_shares(torch.rand(tokens, experts, generator=generator, dtype=torch.float64))
    ids_TK = torch.randint(-1, experts, (tokens, 2), generator=generator)
    ids_TK[torch.rand(tokens, generator=generator) < 0.3] = -1
    mask_T = (ids_TK >= 0).any(dim=1)
    load_E = torch.bincount(ids_TK[ids_TK >= 0], minlength=experts)
    whole = balance_loss(shares_TE, load_fractions(load_E), mask_T)
    assert float(whole) == pytest.approx(slow_balance_loss(shares_TE.tolist(), ids_TK.tolist()), rel=1e-5)
    separate = sum(
        slow_balance_loss(shares_TE[start : start + length].tolist(), ids_TK[start : start + length].tolist())
        for start in range(0, tokens, length)
    )
    assert float(sequence_balance_loss(shares_TE, ids_TK, sequences)) == pytest.approx(separate, rel=1e-9)


def test_an_even_load_costs_one_per_token() -> None:
    shares_TE = torch.full((6, 3), 1 / 3)
    assert float(balance_loss(shares_TE, load_fractions(torch.tensor([4, 4, 4])))) == pytest.approx(6.0)
    ids_TK = torch.tensor([[0, 1], [2, 0], [1, 2]] * 2)
    assert float(sequence_balance_loss(shares_TE, ids_TK, 2)) == pytest.approx(6.0)


def test_one_expert_with_all_load_and_probability_costs_e_per_token() -> None:
    shares_TE = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 5)
    assert float(balance_loss(shares_TE, load_fractions(torch.tensor([5, 0, 0, 0])))) == pytest.approx(20.0)


def test_trap_T21_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    """Each layer sends all its tokens to an expert of its own; joined before the product they would look even."""
    first_TE, second_TE = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    loads = torch.tensor([4, 0]), torch.tensor([0, 4])
    separate = sum(
        float(balance_loss(shares_TE, load_fractions(load_E)))
        for shares_TE, load_E in zip((first_TE, second_TE), loads, strict=True)
    )
    joined = float(balance_loss(torch.cat([first_TE, second_TE]), load_fractions(loads[0] + loads[1])))
    assert (separate, joined) == (16.0, 8.0)


def test_the_gradient_lowers_overloaded_experts_and_raises_underloaded_ones() -> None:
    logits_TE = torch.zeros(4, 3, requires_grad=True)
    balance_loss(logits_TE.softmax(dim=1), load_fractions(torch.tensor([6, 2, 0]))).backward()
    assert logits_TE.grad is not None
    gradient_E = logits_TE.grad.sum(dim=0)
    assert gradient_E[0] > gradient_E[1] > gradient_E[2] and gradient_E[0] > 0 > gradient_E[2]


def test_z_loss_is_the_squared_logarithm_of_the_partition() -> None:
    logits_TE = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]])
    wanted = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits_TE[:2].tolist())
    assert float(z_loss(logits_TE, torch.tensor([True, True, False]))) == pytest.approx(wanted, rel=1e-6)


def test_entropy_is_in_nats_and_zero_for_a_certain_choice() -> None:
    shares_TE = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    assert float(entropy_loss(shares_TE, torch.tensor([True, True, False]))) == pytest.approx(math.log(2))


@pytest.mark.parametrize("mask", [[False] * 3, [True, False, True]])
def test_trap_T04_padding_costs_nothing_and_gets_no_gradient(mask: list[bool]) -> None:
    logits_TE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask_T = torch.tensor(mask)
    ids_TK = torch.tensor([[0], [1], [0]]).masked_fill(~mask_T.unsqueeze(1), -1)
    shares_TE = logits_TE.softmax(dim=1)
    terms: list[Tensor] = [
        balance_loss(shares_TE, load_fractions(torch.tensor([2, 0, 0, 0])), mask_T),
        sequence_balance_loss(shares_TE, ids_TK, 1),
        z_loss(logits_TE, mask_T),
        entropy_loss(shares_TE, mask_T),
    ]
    for term in terms:
        (gradient_TE,) = torch.autograd.grad(term, logits_TE, retain_graph=True)
        assert not gradient_TE[~mask_T].any()
        assert bool(gradient_TE[mask_T].any()) == any(mask)
        assert math.isfinite(float(term.detach()))


def test_fractions_without_any_load_are_0() -> None:
    assert load_fractions(torch.zeros(3, dtype=torch.int64)).tolist() == [0.0] * 3
    assert load_fractions(torch.tensor([3, 1])).tolist() == [0.75, 0.25]


def test_trap_T80_the_orthogonality_loss_by_hand() -> None:
    """W W^T is [[5, 3], [3, 2]]: |5 - 1| + 2 |3| + |2 - 1|."""
    assert float(orthogonality_loss(torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0]]))) == 11.0
    assert float(orthogonality_loss(torch.eye(3, 5))) == 0.0


def test_the_gradient_of_the_orthogonality_loss_is_that_of_a_slow_loop() -> None:
    weight_ED = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    twin_ED = weight_ED.detach().clone().requires_grad_()
    orthogonality_loss(weight_ED).backward()
    total = torch.zeros((), dtype=torch.float64)
    for one, row_D in enumerate(twin_ED):
        for other, column_D in enumerate(twin_ED):
            total = total + ((row_D * column_D).sum() - float(one == other)).abs()
    total.backward()
    torch.testing.assert_close(weight_ED.grad, twin_ED.grad)


def test_the_orthogonality_loss_of_a_router_in_bf16_is_computed_in_fp32() -> None:
    loss = orthogonality_loss(torch.eye(3, 5, dtype=torch.bfloat16) * 1.0078125)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(3 * (1.0078125**2 - 1), rel=1e-6), "0 in bf16, or twice as much"


def test_gradient_steps_make_the_rows_of_a_router_orthonormal() -> None:
    weight_ED = (0.5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.SGD([weight_ED], lr=0.02)
    before = float(orthogonality_loss(weight_ED).detach())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.98**step
        optimizer.zero_grad()
        orthogonality_loss(weight_ED).backward()
        optimizer.step()
    assert float(orthogonality_loss(weight_ED).detach()) < 0.02 * before
