"""`parallelize`, `from_pretrained` and `save_pretrained` in one process; tests/dist/test_replace.py has several."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import dist_moe
from dist_moe.attach.trainer import refuse_for_distributed_experts
from dist_moe.comm.mesh import Mesh
from dist_moe.model.family.experts import FamilyExperts
from dist_moe.moe.experts import GroupedExperts
from dist_moe.replace.experts import placed_layers
from tests.attached import FAMILIES, make_model, tokens, train_on


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_this_package_compute_what_those_of_the_family_do(family: str, tmp_path: Path) -> None:
    model, whole = dist_moe.parallelize(make_model(family)), make_model(family)
    kind = FamilyExperts if family in ("gpt_oss", "llama4_text") else GroupedExperts
    assert all(isinstance(layer.local, kind) for layer in placed_layers(model).values())
    for each in (model, whole):
        train_on(each, tokens(0))
    gradients = {name.replace(".local.", "."): parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        wanted, found = parameter.grad, gradients[name]
        assert (found is None) == (wanted is None), name
        assert found is None or wanted is None or torch.allclose(found, wanted, atol=1e-5), name
    dist_moe.save_pretrained(model, tmp_path)
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(each, whole.get_parameter(name)) for name, each in opened.named_parameters())


def test_the_number_of_ranks_is_that_of_the_process_group() -> None:
    with pytest.raises(dist_moe.UserError, match=r"2 does not divide the ranks \(1\) and the experts \(8\); use 1"):
        dist_moe.parallelize(make_model(), expert_parallel=2)


def test_a_model_is_distributed_once_and_before_it_is_routed() -> None:
    model = dist_moe.parallelize(make_model())
    with pytest.raises(dist_moe.UserError, match="of this package already"):
        dist_moe.parallelize(model)
    with pytest.raises(dist_moe.UserError, match="distribute the experts before `route`"):
        dist_moe.parallelize(dist_moe.route(make_model()))


def test_experts_that_compute_something_unknown_are_refused() -> None:
    model = make_model()
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    kind: Any = type(experts)
    changed = {"forward": lambda self, hidden, ids, weights: kind.forward(self, hidden, ids, weights) + 1}
    experts.__class__ = type("OtherExperts", (kind,), changed)
    with pytest.raises(dist_moe.UserError, match=r"model\.layers\.1\.mlp: its experts .* compute something else"):
        dist_moe.parallelize(model)
    assert not placed_layers(model), "the layer before it is as it was, too"


def test_the_norm_is_that_of_pytorch_and_gradients_are_scaled_to_the_largest() -> None:
    model, whole = dist_moe.parallelize(make_model()), make_model()
    for each in (model, whole):
        train_on(each, tokens(0))
    wanted = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    assert torch.allclose(dist_moe.clip_grad_norm_(model, 0.01), wanted, rtol=1e-4)
    clipped = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(nn.utils.get_total_norm(clipped)) == pytest.approx(0.01, rel=1e-3)
    before = [gradient.clone() for gradient in clipped]
    dist_moe.clip_grad_norm_(model, 1.0)
    assert all(torch.equal(*pair) for pair in zip(before, clipped, strict=True)), "below the largest norm"


def test_a_gradient_that_is_not_finite_stays_visible() -> None:
    model = dist_moe.parallelize(make_model())
    train_on(model, tokens(0))
    first = next(iter(model.parameters()))
    assert first.grad is not None
    first.grad[0, 0] = float("nan")
    assert not dist_moe.clip_grad_norm_(model, 1.0).isfinite()


def test_a_folder_in_bf16_keeps_the_bias_in_fp32(tmp_path: Path) -> None:
    saved: Any = make_model("deepseek_v3")
    saved.save_pretrained(tmp_path)
    model = dist_moe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {value.dtype for name, value in model.named_buffers() if "bias" in name} == {torch.float32}


def test_a_model_without_experts_of_this_package_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(dist_moe.UserError, match="no experts of this package; save it by its own save_pretrained"):
        dist_moe.save_pretrained(make_model(), tmp_path)


def test_the_trainer_may_not_clip_or_save_on_one_rank(tmp_path: Path) -> None:
    model = dist_moe.parallelize(make_model())
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    refuse_for_distributed_experts(model, arguments)
    for layer in placed_layers(model).values():
        layer.mesh = Mesh(world_size=2, rank=0, expert_parallel=2)
    with pytest.raises(dist_moe.UserError, match=r"max_grad_norm=1\.0 clips by the norm of each rank's own experts"):
        refuse_for_distributed_experts(model, arguments)
    without_norm = dataclasses.replace(arguments, max_grad_norm=0.0)
    with pytest.raises(dist_moe.UserError, match="saves the experts of one rank; set save_strategy='no'"):
        refuse_for_distributed_experts(model, without_norm)
    refuse_for_distributed_experts(model, dataclasses.replace(without_norm, save_strategy="no"))
    refuse_for_distributed_experts(None, arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(dist_moe.UserError, match="a GradScaler decides on each rank"):
        dist_moe.balance(model).attach(torch.amp.GradScaler("cpu"))
    del optimizer


def test_a_plain_model_is_clipped_by_pytorch() -> None:
    with pytest.raises(dist_moe.UserError, match=r"no experts of this package; use torch\.nn\.utils"):
        dist_moe.clip_grad_norm_(make_model(), 1.0)
