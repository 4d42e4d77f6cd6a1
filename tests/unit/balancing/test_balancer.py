"""The balancer in one process: its window, its schedule, and the layers that it updates."""

import pytest
import torch

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.margins import BINS
from dist_moe.moe.router import Router
from dist_moe.moe.select import ThresholdRouting, TopK
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from dist_moe.policies.base import Policy
from dist_moe.policies.loss_free import LossFree
from dist_moe.policies.momentum import Momentum
from dist_moe.policies.quantile import Quantile
from dist_moe.policies.unbalanced import Unbalanced

CPU = torch.device("cpu")
PLAIN = LossFree(rate=0.5)
NONE = Unbalanced(rate=0.5)


def make_routers(*experts: int) -> dict[str, Router]:
    """A router for each number of experts."""
    return {f"layer.{place}": Router(count, 4, TopK(1, "sigmoid")) for place, count in enumerate(experts)}


def counts(*values: int) -> RoutingCounts:
    """The counts of a layer with this load, by tokens that took one expert each."""
    return RoutingCounts(torch.tensor(values), torch.tensor([sum(values)]))


def loads(routing_counts: list[RoutingCounts]) -> list[list[int]]:
    """The load of each layer."""
    return [layer_counts.load_E.tolist() for layer_counts in routing_counts]


def test_the_window_is_the_sum_of_its_micro_batches() -> None:
    balancer = Balancer(make_routers(2), PLAIN, CPU, schedule_steps=10)
    balancer.observe([counts(5, 0)])
    balancer.observe([counts(0, 6)])
    assert loads(balancer.step()) == [[5, 6]]
    assert balancer.biases[0].tolist() == [0.5, -0.5], "not -0.5, 0.5 of the first, nor 0, 0 of one after the other"


def test_trap_T07_every_step_begins_a_new_window() -> None:
    balancer = Balancer(make_routers(2), PLAIN, CPU, schedule_steps=10)
    balancer.observe([counts(9, 1)])
    balancer.step()
    balancer.observe([counts(1, 2)])
    assert loads(balancer.step()) == [[1, 2]]
    assert balancer.biases[0].tolist() == [0.0, 0.0], "down and up again; the first window weighs no more"


def test_trap_T13_a_discarded_window_has_no_effect() -> None:
    linear = LossFree(rate=0.5, schedule="linear")
    balancer = Balancer(make_routers(2), linear, CPU, schedule_steps=2)
    balancer.observe([counts(9, 1)])
    assert loads(balancer.discard()) == [[9, 1]], "it is still reported"
    assert (balancer.biases[0].tolist(), balancer.steps_taken) == ([0.0, 0.0], 0)
    balancer.observe([counts(1, 2)])
    balancer.step()
    assert (balancer.biases[0].tolist(), balancer.steps_taken) == ([0.5, -0.5], 1), "at the first step's rate"


def test_trap_T15_layers_with_different_numbers_of_experts() -> None:
    balancer = Balancer(make_routers(2, 5, 3), PLAIN, CPU, schedule_steps=10)
    seen = [counts(1, 0), counts(0, 0, 0, 4, 1), counts(2, 2, 2)]
    balancer.observe(seen)
    assert loads(balancer.step()) == loads(seen)
    assert [bias.tolist() for bias in balancer.biases] == [
        [-0.5, 0.5],
        [0.5, 0.5, 0.5, -0.5, 0.0],
        [0.0, 0.0, 0.0],
    ]


def test_trap_T15_without_balancing_the_load_is_reported_and_no_bias_moves() -> None:
    balancer = Balancer(make_routers(2, 3), NONE, CPU, schedule_steps=10)
    balancer.observe([counts(7, 0), counts(0, 0, 7)])
    assert loads(balancer.step()) == [[7, 0], [0, 0, 7]]
    assert not any(bias.any() for bias in balancer.biases)
    assert (balancer.rate, balancer.steps_taken) == (0.0, 1)


@pytest.mark.parametrize("policy", [PLAIN, NONE], ids=["loss_free", "none"])
def test_trap_T16_a_model_without_moe_layers_can_be_stepped(policy: Policy) -> None:
    balancer = Balancer({}, policy, CPU, schedule_steps=10)
    balancer.observe([])
    assert (balancer.step(), balancer.discard(), balancer.biases, balancer.steps_taken) == ([], [], [], 1)


def test_loads_for_another_number_of_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Balancer(make_routers(2, 2), PLAIN, CPU, schedule_steps=10).observe([counts(1, 1)])


