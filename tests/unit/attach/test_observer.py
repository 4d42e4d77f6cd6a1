"""The counts of forwards, compared with the ids that the experts modules receive."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.attach.observer import Observer
from dist_moe.attach.state import LayerState
from dist_moe.balancing.margins import BINS
from dist_moe.errors import UserError
from dist_moe.probe.layers import find_layers
from dist_moe.probe.routed_layers import unify_layers
from tests.attached import EXPERTS, FAMILIES, Received, added, make_model, tokens, train_on


class Watched:
    """A model that is observed, and the slow count of it."""

    def __init__(self, family: str = "qwen3_moe", margins: bool = False, **changes: Any) -> None:
        self.model: Any = make_model(family, **changes)
        self.states = {layer.name: LayerState(layer) for layer in unify_layers(self.model)}
        for state in self.states.values():
            state.selects = state.probed.bias == "ours"
        self.observer = Observer(self.model.get_submodule("model"), self.states, margins)
        self.received = Received(self.model)

    @property
    def counts(self) -> list[list[int]]:
        """Of the window, by layer."""
        return [self.observer.window[name].load_E.tolist() for name in self.states]


def masked(rows: int = 2, length: int = 12) -> Tensor:
    """Padding on the left of the first row, and on the right of the second."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :5], mask[1, -3:] = 0, 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_is_counted_exactly(family: str) -> None:
    watched = Watched(family)
    watched.model(input_ids=tokens(0))
    assert watched.counts == watched.received.take()
    for counts in watched.observer.window.values():
        assert counts.load_E.dtype == torch.int64 and int(counts.load_E.sum()) == 2 * 24
        assert counts.k_histogram_K.tolist() == [0, 24]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_T94_recomputation_counts_once(family: str, reentrant: bool) -> None:
    watched = Watched(family)
    watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    watched.model.enable_input_require_grads()
    batch = tokens(1)
    loss = watched.model(input_ids=batch, labels=batch).loss
    wanted = watched.received.take()
    loss.backward()
    assert watched.received.take() == wanted, "the layers were computed again"
    assert watched.counts == wanted and watched.observer.forwards == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_T94_recomputation_selects_what_the_forward_selected(reentrant: bool) -> None:
    """The gradients of the selection with a bias of the balancer are those without checkpointing."""
    plain, again = Watched(), Watched()
    gradients = []
    for watched in (plain, again):
        for place, state in enumerate(watched.states.values()):
            state.selection_bias.copy_((-1) ** place * torch.linspace(4, -4, EXPERTS))
        if watched is again:
            watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            watched.model.enable_input_require_grads()
        train_on(watched.model, tokens(2))
        gradients.append({name: each.grad for name, each in watched.model.named_parameters() if each.grad is not None})
    for ours, theirs in zip(again.received.ids.values(), plain.received.ids.values(), strict=True):
        assert len(ours) == 2 and torch.equal(ours[0], ours[1]) and torch.equal(ours[0], theirs[0])
    assert again.counts == plain.counts
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_micro_batches_are_added() -> None:
    watched = Watched()
    train_on(watched.model, *(tokens(seed, rows=seed + 1) for seed in range(3)))
    assert watched.counts == watched.received.take()
    assert watched.observer.forwards == 3


def test_trap_T94_two_forwards_before_their_backward_passes() -> None:
    watched = Watched()
    watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second = (watched.model(input_ids=tokens(seed), labels=tokens(seed)).loss for seed in (1, 2))
    wanted = watched.received.take()
    (first + second).backward()
    assert watched.counts == wanted


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_trap_T94_evaluation_is_not_counted(how: str) -> None:
    watched = Watched()
    watched.model(input_ids=tokens(0))
    wanted = watched.received.take()
    watched.model.train(how != "eval")
    with torch.no_grad() if how == "no_grad" else torch.inference_mode(how == "inference"):
        watched.model(input_ids=tokens(1))
    watched.model.train()
    assert watched.counts == wanted and watched.observer.forwards == 1
    watched.model(input_ids=tokens(2))
    assert watched.received.take() != wanted and watched.observer.forwards == 2


