"""A dozen families of transformers that cover what families differ in; `make families` tries all of them."""

import pytest

from tests.families.balanced import try_balance

COVERING = {
    "qwen3_moe": "ours",  # softmax, no bias
    "deepseek_v2": "ours",  # a factor on the weights
    "deepseek_v3": "own",  # sigmoid, a buffer of the router
    "deepseek_v4": "own",  # square root of softplus; layers that route by token
    "ernie4_5_moe": "own",  # a bias on probabilities
    "afmoe": "own",  # a frozen parameter of the block, handed to the router
    "minimax_m2": "own",  # a buffer of the block
    "granitemoe": "ours",  # results in another order
    "gpt_oss": "ours",  # a router with a bias of its own, transposed experts
    "lfm2_moe": "own",
    "qwen3_next": "ours",  # recurrent layers
    "jamba": "ours",  # the block selects, from the logits of a linear layer
    "llama4": "ours",  # the block computes all experts, and multiplies their input by the gate weights
    "glm4v_moe": "own",  # the text part of a model with images
}


FAST = ("qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in COVERING]
)
def test_a_family_is_balanced_and_counted_exactly(family: str) -> None:
    result = try_balance(family)
    assert result.works, result
    assert result.bias == COVERING[family]


def test_a_router_that_computes_something_else_is_refused() -> None:
    result = try_balance("phimoe")
    assert not result.works
    assert "none of the known rules" in result.reason
