"""`balance` in one process: what it counts and updates, its state, and that the model stays what it was."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import dist_moe
from dist_moe.attach.balancer import Balancer, Layer, inner_model
from dist_moe.attach.load import Load
from dist_moe.errors import UserError
from tests.attached import (
    EXPERTS,
    FAMILIES,
    Received,
    added,
    hooks_of,
    make_model,
    own_biases,
    signs,
    tensors_of,
    tokens,
    train_on,
)

BIASED = ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "afmoe"]


def equal_states(one: Balancer, other: Balancer) -> bool:
    """Bit for bit, with the memory of the rule."""
    first, second = one.state_dict(), other.state_dict()
    layers = zip(first.pop("layers").items(), second.pop("layers").items(), strict=True)
    return first == second and all(
        name == other_name and layer.keys() == theirs.keys() and all(torch.equal(layer[k], theirs[k]) for k in layer)
        for (name, layer), (other_name, theirs) in layers
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_leaves_the_model_bit_for_bit(family: str) -> None:
    model, twin = make_model(family), make_model(family)
    drawn = torch.get_rng_state()
    balancer = dist_moe.balance(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert dict(tensors_of(model)).keys() == dict(tensors_of(twin)).keys()
    for (name, value), (_, theirs) in zip(tensors_of(model), tensors_of(twin), strict=True):
        assert torch.equal(value, theirs) and value.dtype == theirs.dtype and value.grad is None, name
        assert value.requires_grad == theirs.requires_grad
    assert all(module.training for module in model.modules())
    batch = tokens(0)
    torch.testing.assert_close(model(input_ids=batch).logits, twin(input_ids=batch).logits)
    balancer.remove()
    assert [len(each) for each in hooks_of(model)] == [len(each) for each in hooks_of(twin)]
    assert torch.equal(model(input_ids=batch).logits, twin(input_ids=batch).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "afmoe"])
def test_a_model_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = make_model(family)
    layers = dist_moe.balance(model).layers
    assert layers == dist_moe.balance(make_model(family)).layers
    assert all(value.is_meta for name, value in tensors_of(model) if "inv_freq" not in name)


def test_the_layers_and_how_they_are_balanced() -> None:
    assert dist_moe.balance(make_model("qwen3_moe")).layers == [
        Layer(f"model.layers.{place}.mlp", EXPERTS, 2, "ours", "") for place in (0, 1)
    ]
    assert [layer.bias for layer in dist_moe.balance(make_model("deepseek_v3")).layers] == ["own", "own"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_T94_a_single_moe_layer_that_is_recomputed_counts_once(reentrant: bool) -> None:
    model: Any = make_model("deepseek_v3", first_k_dense_replace=2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    received, balancer = Received(model), dist_moe.balance(model)
    assert len(balancer.layers) == 1
    for seed in range(2):
        train_on(model, tokens(seed))
    twice = received.take()
    assert [2 * count for count in balancer.step().counts_LE[0]] == twice[0], "each token in the forward and again"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_counts_what_the_experts_received_and_moves_each_bias_by_the_rate(family: str) -> None:
    model = make_model(family)
    received = Received(model)
    balancer = dist_moe.balance(model, rate=0.25)
    wanted = [torch.zeros(EXPERTS) for _ in balancer.layers]
    for step in (1, 2, 3):
        train_on(model, tokens(step), tokens(10 + step))
        counts = received.take()
        load = balancer.step()
        wanted = [bias_E + 0.25 * signs(layer) for bias_E, layer in zip(wanted, counts, strict=True)]
        assert [list(layer) for layer in load.counts_LE] == counts
        assert (load.step, load.taken, load.rate, load.tokens) == (step, True, 0.25, 4 * 12)
        assert load.layers == tuple(layer.name for layer in balancer.layers)
        assert all(torch.equal(a, b) for a, b in zip(load.biases, wanted, strict=True) if a is not None)
        assert all(torch.equal(a.flatten(), b) for a, b in zip(own_biases(model), wanted, strict=False))
    assert len(own_biases(model)) == (2 if family in BIASED else 0)
    assert balancer.load is load and balancer.steps == 3


def test_each_step_begins_a_new_window() -> None:
    model = make_model()
    received, balancer = Received(model), dist_moe.balance(model)
    for step in range(2):
        train_on(model, tokens(step))
        counts = received.take()
        assert [list(layer) for layer in balancer.step().counts_LE] == counts
    assert balancer.step().counts_LE == ((0,) * EXPERTS,) * 2, "later steps may have no tokens on a rank"


def test_the_load_becomes_even() -> None:
    """On the same tokens without training, so that only the bias changes the selection."""
    model = make_model()
    balancer = dist_moe.balance(model, rate=0.05)
    batch, measured = tokens(0, rows=8, length=32), []
    for _ in range(80):
        model(input_ids=batch)
        measured.append(balancer.step().max_vio)
    assert measured[0] > 0.3 and sum(measured[-10:]) / 10 < measured[0] / 4


def test_trap_T97_a_skipped_step_is_counted_and_changes_nothing() -> None:
    model = make_model("deepseek_v3")
    received, balancer = Received(model), dist_moe.balance(model, "momentum", rate=0.25)
    train_on(model, tokens(0))
    balancer.step()
    before, biases = balancer.state_dict(), [bias.clone() for bias in own_biases(model)]
    received.take()
    train_on(model, tokens(1))
    load = balancer.step(taken=False)
    assert [list(layer) for layer in load.counts_LE] == received.take()
    assert (load.taken, load.rate, load.step, balancer.steps) == (False, 0.0, 2, 2)
    after = balancer.state_dict()
    assert after["taken"] == 1
    for name, layer in before["layers"].items():
        assert all(torch.equal(after["layers"][name][key], layer[key]) for key in layer)
    assert all(torch.equal(a, b) for a, b in zip(own_biases(model), biases, strict=True))
    train_on(model, tokens(2))
    counts = received.take()
    assert [list(layer) for layer in balancer.step().counts_LE] == counts, "the skipped one weighs no more"


def test_trap_T97_a_schedule_does_not_advance_with_skipped_steps() -> None:
    model = make_model()
    balancer = dist_moe.balance(model, rate=0.4, schedule="linear", steps=4)
    rates = []
    for taken in (True, False, False, True, True):
        train_on(model, tokens(0))
        rates.append(balancer.step(taken).rate)
    assert rates == [0.4, 0.0, 0.0, pytest.approx(0.3), pytest.approx(0.2)]


def test_trap_T95_a_cast_to_bf16_keeps_the_bias_in_fp32() -> None:
    model = make_model("deepseek_v3")
    for bias in own_biases(model):
        bias.fill_(0.5)
    balancer = dist_moe.balance(model, rate=0.001)
    model.bfloat16()
    wanted = [torch.full((EXPERTS,), 0.5) for _ in range(2)]
    received = Received(model)
    for step in range(5):
        train_on(model, tokens(step))
        load = balancer.step()
        wanted = [bias_E + 0.001 * signs(counts) for bias_E, counts in zip(wanted, received.take(), strict=True)]
        for found, bias_E, own in zip(load.biases, wanted, own_biases(model), strict=True):
            assert found is not None and found.dtype == torch.float32 and torch.equal(found, bias_E)
            assert own.dtype == torch.bfloat16 and torch.equal(own, bias_E.bfloat16())


def test_trap_T95_a_bias_that_is_loaded_into_the_model_afterwards_is_continued() -> None:
    model = make_model("minimax_m2")
    balancer = dist_moe.balance(model, rate=0.25)
    given = make_model("minimax_m2")
    for place, bias in enumerate(own_biases(given)):
        bias.copy_(torch.linspace(0, 1 + place, EXPERTS))
    model.load_state_dict(given.state_dict())
    received = Received(model)
    train_on(model, tokens(0))
    load = balancer.step()
    for found, own, counts in zip(load.biases, own_biases(given), received.take(), strict=True):
        assert found is not None and torch.equal(found, own + 0.25 * signs(counts))


class Wrapper(nn.Module):
    """As DistributedDataParallel and DeepSpeed's engine hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_model_in_wrappers_is_found() -> None:
    model = make_model()
    compiled = torch.compile(Wrapper(Wrapper(model)), backend="eager")
    assert isinstance(compiled, nn.Module) and inner_model(compiled) is inner_model(model) is model
    balancer, received = dist_moe.balance(compiled), Received(model)
    train_on(Wrapper(Wrapper(model)), tokens(0))
    assert [list(layer) for layer in balancer.step().counts_LE] == received.take()


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("deepseek_v3", policy) for policy in ("loss_free", "momentum", "quantile", "ema_quantile")),
        *(("qwen3_moe", policy) for policy in ("loss_free", "momentum", "adaptive_weight", "ema_quantile")),
    ],
)
def test_trap_T96_a_restored_balancer_continues_with_the_same_bits(family: str, policy: str) -> None:
    def run(balancer: Balancer, model: nn.Module, *seeds: int) -> None:
        for seed in seeds:
            model(input_ids=tokens(seed))
            balancer.step()

    whole_model, first_model, second_model = (make_model(family) for _ in range(3))
    whole, first = dist_moe.balance(whole_model, policy), dist_moe.balance(first_model, policy)
    run(whole, whole_model, 0, 1, 2, 3)
    run(first, first_model, 0, 1)
    second = dist_moe.balance(second_model, policy)
    second_model(input_ids=tokens(9))  # an open window is discarded
    second.load_state_dict(first.state_dict())
    for own, theirs in zip(own_biases(second_model), own_biases(first_model), strict=True):
        assert torch.equal(own, theirs) and bool(own.any()), "before the next forward"
    run(second, second_model, 2, 3)
    assert equal_states(second, whole) and second.steps == 4
    for bias, theirs in zip(second.state_dict()["layers"].values(), first.state_dict()["layers"].values(), strict=True):
        assert not torch.equal(bias["selection_bias"], theirs["selection_bias"])