def test_trap_T94_evaluation_between_a_forward_and_its_recomputation() -> None:
    watched = Watched()
    watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = watched.model(input_ids=tokens(0), labels=tokens(0)).loss
    wanted = watched.received.take()
    watched.model.eval()
    with torch.no_grad():
        watched.model(input_ids=tokens(1))
    watched.model.train()
    loss.backward()
    assert watched.counts == wanted


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "afmoe"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_padding_is_not_counted(family: str, reentrant: bool | None) -> None:
    watched = Watched(family)
    if reentrant is not None:
        watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        watched.model.enable_input_require_grads()
    loss = watched.model(input_ids=tokens(0), attention_mask=masked(), labels=tokens(0)).loss
    wanted = watched.received.take(masked())
    loss.backward()
    assert watched.counts == wanted and sum(wanted[0]) == 2 * (24 - 8)
    assert all(counts.k_histogram_K.tolist() == [0, 16] for counts in watched.observer.window.values())


def test_the_mask_of_a_forward_does_not_reach_the_next_one() -> None:
    watched = Watched()
    watched.model(input_ids=tokens(0), attention_mask=masked())
    wanted = watched.received.take(masked())
    watched.model(input_ids=tokens(1))
    assert watched.counts == added(wanted, watched.received.take())


def test_a_mask_of_four_dimensions_masks_no_token() -> None:
    watched = Watched()
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    watched.model(input_ids=tokens(0), attention_mask=causal)
    assert watched.counts == watched.received.take()


def test_trap_T94_a_forward_that_raises_is_not_counted() -> None:
    watched = Watched()
    watched.model(input_ids=tokens(0))
    wanted = watched.received.take()
    handle = watched.model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watched.model(input_ids=tokens(1))
    handle.remove()
    assert sum(map(sum, watched.received.take())) == 2 * 2 * 24, "its layers were computed"
    assert watched.counts == wanted and watched.observer.forwards == 1
    watched.model(input_ids=tokens(2))
    assert watched.counts == added(wanted, watched.received.take())


def test_a_layer_that_a_forward_runs_twice_is_counted_twice() -> None:
    watched = Watched(num_hidden_layers=1)
    (layer,) = watched.model.model.layers
    watched.model.model.layers = nn.ModuleList([layer, layer])
    watched.model.config.num_hidden_layers = 2
    watched.model.config.layer_types = None
    watched.model(input_ids=tokens(0), use_cache=False)
    assert sum(watched.counts[0]) == 2 * 2 * 24 and watched.counts == watched.received.take()


def test_a_selection_with_a_bias_is_what_the_experts_receive_and_what_is_counted() -> None:
    watched = Watched()
    for state in watched.states.values():
        state.selection_bias[3] = 100.0
        state.selection_bias[5] = -100.0
    watched.model(input_ids=tokens(0))
    counts = watched.received.take()
    assert watched.counts == counts
    assert all(layer[3] == 24 and layer[5] == 0 for layer in counts)


def test_a_bias_also_acts_in_evaluation() -> None:
    watched = Watched()
    for state in watched.states.values():
        state.selection_bias[3] = 100.0
    watched.model.eval()
    with torch.no_grad():
        watched.model(input_ids=tokens(0))
    assert all(layer[3] == 24 for layer in watched.received.take()) and not watched.observer.window


def test_a_new_window_begins_empty() -> None:
    watched = Watched()
    watched.model(input_ids=tokens(0))
    watched.observer.forget()
    assert (watched.observer.window, watched.observer.forwards) == ({}, 0)
    watched.received.take()
    watched.model(input_ids=tokens(1))
    assert watched.counts == watched.received.take()


