"""Keys of earlier versions: refused in a user's settings with the new key, mapped in the file of a checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.config.deepspeed_keys.check import allowed_settings, deepspeed_violations
from dist_moe.config.deepspeed_keys.file import take_deepspeed_file
from dist_moe.config.messages import validate
from dist_moe.config.schema import Config
from dist_moe.config.sections.balance import policy_name
from dist_moe.config.yaml_io import apply_overrides, read_mapping
from dist_moe.errors import ConfigError, Violation
from dist_moe.policies.registry import POLICIES, foreign_defaults
from dist_moe.text import listed, shown

logger = logging.getLogger(__name__)

RENAMED: Mapping[str, str] = {
    "train.micro_batch": "train.micro_batch_size",
    "train.global_batch": "train.global_batch_size",
    "router.normalise": "router.normalize",
    "router.scaling": "router.scaling_factor",
    "router.budget": "router.target_experts_per_token",
    "router.skew": "router.zipf_exponent",
    "router.top_groups": "router.topk_groups",
    "balance.centre": "balance.center",
    "balance.shapes": "balance.applies_to",
    "parallel.exchange": "parallel.all_to_all",
    "checkpoint.every": "checkpoint.interval",
    "observe.every": "observe.interval",
    "observe.check_ranks_every": "observe.replica_check_interval",
}
# Values that were renamed along with their key.
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"balance.shapes": {"mixture": "gate_weights"}}
# Key -> why it is no longer needed.
REMOVED: Mapping[str, str] = {"balance.cadence": "it chose nothing"}


class KeyChange(NamedTuple):
    """What became of one old key.

    Attributes:
        old: Its dotted path.
        value: The value that it had.
        new: The dotted path of the key that replaces it; None where it was removed.
        new_value: The value of that key with the same meaning.
    """

    old: str
    value: Any
    new: str | None
    new_value: Any

    def violation(self) -> Violation:
        """Return the violation for a user's file or override that still has the old key."""
        if self.new is None:
            return Violation(self.old, self.value, "was removed", f"leave it out; {REMOVED[self.old]}")
        return Violation(self.old, self.value, "was renamed", f"use {self.new}={shown(self.new_value)}")

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.old} is ignored"
        return f"{self.old}={shown(self.value)} is read as {self.new}={shown(self.new_value)}"


def upgrade_keys(settings: dict[Any, Any]) -> list[KeyChange]:
    """Replace the old keys in nested settings by the new ones, in place; return what was changed.

    Where both the old and the new key are there, the new one is kept.
    """
    changes = []
    for old in (*RENAMED, *REMOVED):
        section, _, name = old.partition(".")
        values = settings.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        value = values.pop(name)
        new = RENAMED.get(old)
        new_value = value
        if new is not None:
            new_value = RENAMED_VALUES.get(old, {}).get(value, value) if isinstance(value, str) else value
            values.setdefault(new.partition(".")[2], new_value)
        changes.append(KeyChange(old, value, new, new_value))
    return changes


def drop_defaults_of_other_policies(settings: Mapping[Any, Any]) -> None:
    """Remove the fields of other policies from `balance`, in place, where they have their default.

    A complete configuration, whose policy an override may replace, has the fields of its own policy, and those of
    earlier versions have the fields of all.
    """
    values = settings.get("balance")
    name = policy_name(values)
    if not isinstance(values, dict) or name not in POLICIES:
        return
    for field, default in foreign_defaults(name).items():
        if field in values and values[field] == default:
            del values[field]


def _drop_refused_deepspeed_keys(settings: Mapping[Any, Any]) -> list[str]:
    """Remove from train.deepspeed, in place, what earlier versions accepted; return the dotted keys."""
    train = settings.get("train")
    keys = train.get("deepspeed") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(keys, dict):
        return []
    train["deepspeed"] = allowed_settings(keys)
    return [violation.key for violation in deepspeed_violations(keys, where="")]


def load_stored_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config.yaml of a checkpoint, which an earlier version may have written.

    Args:
        path: The file. Its old keys are mapped, with one line in the log.
        overrides: A user's texts like `train.steps=20`, in which old keys are refused.

    Raises:
        ConfigError: As of `load_config`, but for rules that join several fields.
    """
    settings = read_mapping(path)
    if changes := upgrade_keys(settings):
        logger.warning("%s has keys of an earlier version: %s", path, listed(changes, last="and"))
    if refused := _drop_refused_deepspeed_keys(settings):
        logger.warning("%s has keys of train.deepspeed that are ignored: %s", path, listed(refused, last="and"))
    violations = apply_overrides(settings, overrides)
    violations += [change.violation() for change in upgrade_keys(settings)]
    drop_defaults_of_other_policies(settings)
    file = take_deepspeed_file(settings)
    violations += file.violations
    try:
        config = validate(settings)
    except ConfigError as error:
        raise ConfigError([*violations, *error.violations]) from None
    violations += file.disagreements(config)
    if violations:
        raise ConfigError(violations)
    return config
