"""Routing scores without a model: random logits whose experts are unequal, drift, and shift once.

Shapes: T tokens, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How the experts differ, in units of a logit.

    offset_std: standard deviation of the experts' offsets. walk_std: of the step that each offset takes between two
    optimizer steps. noise_std: of a token's logits around the offsets.
    """

    offset_std: float = 0.3
    walk_std: float = 0.002
    noise_std: float = 1.0


class Drawn(NamedTuple):
    """The scores of one step, fp32: the logits of token t are offset_E + noise_TE[t]."""

    offset_E: Tensor
    noise_TE: Tensor

    @property
    def logits_TE(self) -> Tensor:
        """What a router would have computed, a new tensor."""
        return self.noise_TE + self.offset_E


def draw_scores(drift: Drift, experts: int, tokens: int, steps: int, shift_at: int, seed: int) -> Iterator[Drawn]:
    """The scores of `steps` steps of `tokens` tokens; at step `shift_at`, counted from 0, all offsets are drawn anew.

    Equal arguments give equal scores. The offsets do not depend on `tokens`.
    """
    offsets, noises = random_source(seed, experts, 0), random_source(seed, experts, 1)
    offset_E = torch.randn(experts, generator=offsets) * drift.offset_std
    for step in range(steps):
        if step == shift_at:
            offset_E = torch.randn(experts, generator=offsets) * drift.offset_std
        yield Drawn(offset_E, torch.randn(tokens, experts, generator=noises) * drift.noise_std)
        offset_E = offset_E + torch.randn(experts, generator=offsets) * drift.walk_std


def random_source(seed: int, experts: int, stream: int) -> torch.Generator:
    """A source of random numbers of its own for each seed, number of experts (below 100,000) and stream (0 to 9)."""
    return torch.Generator().manual_seed((seed * 100_000 + experts) * 10 + stream)
