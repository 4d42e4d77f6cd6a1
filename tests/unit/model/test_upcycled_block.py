"""The gate weights of an upcycled block, and models of which a part is frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.model.build import freeze_layers, parameter_groups
from dist_moe.model.convert import find_layers
from dist_moe.model.upcycled_block import with_unit_sum
from dist_moe.moe.select import TopK
from tests.dense import dense_folder, upcycled
from tests.unit.model.samples import ALONE, small_model, tokens


def test_weights_sum_to_one_and_keep_the_gradient_of_what_they_were() -> None:
    weights_TK = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.0, 0.0]], requires_grad=True)
    found_TK = with_unit_sum(weights_TK)
    torch.testing.assert_close(found_TK, torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]))
    (gradient_TK,) = torch.autograd.grad(found_TK[:2, 0].sum(), weights_TK)
    torch.testing.assert_close(gradient_TK[:2], torch.tensor([[2.5, 0.0], [5.0, 0.0]]))
    assert with_unit_sum(weights_TK.bfloat16()).dtype == torch.bfloat16


def test_trap_T18_the_router_of_an_upcycled_top_1_model_has_a_gradient(tmp_path: Path) -> None:
    dense_folder(tmp_path, "llama")
    model: Any = upcycled(tmp_path, "llama", ALONE, TopK(1, "softmax"))
    model(input_ids=tokens()).logits.square().mean().backward()
    for layer in find_layers(model):
        gradient = layer.router.weight.grad
        assert gradient is not None and float(gradient.norm()) > 1e-4


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_biases_and_norms_do_not_decay(tmp_path: Path, architecture: str) -> None:
    dense_folder(tmp_path, architecture)
    model = upcycled(tmp_path, architecture, ALONE)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, 0.1)}
    for name, parameter in model.named_parameters():
        decays = not any(word in name for word in ("bias", "norm", "Norm", "embed"))
        assert (id(parameter) in groups["decayed"]) is decays, name


@pytest.mark.parametrize("architecture", ["bert", "llama", "deepseek_v3"])
def test_frozen_layers_have_no_gradient_and_no_optimizer(tmp_path: Path, architecture: str) -> None:
    """Nor a backward pass: what reaches the first trained layer needs no gradient."""
    if architecture == "deepseek_v3":
        model: Any = small_model(architecture)
    else:
        dense_folder(tmp_path, architecture)
        model = upcycled(tmp_path, architecture, ALONE)
    freeze_layers(model, 2)
    layers = model.encoder.layer if architecture == "bert" else model.model.layers
    needed: list[bool] = []
    layers[2].register_forward_pre_hook(lambda module, inputs: needed.append(inputs[0].requires_grad))
    found = model.train()(input_ids=tokens())
    (found.last_hidden_state if architecture == "bert" else found.logits).square().mean().backward()
    assert needed == [False]
    in_optimizer = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    frozen = ("embed", *(f"layer{end}.{index}." for end in ("", "s") for index in (0, 1)))
    for name, parameter in model.named_parameters():
        if name.startswith("pooler"):
            continue
        trained = not any(word in name for word in frozen)
        assert (parameter.grad is not None, id(parameter) in in_optimizer) == (trained, trained), name
    assert [layer.router.is_balanced for layer in find_layers(model)] == [False, True]


def test_nothing_is_frozen_by_default() -> None:
    model = small_model("qwen3_moe")
    freeze_layers(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
