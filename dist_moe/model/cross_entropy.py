"""The sum of -ln p of the next tokens from hidden states, with the logits of one chunk of rows at a time.

Logits are the largest tensor of a step: V is 16 to 100 times D, and their gradient and their fp32 copies are as large.
Shapes: T rows (tokens), C rows of a chunk, D model width, V vocabulary, B sequences, S positions.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from dist_moe.config.sections.model import CrossEntropyName
from dist_moe.data.stream import IGNORE_INDEX
from dist_moe.errors import ConfigError, Violation
from dist_moe.model import liger

logger = logging.getLogger(__name__)

# On a CPU the fp32 logits of a chunk stay in the cache between the four passes over them. On a GPU a chunk has enough
# rows to fill the device with matmuls; 256 MiB are small beside its memory.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Each chunk reads the weight and writes its gradient once. With fewer rows a large vocabulary would be bound by that.
FEWEST_ROWS = 256

CrossEntropy = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""(hidden_TD, head, targets_T) -> the sum of -ln p over the targets other than -100: an fp32 scalar, fp64 for fp64."""


def plain_nll_sum(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the sum of -ln p over the targets other than -100, in fp32 or better."""
    dtype = torch.promote_types(torch.float32, logits_TV.dtype)
    return F.cross_entropy(logits_TV.to(dtype), targets_T, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_nll_sum(hidden_TD: Tensor, head: nn.Linear, targets_T: Tensor) -> Tensor:
    """Return what `plain_nll_sum` does of `head(hidden_TD)`; the gradients are computed in the forward pass.

    A chunk's logits are used up at once: loss, gradient of the logits, and from it the gradients of the hidden states
    and of the weight, which the backward pass only scales. The gradient of the weight is summed in fp32.
    """
    return cast(Tensor, _ChunkedNllSum.apply(hidden_TD, head.weight, head.bias, targets_T, torch.is_grad_enabled()))


def choose_cross_entropy(name: CrossEntropyName, device: torch.device) -> CrossEntropy | None:
    """Return the implementation for `model.cross_entropy` on a device; None for the model's own logits.

    Raises:
        ConfigError: It is liger, which cannot run here, or the device is not a GPU.
    """
    on_gpu = device.type == "cuda"
    missing = liger.missing() if on_gpu else f"a GPU, and the device is {device}"
    if name == "auto":
        name = "chunked" if missing else "liger"
    if name == "liger" and missing:
        remedy = "install it (the extra gpu has liger-kernel), or use auto" if on_gpu else "use auto"
        raise ConfigError([Violation("model.cross_entropy", name, f"needs {missing}", remedy)])
    return {"plain": None, "chunked": chunked_nll_sum, "liger": liger.linear_nll_sum}[name]


def output_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer whose output for the last hidden states is the model's logits.

    None where the model's class computes more than that, such as a scaled or capped logit. The class's own forward
    says so: it runs with stand-ins for its base model and its head, without the cost of either.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    hidden_BSD, logits_BSV = torch.ones(1, 1, head.in_features), torch.tensor([[[-1e3, 1.0, 1e3]]])
    base_stub, head_stub = _Stub(MoeModelOutputWithPast(last_hidden_state=hidden_BSD)), _Stub(logits_BSV)  # type: ignore[arg-type]
    shell = copy.copy(model)
    stubs = {id(model.base_model): base_stub, id(head): head_stub}
    shell._modules = {name: stubs.get(id(child), child) for name, child in model.named_children()}
    try:
        found = shell(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
        linear = torch.equal(found, logits_BSV) and torch.equal(head_stub.inputs[0], hidden_BSD)
    except Exception as error:  # the class of another library may raise anything
        logger.debug("%s does not run on stand-ins: %r", type(model).__name__, error)
        linear = False
    if not linear:
        logger.info("logits of %s are more than a linear function: cross-entropy is plain", type(model).__name__)
    return head if linear else None


class _Stub(nn.Module):
    """Returns a given value, and keeps its positional inputs."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.inputs: tuple[Any, ...] = ()

    def forward(self, *inputs: Any, **_: Any) -> Any:
        self.inputs = inputs
        return self.value


class _ChunkedNllSum(torch.autograd.Function):
    """See `chunked_nll_sum`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, with_gradient: bool
    ) -> Tensor:
        dtype = torch.promote_types(torch.float32, hidden_TD.dtype)
        nll_sum = hidden_TD.new_zeros((), dtype=dtype)
        needed = [with_gradient and needs for needs in ctx.needs_input_grad[:3]]
        hidden_grad_TD = torch.empty_like(hidden_TD) if needed[0] else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=dtype) if needed[1] else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needed[2] else None
        rows = chunk_rows(len(hidden_TD), len(weight_VD), dtype.itemsize, hidden_TD.device.type)
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            hidden_CD, targets_C = hidden_TD[part], targets_T[part]
            log_p_CV = torch.log_softmax(F.linear(hidden_CD, weight_VD, bias_V), dim=-1, dtype=dtype)
            nll_sum += F.nll_loss(log_p_CV, targets_C, ignore_index=IGNORE_INDEX, reduction="sum")
            if not any(needed):
                continue
            # A row without a target has no gradient: it is left out where that costs D values, not V.
            kept_C1 = (targets_C != IGNORE_INDEX).to(hidden_TD.dtype).unsqueeze(1)
            grad_CV = _logits_gradient(log_p_CV, targets_C).to(hidden_TD.dtype)
            if hidden_grad_TD is not None:
                torch.mm(grad_CV, weight_VD, out=hidden_grad_TD[part]).mul_(kept_C1)
            if weight_grad_VD is not None:
                _add_product(weight_grad_VD, grad_CV.T, hidden_CD * kept_C1)
            if bias_grad_V is not None:
                bias_grad_V += (grad_CV.T @ kept_C1).squeeze(1)
        ctx.save_for_backward(hidden_grad_TD, weight_grad_VD, bias_grad_V)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return nll_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else gradient.mul_(gradients[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _logits_gradient(log_p_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the gradient of each row's -ln p with respect to its logits: p, and p - 1 at the target. In place."""
    minus_one = log_p_CV.new_full((), -1.0).expand(len(targets_C), 1)
    return log_p_CV.exp_().scatter_add_(1, targets_C.clamp_min(0).unsqueeze(1), minus_one)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a sum in their dtype, or in a wider one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunk_rows(rows: int, vocabulary: int, itemsize: int, device_type: str) -> int:
    """Return the rows of a chunk: chunks of equal size (to one row), whose logits have about `CHUNK_BYTES`."""
    most = max(FEWEST_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (vocabulary * itemsize))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