def test_trap_T14_a_frozen_router_keeps_its_bias() -> None:
    routers = make_routers(2, 2)
    routers["layer.0"].requires_grad_(False)
    balancer = Balancer(routers, PLAIN, CPU, schedule_steps=10)
    balancer.observe([counts(9, 1), counts(9, 1)])
    assert loads(balancer.step()) == [[9, 1], [9, 1]], "it is still reported"
    assert [bias.tolist() for bias in balancer.biases] == [[0.0, 0.0], [-0.5, 0.5]]


def test_the_current_buffer_of_the_router_is_written() -> None:
    routers = make_routers(2)
    balancer = Balancer(routers, PLAIN, CPU, schedule_steps=10)
    routers["layer.0"].bfloat16()
    routers["layer.0"].selection_bias = torch.tensor([1.0, 1.0])
    balancer.observe([counts(9, 1)])
    balancer.step()
    assert routers["layer.0"].state_dict()["selection_bias"].tolist() == [0.5, 1.5]


def test_trap_T12_a_bias_in_half_precision_is_refused() -> None:
    routers = make_routers(2)
    routers["layer.0"].register_buffer("selection_bias", torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"bias of layer\.0 is torch\.bfloat16; it is fp32"):
        Balancer(routers, PLAIN, CPU, schedule_steps=10)


def test_the_linear_schedule_moves_the_bias() -> None:
    balancer = Balancer(make_routers(2), LossFree(rate=0.5, schedule="linear"), CPU, schedule_steps=2)
    moved = []
    for _ in range(3):
        balancer.observe([counts(9, 1)])
        balancer.step()
        moved.append(balancer.biases[0].tolist())
    assert moved == [[-0.5, 0.5], [-0.75, 0.75], [-0.75, 0.75]]


def test_centering_keeps_the_mean_at_zero() -> None:
    balancer = Balancer(make_routers(4), LossFree(rate=0.5, center=True), CPU, schedule_steps=10)
    balancer.observe([counts(9, 1, 1, 1)])
    balancer.step()
    assert balancer.biases[0].tolist() == [-0.75, 0.25, 0.25, 0.25]


def threshold_routers() -> dict[str, Router]:
    """Two routers by threshold, of four experts."""
    return {name: Router(4, 4, ThresholdRouting(0.4, 4)) for name in ("a", "b")}


def make_controlled(routers: dict[str, Router]) -> Balancer:
    """Adaptive weights, and a threshold that is to give each token two experts."""
    return Balancer(routers, AdaptiveWeight(rate=0.1), CPU, schedule_steps=10, target_experts_per_token=2.0)


ONE_EACH = RoutingCounts(torch.tensor([9, 1, 1, 1]), torch.tensor([12, 0, 0, 0]))


def test_trap_T14_a_frozen_router_keeps_its_threshold() -> None:
    routers = threshold_routers()
    routers["a"].requires_grad_(False)
    balancer = make_controlled(routers)
    balancer.observe([ONE_EACH._replace(k_histogram_K=torch.tensor([0, 0, 0, 3])), ONE_EACH])
    balancer.step()
    assert routers["a"].threshold is not None and routers["b"].threshold is not None
    assert float(routers["a"].threshold) == pytest.approx(0.4)
    assert float(routers["b"].threshold) > 0.45, "its own tokens took 1, independent of those of the frozen router"
    assert balancer.threshold == pytest.approx(float(routers["b"].threshold))


def test_freeze_at_stops_every_policy() -> None:
    settings = Quantile(freeze_at=0)
    balancer = Balancer(make_routers(2), settings, CPU, schedule_steps=10)
    margins_EQ = torch.zeros(2, BINS, dtype=torch.int64)
    margins_EQ[0, 10], margins_EQ[1, 900] = 5, 5
    balancer.observe([counts(9, 1)._replace(margins_EQ=margins_EQ)])
    balancer.step()
    assert not balancer.biases[0].any()
    moving = Balancer(make_routers(2), Quantile(), CPU, schedule_steps=10)
    moving.observe([counts(9, 1)._replace(margins_EQ=margins_EQ)])
    moving.step()
    assert moving.biases[0][0] > 0 > moving.biases[0][1]
    assert settings.rate_at(0, 10) == 0.0, "it has no rate"


def test_trap_T44_a_restored_balancer_continues_as_the_original() -> None:
    """Five steps equal three, a restored state, and two; an open window is discarded (T7)."""
    steps = [RoutingCounts(torch.tensor([9, 1, 1, step]), torch.tensor([6 + step, 3, 0, 0])) for step in range(5)]

    def run(balancer: Balancer, routing_counts: list[RoutingCounts]) -> Balancer:
        for layer_counts in routing_counts:
            balancer.observe([layer_counts, layer_counts])
            balancer.step()
        return balancer

    whole = run(make_controlled(threshold_routers()), steps)
    first = run(make_controlled(threshold_routers()), steps[:3])
    second = make_controlled(threshold_routers())
    second.observe([steps[0], steps[0]])
    second.load_state_dict(first.state_dict())
    run(second, steps[3:])
    for name in ("a", "b"):
        assert torch.equal(second.routers[name].selection_bias, whole.routers[name].selection_bias)
        assert torch.equal(second.routers[name].last_load, whole.routers[name].last_load)
    assert (second.steps_taken, second.controller) == (whole.steps_taken, whole.controller)
    assert second.routers["a"].threshold is not None and second.controller is not None
    assert float(second.routers["a"].threshold) == pytest.approx(second.controller.threshold)


