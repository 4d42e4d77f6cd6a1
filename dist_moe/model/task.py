"""The task: a model and its loss in one module, because the engine runs one forward with one output.

Shapes: B sequences, S positions, V vocabulary, E experts.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.balance.counts import RoutingCounts
from dist_moe.balance.losses import RoutingLosses
from dist_moe.config.sections.model import CrossEntropyName
from dist_moe.model.attention import documents_arguments
from dist_moe.model.convert import find_layers
from dist_moe.model.cross_entropy import choose_cross_entropy, output_head, plain_nll_sum
from dist_moe.model.inputs import ModelInputs
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
        model: A converted model, with memory for its parameters.
        losses: Coefficients of the routing losses.
        needs_margins: Count the margins in training, for a policy that needs them.
        cross_entropy: The implementation of the loss, as `model.cross_entropy` names it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        losses: RoutingLosses = NO_LOSSES,
        needs_margins: bool = False,
        cross_entropy: CrossEntropyName = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = find_layers(model)
        self.losses = losses
        self.needs_margins = needs_margins
        self.cross_entropy: CrossEntropyName = "plain" if output_head(model) is None else cross_entropy

    def forward(self, inputs: ModelInputs, scale: Tensor, token_scale: Tensor | None = None) -> Output:
        """Compute scale * sum of -ln p over the positions whose target is not -100, plus the routing losses.

        Args:
            inputs: Of `model_inputs`.
            scale: fp32 scalar, n / (label tokens of the GLOBAL batch), with n micro-batches over all ranks, by which
                the engine divides. A mean of micro-batch means would give the tokens of a micro-batch with few labels
                a larger weight.
            token_scale: fp32 scalar, n / (all tokens of the global batch), for the routing losses; without it, and in
                evaluation, they are omitted.
        """
        mask_T = None if inputs.mask_BS is None else inputs.mask_BS.reshape(-1)
        for layer in self.layers:
            layer.router.open_record(mask_T)
        nll_sum = self._nll_sum(inputs)
        records = [layer.router.close_record() for layer in self.layers]
        routing_counts = [
            count_record(layer.router, record, self.needs_margins and self.training)
            for layer, record in zip(self.layers, records, strict=True)
        ]
        loss, auxiliary = nll_sum * scale, torch.zeros_like(nll_sum)
        if self.losses.any and self.training and token_scale is not None:
            for layer, record, layer_counts in zip(self.layers, records, routing_counts, strict=True):
                auxiliary = auxiliary + routing_loss(
                    self.losses, layer.router, record, layer_counts, sequences=inputs.tokens_BS.shape[0]
                )
            auxiliary = auxiliary * token_scale
            loss = loss + auxiliary
        return Output(loss, nll_sum.detach(), auxiliary.detach(), routing_counts)

    def _nll_sum(self, inputs: ModelInputs) -> Tensor:
        """Run the model; return the sum of -ln p over the targets in nats, a scalar with the graph."""
        arguments = {
            "input_ids": inputs.tokens_BS,
            "position_ids": inputs.positions_BS,
            "use_cache": False,
            **documents_arguments(inputs.documents, self.model.config),
        }
        targets_T = inputs.targets_BS.flatten()
        cross_entropy = choose_cross_entropy(self.cross_entropy, inputs.tokens_BS.device)
        if cross_entropy is None:
            return plain_nll_sum(self.model(**arguments).logits.flatten(0, 1), targets_T)
        hidden_BSD = self.model.base_model(**arguments).last_hidden_state
        head = cast(nn.Linear, self.model.get_output_embeddings())
        return cross_entropy(hidden_BSD.flatten(0, 1), head, targets_T)
