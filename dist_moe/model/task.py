"""The task: a model and its loss in one module, since the engine sees one forward and one output.

Shapes: B sequences, S positions, V vocabulary, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.balance.counts import RoutingCounts
from dist_moe.balance.losses import RoutingLosses
from dist_moe.model.convert import find_layers
from dist_moe.model.routing import routing_loss, tally_routing

IGNORED = -100  # the target of a position without loss
NO_LOSSES = RoutingLosses()


class Output(NamedTuple):
    """What a forward gives back; a NamedTuple, because DeepSpeed looks for tensors in tuples, lists and dicts only.

    loss: scalar with the graph. nll_sum: fp32 scalar without graph, sum over the label tokens of -ln p (nats).
    auxiliary: fp32 scalar without graph, the part of `loss` that is not the next token's. tallies: the counts of
    each MoE layer on this rank, in the model's order.
    """

    loss: Tensor
    nll_sum: Tensor
    auxiliary: Tensor
    routing_counts: list[RoutingCounts]

    @property
    def loads(self) -> list[Tensor]:
        """int64 load_E of each MoE layer on this rank."""
        return [layer_counts.load_E for layer_counts in self.routing_counts]


class LanguageModelTask(nn.Module):
    """Next-token prediction over packed sequences.

    losses: what is added for the routing. needs_margins: whether the tallies hold the histograms that quantile
    balancing needs.
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
        """The loss is scale * sum of -ln p over the positions whose target is not -100, plus the routing losses.

        positions_BS: place of each token in its document; a fall to 0 begins a new one, and tokens attend within
        their document alone. mask_BS: bool, false at padding, which is neither routed nor counted. scale: fp32
        scalar; the caller puts one over the label tokens of the GLOBAL batch there, because a mean of
        micro-batch means would weigh a token by the company it keeps. token_scale: likewise one over all its tokens,
        for the routing losses; they are left out without it, and in evaluation.
        """
        # A batch without padding needs no mask, and finding that out costs less than masking.
        mask_T = None if bool(mask_BS.all()) else mask_BS.reshape(-1)
        for layer in self.layers:
            layer.router.open_record(mask_T)
        logits_BSV = self.model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
        records = [layer.router.close_record() for layer in self.layers]
        wide = torch.promote_types(torch.float32, logits_BSV.dtype)
        nll_sum = F.cross_entropy(
            logits_BSV.flatten(0, 1).to(wide), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        routing_counts = [
            tally_routing(layer.router, routed, self.needs_margins and self.training)
            for layer, routed in zip(self.layers, records, strict=True)
        ]
        loss, auxiliary = nll_sum * scale, torch.zeros_like(nll_sum)
        if self.losses.any and self.training and token_scale is not None:
            for layer, routed, layer_counts in zip(self.layers, records, routing_counts, strict=True):
                auxiliary = auxiliary + routing_loss(
                    self.losses, layer.router, routed, layer_counts, sequences=tokens_BS.shape[0]
                )
            auxiliary = auxiliary * token_scale
            loss = loss + auxiliary
        return Output(loss, nll_sum.detach(), auxiliary.detach(), routing_counts)
