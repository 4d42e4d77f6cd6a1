"""Policies over ranks, micro-batches, recomputation, skips and evaluation: the same numbers, or none at all."""

import dataclasses

import pytest
import torch

from dist_moe.balancing.losses import RoutingLosses, orthogonality_loss
from dist_moe.comm.mesh import Mesh
from dist_moe.model.inputs import model_inputs
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.loss_free import LossFree
from tests.dist.balanced import CPU, evaluate, validation_set
from tests.dist.policies import (
    LOSSES,
    POLICIES,
    RANDOM_SELECTIONS,
    THRESHOLD,
    case_of,
    given_logits,
    mean_of_local_quantiles,
)
from tests.dist.pool import RankPool
from tests.dist.small import (
    Case,
    Trace,
    make_balancer,
    make_task,
    named_weights,
    ragged_batch,
    reference,
    run_case,
)
from tests.selection import cross, only_first

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)


def assert_same_state(found: object, wanted: object) -> None:
    """Equal bit for bit, through dicts and tensors."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys()
        for key in wanted:
            assert_same_state(found[key], wanted[key])
    elif isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", POLICIES)
def test_trap_T10_counts_and_state_are_those_of_one_rank_exactly(ranks: RankPool, name: str) -> None:
    ((wanted, state),) = ranks.run(given_logits, 1, name)
    moved = any(layer["selection_bias"].any() for layer in state["layers"].values())
    assert moved == (name != "threshold")
    for workers in (2, 4):
        for found, found_state in ranks.run(given_logits, workers, name):
            assert_same_state(found_state, state)
            for step, wanted_step in zip(found, wanted, strict=True):
                for layer_counts, wanted_counts in zip(step, wanted_step, strict=True):
                    assert_same_state(layer_counts._asdict(), wanted_counts._asdict())


def test_trap_T10_a_mean_of_local_quantiles_is_another_bias(ranks: RankPool) -> None:
    """A control for the test above."""
    (one,) = ranks.run(mean_of_local_quantiles, 1)
    two, again = ranks.run(mean_of_local_quantiles, 2)
    assert torch.equal(two, again)
    assert (two - one).abs().max() > 0.01


def gradients(traces: list[Trace], case: Case) -> dict[str, torch.Tensor]:
    """What plain SGD took from every parameter, weight decay included."""
    before = named_weights(make_task(case, ALONE), ALONE)
    after: dict[str, torch.Tensor] = {}
    for trace in traces:
        after |= trace.weights
    return {name: (before[name] - after[name]).double() / case.learning_rate for name in before}


def with_decay(wanted: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """A reference's gradients with the weight decay of 0.1 that SGD adds to matrices but embeddings."""
    before = named_weights(make_task(case, ALONE), ALONE)
    decayed = {name for name in before if before[name].ndim >= 2 and "embed_tokens" not in name}
    return {name: g.double() + (0.1 * before[name].double() if name in decayed else 0) for name, g in wanted.items()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 5e-4) -> None:
    """Tensor by tensor, in units of its own norm or a thousandth of the whole."""
    floor = 1e-3 * float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        assert error <= rtol * max(float(gradient.norm()), floor), name


LAYOUTS = [(1, 1, 1), (1, 1, 4), (2, 2, 1), (4, 2, 1), (4, 4, 2)]  # workers, expert parallel, accumulation


@cross(("name", list(LOSSES)), ("workers, expert_parallel, accumulation", LAYOUTS), strength=1)
def test_trap_T20_the_gradient_of_a_routing_loss_is_that_of_one_process(
    ranks: RankPool, workers: int, expert_parallel: int, accumulation: int, name: str
) -> None:
    """T20, T47: rows with padding, so that ranks and micro-batches differ in their number of tokens."""
    case = Case(expert_parallel=expert_parallel, accumulation=accumulation, losses=LOSSES[name])
    _, _, wanted = reference(case, torch.float64)
    found = gradients(ranks.run(run_case, workers, case), case)
    assert_close(found, with_decay(wanted, case))
    _, _, without = reference(dataclasses.replace(case, losses=RoutingLosses()), torch.float64)
    router = "model.model.layers.1.mlp.gate.weight"
    assert (wanted[router] - without[router]).norm() > 0.05 * without[router].norm(), "the loss weighs"


@pytest.mark.parametrize(("workers", "expert_parallel", "accumulation"), [(1, 1, 4), (2, 2, 2)])
def test_trap_T20_the_orthogonality_loss_counts_once_on_any_layout(
    ranks: RankPool, workers: int, expert_parallel: int, accumulation: int
) -> None:
    """The router's gradient from it is the coefficient times the gradient of the sum, not times ranks or tokens."""
    case = Case(expert_parallel=expert_parallel, accumulation=accumulation, losses=LOSSES["orthogonality"])
    plain = dataclasses.replace(case, losses=RoutingLosses())
    found, without = (gradients(ranks.run(run_case, workers, one), one) for one in (case, plain))
    router = "model.model.layers.1.mlp.gate.weight"
    weight_ED = named_weights(make_task(case, ALONE), ALONE)[router].requires_grad_()
    (case.losses.orthogonality * orthogonality_loss(weight_ED)).backward()
    assert weight_ED.grad is not None
    torch.testing.assert_close(found[router] - without[router], weight_ED.grad.double(), rtol=1e-3, atol=1e-4)


