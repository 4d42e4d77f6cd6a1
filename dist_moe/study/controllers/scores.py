"""Routing scores without a model: random logits whose experts have different means, which drift and shift once.

Shapes: T tokens, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """The distribution of the logits, in units of a logit.

    Attributes:
        offset_std: Standard deviation of the experts' offsets.
        walk_std: Standard deviation of the change of each offset between two steps.
        noise_std: Standard deviation of a token's logits around the offsets.
    """

    offset_std: float = 0.3
    walk_std: float = 0.002
    noise_std: float = 1.0


class ScoreBatch(NamedTuple):
    """The scores of one step, fp32: the logits of token t are offset_E + noise_TE[t]."""

    offset_E: Tensor
    noise_TE: Tensor

    @property
    def logits_TE(self) -> Tensor:
        """The router's logits, a new tensor."""
        return self.noise_TE + self.offset_E


def draw_scores(drift: Drift, experts: int, tokens: int, steps: int, shift_at: int, seed: int) -> Iterator[ScoreBatch]:
    """Draw the scores of consecutive steps.

    Equal arguments give equal scores. The offsets do not depend on `tokens`.

    Args:
        drift: Distribution of the logits.
        experts: E.
        tokens: T of each step.
        steps: Number of steps.
        shift_at: Step, counted from 0, at which all offsets are drawn again.
        seed: Of the random numbers.
    """
    offset_source, noise_source = random_source(seed, experts, 0), random_source(seed, experts, 1)
    offset_E = torch.randn(experts, generator=offset_source) * drift.offset_std
    for step in range(steps):
        if step == shift_at:
            offset_E = torch.randn(experts, generator=offset_source) * drift.offset_std
        yield ScoreBatch(offset_E, torch.randn(tokens, experts, generator=noise_source) * drift.noise_std)
        offset_E = offset_E + torch.randn(experts, generator=offset_source) * drift.walk_std


def random_source(seed: int, experts: int, stream: int) -> torch.Generator:
    """Return an independent generator for each seed, number of experts (below 100,000) and stream (0 to 9)."""
    return torch.Generator().manual_seed((seed * 100_000 + experts) * 10 + stream)