def test_without_its_hooks_a_model_is_what_it_was() -> None:
    watched = Watched()
    for state in watched.states.values():
        state.selection_bias[3] = 100.0
    watched.observer.remove()
    twin = make_model()
    batch = tokens(0)
    assert torch.equal(watched.model(input_ids=batch).logits, twin(input_ids=batch).logits)
    assert not watched.observer.window
    fields = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    experts = {state.layer.experts for state in watched.states.values()}  # these have hooks of the test
    for module in set(watched.model.modules()) - experts:
        assert not any(vars(module)[field] for field in fields), type(module).__name__


def test_a_copy_of_the_model_keeps_the_bias_of_its_moment_and_is_not_counted() -> None:
    """Such as a moving average of the weights."""
    watched = Watched()
    for state in watched.states.values():
        state.selection_bias[3] = 100.0
    watched.model(input_ids=tokens(0))
    wanted = watched.counts
    watched.received.take()
    twin = copy.deepcopy(watched.model)
    for state in watched.states.values():
        state.selection_bias.zero_()
    batch = tokens(1)
    logits = twin(input_ids=batch).logits
    assert watched.counts == wanted and watched.observer.forwards == 1
    watched.observer.remove()
    assert not torch.allclose(watched.model(input_ids=batch).logits, logits)
    raised = Watched()
    for state in raised.states.values():
        state.selection_bias[3] = 100.0
    assert torch.equal(raised.model(input_ids=batch).logits, logits)


def test_a_second_observer_is_refused() -> None:
    watched = Watched()
    with pytest.raises(UserError, match=r"the model has a balancer already; call its remove\(\) before"):
        Observer(watched.model.get_submodule("model"), watched.states, needs_margins=False)
    watched.observer.remove()
    Observer(watched.model.get_submodule("model"), watched.states, needs_margins=False)


def test_hooks_of_others_see_the_selection_with_the_bias() -> None:
    """Hooks that were there before run after those of the observer."""
    model = make_model()
    seen: list[Tensor] = []
    layers = find_layers(model)
    for layer in layers:
        layer.router.register_forward_hook(lambda router, args, output: seen.append(output[2]))
    states = {layer.name: LayerState(layer) for layer in layers}
    for state in states.values():
        state.selection_bias[3] = 100.0
        state.selects = True
    Observer(model.get_submodule("model"), states, needs_margins=False)
    model(input_ids=tokens(0))
    assert len(seen) == 2 and all(bool((ids_TK == 3).any(dim=1).all()) for ids_TK in seen)


@pytest.mark.parametrize(("family", "is_sigmoid"), [("qwen3_moe", False), ("deepseek_v3", True), ("afmoe", True)])
def test_margins_are_those_of_the_scores_that_the_bias_is_added_to(family: str, is_sigmoid: bool) -> None:
    watched = Watched(family, margins=True)
    logits: dict[str, Tensor] = {}
    for place, (name, state) in enumerate(watched.states.items()):
        state.selection_bias.copy_((-1) ** place * torch.linspace(0.5, -0.5, EXPERTS))
        state.write()

        def keep(router: nn.Module, args: Any, output: Any, name: str = name) -> None:
            logits[name] = output[0].detach()

        state.layer.router.register_forward_hook(keep)
    watched.model(input_ids=tokens(0), attention_mask=masked())
    for name, state in watched.states.items():
        found_EQ = watched.observer.window[name].margins_EQ
        wanted_EQ = torch.zeros(EXPERTS, BINS, dtype=torch.int64)
        for logits_E, is_token in zip(logits[name], masked().flatten().tolist(), strict=True):
            scores_E = logits_E.sigmoid() if is_sigmoid else logits_E
            third = sorted((scores_E + state.selection_bias).tolist())[-3]
            for expert, score in enumerate(scores_E.tolist() if is_token else []):
                margin = score - third
                wanted_EQ[expert, int((margin / (1 + abs(margin)) + 1) * BINS / 2)] += 1
        assert found_EQ is not None and int(found_EQ.sum()) == 16 * EXPERTS
        shifted = (found_EQ.cumsum(dim=1) - wanted_EQ.cumsum(dim=1)).abs()
        assert int(shifted.sum()) <= 5, "a margin on the edge of a bin may be in the next one"
