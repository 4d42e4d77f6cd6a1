"""Attention of our own beside those of transformers: matrix products on a CPU, documents by their starts on a GPU.

Registered under `NAME`, so that every model that takes its attention by name can use it. What neither covers is left
to PyTorch's scaled_dot_product_attention, as transformers calls it ("sdpa").
Shapes: B sequences, H heads, G key-value heads, S positions, d width of a head, N documents, T = B * S tokens.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_moe.config.sections.model import AttentionName
from dist_moe.model.inputs import Documents
from dist_moe.worker.cpu_features import multiplies_bf16

NAME = "dist_moe"
# PyTorch's CPU kernel works on tiles in fp32, at a third of the speed of a bf16 matmul where the CPU multiplies bf16;
# where it emulates bf16, the matmuls take 2.5 times as long as the kernel. Beyond these lengths what the kernel skips
# (the keys after the query) and keeps in the cache weighs more. Positions, by dtype, on a CPU that multiplies bf16.
LONGEST = {torch.bfloat16: 512, torch.float32: 0}
HALF = (torch.float16, torch.bfloat16)
# Arguments of an attention function with which scores are computed in another way: scores capped by a tanh, a learned
# sink, a learned bias of positions.
OTHER_SCORES = ("softcap", "s_aux", "position_bias")


def attention_name(name: AttentionName) -> str:
    """Return the name in transformers of an implementation of `model.attention`."""
    return {"auto": NAME, "sdpa": "sdpa"}[name]


def attention(
    module: nn.Module,
    query_BHSd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return softmax(scaling * query key^T + mask) value as [B, S, H, d]: an attention function of transformers."""
    scale = query_BHSd.shape[-1] ** -0.5 if scaling is None else scaling
    plain = not dropout and all(others.get(name) is None for name in OTHER_SCORES)
    starts_N1 = others.get("cu_seq_lens_q")
    if starts_N1 is not None:
        window = others.get("sliding_window")
        if plain and query_BHSd.is_cuda and query_BHSd.dtype in HALF:
            documents = Documents(starts_N1, others["max_length_q"])
            return documents_attention(query_BHSd, key_BGSd, value_BGSd, documents, scale, window), None
        attention_mask = documents_mask(starts_N1, query_BHSd.shape[0], query_BHSd.shape[2], window)
    elif plain and attention_mask is not None and _adds_to_square_scores(attention_mask, query_BHSd, key_BGSd):
        return _Attention.apply(query_BHSd, key_BGSd, value_BGSd, attention_mask, scale), None
    return sdpa_attention_forward(
        module, query_BHSd, key_BGSd, value_BGSd, attention_mask, dropout=dropout, scaling=scaling, **others
    )


def _adds_to_square_scores(mask: Tensor, query_BHSd: Tensor, key_BGSd: Tensor) -> bool:
    """Whether a mask is one of `mask`, on a CPU: of the scores' dtype, for as many keys as queries."""
    return query_BHSd.is_cpu and mask.dtype == query_BHSd.dtype and key_BGSd.shape[2] == query_BHSd.shape[2]


def mask(batch_size: int, q_length: int, kv_length: int, **others: Any) -> Tensor | None:
    """Return the mask of "sdpa", or, where `attention` multiplies matrices, what it adds to the scores.

    A function of transformers, which calls it once for all layers with the same mask. Every row of a batch without
    padding allows its own position, so that no row of the scores is all minus infinity.
    """
    dtype = others.get("dtype", torch.float32)
    short = multiplies_bf16() and 1 < q_length == kv_length <= LONGEST.get(dtype, 0)
    if not short or others.get("attention_mask") is not None or torch.device(others.get("device", "cpu")).type != "cpu":
        return cast(Tensor | None, sdpa_mask(batch_size, q_length, kv_length, **others))
    allowed_B1SS = sdpa_mask(batch_size, q_length, kv_length, **{**others, "allow_is_causal_skip": False})
    if allowed_B1SS is None:  # an encoder without padding: nothing is masked
        return None
    if allowed_B1SS.stride(0) == 0:  # the same for every row
        allowed_B1SS = allowed_B1SS[:1]
    return torch.zeros_like(allowed_B1SS, dtype=dtype).masked_fill_(~allowed_B1SS, float("-inf"))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


