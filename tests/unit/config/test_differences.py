"""Tests of what differs between configurations, and from the defaults."""

from pathlib import Path

import pytest

from dist_moe.config import Config, load_config
from dist_moe.config.differences import default_values, differences, set_values
from dist_moe.errors import ABSENT
from dist_moe.policies.registry import POLICIES

DEBUG = Path(__file__).resolve().parents[3] / "configs/debug.yaml"


def test_differences_are_found_below_mappings_with_absent_values() -> None:
    one = {"a": {"same": 1, "list": [1, 2], "gone": None}, "b": 1, "type": {"x": 1}}
    other = {"a": {"same": 1, "list": [1, 3], "new": 2}, "b": 1, "type": 5}
    assert list(differences(one, other)) == [
        ("a.list", [1, 2], [1, 3]),
        ("a.gone", None, ABSENT),
        ("a.new", ABSENT, 2),
        ("type", {"x": 1}, 5),
    ]
    assert list(differences(one, one)) == []


def test_values_that_a_file_sets_are_those_that_differ_from_the_defaults() -> None:
    plain = load_config(DEBUG, ["run.seed=7"])
    found = set_values(plain.model_dump(mode="json"))
    assert found["run.seed"] == 7 and found["train.steps"] == 20 and found["model.config.n_routed_experts"] == 12
    assert found["train.learning_rate"] == 2e-3 and found["balance.rate"] == 0.04
    for key in ("run.threads", "train.weight_decay", "balance.policy", "slurm.job_name", "observe.tensorboard"):
        assert key not in found, key


@pytest.mark.parametrize("policy", POLICIES)
def test_the_defaults_of_balance_are_those_of_its_policy(policy: str) -> None:
    values = POLICIES[policy].model_validate({}).model_dump(mode="json")
    expected = {} if policy == default_values("balance")["policy"] else {"balance.policy": policy}
    assert set_values({"balance": values}) == expected


def test_every_section_has_its_defaults() -> None:
    for section in Config.model_fields:
        assert default_values(section) or section in ("slurm", "kubernetes"), section


def test_a_configuration_from_elsewhere_is_not_trusted() -> None:
    assert set_values({"nonsense": {"a": 1}, "train": 5, "balance": {"policy": ["x"]}, "run": {"seed": 0, "b": 2}}) == {
        "nonsense.a": 1,
        "train": 5,
        "balance.policy": ["x"],
        "run.b": 2,
    }
