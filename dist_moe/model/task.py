"""The task: a model and its loss in one module, because the engine runs one forward with one output.

Shapes: B sequences, S positions, V vocabulary, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.balance.counts import RoutingCounts
from dist_moe.balance.losses import RoutingLosses
from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.model.convert import find_layers
from dist_moe.model.routing import count_record, routing_loss

NO_LOSSES = RoutingLosses()


class Output(NamedTuple):
    """The result of a forward; a NamedTuple, because DeepSpeed looks for tensors in tuples, lists and dicts only.

    Attributes:
        loss: Scalar with the graph.
        nll_sum: fp32 scalar without graph, the sum over the label tokens of -ln p (nats).
        auxiliary: fp32 scalar without graph, the part of `loss` that is due to the routing.
        routing_counts: The counts of each MoE layer on this rank, in the model's order.
    """

    loss: Tensor
    nll_sum: Tensor
    auxiliary: Tensor
    routing_counts: list[RoutingCounts]

    @property
    def loads(self) -> list[Tensor]:
        """load_E (int64) of each MoE layer on this rank."""
        return [layer_counts.load_E for layer_counts in self.routing_counts]


class LanguageModelTask(nn.Module):
    """Next-token prediction over packed sequences.

    Args:
        model: A converted model.
        losses: Coefficients of the routing losses.
        needs_margins: Count the margins in training, for a policy that needs them.
    """

    def __init__(self, model: PreTrainedModel, losses: RoutingLosses = NO_LOSSES, needs_margins: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layers = find_layers(model)
        self.losses = losses
        self.needs_margins = needs_margins

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        positions_BS: Tensor,
        mask_BS: Tensor,
        scale: Tensor,
        token_scale: Tensor | None = None,
    ) -> Output:
        """Compute scale * sum of -ln p over the positions whose target is not -100, plus the routing losses.

        Args:
            tokens_BS: int64 in [0, V).
            targets_BS: int64, the next token, or -100 for a position without loss.
            positions_BS: Index of each token in its document; a return to 0 begins a new document, and tokens attend
                within their document only.
            mask_BS: bool, false for padding, which is neither routed nor counted.
            scale: fp32 scalar, n / (label tokens of the GLOBAL batch), with n micro-batches over all ranks, by which
                the engine divides. A mean of micro-batch means would give the tokens of a micro-batch with few labels
                a larger weight.
            token_scale: fp32 scalar, n / (all tokens of the global batch), for the routing losses; without it, and in
                evaluation, they are omitted.
        """
        # A batch without padding needs no mask, and this check costs less than masking.
        mask_T = None if bool(mask_BS.all()) else mask_BS.reshape(-1)
        for layer in self.layers:
            layer.router.open_record(mask_T)
        logits_BSV = self.model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
        records = [layer.router.close_record() for layer in self.layers]
        dtype = torch.promote_types(torch.float32, logits_BSV.dtype)
        nll_sum = F.cross_entropy(
            logits_BSV.flatten(0, 1).to(dtype), targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        routing_counts = [
            count_record(layer.router, record, self.needs_margins and self.training)
            for layer, record in zip(self.layers, records, strict=True)
        ]
        loss, auxiliary = nll_sum * scale, torch.zeros_like(nll_sum)
        if self.losses.any and self.training and token_scale is not None:
            for layer, record, layer_counts in zip(self.layers, records, routing_counts, strict=True):
                auxiliary = auxiliary + routing_loss(
                    self.losses, layer.router, record, layer_counts, sequences=tokens_BS.shape[0]
                )
            auxiliary = auxiliary * token_scale
            loss = loss + auxiliary
        return Output(loss, nll_sum.detach(), auxiliary.detach(), routing_counts)
