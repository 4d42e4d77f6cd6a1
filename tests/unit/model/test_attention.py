"""Attention by matrix products and by starts of documents equals PyTorch's, forward and backward, or is PyTorch's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dist_moe.model import attention as module_under_test
from dist_moe.model.attention import (
    LONGEST,
    NAME,
    attention,
    documents_arguments,
    documents_attention,
    documents_mask,
)
from dist_moe.model.inputs import Documents, find_documents
from tests.dense import dense_folder, outputs, upcycled
from tests.unit.model.samples import ALONE, FAMILIES, small_model, tokens

BATCH, LENGTH = 2, 12
DOCUMENTS_BS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
SHAPES = {"equal heads": (4, 4, 8, 8), "shared keys": (6, 2, 8, 8), "narrow values": (4, 4, 12, 8)}
"""Query heads, key heads, width of a query, width of a value."""


class Layer(nn.Module):
    """What an attention function reads of its layer."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = heads // groups, True


def inputs(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as [B, heads, S, width], laid out as a layer makes them."""
    heads, groups, width, value_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)
    sizes = ((heads, width), (groups, width), (groups, value_width))
    query, key, value = (
        torch.randn(BATCH, LENGTH, *size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for size in sizes
    )
    return query, key, value


def run(found: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """An output, and the gradients of the leaves for one fixed gradient of it."""
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, leaves, gradient)]


def allowed(window: int | None = None) -> Tensor:
    """bool [B, 1, S, S] of `DOCUMENTS_BS`, by loops."""
    mask_B1SS = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row, documents in enumerate(DOCUMENTS_BS.tolist()):
        for query in range(LENGTH):
            for key in range(query + 1):
                near = window is None or query - key < window
                mask_B1SS[row, 0, query, key] = near and documents[query] == documents[key]
    return mask_B1SS


def doubled(leaves: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (leaf.detach().double().requires_grad_() for leaf in leaves)
    return query, key, value


def bias_of(mask_B1SS: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask_B1SS.shape, dtype=dtype).masked_fill_(~mask_B1SS, float("-inf"))


@pytest.fixture
def all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in every dtype, on any CPU."""
    monkeypatch.setattr(module_under_test, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(module_under_test, "LONGEST", dict.fromkeys((torch.float32, torch.bfloat16), 10_000))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_trap_T71_matrix_products_equal_sdpa(dtype: torch.dtype, tolerance: float, shape: str, packed: bool) -> None:
    heads, groups, width, _ = SHAPES[shape]
    layer, leaves = Layer(heads, groups), inputs(shape, dtype)
    mask_B1SS = allowed() if packed else torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    exact = doubled(leaves)
    wanted = run(sdpa_attention_forward(layer, *exact, mask_B1SS, scaling=width**-0.5)[0], exact)
    found = run(attention(layer, *leaves, bias_of(mask_B1SS, dtype), scaling=width**-0.5)[0], leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


def test_in_bf16_the_error_is_of_the_size_of_that_of_sdpa() -> None:
    layer, leaves = Layer(4, 4), inputs("equal heads", torch.bfloat16)
    exact = doubled(leaves)
    wanted = run(sdpa_attention_forward(layer, *exact, allowed())[0], exact)
    theirs = run(sdpa_attention_forward(layer, *leaves, allowed())[0], leaves)
    ours = run(attention(layer, *leaves, bias_of(allowed(), torch.bfloat16))[0], leaves)
    for one, other, value in zip(ours, theirs, wanted, strict=True):
        assert (one.double() - value).norm() < 2 * (other.double() - value).norm()


@pytest.mark.parametrize("others", [{"dropout": 0.5}, {"softcap": 20.0}, {"position_bias": torch.ones(1, 4, 12, 12)}])
def test_trap_T71_what_matrix_products_do_not_cover_goes_to_sdpa(
    others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(module_under_test, "sdpa_attention_forward", lambda *_, **named: calls.append(named))
    bias_B1SS = bias_of(allowed(), torch.float32)
    attention(Layer(4, 4), *inputs("equal heads", torch.float32), bias_B1SS, **others)
    attention(Layer(4, 4), *inputs("equal heads", torch.float32), allowed())
    attention(Layer(4, 4), *inputs("equal heads", torch.float32), None)
    assert len(calls) == 3 and calls[0].items() >= others.items()


def test_a_float_mask_for_more_keys_than_queries_goes_to_sdpa() -> None:
    """As a model gives it that makes a mask of its own and generates with a cache."""
    query, key, value = inputs("shared keys", torch.float32)
    bias_B1SS = bias_of(allowed(), torch.float32)[:, :, -3:]
    found = attention(Layer(6, 2), query[:, :, -3:], key, value, bias_B1SS)[0]
    wanted = sdpa_attention_forward(Layer(6, 2), query[:, :, -3:], key, value, bias_B1SS)[0]
    assert torch.equal(found, wanted)


def gradients(model: Any, name: str, positions_BS: Tensor) -> list[Tensor]:
    """The logits and the gradients of a model with an implementation of attention."""
    model.config._attn_implementation = name
    model.zero_grad()
    logits_BSV = model(input_ids=tokens(2, LENGTH), position_ids=positions_BS, use_cache=False).logits
    return run(logits_BSV, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.usefixtures("all_lengths")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("qwen3_moe", {}), ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}), ("deepseek_v3", {})],
)
def test_a_family_gives_the_same_gradients(
    architecture: str, changes: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **FAMILIES[architecture][0], **changes), dtype=torch.float32
    )
    row = torch.cat([torch.arange(5), torch.arange(7)]) if packed else torch.arange(LENGTH)
    products: list[Tensor] = []
    apply = module_under_test._Attention.apply

    def recorded(*given: Any) -> Any:
        products.append(given[3])
        return apply(*given)

    monkeypatch.setattr(module_under_test._Attention, "apply", recorded)
    wanted = gradients(model, "sdpa", row.expand(2, -1))
    assert not products
    found = gradients(model, NAME, row.expand(2, -1))
    assert len(products) == model.config.num_hidden_layers
    assert {id(bias) for bias in products} == {id(products[0])}, "the mask is made once"
    assert products[0].shape[0] == (2 if packed else 1)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def test_lengths_and_dtypes_beyond_the_rule_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "multiplies_bf16", lambda: True)

    def mask_of(length: int, dtype: torch.dtype, **others: Any) -> Tensor | None:
        return module_under_test.mask(2, length, length, dtype=dtype, **others)

    longest = LONGEST[torch.bfloat16]
    bias = mask_of(longest, torch.bfloat16)
    assert bias is not None and bias.dtype == torch.bfloat16 and bias.shape == (1, 1, longest, longest)
    assert torch.equal(bias[0, 0], bias_of(torch.ones(longest, longest).tril().bool(), torch.bfloat16))
    assert mask_of(longest + 1, torch.bfloat16) is None, "the flag says causal"
    assert mask_of(1, torch.bfloat16) is None
    assert mask_of(8, torch.float32) is None and mask_of(8, torch.float16) is None
    padded = mask_of(4, torch.bfloat16, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool())
    assert padded is not None and padded.dtype == torch.bool
    assert module_under_test.mask(2, 1, 8, q_offset=7, dtype=torch.bfloat16) is None