def test_the_state_is_a_copy() -> None:
    model = make_model()
    balancer = dist_moe.balance(model, rate=1.0)
    state = balancer.state_dict()
    train_on(model, tokens(0))
    balancer.step()
    assert not any(bool(layer["selection_bias"].any()) for layer in state["layers"].values())
    assert state["steps"] == 0 and state["policy"] == "loss_free"


def test_a_state_that_lacks_something_is_refused() -> None:
    balancer = dist_moe.balance(make_model())
    state = balancer.state_dict()
    del state["taken"], state["steps"]
    with pytest.raises(UserError, match=r"the state of the balancer lacks taken, steps; give what state_dict\(\) ret"):
        balancer.load_state_dict(state)


def test_the_state_of_another_model_is_refused() -> None:
    state = dist_moe.balance(make_model(num_hidden_layers=1)).state_dict()
    with pytest.raises(
        UserError, match=r"is of the layers model\.layers\.0\.mlp, and the model has model\.layers\.0\.mlp and"
    ):
        dist_moe.balance(make_model()).load_state_dict(state)


def test_the_state_of_a_model_with_other_experts_is_refused() -> None:
    state = dist_moe.balance(make_model(num_experts=16)).state_dict()
    balancer = dist_moe.balance(make_model())
    with pytest.raises(
        UserError, match=r"of model\.layers\.0\.mlp has a selection_bias of 16 experts, and the layer has 8;"
    ):
        balancer.load_state_dict(state)
    assert not any(bool(layer["selection_bias"].any()) for layer in balancer.state_dict()["layers"].values())


