"""The contract of the engine: DeepSpeed on every layout against one process in fp64."""

import dataclasses
import functools
import sys
from unittest import mock

import pytest
import torch

from dist_moe.comm.mesh import Mesh
from dist_moe.engine.deepspeed import deepspeed
from tests.dist.pool import RankPool
from tests.dist.small import Case, Trace, make_task, named_weights, reference, run_case
from tests.selection import cross

STAGES = [0, 1, 2]
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (workers, expert parallel)


@functools.cache
def expected(dtype: torch.dtype = torch.float64) -> tuple[float, float, dict[str, torch.Tensor]]:
    return reference(Case(), dtype)


@functools.cache
def initial() -> dict[str, torch.Tensor]:
    mesh = Mesh(1, 0, 1)
    return named_weights(make_task(Case(), mesh), mesh)


def merged(traces: list[Trace]) -> dict[str, torch.Tensor]:
    """Every weight once; where several ranks hold it, they hold the same."""
    weights: dict[str, torch.Tensor] = {}
    for one in traces:
        for name, value in one.weights.items():
            assert name not in weights or torch.equal(weights[name], value), f"replicas of {name} differ"
            weights[name] = value
    return weights


def gradients_of(traces: list[Trace], learning_rate: float) -> dict[str, torch.Tensor]:
    """What SGD without weight decay applied, told from the weights: (before - after) / rate."""
    after = merged(traces)
    return {name: (before.double() - after[name].double()) / learning_rate for name, before in initial().items()}


def assert_gradients(
    found: dict[str, torch.Tensor], factor: float, tolerance: float, dtype: torch.dtype = torch.float64
) -> None:
    # An expert with few tokens has a small gradient of few addends, whose bf16 rounding does not average out.
    floor = 1e-3 if dtype == torch.float64 else 0.05
    _, norm, wanted = expected(dtype)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        decay = 0.1 * initial()[name].double() if decays(name) else 0.0
        error = (found[name] - (gradient.double() * factor + decay)).norm()
        scale = max(float(gradient.norm()), floor * norm) * factor
        assert error <= tolerance * scale, f"{name}: off by {float(error / scale):.2e} of its norm"


def loads_the_compiler(rank: int, world_size: int) -> bool:
    """Train a step, and return whether that has loaded torch's compiler."""
    name = "torch._inductor.compile_fx"
    before = name in sys.modules
    run_case(rank, world_size, Case())
    return name in sys.modules and not before


def test_a_step_does_not_load_torch_s_compiler(ranks: RankPool) -> None:
    assert ranks.run(loads_the_compiler, 1) == [False]


def probes_for_a_compiler(rank: int, world_size: int) -> bool:
    """Train a step, and return whether DeepSpeed has looked for operators that it could compile."""
    vars(deepspeed.ops).pop("__compatible_ops__", None)
    with mock.patch.object(deepspeed.ops, "_probe_compatible_ops", return_value={}) as probe:
        run_case(rank, world_size, Case())
    return probe.called


def test_an_engine_starts_without_a_search_for_compilers(ranks: RankPool) -> None:
    assert ranks.run(probes_for_a_compiler, 1) == [False]


