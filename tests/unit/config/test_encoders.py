"""An encoder of MoE models: classification is its task, and its gate weights have the factor of its router."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_moe
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, resolve
from dist_moe.model.build import build_model, routing_rule
from dist_moe.model.convert import find_layers
from tests.families.small import TOP_K, build, small_config
from tests.families.trained import settings_of
from tests.family_models import difference, logits
from tests.unit.config.files import debug, violations

ENCODER = "openai_privacy_filter"
CLASSIFY = "task.kind=classification"


def encoder(*overrides: str) -> Config:
    model = settings_of(ENCODER)
    return debug(f"model.architecture={ENCODER}", f"model.config={json.dumps(model['config'])}", *overrides)


def folder_of(path: Path) -> Path:
    build(small_config(ENCODER, vocab_size=400)).save_pretrained(path)
    return path


def test_a_language_model_is_refused() -> None:
    (found,) = violations(encoder()).values()
    assert str(found) == (
        "model.architecture=openai_privacy_filter is an encoder (openai_privacy_filter): its tokens see later ones, so "
        "it has no next-token loss; use a decoder, such as a qwen3_moe, or set task.kind=classification"
    )


def test_a_language_model_of_a_folder_is_refused(tmp_path: Path) -> None:
    overrides = ("model.config={}", f"model.pretrained={folder_of(tmp_path)}")
    (found,) = violations(encoder(*overrides)).values()
    assert found.key == "model.pretrained" and "is an encoder (openai_privacy_filter)" in str(found)
    assert not violations(encoder(*overrides, CLASSIFY))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_texts_are_classified_or_measured(kind: str) -> None:
    assert not violations(encoder(f"task.kind={kind}"))


@pytest.mark.parametrize("top_k", [2, 3])
def test_trap_T117_gate_weights_are_divided_by_the_number_of_experts_a_token_takes(top_k: int) -> None:
    """The block multiplies by it: without the factor of the router the experts' results are `top_k` times as large."""
    resolved = resolve(encoder(CLASSIFY, f"model.config.num_experts_per_tok={top_k}"), workers=1)
    config, arguments = resolved.config, {**resolved.model_config, "vocab_size": 257}
    assert config.router.scaling_factor == 1 / top_k
    rule = routing_rule(config.router, config.balance, ENCODER)
    ours: Any = build_model(ENCODER, arguments, rule, Mesh(1, 0, 1), seed=0).eval()
    theirs = build(copy.deepcopy(ours.config)).eval()
    state = ours.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            ours_name = name.replace(".experts.", ".experts.local.").replace(".router.", ".router.original.")
            parameter.copy_(state[ours_name])
    assert len(find_layers(ours)) == 3
    assert difference(logits(ours), logits(theirs)) < 1e-5


def test_trap_T117_a_threshold_gives_a_model_the_same_factor_in_a_script_and_in_a_run() -> None:
    """The block multiplies the result by the number of experts, also where a token takes another number."""
    model = dist_moe.route(build(small_config(ENCODER)), "threshold")
    resolved = resolve(encoder(CLASSIFY, "router.selection=threshold"), workers=1)
    factors = {layer.router.rule.routed_scaling_factor for layer in find_layers(model)}
    assert factors == {resolved.config.router.scaling_factor} == {1 / TOP_K}
