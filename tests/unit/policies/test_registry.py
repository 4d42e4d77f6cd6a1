"""The registry of policies, and the section `balance` that is made from it."""

from pathlib import Path

import pytest

from dist_moe.config import ConfigError, dump_config, load_config
from dist_moe.config.sections.balance import balance_fields, policy_name
from dist_moe.policies.base import BiasPolicy
from dist_moe.policies.registry import DEFAULT, POLICIES, foreign_defaults, make_policy, policies_with
from tests.unit.config.files import debug


def refused(*overrides: str) -> str:
    """The error of the debug configuration with these overrides."""
    with pytest.raises(ConfigError) as caught:
        debug(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", POLICIES)
def test_a_configuration_has_the_fields_of_its_policy_alone(name: str, tmp_path: Path) -> None:
    config = debug(f"balance.policy={name}")
    assert type(config.balance) is POLICIES[name]
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert set(config.balance.model_dump()) == set(balance_fields()) - set(foreign_defaults(name))


def test_the_default_policy_needs_no_name() -> None:
    assert policy_name({"rate": 0.1}) == policy_name(make_policy(DEFAULT.name())) == DEFAULT.name()
    assert type(debug().balance) is DEFAULT


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_with_a_bias_is_one_with_a_rule(name: str) -> None:
    policy = make_policy(name)
    assert policy.moves_bias == isinstance(policy, BiasPolicy)
    assert policy.moves_bias or not (policy.has_rate or policy.needs_margins)


def test_a_field_of_another_policy_is_refused_with_the_policies_that_have_it() -> None:
    assert policies_with("rule") == ["loss_free", "adaptive_weight"]
    assert refused("balance.policy=quantile", "balance.rule=sign") == (
        "balance.rule=sign has no meaning with balance.policy=quantile; leave it out, or use "
        "balance.policy=loss_free or adaptive_weight"
    )
    assert refused("balance.policy=quantile", "balance.rates=1").endswith("did you mean balance.rate?")


@pytest.mark.parametrize("value", ["auction", "null", "[1]"])
def test_an_unknown_policy_is_refused_with_the_known_ones(value: str) -> None:
    message = refused(f"balance.policy={value}", "balance.rate=0.1")
    names = (
        "'none', 'loss_free', 'adaptive_weight', 'momentum', 'quantile', 'ema_quantile', 'expert_threshold' or 'auxi"
    )
    names = f"should be {names}liary'; give the policy: none ("
    assert message.startswith("balance.policy=") and names in message


def test_a_section_that_is_no_mapping_is_refused() -> None:
    assert refused("balance=3") == "balance=3 is not a mapping; write its keys below it"


def test_an_unknown_field_of_make_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="clip"):
        make_policy("loss_free", clip=2.0)
