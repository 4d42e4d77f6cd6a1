"""Next-token prediction.

Shapes: B sequences, S positions, T = B * S tokens, D model width.
"""

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from dist_moe.balancing.losses import RoutingLosses
from dist_moe.config.sections.model import CrossEntropyName
from dist_moe.model.attention import documents_arguments
from dist_moe.model.cross_entropy import choose_cross_entropy, output_head, plain_nll_sum
from dist_moe.model.inputs import LabeledInputs, ModelInputs
from dist_moe.model.tasks.base import NO_LOSSES, Losses, Task


class LanguageModelTask(Task):
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
        super().__init__(model, losses, needs_margins)
        self.cross_entropy: CrossEntropyName = "plain" if output_head(model) is None else cross_entropy

    def compute(self, inputs: ModelInputs | LabeledInputs) -> Losses:
        """Run the model, and sum -ln p in nats over the positions whose target is not -100."""
        assert isinstance(inputs, ModelInputs)
        arguments = {
            "input_ids": inputs.tokens_BS,
            "position_ids": inputs.positions_BS,
            "use_cache": False,
            **documents_arguments(inputs.documents, self.model.config),
        }
        targets_T = inputs.targets_BS.flatten()
        cross_entropy = choose_cross_entropy(self.cross_entropy, inputs.tokens_BS.device)
        if cross_entropy is None:
            nll_sum = plain_nll_sum(self.model(**arguments).logits.flatten(0, 1), targets_T)
        else:
            hidden_BSD = self.model.base_model(**arguments).last_hidden_state
            head = cast(nn.Linear, self.model.get_output_embeddings())
            nll_sum = cross_entropy(hidden_BSD.flatten(0, 1), head, targets_T)
        return Losses(nll_sum, nll_sum)