def test_trap_T20_the_global_loss_uses_the_previous_step_on_every_layout(ranks: RankPool) -> None:
    """Two real steps; the load of the first, over all ranks and micro-batches, weighs in the gradient of the second."""
    alone = Case(losses=LOSSES["global_batch"], steps=2, learning_rate=0.1)
    (wanted,) = ranks.run(run_case, 1, alone)
    assert all(layer["last_load"].sum() == 2 * wanted_tokens(1) for layer in wanted.state["layers"].values())
    spread = dataclasses.replace(alone, expert_parallel=2, accumulation=2)
    for trace in ranks.run(run_case, 4, spread):
        assert trace.norms == pytest.approx(wanted.norms, rel=1e-4)
        assert trace.loads[1] == wanted.loads[1]
        for name, weight in trace.weights.items():
            torch.testing.assert_close(weight, wanted.weights[name], rtol=1e-4, atol=1e-5)


def wanted_tokens(step: int) -> int:
    """Tokens of a global batch that are routed."""
    return int((ragged_batch(step).documents_BS >= 0).sum())


def test_trap_T20_the_loss_of_a_micro_batch_does_not_depend_on_its_rank(ranks: RankPool) -> None:
    """Two rows each on 1, 2 and 4 workers; other micro-batches have other load fractions, and another gradient."""
    losses = RoutingLosses(balance=3.0, scope="micro_batch")
    alone = Case(accumulation=4, losses=losses)
    wanted = gradients(ranks.run(run_case, 1, alone), alone)
    for workers, accumulation in ((2, 2), (4, 1)):
        case = dataclasses.replace(alone, accumulation=accumulation, expert_parallel=2)
        assert_close(gradients(ranks.run(run_case, workers, case), case), wanted)
    whole = dataclasses.replace(alone, accumulation=1)
    with pytest.raises(AssertionError, match=r"model\.\S+\nassert"):
        assert_close(gradients(ranks.run(run_case, 1, whole), whole), wanted)


@cross(
    ("name", ["threshold", "adaptive weight", "expert_threshold"]),
    ("workers, expert_parallel, accumulation", LAYOUTS),
    strength=1,
)
def test_trap_T22_gradients_of_other_routers_equal_the_reference(
    ranks: RankPool, workers: int, expert_parallel: int, accumulation: int, name: str
) -> None:
    case = case_of(name, expert_parallel=expert_parallel, accumulation=accumulation)
    loss, norm, wanted = reference(case, torch.float64)
    traces = ranks.run(run_case, workers, case)
    assert sum(trace.losses[0] for trace in traces) == pytest.approx(loss, rel=1e-5)
    assert traces[0].norms[0] == pytest.approx(norm, rel=1e-4)
    assert_close(gradients(traces, case), with_decay(wanted, case))


@pytest.mark.parametrize("name", only_first(["threshold, target", "quantile", "adaptive weight", "expert_threshold"]))
def test_trap_T01_recomputation_changes_nothing_for_any_policy(ranks: RankPool, name: str) -> None:
    plain = case_of(name, expert_parallel=2, accumulation=2, steps=2, losses=RoutingLosses(1.0, "sequence", 0.1, 0.1))
    wanted = ranks.run(run_case, 2, plain)
    found = ranks.run(run_case, 2, dataclasses.replace(plain, checkpointing=True))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.loads, ours.losses, ours.norms) == (theirs.loads, theirs.losses, theirs.norms)
        assert_same_state(ours.state, theirs.state)
        assert_same_state(ours.weights, theirs.weights)


@pytest.mark.parametrize("name", POLICIES)
def test_trap_T13_a_skipped_step_does_not_change_the_state_of_any_policy(ranks: RankPool, name: str) -> None:
    """A step and a skipped one: the state is that after the first."""
    once = case_of(name, expert_parallel=2, steps=1)
    skipped = dataclasses.replace(once, steps=2, poison="loss", poison_step=1)
    wanted = ranks.run(run_case, 2, once)
    assert wanted[0].state["taken"] == 1
    for ours, theirs in zip(ranks.run(run_case, 2, skipped), wanted, strict=True):
        assert ours.taken == [True, False]
        assert_same_state(ours.state, theirs.state)


@pytest.mark.parametrize("name", POLICIES)
def test_trap_T14_evaluation_does_not_change_the_state_of_any_policy(name: str) -> None:
    """Nor the window: the next step is the same as without an evaluation."""
    states = []
    for evaluated in (False, True):
        case = case_of(name)
        task = make_task(case, ALONE)
        balancer = make_balancer(task, case)
        for seed in range(2):
            batch = ragged_batch(seed)
            output = task(model_inputs(batch, torch.device("cpu")), torch.tensor(1.0))
            balancer.observe(output.routing_counts)
            if evaluated:
                evaluate(task, validation_set(rows=5), ALONE, CPU, 1)
            balancer.step()
        states.append(balancer.state_dict())
    assert_same_state(states[1], states[0])


def test_trap_T17_random_routing_moves_no_bias(ranks: RankPool) -> None:
    case = Case(rule=RANDOM_SELECTIONS, policy=LossFree(rate=0.05), steps=2)
    (trace,) = ranks.run(run_case, 1, case)
    assert trace.loads[0][0][0] > 2 * trace.loads[0][0][-1], "it is uneven"
    assert not any(bias.any() for bias in trace.biases)
    assert not any(layer["last_load"].any() for layer in trace.state["layers"].values())


@pytest.mark.parametrize("workers", only_first([2, 1]))
def test_the_target_is_reached_within_two_percent_in_training(ranks: RankPool, workers: int) -> None:
    case = Case(
        expert_parallel=workers,
        rule=THRESHOLD,
        policy=AdaptiveWeight(rate=0.05),
        target_experts_per_token=3.0,
        steps=60,
        optimizer="adamw",
        learning_rate=1e-4,
    )
    trace = ranks.run(run_case, workers, case)[0]
    means = trace.experts_per_token[-20:]
    assert sum(means) / len(means) == pytest.approx(3.0, rel=0.02)
    assert abs(trace.experts_per_token[0] - 3.0) > 0.3, "the target was not reached from the start"
