"""The router: a linear map to routing logits, the selection bias, and the load of its last forward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.moe.records import Routing
from dist_moe.moe.select import TopK, select_top_k


class Router(nn.Module):
    """Routes tokens by `rule`; holds the one sanctioned state of the design.

    A Hugging Face block calls its router with the hidden states alone and expects fixed results, so what else goes in
    or out is kept here: `selection_bias` (fp32 [E], a buffer, written by the balancer alone), the mask of the tokens
    that exist, and the load of the current forward. The load is counted only between `open_record` and
    `close_record`, which surround the whole model's forward. Recomputation under activation checkpointing runs
    in the backward pass, when the record is closed, so it cannot count a token twice; it finds the same mask and the
    same bias and therefore routes alike.

    weight: [E, D]. The logits are computed in fp32 whatever the model's precision is.
    """

    selection_bias: Tensor

    def __init__(self, experts: int, width: int, rule: TopK) -> None:
        super().__init__()
        self.rule = rule
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32))
        self._mask_T: Tensor | None = None
        self._load_E: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Follow `.to`, `.bfloat16()` and their like, but keep the bias in fp32: 0.5 + 0.001 is 0.5 in bf16."""
        bias_E = self.selection_bias
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias_E.to(self.selection_bias.device)
        return self

    def open_record(self, mask_T: Tensor | None) -> None:
        """Begin a forward: only tokens where `mask_T` (bool) is true are routed and counted; None means all."""
        self._mask_T = mask_T
        self._load_E = torch.zeros(self.experts, dtype=torch.int64, device=self.weight.device)

    def close_record(self) -> Tensor:
        """End the forward and return its load_E: int64, assignments to each expert on this rank.

        In training the mask stays, because recomputation in the backward pass needs it.
        """
        load_E, self._load_E = self._load_E, None
        if not self.training:
            self._mask_T = None
        if load_E is None:
            raise RuntimeError("close_record without open_record: the forward of this router was not opened")
        return load_E

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [..., D] -> (logits_TE fp32, weights_TK in the dtype of hidden, ids_TK int64), as blocks expect."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        # Autocast would bring the matmul down to bf16, whose 8 bits tie and flip close scores.
        with torch.autocast(hidden.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.to(dtype), self.weight.to(dtype))
            routing = self._select(logits_TE)
        if self._load_E is not None:
            ids = routing.ids_TK.reshape(-1)
            self._load_E += torch.bincount(ids[ids >= 0], minlength=self.experts)
        return logits_TE, routing.weights_TK.to(hidden.dtype), routing.ids_TK

    def _select(self, logits_TE: Tensor) -> Routing:
        if self.rule.score == "sigmoid":
            routing = select_top_k(logits_TE, self.rule, score_bias_E=self.selection_bias)
        else:
            routing = select_top_k(logits_TE, self.rule, logit_bias_E=self.selection_bias)
        if self._mask_T is None:
            return routing
        return routing._replace(ids_TK=routing.ids_TK.masked_fill(~self._mask_T.unsqueeze(-1), -1))
