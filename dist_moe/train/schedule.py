"""The learning rate as a pure function of the steps taken."""

import math
from dataclasses import dataclass

from dist_moe.config import Config


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, cosine decay to peak * final_ratio at `steps`, then constant."""

    peak: float
    warmup_steps: int
    steps: int
    final_ratio: float

    def learning_rate(self, taken: int) -> float:
        """Return the rate of the step after `taken` taken steps; a skipped step does not advance it."""
        if taken < self.warmup_steps:
            return self.peak * (taken + 1) / self.warmup_steps
        progress = min(1.0, (taken - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.final_ratio + (1.0 - self.final_ratio) * cosine)


def learning_rate_schedule(config: Config) -> Schedule:
    """Return the schedule of a run."""
    train = config.train
    return Schedule(train.learning_rate, train.warmup_length, train.schedule_length, train.final_learning_rate_ratio)
