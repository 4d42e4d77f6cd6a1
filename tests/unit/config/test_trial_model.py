"""The model of a configuration is built on the meta device and run once: what fails is a violation of its key."""

import logging
from typing import Any

import pytest

from dist_moe.config import ConfigError, resolve
from dist_moe.config.checks.trial_model import ROPE_LOGGER, failure, trial_violations
from dist_moe.families.registry import FAMILIES
from tests.unit.config.files import debug, qwen, violations

ROPE = "model.config.rope_parameters"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ("rope_parameters={rope_type: yarnn, factor: 4.0}",),
            [
                f'{ROPE}={{"rope_type": "yarnn", "factor": 4.0, "rope_theta": 10000.0}} has the rope_type yarnn, which '
                "transformers does not know; did you mean yarn?"
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
                f'{ROPE}={{"rope_theta": "big", "rope_type": "default"}} makes a model that fails (TypeError: '
                "unsupported operand type(s) for ** or pow(): 'str' and 'Tensor'); leave it out (the default is "
                '{"rope_theta": 10000.0, "rope_type": "default"}), or give a value that the model accepts',
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
        ("{rope_type: linear, factor: 0.0}", "`rope_parameters`'s factor field must be a float or int >= 1, got 0.0"),
        ("{rope_type: linear, factor: 0.5}", "`rope_parameters`'s factor field must be a float or int >= 1, got 0.5"),
        ("{rope_theta: -1.0}", "the rotary embeddings are not finite"),
        ("{rope_type: [yarn]}", ""),
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
        "{rope_theta: 500000.0}",
        "{}",
    ],
)
def test_rotary_parameters_of_every_kind_are_accepted(parameters: str) -> None:
    assert not violations(debug(f"{ROPE}={parameters}"))


def test_a_failure_of_a_pretrained_model_says_so() -> None:
    arguments: dict[str, Any] = {**debug().model.config, "vocab_size": 257, "rope_parameters": {"rope_theta": "big"}}
    (found,) = trial_violations("deepseek_v3", arguments, set(), own=set())
    assert found.key == ROPE and found.rule.endswith("and is the value of model.pretrained")
    assert found.remedy == "correct the config.json of that folder"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_default_model_of_each_family_works(architecture: str) -> None:
    assert failure(architecture, {}) is None


def test_the_warnings_of_transformers_are_shown_again_afterwards() -> None:
    before = list(logging.getLogger(ROPE_LOGGER).filters)
    assert violations(debug(f"{ROPE}={{factor: 4.0}}"))
    assert logging.getLogger(ROPE_LOGGER).filters == before


def test_the_trial_changes_no_configuration() -> None:
    config = qwen()
    before = config.model_dump()
    assert not violations(config)
    assert config.model_dump() == before


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_model_that_no_machine_holds_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.config\.{key}=100000000000000 .*bytes of weights, and no machine"):
        resolve(debug(f"model.config.{key}=100000000000000"), 1)
