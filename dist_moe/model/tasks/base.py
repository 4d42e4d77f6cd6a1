"""What every task shares: the records of the routers around a forward, the routing losses, and the output.

Shapes: B sequences, S positions, E experts, C outputs.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.losses import RoutingLosses, orthogonality_loss
from dist_moe.families.registry import family_of
from dist_moe.model.convert import find_layers
from dist_moe.model.inputs import LabeledInputs, ModelInputs, split_documents
from dist_moe.model.routing import count_record, routing_loss
from dist_moe.moe.records import RouterRecord

NO_LOSSES = RoutingLosses()


class Output(NamedTuple):
    """The result of a forward; a NamedTuple, because DeepSpeed looks for tensors in tuples, lists and dicts only.

    Attributes:
        loss: Scalar with the graph.
        nll_sum: fp32 scalar without graph, the sum over the labels of their losses: -ln p in nats, or, of a regression,
            the squared error.
        auxiliary: fp32 scalar without graph, the part of `loss` that is due to the routing.
        routing_counts: The counts of each MoE layer on this rank, in the model's order.
        outputs_BC: fp32 without graph, the logits of the classes, or [B, 1] the values; None of a language model.
        records: The records of the routers without graph, where they were asked for.
    """

    loss: Tensor
    nll_sum: Tensor
    auxiliary: Tensor
    routing_counts: list[RoutingCounts]
    outputs_BC: Tensor | None = None
    records: list[RouterRecord] | None = None

    @property
    def loads(self) -> list[Tensor]:
        """load_E (int64) of each MoE layer on this rank."""
        return [layer_counts.load_E for layer_counts in self.routing_counts]


class Losses(NamedTuple):
    """What a task computes of a batch.

    Attributes:
        training: The sum over the labels of their losses, with the graph, weighted as in training.
        plain: The same sum without weights; its graph is not used.
        outputs_BC: As in `Output`.
    """

    training: Tensor
    plain: Tensor
    outputs_BC: Tensor | None = None


def _mask_of(inputs: ModelInputs | LabeledInputs) -> Tensor | None:
    return None if inputs.mask_BS is None else inputs.mask_BS.reshape(-1)


class Task(nn.Module, ABC):
    """A model and its loss.

    Where the tokens of a family see other documents of their row, each document is given a row of its own.

    Args:
        model: A converted model, with memory for its parameters.
        losses: Coefficients of the routing losses.
        needs_margins: Count the margins in training, for a policy that needs them.
    """

    def __init__(self, model: PreTrainedModel, losses: RoutingLosses = NO_LOSSES, needs_margins: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layers = find_layers(model)
        self.losses = losses
        self.needs_margins = needs_margins
        self.separates_documents = family_of(model.config.model_type).separates_documents

    @abstractmethod
    def compute(self, inputs: ModelInputs | LabeledInputs) -> Losses:
        """Run the model, and sum the losses of the labels."""

    def forward(
        self,
        inputs: ModelInputs | LabeledInputs,
        scale: Tensor,
        token_scale: Tensor | None = None,
        keep_records: bool = False,
    ) -> Output:
        """Compute scale * the sum of the losses of the labels, plus the routing losses.

        Args:
            inputs: Of `model_inputs`.
            scale: fp32 scalar, n / (labels of the GLOBAL batch), with n micro-batches over all ranks, by which the
                engine divides. A mean of micro-batch means would give the labels of a micro-batch with few of them a
                larger weight.
            token_scale: fp32 scalar, n / (all tokens of the global batch), for the routing losses; without it, and in
                evaluation, they are omitted.
            keep_records: Whether to return the records of the routers.
        """
        given, place_T = inputs, None
        if isinstance(inputs, ModelInputs) and not self.separates_documents:
            inputs, place_T = split_documents(inputs)
        mask_T = _mask_of(inputs)
        for layer in self.layers:
            layer.router.open_record(mask_T)
        computed = self.compute(inputs)
        records = [layer.router.close_record() for layer in self.layers]
        routing_counts = [
            count_record(layer.router, record, self.needs_margins and self.training)
            for layer, record in zip(self.layers, records, strict=True)
        ]
        loss, auxiliary = computed.training * scale, torch.zeros_like(computed.training)
        if self.losses.any and self.training and token_scale is not None:
            auxiliary = self._routing_losses(records, routing_counts, inputs.tokens_BS.shape[0], token_scale)
            loss = loss + auxiliary
        nll_sum = (computed.training if self.training else computed.plain).detach()
        kept = [record.detached() for record in records] if keep_records else None
        if kept is not None and place_T is not None:
            kept = [record.at(place_T, _mask_of(given)) for record in kept]
        return Output(loss, nll_sum, auxiliary.detach(), routing_counts, computed.outputs_BC, kept)

    def _routing_losses(
        self, records: list[RouterRecord], routing_counts: list[RoutingCounts], sequences: int, token_scale: Tensor
    ) -> Tensor:
        """Return the routing losses of all layers, as they are added to the loss of a micro-batch."""
        total = torch.zeros_like(token_scale)
        if self.losses.of_tokens:
            for layer, record, layer_counts in zip(self.layers, records, routing_counts, strict=True):
                total = total + routing_loss(self.losses, layer.router, record, layer_counts, sequences)
            total = total * token_scale
        if self.losses.orthogonality:
            # Without `token_scale`: the mean over micro-batches and ranks, which the engine takes, counts it once.
            for layer in self.layers:
                total = total + self.losses.orthogonality * orthogonality_loss(layer.router.matrix)
        return total
