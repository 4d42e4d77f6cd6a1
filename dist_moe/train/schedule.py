"""The learning rate as a pure function of the steps taken."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, then a cosine to peak * final_ratio at `steps`, then constant."""

    peak: float
    warmup_steps: int
    steps: int
    final_ratio: float

    def learning_rate(self, taken: int) -> float:
        """The rate of the step that follows `taken` taken steps; a skipped step does not move it."""
        if taken < self.warmup_steps:
            return self.peak * (taken + 1) / self.warmup_steps
        progress = min(1.0, (taken - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.final_ratio + (1.0 - self.final_ratio) * cosine)
