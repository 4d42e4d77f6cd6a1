"""Keys of earlier versions: refused in a user's settings with the new key, mapped in the file of a checkpoint."""

import logging
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import ConfigError, dump_config, load_config, load_stored_config
from dist_moe.config.messages import field_paths
from dist_moe.config.renamed_keys import REMOVED, RENAMED, upgrade_keys
from dist_moe.policies.adaptive_weight import AdaptiveWeight
from tests.unit.config.files import debug

OLD = Path(__file__).with_name("earlier_config.yaml")


def test_each_new_key_is_known_and_no_old_one_is() -> None:
    known = set(field_paths())
    assert set(RENAMED.values()) <= known
    assert not {*RENAMED, *REMOVED} & known


def test_the_file_of_an_earlier_checkpoint_loads_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_moe"):
        config = load_stored_config(OLD)
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"{OLD} has keys of an earlier version: train.micro_batch=1 is read as ")
    assert "balance.shapes=mixture is read as balance.applies_to=gate_weights" in line
    assert line.endswith("and balance.cadence is ignored")
    assert all(f"{old}=" in line for old in RENAMED)
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (1, 12)
    assert (config.router.normalize, config.router.scaling_factor, config.router.topk_groups) == (True, 1.0, 1)
    assert (config.router.target_experts_per_token, config.router.zipf_exponent) == (None, 1.5)
    assert isinstance(config.balance, AdaptiveWeight)
    assert (config.balance.center, config.balance.applies_to) == (True, "gate_weights")
    assert (config.checkpoint.interval, config.observe.interval, config.observe.replica_check_interval) == (10, 5, 50)
    assert config.parallel.all_to_all == "flat"


def test_a_file_of_this_version_is_loaded_without_a_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(debug()), encoding="utf-8")
    assert load_stored_config(path) == debug()
    assert not caplog.records


def test_deepspeed_keys_that_an_earlier_version_accepted_are_ignored_with_a_line(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    text = dump_config(debug("train.deepspeed={communication_data_type: fp32}"))
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("communication_data_type", "dump_state: true\n    communication_data_type"))
    assert load_stored_config(path).train.deepspeed == {"communication_data_type": "fp32"}
    (record,) = caplog.records
    assert record.getMessage() == f"{path} has keys of train.deepspeed that are ignored: dump_state"
    with pytest.raises(ConfigError, match=r"train.deepspeed.dump_state=true prints what DeepSpeed measures"):
        load_stored_config(path, ["train.deepspeed={dump_state: true}"])
    with pytest.raises(ConfigError, match="give the path of a JSON file of DeepSpeed"):
        load_stored_config(path, [f"train.deepspeed={tmp_path}/none.json"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.micro_batch=4", "train.micro_batch=4 was renamed; use train.micro_batch_size=4"),
        ("balance.shapes=mixture", "balance.shapes=mixture was renamed; use balance.applies_to=gate_weights"),
        ("balance.shapes=selection", "balance.shapes=selection was renamed; use balance.applies_to=selection"),
        ("router.normalise=null", "router.normalise=null was renamed; use router.normalize=null"),
        ("balance.cadence=step", "balance.cadence=step was removed; leave it out; it chose nothing"),
    ],
)
def test_a_user_is_given_the_new_key(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        debug(override)
    assert str(caught.value).splitlines()[0] == line
    with pytest.raises(ConfigError) as caught:
        load_stored_config(OLD, [override])
    assert str(caught.value) == line, "an override of evaluation is a user's, the file is not"


def test_each_old_key_in_a_users_file_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(OLD)
    assert {violation.key for violation in caught.value.violations} >= {*RENAMED, *REMOVED}


def test_the_new_key_wins_where_both_are_given() -> None:
    settings: dict[Any, Any] = {"train": {"micro_batch": 4, "micro_batch_size": 2}, "balance": None}
    (change,) = upgrade_keys(settings)
    assert settings == {"train": {"micro_batch_size": 2}, "balance": None}
    assert (change.old, change.new) == ("train.micro_batch", "train.micro_batch_size")
    assert upgrade_keys(settings) == []


@pytest.mark.parametrize("content", ["train: {stepz: 3}", "train: [", "- a"])
def test_a_damaged_file_is_a_config_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_stored_config(path)
