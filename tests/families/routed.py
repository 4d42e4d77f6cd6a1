"""What `dist_moe.route` does with a small model of a family: equal logits by its own rule, and balance by another."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dist_moe
from tests.families.balanced import TEXT, loss_of, unbalance, values_of
from tests.families.small import LENGTH, VOCABULARY, build, small_config

STEPS, SEQUENCES, LAST = 20, 16, 5
THRESHOLD, TARGET, RATE = 0.4, 2.0, 0.5
SAME_LOGITS = 1e-4
"""Largest difference of a logit, in units of the largest one."""


@dataclass(frozen=True)
class Routed:
    """The result of a family.

    Attributes:
        difference: Largest difference between the logits with the family's own rule and those of transformers, in
            units of the largest one.
        before: MaxVio of the first step with threshold routing and adaptive weights.
        after: Mean of the last steps.
        floor: The sampling floor of a step.
        experts: Experts that a token takes in the last step.
        reason: Why it cannot be routed, or what failed; "" where nothing is wrong.
    """

    difference: float = math.nan
    before: float = math.nan
    after: float = math.nan
    floor: float = math.nan
    experts: float = math.nan
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether the logits are equal, and MaxVio falls to less than half, both without the sampling floor."""
        falls = self.after - self.floor < (self.before - self.floor) / 2
        return not self.reason and self.difference <= SAME_LOGITS and falls


def try_route(family: str) -> Routed:
    """Route a small model of a family whose experts are uneven by a threshold, and train it for some steps on text."""
    torch.manual_seed(0)
    model = build(small_config(family))
    unbalance(model)
    difference = _difference(model)
    dist_moe.route(model.train(), "threshold", threshold=THRESHOLD, target_experts_per_token=TARGET)
    balancer = dist_moe.balance(model, "adaptive_weight", rate=RATE)
    tokens = torch.tensor([byte % VOCABULARY for byte in Path(TEXT).read_bytes()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loads = []
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH // 2, (SEQUENCES,))
        batch = torch.stack([tokens[start : start + LENGTH // 2] for start in starts])
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(balancer.step())
    moved = [place for place, layer in enumerate(balancer.layers) if layer.bias is not None]
    vio = [sum(load.max_vio_per_layer[place] for place in moved) / len(moved) for load in loads]
    experts = sum(loads[-1].counts_LE[moved[0]]) / loads[-1].tokens
    return Routed(difference, vio[0], sum(vio[-LAST:]) / LAST, loads[-1].max_vio_floor, experts)


@torch.no_grad()
def _difference(model: Any) -> float:
    """Compare the logits of a model with those of a copy that is routed by its own rule."""
    tokens = torch.randint(3, VOCABULARY, (2, 16))
    routed = dist_moe.route(copy.deepcopy(model).eval(), "top_k")
    found, wanted = (values_of(each(input_ids=tokens, use_cache=False)) for each in (routed, model.eval()))
    return float((found - wanted).abs().max() / wanted.abs().max())