class _Attention(torch.autograd.Function):
    """Attention as batched matmuls; the heads that share a key are the rows of one product."""

    @staticmethod
    def forward(
        ctx: Any, query_BHSd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, bias_B1SS: Tensor, scale: float
    ) -> Tensor:
        (batch, heads, length, _), groups = query_BHSd.shape, key_BGSd.shape[1]
        rows = heads // groups * length
        query = query_BHSd.reshape(batch * groups, rows, -1)
        key, value = (each.reshape(batch * groups, length, -1) for each in (key_BGSd, value_BGSd))
        scores = query.new_empty(batch * groups, rows, length)
        torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
        scores.view(batch, heads, length, length).add_(bias_B1SS)
        shares = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale, ctx.heads = scale, heads
        return torch.bmm(shares, value).view(batch, heads, length, -1).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        gradient_BSHd = gradients[0]
        batch, length = gradient_BSHd.shape[:2]
        gradient = gradient_BSHd.transpose(1, 2).reshape(len(query), shares.shape[1], -1)
        value_gradient = torch.bmm(shares.mT, gradient)
        shares_gradient = torch.bmm(gradient, value.mT)
        scores_gradient = torch._softmax_backward_data(shares_gradient, shares, -1, shares.dtype).mul_(ctx.scale)
        query_gradient = torch.bmm(scores_gradient, key)
        key_gradient = torch.bmm(scores_gradient.mT, query)
        key_shape = (batch, -1, length)
        return (
            query_gradient.view(batch, ctx.heads, length, -1),
            key_gradient.view(*key_shape, key.shape[-1]),
            value_gradient.view(*key_shape, value.shape[-1]),
            None,
            None,
        )


def documents_attention(
    query_BHSd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """Return causal attention within documents as [B, S, H, d], by the flash kernel for sequences of any lengths.

    Args:
        query_BHSd: fp16 or bf16 on a GPU.
        key_BGSd: As many positions.
        value_BGSd: As many positions; its heads may be narrower than those of the key.
        documents: Of the batch.
        scale: The factor on the scores.
        window: The positions that a token attends to, its own included; None: all of its document up to its own.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, width = query_BHSd.shape
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query_BHSd, key_BGSd, value_BGSd))
    value_width = value.shape[-1]
    if value_width < width:  # the kernel has one width for all three (multi-head latent attention: 192 and 128)
        value = nn.functional.pad(value, (0, width - value_width))
    starts, longest = documents
    bounds = (-1 if window is None else window - 1, 0)
    # The kernel takes fewer heads of the key as they are. Newer versions of this function ask whether that is meant.
    asked: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    found = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, window_size=bounds, **asked)
    return cast(Tensor, found)[..., :value_width].view(batch, length, heads, value_width)


def documents_mask(starts_N1: Tensor, batch: int, length: int, window: int | None) -> Tensor:
    """Return as a mask, bool [B, 1, S, S], what `documents_attention` lets a token attend to."""
    token_T = torch.arange(batch * length, device=starts_N1.device, dtype=starts_N1.dtype)
    document_BS = torch.bucketize(token_T, starts_N1, right=True).view(batch, length)
    position_S = token_T[:length]
    distance_SS = position_S.unsqueeze(1) - position_S
    near_SS = distance_SS >= 0 if window is None else (distance_SS >= 0) & (distance_SS < window)
    return (near_SS & (document_BS.unsqueeze(2) == document_BS.unsqueeze(1))).unsqueeze(1)


def documents_arguments(documents: Documents | None, model_config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments by which a model on a GPU hands the documents to `attention`; none where it does not.

    Without them transformers compares positions on the device to find packed documents, waits for the result, and
    builds a mask, which rules the flash kernel out.
    """
    if documents is None or model_config._attn_implementation != NAME or hasattr(model_config, "attention_chunk_size"):
        return {}
    starts, longest = documents
    return {
        # transformers makes no mask where it is given one of four dimensions, and hands this one on.
        "attention_mask": starts.new_empty(1, 1, 1, 0),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
