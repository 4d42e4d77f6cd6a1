"""The router: a linear map to routing logits, the selection bias, and the record of its current forward.

Shapes: T tokens, D model width, E experts, K columns (the maximum number of experts a token takes).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_moe.moe.records import RouterRecord, Routing
from dist_moe.moe.select import ExpertThreshold, RandomRouting, Rule, ThresholdRouting, select


class FamilyBias(Protocol):
    """Where a family keeps the selection bias.

    Attributes:
        owner: The module.
        name: Its name there.
    """

    @property
    def owner(self) -> nn.Module: ...

    @property
    def name(self) -> str: ...


class Router(nn.Module):
    """Routes tokens by a rule, and keeps the state that Hugging Face's call of a router cannot carry.

    A Hugging Face block calls its router with the hidden states alone and expects fixed results, so further inputs
    and outputs are attributes: the buffers below, the mask of the tokens that are not padding, and the record of the
    current forward. The record exists only between `open_record` and `close_record`, which surround the whole
    model's forward. Recomputation under activation checkpointing runs in the backward pass, when the record is
    closed, so it cannot count a token twice; it reads the same mask and the same bias, and selects the same experts.

    The logits are computed in fp32 in a model of any precision.

    Args:
        num_experts: E.
        width: D.
        rule: How tokens select experts.

    Attributes:
        weight: [E, D].
        selection_bias: [E] fp32, a buffer that only the balancer writes.
        threshold: fp32 scalar, a buffer; None without threshold routing.
        last_load: [E] int64, a buffer that is not part of the model's checkpoint: the load of the last optimizer
            step, for the auxiliary loss over it.
        target_experts_per_token: What a balancer that finds this router in a model controls the threshold to; None
            for a constant threshold.
    """

    selection_bias: Tensor
    last_load: Tensor
    threshold: Tensor | None
    target_experts_per_token: float | None = None

    def __init__(self, num_experts: int, width: int, rule: Rule) -> None:
        super().__init__()
        self._add_state(num_experts, rule)
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def _add_state(self, num_experts: int, rule: Rule) -> None:
        self.num_experts = num_experts
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("last_load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.set_rule(rule)
        self._mask_T: Tensor | None = None
        self._open = False
        self._record: RouterRecord | None = None

    def set_rule(self, rule: Rule) -> None:
        """Route by another rule from now on, with its initial threshold; the bias stays."""
        self.rule = rule
        start, device = None, self.selection_bias.device
        if isinstance(rule, ThresholdRouting):
            start = torch.tensor(rule.threshold, dtype=torch.float32, device=device)
        self.register_buffer("threshold", start)

    @property
    def family_bias(self) -> "FamilyBias | None":
        """The selection bias of the family's own router, in whose place this router has its own; None without one."""
        return None

    @property
    def matrix(self) -> nn.Parameter:
        """The weights [E, D] of the logits."""
        return self.weight

    @property
    def is_fixed(self) -> bool:
        """Whether the experts of a token do not depend on its logits, so that neither a bias nor a loss moves them."""
        return isinstance(self.rule, RandomRouting)

    @property
    def is_balanced(self) -> bool:
        """Whether a balancer may update the state: not that of a frozen router, nor of one with fixed experts."""
        return self.matrix.requires_grad and not self.is_fixed

    @property
    def max_experts_per_token(self) -> int:
        """Maximum number of experts a token takes."""
        return self.rule.max_experts_per_token

    @property
    def top_k(self) -> int | None:
        """Experts a token takes, with expert thresholds on average; None if the rule does not say."""
        return None if isinstance(self.rule, ThresholdRouting) else self.rule.top_k

    @property
    def may_take_none(self) -> bool:
        """Whether a token that is not padding may take no expert."""
        return isinstance(self.rule, ExpertThreshold) and self.rule.min_experts == 0

    def reset_state(self) -> None:
        """Write the initial values of the buffers, which a model built on the meta device lacks."""
        self.selection_bias.zero_()
        self.last_load.zero_()
        if self.threshold is not None and isinstance(self.rule, ThresholdRouting):
            self.threshold.fill_(self.rule.threshold)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Apply `.to`, `.bfloat16()` and the like, but keep the state in fp32: 0.5 + 0.001 is 0.5 in bf16."""
        bias_E, threshold = self.selection_bias, self.threshold
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias_E.to(self.selection_bias.device)
        if threshold is not None and self.threshold is not None and self.threshold.dtype != torch.float32:
            self.threshold = threshold.to(self.threshold.device)
        return self

    def open_record(self, mask_T: Tensor | None) -> None:
        """Prepare for one forward of the model.

        Args:
            mask_T: bool; only tokens where it is true are routed and counted. None means all.
        """
        self._mask_T = mask_T
        self._open, self._record = True, None

    @property
    def has_record(self) -> bool:
        """Whether this router ran since `open_record`."""
        return self._record is not None

    def close_record(self) -> RouterRecord:
        """Return the record of the forward since `open_record`.

        Raises:
            RuntimeError: There was no `open_record` or no forward.
        """
        # In training the mask is kept, because recomputation in the backward pass needs it.
        record, self._record, self._open = self._record, None, False
        if not self.training:
            self._mask_T = None
        if record is None:
            raise RuntimeError("close_record without open_record and one forward of this router after it")
        return record

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: [..., D].

        Returns:
            logits_TE (fp32), weights_TK (in the dtype of `hidden`) and ids_TK (int64), as Hugging Face blocks expect.
        """
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        # Autocast would compute the matmul in bf16, whose 8 bits make close scores equal or swap them.
        with torch.autocast(hidden.device.type, enabled=False):
            logits_TE = _WideLinear.apply(hidden_TD, self.weight)
            routing = self._route(logits_TE)
        return logits_TE, routing.weights_TK.to(hidden.dtype), routing.ids_TK

    def _route(self, logits_TE: Tensor) -> Routing:
        """Select experts for the tokens that are not padding, and record them where a record is open."""
        return self._record_routing(logits_TE, select(logits_TE, self.rule, self.selection_bias, self.threshold))

    def _record_routing(self, logits_TE: Tensor, routing: Routing) -> Routing:
        """Leave out padding, and record the routing where a record is open."""
        if self._mask_T is not None:
            routing = routing._replace(ids_TK=routing.ids_TK.masked_fill(~self._mask_T.unsqueeze(-1), -1))
        if self._open:
            if self._record is not None:
                raise RuntimeError("a router ran twice in one forward of the model; its record holds one run")
            self._record = RouterRecord(logits_TE, routing.ids_TK, self._mask_T, routing.weights_TK)
        return routing


class _WideLinear(torch.autograd.Function):
    """A linear map in fp32 or wider that keeps its input for the backward as it is, not a wider copy of it."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_ED)
        dtype = torch.promote_types(torch.float32, hidden_TD.dtype)
        return F.linear(hidden_TD.to(dtype), weight_ED.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_TD, weight_ED = ctx.saved_tensors
        gradient_TE = gradients[0]
        hidden_gradient_TD = weight_gradient_ED = None
        if ctx.needs_input_grad[0]:
            hidden_gradient_TD = (gradient_TE @ weight_ED.to(gradient_TE.dtype)).to(hidden_TD.dtype)
        if ctx.needs_input_grad[1]:
            weight_gradient_ED = (gradient_TE.t() @ hidden_TD.to(gradient_TE.dtype)).to(weight_ED.dtype)
        return hidden_gradient_TD, weight_gradient_ED
