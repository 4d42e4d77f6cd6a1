"""What `dist_moe.balance` does with a small model of a family: found, counted exactly, and balanced in a few steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dist_moe
from dist_moe.probe.layers import find_layers
from tests.families.small import LENGTH, VOCABULARY, build, small_config

STEPS, SEQUENCES, LAST = 20, 16, 5
TEXT = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Balanced:
    """The result of a family.

    Attributes:
        layers: MoE layers of the small model.
        bias: Where their bias is: own, ours, or "" where none can be balanced.
        rule: The rule of the last layer's router, in words.
        before: MaxVio of the first step, of the worst layer that is balanced.
        after: Mean of the last steps, of the worst layer.
        floor: The sampling floor of a step.
        exact: Whether the counts are those that the experts received.
        reason: Why it is not balanced, or what failed; "" where nothing is wrong.
    """

    layers: int = 0
    bias: str = ""
    rule: str = ""
    before: float = 0.0
    after: float = 0.0
    floor: float = 0.0
    exact: bool = False
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether the experts are balanced, and counted exactly."""
        return not self.reason and self.exact and self.after < self.before / 2


def try_balance(family: str) -> Balanced:
    """Balance a small model of a family whose experts are uneven at the start, and train it for some steps on text."""
    torch.manual_seed(0)
    model = build(small_config(family)).train()
    unbalance(model)
    try:
        seen = dist_moe.balance(model, "none")
    except dist_moe.UserError as error:
        return Balanced(reason=str(error))
    seen.remove()
    balanced = [layer for layer in seen.layers if layer.bias is not None]
    if not balanced:
        return Balanced(len(seen.layers), reason=seen.layers[-1].reason)
    rule = seen._states[balanced[-1].name].probed.rule
    if rule is None or rule.groups > 1:
        balancer = dist_moe.balance(model, "loss_free", rate=0.05)
    else:
        balancer = dist_moe.balance(model, "quantile")
    loads = _train(model, balancer, [layer.name for layer in seen.layers])
    vio = [_worst(load, {layer.name for layer in balanced}) for load, _ in loads]
    return Balanced(
        layers=len(seen.layers),
        bias=" and ".join(sorted({str(layer.bias) for layer in balanced})),
        rule="" if rule is None else f"{rule.score}{', normalized' if rule.normalize else ''}",
        before=vio[0],
        after=sum(vio[-LAST:]) / LAST,
        floor=loads[-1][0].max_vio_floor,
        exact=all(exact for _, exact in loads),
    )


def _worst(load: dist_moe.Load, names: set[str]) -> float:
    return max(value for name, value in zip(load.layers, load.max_vio_per_layer, strict=True) if name in names)


def _train(model: PreTrainedModel, balancer: dist_moe.Balancer, names: list[str]) -> list[tuple[dist_moe.Load, bool]]:
    """Return the load of each step, and whether it is what the experts received."""
    received = _Received(model, names)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    balancer.attach(optimizer)
    tokens = torch.tensor([byte % VOCABULARY for byte in TEXT.read_bytes()])
    loads = []
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH // 2, (SEQUENCES,))
        batch = torch.stack([tokens[start : start + LENGTH // 2] for start in starts])
        received.clear()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert balancer.load is not None
        loads.append((balancer.load, received.equals(balancer.load)))
    return loads


def values_of(output: Any) -> Tensor:
    """Return the logits, or the last hidden states of a model without a head."""
    values: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return values


def loss_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return a loss of a batch: of the next token, or of the last hidden states of a model without a head."""
    values = values_of(model(input_ids=batch, use_cache=False))
    if values.shape[-1] != VOCABULARY:
        return values.float().pow(2).mean()
    return nn.functional.cross_entropy(values[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def unbalance(model: nn.Module) -> None:
    """Give the routers weights whose size differs from expert to expert."""
    for layer in find_layers(model):
        for parameter in layer.router.parameters():
            if parameter.ndim == 2:
                scale = torch.linspace(0.5, 4, len(parameter)).unsqueeze(1)  # large logits are selected more often
                parameter.copy_(torch.randn(parameter.shape) * scale / parameter.shape[1] ** 0.5)


class _Received:
    """Counts the ids that the experts of each layer are called with."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._counts: dict[str, dict[int, int]] = {name: {} for name in names}
        for layer in find_layers(model):
            layer.experts.register_forward_pre_hook(self._hook(self._counts[layer.name]), with_kwargs=True)

    def _hook(self, counts: dict[int, int]) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
            ids = next(value for value in tensors if not value.is_floating_point())
            for expert, number in zip(*(each.tolist() for each in ids.unique(return_counts=True)), strict=True):
                counts[expert] = counts.get(expert, 0) + number

        return count

    def equals(self, load: dist_moe.Load) -> bool:
        """Whether these are the counts of a step."""
        rows = zip(load.layers, load.counts_LE, strict=True)
        return all(list(row) == [self._counts[name].get(each, 0) for each in range(len(row))] for name, row in rows)

    def clear(self) -> None:
        """Count from 0."""
        for counts in self._counts.values():
            counts.clear()
