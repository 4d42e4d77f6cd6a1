"""What `balance` refuses, with value, rule and remedy; and layers that it counts and does not balance."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_moe
from dist_moe.errors import UserError
from dist_moe.probe.layers import find_layers
from tests.attached import EXPERTS, Received, hooks_of, make_model, signs, tokens, train_on


def test_policy_none_counts_what_cannot_be_balanced() -> None:
    model = make_model()
    layer = find_layers(model)[1]
    weight = layer.router.get_parameter("weight")
    layer.block.gate = Heated(weight)
    received = Received(model)
    balancer = dist_moe.balance(model, "none")
    assert [layer.bias for layer in balancer.layers] == ["ours", None]
    train_on(model, tokens(0))
    load = balancer.step()
    assert [list(layer) for layer in load.counts_LE] == received.take()
    assert load.biases[0] is not None and not load.biases[0].any() and load.biases[1] is None


class Heated(nn.Module):
    """A router with a temperature that its logits do not show."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_states.reshape(-1, hidden_states.shape[-1]) @ self.weight.T
        weights_TK, ids_TK = (logits_TE / 3).softmax(dim=-1).topk(2)
        return logits_TE, weights_TK, ids_TK


def heated(*layers: int) -> nn.Module:
    model = make_model()
    for place, layer in enumerate(find_layers(model)):
        if place in layers:
            layer.block.gate = Heated(layer.router.get_parameter("weight"))
    return model


def test_trap_T99_layers_of_an_unknown_rule_are_counted_beside_balanced_ones() -> None:
    model = heated(1)
    received, balancer = Received(model), dist_moe.balance(model, rate=0.25)
    train_on(model, tokens(0))
    load, counts = balancer.step(), received.take()
    assert [list(layer) for layer in load.counts_LE] == counts
    assert load.biases[0] is not None and torch.equal(load.biases[0], 0.25 * signs(counts[0]))
    assert load.biases[1] is None
    assert balancer.layers[1].reason.startswith("it selects 2 of 8 experts by none of the known rules")


class Opaque(nn.Module):
    """A router whose results are not told apart."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Any:
        return SimpleNamespace(results=self.inner(hidden_states))


class ReadsOpaque(nn.Module):
    """A block around one whose router is opaque."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = Opaque(block.get_submodule("gate")), block.get_submodule("experts")

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(flat).results
        found: Tensor = self.experts(flat, ids, weights)
        return found.view_as(hidden_states)


def test_a_layer_that_cannot_be_read_is_named_and_the_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = make_model()
    model.model.layers[0].mlp = ReadsOpaque(model.model.layers[0].mlp)
    received = Received(model)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        balancer = dist_moe.balance(model, rate=0.25)
    unread, read = balancer.layers
    assert (unread[:4], read[:4]) == (("model.layers.0.mlp", 0, 0, None), ("model.layers.1.mlp", EXPERTS, 2, "ours"))
    assert "Opaque" in unread.reason and unread.reason.endswith("its load cannot be counted") and not read.reason
    assert caplog.messages == [f"1 MoE layer of Qwen3MoeForCausalLM not balanced: {unread.reason}"]
    train_on(model, tokens(0))
    load = balancer.step()
    assert load.layers == ("model.layers.1.mlp",) and [list(load.counts_LE[0])] == received.take()[1:]
    model.model.layers[1].mlp = ReadsOpaque(model.model.layers[1].mlp)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp \(Opaque\): .*; its load cannot be counted"):
        dist_moe.balance(model)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown policy": ("qwen3_moe", {"policy": "best"}, r"policy='best' is unknown; use one of none, loss_f"),
    "unknown field": ("qwen3_moe", {"speed": 3}, "speed"),
    "out of range": ("qwen3_moe", {"rate": -1.0}, "rate"),
    "schedule": ("qwen3_moe", {"schedule": "linear"}, r"schedule=linear needs the length of the run; give steps"),
    "steps": ("qwen3_moe", {"steps": 0}, r"steps=0 is not the number of steps of a run; use 1 or more"),
    "losses": (
        "qwen3_moe",
        {"auxiliary_loss": 0.01, "z_loss": 0.1},
        r"auxiliary_loss=0\.01, z_loss=0\.1: a loss belongs in the training loop; use a policy that moves a bias",
    ),
    "auxiliary": ("qwen3_moe", {"policy": "auxiliary"}, r"loss.* belongs in the training loop; use .* moves a bias"),
    "multiplicative": (
        "deepseek_v3",
        {"form": "multiplicative"},
        r"policy=loss_free with these fields .* multiplies the scores of model\.layers\.1\.mlp, .* use its defaults",
    ),
    "thresholds": (
        "qwen3_moe",
        {"policy": "expert_threshold"},
        r"policy=expert_threshold does not work .* scores of model\.layers\.0\.mlp; use",
    ),
    "shares": ("qwen3_moe", {"shares": [0.5, 0.5]}, r"model\.layers\.0\.mlp: .*2 values for the 8 experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused_with_value_rule_and_remedy(case: str) -> None:
    family, fields, message = REFUSED[case]
    model = make_model(family)
    with pytest.raises(UserError, match=message):
        dist_moe.balance(model, **fields)
    assert not any(hooks_of(model)), "nothing is left on the model"


def test_trap_T99_a_model_of_unknown_rules_alone_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"^no layer can be balanced: model\.layers\.0\.mlp: it selects 2 of 8 experts by none of the known rules "
        r".*; policy='none' counts the load$",
    ):
        dist_moe.balance(heated(0, 1))


def test_a_policy_that_reads_logits_needs_a_known_rule() -> None:
    model = heated()
    layer = find_layers(model)[0]
    layer.block.gate = HeatedWithBias(layer.router.get_parameter("weight"))
    assert [each.bias for each in dist_moe.balance(model).layers] == ["own", "ours"]
    with pytest.raises(
        UserError, match=r"policy=quantile reads the logits of model\.layers\.0\.mlp, whose rule is not"
    ):
        dist_moe.balance(model, "quantile")


class HeatedWithBias(Heated):
    """With a selection bias of its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_states.reshape(-1, hidden_states.shape[-1]) @ self.weight.T
        scores_TE = (logits_TE / 3).softmax(dim=-1)
        ids_TK = (scores_TE + self.get_buffer("expert_bias")).topk(2).indices
        return logits_TE, scores_TE.gather(1, ids_TK), ids_TK


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no MoE layer"):
        dist_moe.balance(nn.Linear(2, 2))


def test_a_step_without_a_forward_in_training_mode_is_refused() -> None:
    model = make_model()
    balancer = dist_moe.balance(model)
    model.eval()
    model(input_ids=tokens(0))
    with pytest.raises(
        UserError, match=r"no forward of the model in training mode was counted .*; call model\.train\("
    ):
        balancer.step()
    model.train()
    model(input_ids=tokens(0))
    assert balancer.step().tokens == 24, "it may be tried again"
