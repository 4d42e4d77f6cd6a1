"""`route` changes which experts tokens take, and nothing else of what a family computes."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import dist_moe
from dist_moe.moe.select import ExpertThreshold, ThresholdRouting, TopK
from dist_moe.probe.layers import find_layers
from dist_moe.replace.experts import placed_layers
from tests.attached import EXPERTS, FAMILIES, logits_of, make_model, routers, tokens, train_on


def softmax_choice(logits_E: list[float], threshold: float) -> list[int]:
    """The experts in order of probability whose sum reaches the threshold, by a loop."""
    probabilities = torch.tensor(logits_E, dtype=torch.float64).softmax(0).tolist()
    taken: list[int] = []
    for expert in sorted(range(len(probabilities)), key=lambda index: -probabilities[index]):
        taken.append(expert)
        if sum(probabilities[each] for each in taken) >= threshold:
            break
    return taken


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_of_the_family_gives_its_own_logits_and_gradients(family: str) -> None:
    model = make_model(family)
    whole = copy.deepcopy(model)
    assert dist_moe.route(model, "top_k") is model
    for each in (model, whole):
        each.eval()
        each(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    assert torch.allclose(logits_of(model), logits_of(whole), atol=1e-5)
    gradients = {
        name.replace(".original.", ".").replace(".local.", "."): p.grad for name, p in model.named_parameters()
    }
    for name, parameter in whole.named_parameters():
        wanted, found = parameter.grad, gradients.get(name)  # a bias of the family is a buffer now
        assert (found is None) == (wanted is None), name
        assert found is None or wanted is None or torch.allclose(found, wanted, atol=1e-5), name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_token_takes_experts_until_their_probability_passes_the_threshold(family: str) -> None:
    model = dist_moe.route(make_model(family), threshold=0.55)
    first, *_ = routers(model)
    first.open_record(None)
    logits_of(model)
    record = first.close_record()
    for logits_E, ids_K in zip(record.logits_TE.tolist(), record.ids_TK.tolist(), strict=True):
        assert sorted(each for each in ids_K if each >= 0) == sorted(softmax_choice(logits_E, 0.55))
    assert len({int((ids_K >= 0).sum()) for ids_K in record.ids_TK}) > 1


def test_the_parameters_are_the_same_objects_so_that_an_optimizer_still_has_them() -> None:
    model = make_model()
    before = {id(parameter) for parameter in model.parameters()}
    dist_moe.route(model)
    assert {id(parameter) for parameter in model.parameters()} == before


def test_the_fields_are_those_of_the_section_router() -> None:
    model = dist_moe.route(make_model("deepseek_v3"), "expert_threshold", top_k=3, min_experts=1, scaling_factor=2.0)
    assert {router.rule for router in routers(model)} == {ExpertThreshold(3, EXPERTS, 1, "sigmoid", False, 2.0)}
    model = dist_moe.route(make_model(), "threshold", threshold=0.3, max_experts=4, normalize=True)
    assert {router.rule for router in routers(model)} == {ThresholdRouting(0.3, 4, normalize=True)}
    model = dist_moe.route(make_model("deepseek_v3"), "top_k", top_k=1, score="softmax", normalize=False)
    (rule,) = {router.rule for router in routers(model)}
    assert isinstance(rule, TopK) and (rule.top_k, rule.score, rule.normalize) == (1, "softmax", False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"selection": "zipf"}, "selection='zipf' is not possible here; use top_k, threshold, expert_threshold"),
        ({"treshold": 0.5}, "treshold is not a field of route; use threshold, "),
        ({"threshold": 1.5}, "threshold=1.5 should be less than 1"),
        ({"max_experts": 9}, r"max_experts=9 is more than the model's 8 experts; use 1 to 8, or null"),
        ({"target_experts_per_token": 8.5}, "target_experts_per_token=8.5 cannot be reached"),
        ({"score": "sigmoid"}, "score=sigmoid adds up probabilities over all experts"),
        ({"selection": "top_k", "threshold": 0.5}, "threshold=0.5 has no meaning with selection=top_k"),
        ({"selection": "top_k", "top_k": 9}, "top_k=9 is more than the 8 experts of a layer; use 8 or fewer"),
        ({"selection": "expert_threshold"}, "score=softmax compares the logit of each expert with a threshold"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_replaced(arguments: dict[str, Any], said: str) -> None:
    model = make_model()
    with pytest.raises(dist_moe.UserError, match=said):
        dist_moe.route(model, **arguments)
    assert not routers(model) and not placed_layers(model)


def test_a_model_in_a_wrapper_or_on_the_meta_device_or_quantized_is_refused() -> None:
    with pytest.raises(dist_moe.UserError, match="inside of a _Wrapper, which knows its present parameters"):
        dist_moe.route(_Wrapper(make_model()))
    with pytest.raises(dist_moe.UserError, match=r"on the meta device, without values; .* dist_moe\.from_pretrained"):
        dist_moe.route(make_model().to("meta"))
    model = make_model()
    head: Any = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(dist_moe.UserError, match=r"lm_head\.weight is torch\.int8: the model is quantized"):
        dist_moe.route(model)


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_routing_twice_is_refused_but_for_another_target() -> None:
    model = dist_moe.route(make_model())
    with pytest.raises(dist_moe.UserError, match="has another selection already"):
        dist_moe.route(model, threshold=0.5)
    for router in routers(model):
        assert router.threshold is not None
        router.threshold.fill_(0.6)
    with pytest.raises(dist_moe.UserError, match=r"target_experts_per_token=9\.0 cannot be reached"):
        dist_moe.route(model, target_experts_per_token=9.0)
    dist_moe.route(model, target_experts_per_token=3.0)
    assert [(float(each.threshold or 0), each.target_experts_per_token) for each in routers(model)] == [
        (pytest.approx(0.6), 3.0)
    ] * 2


def test_a_model_that_is_balanced_is_not_routed() -> None:
    model = make_model()
    balancer = dist_moe.balance(model)
    with pytest.raises(dist_moe.UserError, match=r"remove\(\) before another one is made, and before the"):
        dist_moe.route(model)
    balancer.remove()
    dist_moe.route(model)


def test_a_bias_on_the_family_s_scores_is_not_one_on_probabilities(tmp_path: Path) -> None:
    saved: Any = make_model("deepseek_v3")
    for layer in find_layers(saved):
        layer.router.e_score_correction_bias.copy_(torch.linspace(-3, 3, EXPERTS))  # type: ignore[operator]
    saved.save_pretrained(tmp_path)
    same = dist_moe.route(dist_moe.from_pretrained(tmp_path), "top_k")
    assert torch.allclose(logits_of(same), logits_of(saved), atol=1e-5)
    routed = [dist_moe.route(model) for model in (dist_moe.from_pretrained(tmp_path), saved)]
    assert not any(router.selection_bias.any() for model in routed for router in routers(model))
    assert torch.allclose(logits_of(routed[0]), logits_of(routed[1]), atol=1e-5)


def test_trap_T106_a_trainer_resumes_from_the_folder_that_it_saved(tmp_path: Path) -> None:
    """It loads the tensors of the folder into the model, and says nothing of names that do not match."""
    data = [{"input_ids": row, "labels": row} for row in tokens(0, 32)]
    found = []
    for steps, resumes in ((4, False), (4, True)):
        torch.manual_seed(0)
        model: Any = dist_moe.route(make_model(seed=int(resumes)), threshold=0.4)
        balancer = dist_moe.balance(model, "adaptive_weight", rate=0.3)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, save_steps=2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[balancer.callback()])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumes else None)
        found.append((logits_of(model), balancer.state_dict()["layers"], model.state_dict()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name, layer in found[0][1].items():
        assert all(torch.equal(value, found[1][1][name][key]) for key, value in layer.items())
    assert found[0][2].keys() == found[1][2].keys()


def test_a_state_with_other_names_is_refused_and_one_of_adapters_is_not() -> None:
    state = make_model().state_dict()
    for model in (dist_moe.route(make_model()), dist_moe.parallelize(make_model())):
        with pytest.raises(dist_moe.UserError, match="no experts under the names of this model"):
            model.load_state_dict(state, strict=False)
        model.load_state_dict({"lm_head.weight": state["lm_head.weight"]}, strict=False)
        model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_a_balancer_that_moves_no_bias_leaves_the_routing_as_it_is() -> None:
    model = dist_moe.route(make_model(), threshold=0.4)
    balancer = dist_moe.balance(model, "adaptive_weight", rate=0.3, applies_to="gate_weights")
    train_on(model, tokens(0, 8, 32))
    balancer.step()
    balancer.remove()
    before = logits_of(model)
    dist_moe.balance(model, "none")
    assert torch.equal(logits_of(model), before)


def test_trap_T105_two_forwards_before_a_backward_are_computed_again_as_they_were() -> None:
    """The mask is for counting alone: no router keeps that of another batch until the backward."""
    masks = [torch.ones(2, 12, dtype=torch.int64) for _ in range(2)]
    masks[0][0, 9:], masks[1][1, 9:] = 0, 0
    gradients = []
    for checkpointed in (False, True):
        model: Any = dist_moe.route(make_model(), threshold=0.5)
        if checkpointed:
            model.gradient_checkpointing_enable()
        balancer = dist_moe.balance(model)
        losses = []
        for index, mask in enumerate(masks):
            batch = tokens(index)
            losses.append(model(input_ids=batch, labels=batch, attention_mask=mask).loss)
        torch.stack(losses).sum().backward()
        assert balancer.step().tokens == 42
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_balancing_reaches_the_threshold_and_the_gate_weights() -> None:
    model = dist_moe.route(make_model(), threshold=0.2, target_experts_per_token=3.0)
    balancer = dist_moe.balance(model, "adaptive_weight", rate=0.3, applies_to="gate_weights")
    assert all(isinstance(each.rule, ThresholdRouting) and each.rule.bias_in_gate_weights for each in routers(model))
    assert [(layer.num_experts, layer.bias) for layer in balancer.layers] == [(EXPERTS, "own")] * 2
    first = last = None
    for step in range(30):
        train_on(model, tokens(step, 8, 32))
        last = balancer.step()
        first = first or last
    assert first is not None and last is not None
    assert last.max_vio < first.max_vio / 2
    assert sum(last.counts_LE[0]) / last.tokens == pytest.approx(3.0, abs=0.3)
    assert all(float(router.threshold or 0) > 0.25 for router in routers(model))


def test_trap_T105_recomputation_padding_evaluation_and_copies_do_not_disturb_the_counts() -> None:
    model: Any = dist_moe.route(make_model(), threshold=0.5)
    model.gradient_checkpointing_enable()
    balancer = dist_moe.balance(model, "loss_free")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    taken: list[Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda router, args, output: taken.append(output[2]))
    train_on(model, tokens(0), attention_mask=mask)
    routed = [ids_TK[mask.flatten().bool()] for ids_TK in taken[:2]]
    first = [ids_TK[ids_TK >= 0].bincount(minlength=EXPERTS).tolist() for ids_TK in routed]
    assert len(taken) == 4, "the layers ran twice"
    assert all(torch.equal(*pair) for pair in zip(taken[:2], reversed(taken[2:]), strict=True))
    model.eval()
    logits_of(model)
    model.generate(tokens(1), max_new_tokens=3, do_sample=False)
    logits_of(copy.deepcopy(model))
    model.train()
    load = balancer.step()
    assert [list(counts) for counts in load.counts_LE] == first
    assert load.tokens == int(mask.sum())


@pytest.mark.parametrize(
    ("selection", "policy", "said"),
    [
        ("threshold", "quantile", "finds the bias with which each expert gets K of E tokens"),
        ("threshold", "expert_threshold", "sets a threshold for each expert"),
        ("expert_threshold", "loss_free", "needs the thresholds that balance.policy=expert_threshold alone sets"),
    ],
)
def test_a_policy_that_does_not_work_with_the_selection_is_refused(selection: Any, policy: str, said: str) -> None:
    model = dist_moe.route(make_model("deepseek_v3"), selection)
    with pytest.raises(dist_moe.UserError, match=said):
        dist_moe.balance(model, policy)


def test_expert_thresholds_are_set_by_their_policy() -> None:
    model = dist_moe.route(make_model("deepseek_v3"), "expert_threshold")
    balancer = dist_moe.balance(model, "expert_threshold")
    for step in range(10):
        train_on(model, tokens(step, 8, 32))
        load = balancer.step()
    assert sum(load.counts_LE[0]) / (8 * 32) == pytest.approx(2, abs=0.3)
    assert all(bool(router.selection_bias.any()) for router in routers(model))


def test_the_state_resumes(tmp_path: Path) -> None:
    """The state of the model has biases and thresholds, and that of the balancer the rest."""
    states: list[dict[str, Any]] = []
    logits = []
    for resumed in (False, True):
        model = dist_moe.route(make_model(), threshold=0.3, target_experts_per_token=2.0)
        balancer = dist_moe.balance(model, "adaptive_weight", rate=0.3)
        for step in range(6):
            if resumed and step < 3:
                continue
            if resumed and step == 3:
                model.load_state_dict(states[0]["model"])
                balancer.load_state_dict(states[0]["balancer"])
            train_on(model, tokens(step))
            balancer.step()
            if step == 2:
                states.append(copy.deepcopy({"model": model.state_dict(), "balancer": balancer.state_dict()}))
        logits.append(logits_of(model))
        states.append({"balancer": balancer.state_dict()})
    assert torch.equal(*logits)
    assert states[1]["balancer"]["controller"] == states[2]["balancer"]["controller"]


def test_a_second_balancer_is_refused_and_a_removed_one_leaves_the_model_to_another() -> None:
    model = dist_moe.route(make_model())
    balancer = dist_moe.balance(model)
    with pytest.raises(dist_moe.UserError, match="has a balancer already"):
        dist_moe.balance(model)
    balancer.remove()
    dist_moe.balance(model).remove()
    logits_of(model)


def test_a_family_that_cannot_be_saved_so_is_named_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = make_model()
    model.config.model_type = "of_a_script"
    with caplog.at_level(logging.WARNING, "dist_moe"):
        dist_moe.route(model)
    assert "cannot be saved as a folder with this routing" in caplog.text
    with pytest.raises(dist_moe.UserError, match="the of_a_script cannot be saved with this routing"):
        model.save_pretrained("unused")
    assert find_layers(model)