def test_listeners_get_the_load_of_each_step() -> None:
    model, seen = make_model(), list[Load]()
    balancer = dist_moe.balance(model)
    balancer.listen(seen.append)
    balancer.listen(lambda load: seen.append(load))
    train_on(model, tokens(0))
    assert seen == [balancer.step()] * 2


def test_what_checkpoints_of_the_model_lack_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dist_moe"):
        dist_moe.balance(make_model("deepseek_v3"))
        assert not caplog.messages
        dist_moe.balance(make_model())
    assert caplog.messages == [
        "2 MoE layers of Qwen3MoeForCausalLM: no selection bias of the model's own; the state of the balancer has it, "
        "and checkpoints of the model lack it"
    ]


def test_after_removal_a_bias_of_the_model_keeps_its_value_and_nothing_is_counted() -> None:
    model = make_model("deepseek_v3")
    balancer = dist_moe.balance(model, rate=0.25)
    train_on(model, tokens(0))
    load = balancer.step()
    balancer.remove()
    train_on(model, tokens(1))
    with pytest.raises(UserError, match=r"the balancer was removed from the model; call dist_moe\.balance again"):
        balancer.step()
    assert all(torch.equal(a, b) for a, b in zip(own_biases(model), load.biases, strict=True) if b is not None)


def test_accumulated_counts_equal_those_of_one_large_batch() -> None:
    batches = [tokens(seed, rows=4) for seed in range(3)]
    loads = []
    for split in (False, True):
        model = make_model("deepseek_v3").eval()
        for module in model.modules():
            module.training = True
        received, balancer = Received(model), dist_moe.balance(model)
        for batch in batches if split else [torch.cat(batches)]:
            model(input_ids=batch)
        loads.append(balancer.step().counts_LE)
        assert [list(layer) for layer in loads[-1]] == added(received.take())
    assert loads[0] == loads[1]
