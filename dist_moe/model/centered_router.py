"""Routers of an upcycled model that ignore the mean of their inputs at the start.

The states of a trained encoder have a large mean. Its product with the row of an expert is added to that expert's logit
for every token, and most of the imbalance of drawn routers comes from it. Shapes: T tokens, D model width, E experts.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_moe.model.inputs import LabeledInputs, ModelInputs
from dist_moe.model.tasks.base import Task
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.model.upcycled_block import UpcycledBlock


@torch.no_grad()
def mean_router_inputs(task: Task, batches: Iterable[ModelInputs | LabeledInputs]) -> list[Tensor]:
    """Compute the mean input of each router over the tokens of some batches. Not collective.

    The blocks compute their first local expert for every token, which is the dense network up to
    `model.upcycle_noise`, so that no rank needs another.

    Args:
        task: With an upcycled model, on the CPU.
        batches: At least one token.

    Returns:
        For each MoE layer, fp32 [D].
    """
    sums: dict[nn.Module, Tensor] = {}
    tokens, mask_T = 0, None

    def add(router: nn.Module, inputs: tuple[Tensor]) -> None:
        (hidden_TD,) = inputs
        kept_TD = hidden_TD if mask_T is None else hidden_TD[mask_T]
        sums[router] = sums.get(router, torch.zeros(())) + kept_TD.double().sum(dim=0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_dense(task))
        stack.enter_context(_loss_on_cpu(task))
        for layer in task.layers:
            stack.callback(layer.router.register_forward_pre_hook(add).remove)
        for inputs in batches:
            mask_T = None if inputs.mask_BS is None else inputs.mask_BS.reshape(-1)
            tokens += inputs.tokens_BS.numel() if mask_T is None else int(mask_T.sum())
            task(inputs, torch.ones(()))
    return [(sums[layer.router] / tokens).float() for layer in task.layers]


@contextlib.contextmanager
def _as_dense(task: Task) -> Iterator[None]:
    blocks = [module for module in task.model.modules() if isinstance(module, UpcycledBlock)]
    was_training = task.training
    task.eval()
    for block in blocks:
        block.as_dense = True
    try:
        yield
    finally:
        for block in blocks:
            block.as_dense = False
        task.train(was_training)


@contextlib.contextmanager
def _loss_on_cpu(task: Task) -> Iterator[None]:
    """Compute the loss, which is not used, as a CPU can; `model.cross_entropy` may name what needs the run's GPU."""
    if not isinstance(task, LanguageModelTask) or task.cross_entropy != "liger":
        yield
        return
    task.cross_entropy = "auto"
    try:
        yield
    finally:
        task.cross_entropy = "liger"


@torch.no_grad()
def center_routers(routers: Sequence[nn.Module], means: Sequence[Tensor]) -> None:
    """Make the rows of each router orthogonal to its mean input, in place: W - (W u) u^T with u = mean / |mean|.

    Args:
        routers: With `weight` [E, D].
        means: Of `mean_router_inputs`, equal on all ranks.
    """
    for router, mean_D in zip(routers, means, strict=True):
        weight_ED = router.get_parameter("weight")
        unit_D = (mean_D / torch.linalg.vector_norm(mean_D).clamp_min(torch.finfo(mean_D.dtype).tiny)).to(weight_ED)
        weight_ED.sub_(torch.outer(weight_ED @ unit_D, unit_D))
