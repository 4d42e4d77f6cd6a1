"""The model of a configuration is built on the meta device and run once: what fails is a violation of its key."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers.activations import ACT2CLS, ACT2FN

from dist_moe.config import Config
from dist_moe.config.checks.trial_model import ROPE_LOGGER, failure, trial_violations
from tests.unit.config.files import WRITTEN_FAMILIES, debug, qwen, violations

ROPE = "model.config.rope_parameters"
YARN = "rope_type: yarn, factor: 4.0, original_max_position_embeddings: 64"
LONG = "rope_type: longrope, factor: 4, original_max_position_embeddings: 32, short_factor: [1, 1, 1, 1]"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ("rope_parameters={rope_type: yarnn, factor: 4.0}",),
            [
                f'{ROPE}={{"rope_type": "yarnn", "factor": 4.0}} has the rope_type yarnn, which transformers does not '
                "know; did you mean yarn?"
            ],
        ),
        (
            ("head_dim=null",),
            [
                "model.config.head_dim=null makes a model that fails (TypeError: unsupported operand type(s) for ** or "
                "pow(): 'NoneType' and 'float'); leave it out, or give a value that the model accepts"
            ],
        ),
        (
            ("head_dim=null", "rope_parameters={rope_theta: big}", "hidden_act=foo"),
            [
                "model.config.hidden_act=foo is not an activation of transformers; use silu",
                "model.config.head_dim=null makes a model that fails (TypeError: unsupported operand type(s) for ** or "
                "pow(): 'NoneType' and 'float'); leave it out, or give a value that the model accepts",
                f'{ROPE}={{"rope_theta": "big"}} has rope_theta=big, which is not a number above 0; leave '
                "rope_parameters out, or correct its values",
            ],
        ),
    ],
    ids=["rope_type", "head_dim", "three at once"],
)
def test_what_would_fail_later_is_a_violation_of_its_key(overrides: tuple[str, ...], lines: list[str]) -> None:
    found = violations(qwen(*(f"model.config.{override}" for override in overrides)))
    assert sorted(map(str, found.values())) == sorted(lines)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ("{rope_type: yarn, factor: 4.0, beta: 3}", "Unrecognized keys in `rope_parameters` for 'rope_type'='yarn'"),
        ("{factor: 4.0}", "Unrecognized keys in `rope_parameters` for 'rope_type'='default'"),
        ("{rope_type: yarn}", "Missing required keys in `rope_parameters` for 'rope_type'='yarn': {'factor'}"),
        ("{rope_type: linear, factor: 0.5}", "has factor=0.5, which is not a number of 1 or more"),
        ("{rope_type: linear, factor: true}", "has factor=true, which is not a number of 1 or more"),
        ("{rope_theta: -1.0}", "has rope_theta=-1.0, which is not a number above 0"),
        ("{rope_theta: 1.0e-300}", "the rotary embeddings are not finite at position 1"),
        ("{rope_type: [yarn]}", 'has the rope_type ["yarn"], which transformers does not know'),
        ("{rope_type: yarn, type: linear, factor: 2.0}", "has the type linear and the rope_type yarn"),
        (f"{{{YARN}, truncate: maybe}}", "has truncate=maybe, which is not true or false"),
        (f"{{{YARN}, beta_fast: 0, mscale: x}}", "has beta_fast=0, which is not a number above 0, or null and has "),
        ("{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 0}", "which is not a whole number above 0"),
        (f"{{{YARN}, mscale: 0.5}}", "has mscale, which has no effect without mscale_all_dim"),
        (
            f"{{{YARN}, attention_factor: 1.5, mscale: 0.5, mscale_all_dim: 0.5}}",
            "has mscale, which has no effect where attention_factor is given",
        ),
        (
            "{rope_type: default, partial_rotary_factor: 0.5}",
            "has partial_rotary_factor, which has no effect with the rope_type default in a deepseek_v3",
        ),
        (f"{{{LONG}, long_factor: [1, 1, 1, 0]}}", "the rotary embeddings are not finite at position 63"),
    ],
)
def test_rotary_parameters_that_are_ignored_or_fail_are_refused(parameters: str, reason: str) -> None:
    found = violations(debug(f"{ROPE}={parameters}"))
    assert list(found) == [ROPE] and reason in found[ROPE].rule


@pytest.mark.parametrize(
    "parameters",
    [
        "{rope_type: dynamic, factor: 2.0}",
        "{rope_type: linear, factor: 2.0}",
        "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 64}",
        "{rope_type: llama3, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
        "original_max_position_embeddings: 128}",
        f"{{{LONG}, long_factor: [1, 1, 1, 2]}}",
        f"{{{YARN}, type: yarn, beta_fast: 32, beta_slow: 1, mscale: 1.0, mscale_all_dim: 1.0, truncate: true}}",
        "{rope_type: default, partial_rotary_factor: 1.0}",
        "{rope_theta: 500000.0}",
        "{}",
    ],
)
def test_rotary_parameters_of_every_kind_are_accepted(parameters: str) -> None:
    assert not violations(debug(f"{ROPE}={parameters}"))


def test_a_failure_of_a_pretrained_model_says_so() -> None:
    arguments: dict[str, Any] = {**debug().model.config, "vocab_size": 257, "rope_parameters": {"rope_theta": "big"}}
    (found,) = trial_violations("deepseek_v3", arguments, set(), own=set(), length=2)
    assert found.key == ROPE and found.rule.endswith("and is the value of model.pretrained")
    assert found.remedy == "correct the config.json of that folder"


@pytest.mark.parametrize("architecture", WRITTEN_FAMILIES)
def test_the_default_model_of_each_family_works(architecture: str) -> None:
    assert failure(architecture, {}, length=4096) is None


def test_the_trial_is_of_the_length_of_a_run() -> None:
    """The same model, at lengths where its rotary embeddings are finite, and then not."""
    factors = {"short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 0]}
    long = {"rope_type": "longrope", "factor": 4, "original_max_position_embeddings": 32, **factors}
    arguments = {**debug().model.config, "max_position_embeddings": 32, "vocab_size": 257, "rope_parameters": long}
    assert failure("deepseek_v3", arguments, 32) is None
    assert "not finite at position 32" in str(failure("deepseek_v3", arguments, 33))
    longer = {**arguments, "max_position_embeddings": 64}
    assert "not finite at position 63" in str(failure("deepseek_v3", longer, 32)), "the positions that the model claims"


@pytest.mark.parametrize(("make", "activation"), [(debug, "prelu"), (qwen, "prelu"), (debug, "xielu")])
def test_an_activation_with_a_state_is_refused(make: Callable[..., Config], activation: str) -> None:
    """The experts here would train it, and no checkpoint would hold it."""
    found = violations(make(f"model.config.hidden_act={activation}"))
    assert list(found) == ["model.config.hidden_act"]
    assert "the experts of its MoE layers have the state act_fn." in found["model.config.hidden_act"].rule


@pytest.mark.parametrize("activation", sorted(set(ACT2CLS) - {"prelu", "xielu"}))
def test_every_other_activation_has_no_state(activation: str) -> None:
    assert not [*ACT2FN[activation].parameters(), *ACT2FN[activation].buffers()]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.config.n_routed_experts=1000000000000", "is above 1,000,000; give a smaller number"),
        ("model.config.num_hidden_layers=200000000", "is above 10,000; give a smaller number"),
        ("model.config.qk_rope_head_dim=2000000000", "is above 1,000,000; give a smaller number"),
        ("model.config.hidden_size=1000000000000", "is above 1,000,000; give a smaller number"),
        ("model.config.max_position_embeddings=3000000000", "is above 2,147,483,648; give a smaller number"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_it_is_built(override: str, line: str) -> None:
    begun = time.monotonic()
    assert [str(found) for found in violations(debug(override)).values()] == [f"{override} {line}"]
    assert time.monotonic() - begun < 20


def test_the_warnings_of_transformers_are_shown_again_afterwards() -> None:
    before = list(logging.getLogger(ROPE_LOGGER).filters)
    assert violations(debug(f"{ROPE}={{factor: 4.0}}"))
    assert logging.getLogger(ROPE_LOGGER).filters == before


def test_the_trial_changes_no_configuration() -> None:
    config = qwen()
    before = config.model_dump()
    assert not violations(config)
    assert config.model_dump() == before


def test_a_model_that_no_machine_holds_is_refused() -> None:
    """Each of its sizes is one that some model might have."""
    sizes = {"hidden_size": 1_000_000, "moe_intermediate_size": 1_000_000, "n_routed_experts": 10_000}
    (found,) = violations(debug(*(f"model.config.{key}={size}" for key, size in sizes.items()))).values()
    assert found.key.removeprefix("model.config.") in sizes
    assert "bytes of weights, and no machine" in found.rule
