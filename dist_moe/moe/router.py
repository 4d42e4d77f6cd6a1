"""The router: a linear map to routing logits, the selection bias, and the record of its last forward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.moe.records import RouterRecord
from dist_moe.moe.select import RandomRouting, Rule, ThresholdRouting, select


class Router(nn.Module):
    """Routes tokens by `rule`; holds the one sanctioned state of the design.

    A Hugging Face block calls its router with the hidden states alone and expects fixed results, so what else goes in
    or out is kept here: `selection_bias` (fp32 [E], a buffer, written by the balancer alone), `threshold` (fp32
    scalar, a buffer, with threshold routing), `last_load` (int64 [E], a buffer that no checkpoint of the model
    holds: the load of the last optimizer step, for the auxiliary loss over it), the mask of the tokens that exist,
    and the record of the current forward. The record is kept only between `open_record` and `close_record`,
    which surround the whole model's forward. Recomputation under activation checkpointing runs in the backward
    pass, when the record is closed, so it cannot count a token twice; it finds the same mask and the same bias and
    therefore routes alike.

    weight: [E, D]. The logits are computed in fp32 whatever the model's precision is.
    """

    selection_bias: Tensor
    last_load: Tensor
    threshold: Tensor | None

    def __init__(self, experts: int, width: int, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("last_load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        start = torch.tensor(rule.threshold, dtype=torch.float32) if isinstance(rule, ThresholdRouting) else None
        self.register_buffer("threshold", start)
        self._mask_T: Tensor | None = None
        self._open = False
        self._record: RouterRecord | None = None

    @property
    def balanced(self) -> bool:
        """Whether a balancer may move what is kept here: neither a frozen router nor a forced one must drift."""
        return self.weight.requires_grad and not isinstance(self.rule, RandomRouting)

    @property
    def max_experts_per_token(self) -> int:
        """Experts a token takes at most."""
        return self.rule.max_experts_per_token

    def reset_state(self) -> None:
        """Give the buffers the values of a run that begins; on the meta device they have none."""
        self.selection_bias.zero_()
        self.last_load.zero_()
        if self.threshold is not None and isinstance(self.rule, ThresholdRouting):
            self.threshold.fill_(self.rule.threshold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Follow `.to`, `.bfloat16()` and their like, but keep the state in fp32: 0.5 + 0.001 is 0.5 in bf16."""
        bias_E, threshold = self.selection_bias, self.threshold
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias_E.to(self.selection_bias.device)
        if threshold is not None and self.threshold is not None and self.threshold.dtype != torch.float32:
            self.threshold = threshold.to(self.threshold.device)
        return self

    def open_record(self, mask_T: Tensor | None) -> None:
        """Begin a forward: only tokens where `mask_T` (bool) is true are routed and counted; None means all."""
        self._mask_T = mask_T
        self._open, self._record = True, None

    def close_record(self) -> RouterRecord:
        """End the forward and return what it left.

        In training the mask stays, because recomputation in the backward pass needs it.
        """
        routed, self._record, self._open = self._record, None, False
        if not self.training:
            self._mask_T = None
        if routed is None:
            raise RuntimeError("close_record without open_record and one forward of this router after it")
        return routed

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [..., D] -> (logits_TE fp32, weights_TK in the dtype of hidden, ids_TK int64), as blocks expect."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        # Autocast would bring the matmul down to bf16, whose 8 bits tie and flip close scores.
        with torch.autocast(hidden.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.to(dtype), self.weight.to(dtype))
            routing = select(logits_TE, self.rule, self.selection_bias, self.threshold)
        ids_TK = routing.ids_TK
        if self._mask_T is not None:
            ids_TK = ids_TK.masked_fill(~self._mask_T.unsqueeze(-1), -1)
        if self._open:
            if self._record is not None:
                raise RuntimeError("a router ran twice in one forward of the model; its record holds one run")
            self._record = RouterRecord(logits_TE, ids_TK, self._mask_T)
        return logits_TE, routing.weights_TK.to(hidden.dtype), ids_TK
