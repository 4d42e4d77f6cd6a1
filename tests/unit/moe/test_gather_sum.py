"""The sums of each token's rows, by every implementation, against a loop over slots."""

import pytest
import torch
from torch import Tensor

from dist_moe.moe.gather_sum import GatherSum, by_embedding_bag, by_gather

IMPLEMENTATIONS = {"by_embedding_bag": by_embedding_bag, "by_gather": by_gather}


def slow(rows_QD: Tensor, row_TK: Tensor) -> Tensor:
    """The slow twin, in fp64."""
    total_TD = torch.zeros(row_TK.shape[0], rows_QD.shape[1], dtype=torch.float64)
    for token, slot in (row_TK >= 0).nonzero().tolist():
        total_TD[token] += rows_QD[row_TK[token, slot]].double()
    return total_TD


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_trap_T27_empty_slots_add_nothing(implementation: GatherSum, dtype: torch.dtype, empty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, slots, width = 7, 3, 40
    rows_QD = torch.randn(tokens * slots + 2, width, generator=generator, dtype=torch.float64).to(dtype)
    rows_QD[-2:] = float("nan")
    row_TK = torch.randperm(tokens * slots, generator=generator).view(tokens, slots)
    row_TK[torch.rand(tokens, slots, generator=generator) < empty] = -1
    found_TD = implementation(rows_QD, row_TK)
    assert found_TD.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found_TD.double(), slow(rows_QD, row_TK), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "tokens"), [(0, 0), (0, 3), (2, 0)])
def test_without_rows_or_tokens_there_is_nothing_to_add(implementation: GatherSum, rows: int, tokens: int) -> None:
    row_TK = torch.full((tokens, 2), -1)
    assert torch.equal(implementation(torch.ones(rows, 5), row_TK), torch.zeros(tokens, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_terms_are_added_in_fp32(implementation: GatherSum) -> None:
    """256 + 1 is 256 in bf16, so that a sum in bf16 would lose every 1."""
    rows_QD = torch.tensor([256.0, *[1.0] * 8], dtype=torch.bfloat16).unsqueeze(1).expand(9, 16).contiguous()
    assert implementation(rows_QD, torch.arange(9).unsqueeze(0)).tolist() == [[264.0] * 16]