def test_the_state_of_another_model_is_refused() -> None:
    state = make_controlled(threshold_routers()).state_dict()
    with pytest.raises(ValueError, match=r"the state has the layers \['a', 'b'\]"):
        Balancer(make_routers(4), PLAIN, CPU, schedule_steps=10).load_state_dict(state)


def with_momentum(*experts: int) -> Balancer:
    """A balancer whose rule has a memory, after two steps of uneven load."""
    balancer = Balancer(make_routers(*experts), Momentum(rate=0.5), CPU, schedule_steps=10)
    for _ in range(2):
        balancer.observe([counts(*range(1, count + 1)) for count in experts])
        balancer.step()
    return balancer


def test_the_memory_of_a_rule_is_kept_for_each_layer() -> None:
    balancer = with_momentum(2, 3)
    layers = balancer.state_dict()["layers"]
    assert {name: sorted(layer) for name, layer in layers.items()} == {
        f"layer.{place}": ["last_load", "memory.momentum", "selection_bias"] for place in range(2)
    }
    # After a first step of d / 2 the second moves by d / 4 + d / 2: the bias is 5/3 of the momentum.
    for layer in layers.values():
        torch.testing.assert_close(layer["selection_bias"], layer["memory.momentum"] * 5 / 3)
        assert bool(layer["memory.momentum"].any())


def test_trap_T44_a_restored_memory_gives_the_same_bits() -> None:
    balancer = with_momentum(2, 3)
    other = Balancer(make_routers(2, 3), Momentum(rate=0.5), CPU, schedule_steps=10)
    assert other.load_state_dict(balancer.state_dict()) == []
    for one in (balancer, other):
        one.observe([counts(7, 2), counts(1, 1, 5)])
        one.step()
    ours, theirs = (one.state_dict()["layers"] for one in (balancer, other))
    assert all(torch.equal(ours[name][kind], theirs[name][kind]) for name in ours for kind in ours[name])


def test_a_state_without_memory_starts_with_an_empty_one() -> None:
    old = Balancer(make_routers(2, 3), PLAIN, CPU, schedule_steps=10).state_dict()
    balancer = with_momentum(2, 3)
    assert balancer.load_state_dict(old) == [
        "the checkpoint lacks the memory of balance.policy=momentum (momentum): it is empty"
    ]
    assert not any(value.any() for memory in balancer.memory.values() for value in memory.values())


def test_trap_T44_a_memory_that_one_layer_lacks_is_empty_in_all() -> None:
    state = with_momentum(2, 3).state_dict()
    del state["layers"]["layer.1"]["memory.momentum"]
    balancer = with_momentum(2, 3)
    assert len(balancer.load_state_dict(state)) == 1
    assert not any(value.any() for memory in balancer.memory.values() for value in memory.values())


def test_memory_of_another_policy_is_not_used_and_named() -> None:
    balancer = Balancer(make_routers(2, 3), PLAIN, CPU, schedule_steps=10)
    assert balancer.load_state_dict(with_momentum(2, 3).state_dict()) == [
        "the checkpoint has the memory momentum, which balance.policy=loss_free does not use"
    ]


def test_trap_T13_a_discarded_window_does_not_change_the_memory() -> None:
    balancer = with_momentum(2)
    before_E = balancer.memory["layer.0"]["momentum"].clone()
    balancer.observe([counts(9, 1)])
    balancer.discard()
    assert torch.equal(balancer.memory["layer.0"]["momentum"], before_E)


def test_trap_T14_a_frozen_router_and_a_frozen_policy_keep_their_memory() -> None:
    routers = make_routers(2, 2)
    routers["layer.0"].requires_grad_(False)
    balancer = Balancer(routers, Momentum(rate=0.5, freeze_at=1), CPU, schedule_steps=10)
    seen = []
    for _ in range(3):
        balancer.observe([counts(9, 1), counts(9, 1)])
        balancer.step()
        seen.append([balancer.memory[name]["momentum"].tolist() for name in routers])
    assert seen[0][0] == [0.0, 0.0] != seen[0][1]
    assert seen[0] == seen[1] == seen[2]
