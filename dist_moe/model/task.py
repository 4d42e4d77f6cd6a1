"""The task: a model and its loss in one module, since the engine sees one forward and one output.

Shapes: B sequences, S positions, V vocabulary, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_moe.model.convert import find_layers

IGNORED = -100  # the target of a position without loss


class Output(NamedTuple):
    """What a forward gives back; a NamedTuple, because DeepSpeed looks for tensors in tuples, lists and dicts only.

    loss: scalar with the graph. nll_sum: fp32 scalar without graph, sum over the label tokens of -ln p (nats).
    loads: int64 load_E of each MoE layer on this rank, in the model's order.
    """

    loss: Tensor
    nll_sum: Tensor
    loads: list[Tensor]


class LanguageModelTask(nn.Module):
    """Next-token prediction over packed sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.layers = find_layers(model)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, positions_BS: Tensor, mask_BS: Tensor, scale: Tensor
    ) -> Output:
        """The loss is scale * sum of -ln p over the positions whose target is not -100.

        positions_BS: place of each token in its document; a fall to 0 begins a new one, and tokens attend within
        their document alone. mask_BS: bool, false at padding, which is neither routed nor counted. scale: fp32
        scalar; the caller puts one over the label tokens of the GLOBAL batch there, because a mean of
        micro-batch means would weigh a token by the company it keeps.
        """
        # A batch without padding needs no mask, and finding that out costs less than masking.
        mask_T = None if bool(mask_BS.all()) else mask_BS.reshape(-1)
        for layer in self.layers:
            layer.router.open_record(mask_T)
        logits_BSV = self.model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False).logits
        loads = [layer.router.close_record() for layer in self.layers]
        wide = torch.promote_types(torch.float32, logits_BSV.dtype)
        nll_sum = F.cross_entropy(
            logits_BSV.flatten(0, 1).to(wide), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return Output(nll_sum * scale, nll_sum.detach(), loads)
