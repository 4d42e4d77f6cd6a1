"""Records for the tests of dist_moe.observe, built by the real builders from counts that a test names."""

from collections.abc import Sequence

import torch

from dist_moe.observe.metrics import EvaluationMetrics, StepMetrics, evaluation_metrics, step_metrics

UNEVEN = ([40, 0, 20], [20, 20, 20, 20])


def step_sample(
    step: int = 10, loads: Sequence[Sequence[int]] = UNEVEN, loss: float = 2.5, skipped: bool = False
) -> StepMetrics:
    """A step with these counts, a bias that rises by 0.25 per expert from -0.25, and fixed other numbers."""
    return step_metrics(
        step=step,
        loss=loss,
        learning_rate=0.001,
        grad_norm=0.75,
        tokens=64 * step,
        tokens_per_s=12_345.6,
        step_ms=20.0,
        load_L=[torch.tensor(load) for load in loads],
        bias_L=[torch.arange(len(load)) / 4 - 0.25 for load in loads],
        balance_rate=0.002,
        skipped=skipped,
        skipped_steps=int(skipped),
    )


def evaluation_sample(step: int = 20, loads: Sequence[Sequence[int]] = UNEVEN) -> EvaluationMetrics:
    """An evaluation over 100 label tokens of 2 nats, 250 bytes of text, with these counts."""
    return evaluation_metrics(
        step=step, total_nats=200.0, tokens=100, text_bytes=250, load_L=[torch.tensor(load) for load in loads]
    )
