"""The routing losses where they are used, in the task of a padded model, against loops over tokens and layers."""

import math

import pytest
import torch
from torch import Tensor

from dist_moe.balancing.losses import RoutingLosses
from dist_moe.model.build import build_model
from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.select import TopK
from dist_moe.scores import Score
from tests.unit.model.samples import ALONE, FAMILIES, tokens

ROWS, LENGTH, PADDING = 2, 12, 4
EXPERTS = 12
BIAS_E = torch.linspace(-0.3, 0.3, EXPERTS)
LAST_LOAD_E = torch.tensor([5, 1, 9, 2, 0, 3, 7, 4, 8, 1, 1, 6])
SCALE = torch.tensor(1.0 / (ROWS * LENGTH - PADDING))


def make_task(losses: RoutingLosses, score: Score) -> LanguageModelTask:
    """The small Qwen3 (12 experts, 2 MoE layers), with biases that decide and a load from the step before."""
    rule = TopK(2, score, normalize=True)
    task = LanguageModelTask(build_model("qwen3_moe", FAMILIES["qwen3_moe"][0], rule, ALONE, seed=0), losses)
    for number, layer in enumerate(task.layers):
        layer.router.selection_bias.copy_(BIAS_E.roll(number))
        layer.router.last_load.copy_(LAST_LOAD_E.roll(3 * number))
    return task


def forward(task: LanguageModelTask) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The auxiliary part of the loss with its graph; without it the router's logits and choices of each layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.router.register_forward_hook(lambda module, inputs, outputs: seen.append((outputs[0], outputs[2])))
        for layer in task.layers
    ]
    tokens_BS = tokens(ROWS, LENGTH)
    mask_BS = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask_BS[1, LENGTH - PADDING :] = False
    targets_BS = torch.full_like(tokens_BS, -100)  # the loss is that of the routing alone
    positions_BS = torch.arange(LENGTH).expand(ROWS, -1)
    output = task(ModelInputs(tokens_BS, targets_BS, positions_BS, mask_BS), torch.tensor(1.0), SCALE)
    for handle in handles:
        handle.remove()
    assert float(output.auxiliary) == pytest.approx(float(output.loss.detach()))
    return output.loss, mask_BS.flatten(), [logits for logits, _ in seen], [ids for _, ids in seen]


def shares_of(logits_E: Tensor, score: Score) -> Tensor:
    """The probabilities of one token in the losses."""
    scores_E = 1 / (1 + torch.exp(-logits_E)) if score == "sigmoid" else torch.exp(logits_E) / torch.exp(logits_E).sum()
    return scores_E / scores_E.sum()


def slow_loss(losses: RoutingLosses, score: Score, mask_T: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Layer by layer and token by token, from logits and choices."""
    total = torch.zeros(())
    for number, (logits_TE, ids_TK) in enumerate(layers):
        kept = [token for token in range(len(mask_T)) if mask_T[token]]
        choices = {token: set(ids_TK[token].tolist()) for token in kept}
        if losses.scope == "sequence":
            choices = {token: set(logits_TE[token].topk(2).indices.tolist()) for token in kept}
        for token in kept:
            shares_E = shares_of(logits_TE[token], score)
            same = [other for other in kept if losses.scope != "sequence" or other // LENGTH == token // LENGTH]
            counts = [sum(expert in choices[other] for other in same) for expert in range(EXPERTS)]
            if losses.scope == "global_batch":
                counts = LAST_LOAD_E.roll(3 * number).tolist()
            for expert in range(EXPERTS):
                total = total + losses.balance * EXPERTS * counts[expert] / sum(counts) * shares_E[expert]
            total = total + losses.z * torch.log(torch.exp(logits_TE[token]).sum()) ** 2
            total = total - losses.entropy * (shares_E * torch.log(shares_E)).sum()
    return total * SCALE


CASES = {
    "micro-batch": RoutingLosses(balance=0.7, scope="micro_batch"),
    "sequence": RoutingLosses(balance=0.7, scope="sequence"),
    "global batch": RoutingLosses(balance=0.7, scope="global_batch"),
    "z": RoutingLosses(z=0.3),
    "entropy": RoutingLosses(entropy=0.2),
    "all": RoutingLosses(balance=0.7, scope="sequence", z=0.3, entropy=0.2),
}
SCORES: list[Score] = ["softmax", "sigmoid"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", CASES)
def test_trap_T04_the_task_adds_the_losses_of_a_slow_loop(name: str, score: Score) -> None:
    task = make_task(CASES[name], score)
    loss, mask_T, logits, ids = forward(task)
    wanted = slow_loss(CASES[name], score, mask_T, list(zip(logits, ids, strict=True)))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", CASES)
def test_trap_T20_the_gradient_of_the_task_s_losses_is_the_loop_s(name: str, score: Score) -> None:
    gradients = []
    for slow in (False, True):
        task = make_task(CASES[name], score)
        loss, mask_T, logits, ids = forward(task)
        chosen = slow_loss(CASES[name], score, mask_T, list(zip(logits, ids, strict=True))) if slow else loss
        chosen.backward()
        gradients.append(
            [layer.router.weight.grad.clone() for layer in task.layers if layer.router.weight.grad is not None]
        )
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_trap_T21_the_losses_of_all_layers_are_added() -> None:
    """Opposite loads in the two layers: their sum would be level, and cost no more than a level load does."""
    task = make_task(RoutingLosses(balance=1.0, scope="global_batch"), "softmax")
    loads = [torch.tensor([2, 0] * 6), torch.tensor([0, 2] * 6)]
    for layer, load_E in zip(task.layers, loads, strict=True):
        layer.router.last_load.copy_(load_E)
    loss, mask_T, logits, _ = forward(task)
    separate = sum(
        EXPERTS * float((shares_of(logits_TE[token], "softmax") * load_E / 12).sum().detach())
        for logits_TE, load_E in zip(logits, loads, strict=True)
        for token in range(len(mask_T))
        if mask_T[token]
    )
    assert float(loss.detach()) == pytest.approx(separate * float(SCALE), rel=1e-5)
    assert abs(float(loss.detach()) - 2.0) > 1e-3, "which a level load would cost"


def test_in_evaluation_and_without_a_scale_nothing_is_added() -> None:
    task = make_task(CASES["all"], "softmax").eval()
    loss, *_ = forward(task)
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "softmax_selected"])
@pytest.mark.parametrize("size", [150.0, 1e4])
def test_extreme_logits_give_finite_gradients(score: Score, size: float) -> None:
    task = make_task(CASES["all"], score)
    with torch.no_grad():
        for layer in task.layers:
            layer.router.weight.mul_(size)
    loss, *_ = forward(task)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
