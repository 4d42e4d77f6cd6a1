"""The class of a text or a pair of texts, or a number for it: a linear head over pooled hidden states.

Shapes: B texts, S positions, D model width, C outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.balancing.losses import RoutingLosses
from dist_moe.config.sections.task import PoolingName
from dist_moe.model.head import REGRESSION, head_of, pooling_of
from dist_moe.model.inputs import LabeledInputs, ModelInputs
from dist_moe.model.tasks.base import NO_LOSSES, Losses, Task


class ClassificationTask(Task):
    """Classification by cross entropy, or regression by the squared error, of one label a text.

    Args:
        model: A converted model with a head (`dist_moe.model.head`), which says which of the two it is.
        losses: Coefficients of the routing losses.
        needs_margins: Count the margins in training, for a policy that needs them.
        class_weights: The factor of each class's losses in training; none: 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        losses: RoutingLosses = NO_LOSSES,
        needs_margins: bool = False,
        class_weights: Sequence[float] = (),
    ) -> None:
        super().__init__(model, losses, needs_margins)
        self.pooling: PoolingName = pooling_of(model.config)
        self.is_regression = model.config.problem_type == REGRESSION
        weights_C = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
        self.register_buffer("class_weights_C", weights_C, persistent=False)

    def compute(self, inputs: ModelInputs | LabeledInputs) -> Losses:
        """Run the model, and sum the losses of the rows that hold a text."""
        assert isinstance(inputs, LabeledInputs)
        mask_BS = torch.ones_like(inputs.tokens_BS, dtype=torch.bool) if inputs.mask_BS is None else inputs.mask_BS
        is_text_B = mask_BS.any(dim=1)
        hidden_BSD = self.model.base_model(**self._arguments(inputs, is_text_B)).last_hidden_state
        head = head_of(self.model)
        pooled_BD = pool(hidden_BSD, mask_BS, self.pooling)
        # In fp32 also in a bf16 model: the loss of a text, or the value of a regression, keeps its digits.
        outputs_BC = nn.functional.linear(pooled_BD, head.weight.float())
        losses_B = self._losses(outputs_BC, inputs.labels_B)
        # A row of padding alone may hold anything, NaN too.
        plain_B = torch.where(is_text_B, losses_B, 0.0)
        weights_C = self.class_weights_C
        weighted_B = plain_B if weights_C is None else plain_B * weights_C[inputs.labels_B.long()]  # type: ignore[index]
        return Losses(weighted_B.sum(), plain_B.sum(), outputs_BC.detach())

    def _arguments(self, inputs: LabeledInputs, is_text_B: Tensor) -> dict[str, Tensor | bool]:
        arguments: dict[str, Tensor | bool] = {"input_ids": inputs.tokens_BS}
        positions_S = torch.arange(inputs.tokens_BS.shape[1], device=inputs.tokens_BS.device)
        arguments["position_ids"] = positions_S.expand_as(inputs.tokens_BS)
        if inputs.mask_BS is not None:
            # No row without a key: its scores would be all minus infinity.
            arguments["attention_mask"] = (inputs.mask_BS | ~is_text_B[:, None]).long()
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = inputs.types_BS
        if hasattr(self.model.config, "use_cache"):
            arguments["use_cache"] = False
        return arguments

    def _losses(self, outputs_BC: Tensor, labels_B: Tensor) -> Tensor:
        if self.is_regression:
            return (outputs_BC[:, 0] - labels_B.float()).square()
        return nn.functional.cross_entropy(outputs_BC, labels_B.long(), reduction="none")


def pool(hidden_BSD: Tensor, mask_BS: Tensor, pooling: PoolingName) -> Tensor:
    """Return one vector a text, fp32 [B, D]: the mean of its tokens' hidden states, or that of its first or last token.

    Args:
        hidden_BSD: The hidden states.
        mask_BS: bool, false at padding, which is at the end of a row.
        pooling: Which.
    """
    if pooling == "first":
        return hidden_BSD[:, 0].float()
    lengths_B = mask_BS.sum(dim=1)
    if pooling == "last":
        last_B = (lengths_B - 1).clamp(min=0)
        return hidden_BSD[torch.arange(len(last_B), device=last_B.device), last_B].float()
    kept_BSD = torch.where(mask_BS[:, :, None], hidden_BSD.float(), 0.0)
    return kept_BSD.sum(dim=1) / lengths_B.clamp(min=1)[:, None]
