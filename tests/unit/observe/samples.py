"""Records for the tests of dist_moe.observe, built by the package from given counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.observe.evaluation import EvaluationMetrics, evaluation_metrics
from dist_moe.observe.metrics import Progress, StepMetrics, step_metrics

Counts = Sequence[Sequence[int]]
UNEVEN = ([40, 0, 20], [20, 20, 20, 20])
VARYING = ([20, 5, 10], [40, 20])  # by layer: tokens that take one expert, two, three; consistent with UNEVEN


def progress_sample(
    step: int = 10,
    loss: float = 2.5,
    skipped: bool = False,
    threshold: float | None = None,
    auxiliary_loss: float = 0.0,
) -> Progress:
    """Return fixed values, except for the arguments."""
    return Progress(
        step=step,
        loss=loss,
        auxiliary_loss=auxiliary_loss,
        learning_rate=0.001,
        grad_norm=0.75,
        tokens=64 * step,
        tokens_per_s=12_345.6,
        step_ms=20.0,
        skipped=skipped,
        skipped_steps=int(skipped),
        balance_rate=0.002,
        threshold=threshold,
    )


def step_sample(
    step: int = 10,
    loads: Counts = UNEVEN,
    loss: float = 2.5,
    skipped: bool = False,
    k_histograms: Counts | None = None,
    threshold: float | None = None,
    auxiliary_loss: float = 0.0,
) -> StepMetrics:
    """Build a step with these counts; by default every token takes two experts.

    The bias rises by 0.25 per expert from -0.25, MaxVio_computation is 1.5 in layer 0, 2.5 in layer 1, ...
    """
    return step_metrics(
        progress_sample(step, loss, skipped, threshold, auxiliary_loss),
        load_L=[torch.tensor(load) for load in loads],
        k_histogram_L=histograms_of(loads, k_histograms),
        microbatch_vio_L=[(1.5 + layer, 0.25) for layer in range(len(loads))],
        bias_L=[torch.arange(len(load)) / 4 - 0.25 for load in loads],
        expert_parallel=1,
    )


def evaluation_sample(step: int = 20, loads: Counts = UNEVEN, k_histograms: Counts | None = None) -> EvaluationMetrics:
    """Build an evaluation over 100 label tokens of 2 nats, 250 bytes of text, with these counts."""
    return evaluation_metrics(
        step=step,
        total_nats=200.0,
        tokens=100,
        text_bytes=250,
        load_L=[torch.tensor(load) for load in loads],
        k_histogram_L=histograms_of(loads, k_histograms),
    )


def histograms_of(loads: Counts, k_histograms: Counts | None) -> list[Tensor]:
    """Return `k_histograms`; by default every token takes two experts, the last one of an odd load one."""
    if k_histograms is None:
        k_histograms = [[sum(load) % 2, sum(load) // 2] for load in loads]
    return [torch.tensor(counts, dtype=torch.int64) for counts in k_histograms]