def operators_of(rank: int, world_size: int, case: Case) -> set[str]:
    """Return the names of torch's operators that a run calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_case(rank, world_size, case)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_adamw_is_one_operator(ranks: RankPool, stage: int, bf16: bool) -> None:
    operators = ranks.run(operators_of, 1, Case(zero_stage=stage, bf16=bf16, optimizer="adamw", clipping=1.0))[0]
    assert "aten::_fused_adamw_" in operators and "aten::addcdiv_" not in operators
    if stage > 0:
        assert not operators & {"aten::amax", "aten::amin"}, "DeepSpeed looks for values that are not finite"


def decays(name: str) -> bool:
    return initial()[name].ndim >= 2 and "embed_tokens" not in name


@cross(("accumulation", [1, 2]), ("workers, expert_parallel", LAYOUTS), ("stage", STAGES))
def test_trap_T22_gradients_equal_the_reference(
    ranks: RankPool, workers: int, expert_parallel: int, stage: int, accumulation: int
) -> None:
    case = Case(expert_parallel=expert_parallel, zero_stage=stage, accumulation=accumulation)
    traces = ranks.run(run_case, workers, case)
    loss, norm, _ = expected()
    assert sum(one.losses[0] for one in traces) == pytest.approx(loss, rel=1e-5)
    assert {one.norms[0] for one in traces} == {traces[0].norms[0]}
    assert traces[0].norms[0] == pytest.approx(norm, rel=1e-4)
    assert_gradients(gradients_of(traces, case.learning_rate), 1.0, 2e-4)


@cross(("workers, expert_parallel", [(1, 1), (4, 2), (4, 4)]), ("stage", [2, 0, 1]), strength=1)
def test_trap_T24_clipping_uses_the_true_global_norm(
    ranks: RankPool, workers: int, expert_parallel: int, stage: int
) -> None:
    """T24, T48, T50: the clipped SGD update itself, with the coefficient well under one half."""
    _, norm, _ = expected()
    case = Case(expert_parallel=expert_parallel, zero_stage=stage, clipping=0.2 * norm, accumulation=2)
    traces = ranks.run(run_case, workers, case)
    assert traces[0].norms[0] == pytest.approx(norm, rel=1e-4)
    assert_gradients(gradients_of(traces, case.learning_rate), 0.2, 2e-4)


@cross(("workers, accumulation", [(1, 1), (4, 1), (2, 4)]), ("stage", [1, 2, 0]), strength=1)
def test_gradients_in_bf16_are_those_of_one_process_in_bf16(
    ranks: RankPool, workers: int, accumulation: int, stage: int
) -> None:
    # The reference is bf16 too: against fp64, rounding sends some tokens to other experts on any layout alike.
    # The step is large against the rounding of weights, which are kept in fp32 and shown in bf16.
    case = Case(
        expert_parallel=min(2, workers),
        zero_stage=stage,
        accumulation=accumulation,
        bf16=True,
        learning_rate=1e4,
    )
    traces = ranks.run(run_case, workers, case)
    _, norm, _ = expected(torch.bfloat16)
    assert traces[0].norms[0] == pytest.approx(norm, rel=0.01)
    assert_gradients(gradients_of(traces, case.learning_rate), 1.0, 0.05, torch.bfloat16)


@cross(("poison", ["loss", "expert"]), ("bf16", [False, True]), ("optimizer", ["sgd", "adamw"]), ("stage", STAGES))
def test_trap_T49_a_step_that_is_not_finite_is_skipped_on_every_rank(
    ranks: RankPool, stage: int, optimizer: str, bf16: bool, poison: str
) -> None:
    """T13, T49: no weight, moment or bias moves; the loss may be finite and one expert of one rank to blame."""
    layout = Case(expert_parallel=2, zero_stage=stage, optimizer=optimizer, bf16=bf16, learning_rate=1e-2)
    skipped = ranks.run(run_case, 2, dataclasses.replace(layout, poison=poison))
    untouched = ranks.run(run_case, 2, dataclasses.replace(layout, steps=0))
    assert [one.taken for one in skipped] == [[False], [False]]
    for ours, before in zip(skipped, untouched, strict=True):
        assert all(torch.equal(ours.weights[name], before.weights[name]) for name in before.weights)
        assert all(torch.equal(a, b) for a, b in zip(ours.biases, before.biases, strict=True))
        assert not any(moment.any() for moment in ours.moments)
    assert sum(map(sum, skipped[0].loads[0])) > 0, "the load of a skipped step is still shown"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_after_a_skipped_step(ranks: RankPool, stage: int) -> None:
    case = Case(expert_parallel=2, zero_stage=stage, steps=3, poison="loss", optimizer="adamw", learning_rate=1e-2)
    traces = ranks.run(run_case, 2, case)
    assert traces[0].taken == traces[1].taken == [False, True, True]
    assert all(torch.isfinite(weight).all() for weight in merged(traces).values())
    assert all(torch.equal(a, b) for a, b in zip(traces[0].biases, traces[1].biases, strict=True))
    assert any(bias.any() for bias in traces[0].biases)


@pytest.mark.parametrize("stage", STAGES)
def test_adamw_counts_no_step_before_the_first(ranks: RankPool, stage: int) -> None:
    """Its first step is as long as the learning rate, wherever the gradient is; counted as the second it is 0.73 of it.

    DeepSpeed's optimizer for bf16 at ZeRO 0 makes an empty one when it starts.
    """
    case = Case(expert_parallel=2, zero_stage=stage, optimizer="adamw", bf16=True, learning_rate=0.25)
    after = merged(ranks.run(run_case, 2, case))
    name = "model.model.norm.weight"  # of ones, without weight decay, and every element has a gradient
    assert torch.equal((initial()[name] - after[name].float()).abs(), torch.full_like(initial()[name], 0.25))


@pytest.mark.parametrize("bf16", [False, True])
def test_trap_T48_zero_0_clips_by_a_norm_that_holds_the_experts(ranks: RankPool, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float64
    _, norm, _ = expected(dtype)
    rate = 1e4 if bf16 else 1.0
    case = Case(expert_parallel=4, zero_stage=0, clipping=0.2 * norm, bf16=bf16, learning_rate=rate)
    traces = ranks.run(run_case, 4, case)
    assert traces[0].norms[0] == pytest.approx(norm, rel=0.01 if bf16 else 1e-4)
    # Told from weights shown in bf16, the clipped step is known to some percent; the norm above is the sharp check.
    assert_gradients(gradients_of(traces, rate), 0.2, 0.25 if bf16 else 2e-4, dtype)