def test_a_cpu_that_emulates_bf16_leaves_it_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "multiplies_bf16", lambda: False)
    assert module_under_test.mask(2, 8, 8, dtype=torch.bfloat16) is None


@pytest.mark.usefixtures("all_lengths")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_generation_gives_the_same_tokens(architecture: str) -> None:
    model: Any = small_model(architecture).eval()
    found = []
    for name in ("sdpa", NAME):
        model.config._attn_implementation = name
        found.append(model.generate(tokens(2, 6), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_trap_T71_the_mask_of_documents_equals_loops(window: int | None) -> None:
    starts_N1, _ = find_documents(DOCUMENTS_BS)
    assert torch.equal(documents_mask(starts_N1, BATCH, LENGTH, window), allowed(window))


def slow_varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *rest: Any, **named: Any) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` for causal attention, one document after the other."""
    starts_k, longest_q, longest_k = rest
    assert torch.equal(starts, starts_k) and longest_q == longest_k == int(starts.diff().max())
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "the kernel has one width"
    assert starts.dtype == torch.int32 and named["window_size"][1] == 0
    left, shared = named["window_size"][0], query.shape[1] // key.shape[1]
    parts = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (each[begin:end].transpose(0, 1) for each in (query, key, value))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        near = (distance >= 0) & (distance <= left) if left >= 0 else distance >= 0
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=named["scale"]).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_trap_T71_attention_by_starts_equals_sdpa_with_a_mask(
    shape: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slow twin of the kernel, which runs on a GPU only (tests/gpu)."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", slow_varlen)
    heads, groups, *_ = SHAPES[shape]
    leaves = inputs(shape, torch.float64)
    documents = find_documents(DOCUMENTS_BS)
    found = run(documents_attention(*leaves, documents, 0.3, window), leaves)
    wanted = run(sdpa_attention_forward(Layer(heads, groups), *leaves, allowed(window), scaling=0.3)[0], leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_takes_the_documents_instead_of_the_positions(architecture: str) -> None:
    """As on a GPU in fp32: transformers makes no mask, and each layer makes that of the documents."""
    model: Any = small_model(architecture).eval()
    positions_BS = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(LENGTH)])
    given = {"input_ids": tokens(2, LENGTH), "position_ids": positions_BS, "use_cache": False}
    arguments = documents_arguments(find_documents(DOCUMENTS_BS), model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(**given, **arguments).logits, model(**given).logits, rtol=1e-5, atol=1e-5)
        other = documents_arguments(find_documents(torch.zeros_like(DOCUMENTS_BS)), model.config)
        assert not torch.allclose(model(**given, **other).logits, model(**given).logits, rtol=1e-3, atol=1e-3)


def test_documents_are_given_only_where_they_are_read() -> None:
    model: Any = small_model("qwen3_moe")
    documents = Documents(torch.tensor([0, 4], dtype=torch.int32), 4)
    assert documents_arguments(documents, model.config)
    assert documents_arguments(None, model.config) == {}
    model.config.attention_chunk_size = 8  # a pattern of its own, which starts of documents do not describe
    assert documents_arguments(documents, model.config) == {}
    other: Any = small_model("qwen3_moe")
    other.config._attn_implementation = "sdpa"
    assert documents_arguments(documents, other.config) == {}


def test_an_encoder_in_bf16_attends_to_later_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As that of transformers; without padding there is no mask."""
    monkeypatch.setattr(module_under_test, "multiplies_bf16", lambda: True)
    theirs = dense_folder(tmp_path, "bert").bfloat16()
    ours = upcycled(tmp_path, "bert", ALONE).bfloat16()
    tokens_BS, changed_BS = tokens(), tokens()
    changed_BS[:, -1] = 1
    found, wanted, other = (
        outputs(model, ids_BS).float() for model, ids_BS in ((ours, tokens_BS), (theirs, tokens_BS), (ours, changed_BS))
    )
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert not torch.allclose(found[:, 0], other[:, 0], atol=0.05)
