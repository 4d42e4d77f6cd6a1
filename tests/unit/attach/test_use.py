"""How a balancer is used: wrong uses are refused, and copies and recomputation of a model do not change counts."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dist_moe
from dist_moe.attach.steppers import attach_to
from dist_moe.errors import UserError
from dist_moe.probe.layers import inner_model, repeats_tokens
from tests.attached import make_model, tokens, train_on


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_trap_T94_a_model_that_is_recomputed_as_a_whole_counts_once(reentrant: bool) -> None:
    model = make_model()
    balancer = dist_moe.balance(model, "none")
    embedded = model.get_input_embeddings()(tokens(0)).detach().requires_grad_()  # type: ignore[operator]
    output = checkpoint(lambda values: model(inputs_embeds=values).logits, embedded, use_reentrant=reentrant)
    output.sum().backward()
    assert [sum(counts) for counts in balancer.step().counts_LE] == [24 * 2] * 2


def test_trap_T94_a_mask_that_is_given_by_position_excludes_padding() -> None:
    model = make_model()
    balancer = dist_moe.balance(model.model, "none")  # type: ignore[arg-type]
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    model.model(tokens(0), mask)  # type: ignore[operator]
    assert [sum(counts) for counts in balancer.step().counts_LE] == [(24 - 5) * 2] * 2


def test_trap_T94_a_mask_that_is_not_used_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    balancer = dist_moe.balance(model, "none")
    mask = torch.zeros(2, 1, 12, 12)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        for _ in range(2):
            model(input_ids=tokens(0), attention_mask=mask)
    assert [record.message for record in caplog.records] == [
        "padding is counted: the attention mask is not [sequences, positions] of these tokens"
    ]
    assert sum(balancer.step().counts_LE[0]) == 2 * 24 * 2


def test_counting_alone_changes_no_bit_of_the_result() -> None:
    model = make_model().bfloat16()
    before = model(input_ids=tokens(0)).logits
    dist_moe.balance(model, "none")
    assert torch.equal(model(input_ids=tokens(0)).logits, before)


def test_a_balancer_is_attached_once() -> None:
    model = make_model()
    balancer = dist_moe.balance(model)
    first = balancer.attach(optimizer_of(model))
    with pytest.raises(UserError, match="attached already, and a second one would step twice; detach the first one"):
        balancer.attach(optimizer_of(model))
    with pytest.raises(UserError, match="attached already, and would step twice"):
        balancer.callback()
    first.remove()
    balancer.callback()
    with pytest.raises(UserError, match="attached already"):
        balancer.attach(optimizer_of(model))


def test_a_removed_balancer_does_not_step() -> None:
    model = make_model()
    balancer, optimizer = dist_moe.balance(model), optimizer_of(model)
    balancer.attach(optimizer)
    train_on(model, tokens(0))
    balancer.remove()
    optimizer.step()
    assert balancer.steps == 0
    with pytest.raises(UserError, match=r"was removed from the model; call dist_moe\.balance again"):
        balancer.step()
    dist_moe.balance(model).remove()


def test_a_second_balancer_of_a_model_is_refused() -> None:
    model = make_model()
    dist_moe.balance(model, "none")
    with pytest.raises(UserError, match=r"the model has a balancer already; call its remove\(\)"):
        dist_moe.balance(model)


def test_a_model_can_be_saved_and_copied_as_a_whole() -> None:
    model = make_model()
    balancer = dist_moe.balance(model, rate=1.0)
    balancer.listen(lambda load: None)
    train_on(model, tokens(0))
    balancer.step()
    expected = model(input_ids=tokens(1)).logits
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (torch.load(stored, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(input_ids=tokens(1)).logits, expected)
    train_on(model, tokens(0))
    balancer.step()
    assert not torch.equal(model(input_ids=tokens(1)).logits, expected)
    assert torch.equal(other(input_ids=tokens(1)).logits, expected), "a copy keeps its bias"


def test_a_layer_without_a_token_is_reported_and_a_model_without_any_refused(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = make_model()
    balancer = dist_moe.balance(model)
    layers = model.model.layers
    whole, layers[1].mlp = layers[1].mlp, nn.Identity()
    with caplog.at_level(logging.WARNING, "dist_moe"):
        train_on(model, tokens(0))
        balancer.step()
    assert [record.message for record in caplog.records] == [
        "1 layer received no token in the first step: model.layers.1.mlp"
    ]
    layers[1].mlp = whole
    balancer.remove()
    balancer = dist_moe.balance(model)
    for layer in layers:
        layer.mlp = nn.Identity()
    train_on(model, tokens(0))
    with pytest.raises(UserError, match=r"no layer received a token in the first step: .* before torch\.compile"):
        balancer.step()


def test_a_later_step_without_a_forward_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    balancer = dist_moe.balance(model)
    train_on(model, tokens(0))
    balancer.step()
    with caplog.at_level(logging.WARNING, "dist_moe"):
        balancer.step()
    assert caplog.messages == ["step 2: no forward in training mode since the last step"]


def test_weights_on_probabilities_need_a_bias_on_logits() -> None:
    dist_moe.balance(make_model("qwen3_moe"), "adaptive_weight")
    with pytest.raises(UserError, match=r"adaptive_weight moves weights on probabilities, and .* logits of a softmax"):
        dist_moe.balance(make_model("ernie4_5_moe"), "adaptive_weight")


def test_a_model_in_threads_or_on_several_devices_is_refused() -> None:
    model = make_model()
    with pytest.raises(UserError, match="DataParallel runs copies of the model in threads"):
        inner_model(nn.DataParallel(model))
    model.lm_head.weight = nn.Parameter(torch.empty(2, 2, device="meta"))  # type: ignore[union-attr]
    assert inner_model(model) is model


def test_engines_whose_steps_cannot_be_followed_are_refused() -> None:
    class Pipeline:
        global_steps = 0

        def train_batch(self) -> None: ...

        def was_step_applied(self) -> bool:
            return True

    class TensorParallel(nn.Module):
        def autotp_size(self) -> int:
            return 2

    with pytest.raises(UserError, match=r"PipelineEngine makes its steps within train_batch; call balancer\.step"):
        attach_to(dist_moe.balance(make_model()), Pipeline())
    with pytest.raises(UserError, match=r"autotp_size\); give group, the ranks with different tokens"):
        repeats_tokens(TensorParallel())


def test_a_scaler_that_is_off_skips_no_step() -> None:
    model = make_model()
    balancer, optimizer = dist_moe.balance(model), optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    balancer.attach(scaler)
    train_on(model, tokens(0))
    scaler.step(optimizer)
    assert balancer.load is not None and balancer.load.taken


def test_a_state_of_another_policy_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    state = dist_moe.balance(make_model(), "momentum").state_dict()
    with caplog.at_level(logging.WARNING, "dist_moe"):
        dist_moe.balance(make_model(), "loss_free").load_state_dict(state)
    assert caplog.messages[0] == "the state is of policy=momentum, and this balancer has loss_free"
    assert "does not use" in caplog.messages[1]
