"""Loads a configuration from a YAML file and `key=value` overrides, and writes it back as YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_moe.config.deepspeed_keys.file import (
    describe_keys,
    is_deepspeed_json,
    read_deepspeed_json,
    take_deepspeed_file,
)
from dist_moe.config.messages import validate, validate_rest
from dist_moe.config.pretrained import fill_architecture
from dist_moe.config.renamed_keys import drop_defaults_of_other_policies, upgrade_keys
from dist_moe.config.resolve import FurtherCheck, cross_field_violations, independent_of
from dist_moe.config.schema import Config
from dist_moe.config.yaml_io import apply_overrides, read_mapping, render
from dist_moe.errors import ConfigError, Violation


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    further_check: FurtherCheck | None = None,
) -> Config:
    """Read the YAML file, apply the overrides, and validate the whole.

    Rules that join several fields are those of `resolve`. Where something else is wrong already, they are checked here
    too, as far as they do not depend on it, so that the error lists everything at once; this imports transformers.

    Args:
        path: The YAML file of a run.
        overrides: Texts like `train.steps=20`; the value is parsed as YAML, and a later one wins.
        workers: The processes of the run, all hosts together, where they are known: rules that depend on them.
        further_check: As `resolve` takes it; called here only where something else is wrong.

    Raises:
        ConfigError: With everything that is wrong: a file that cannot be read, invalid YAML, an override without `=`,
            an unknown key (with the nearest known one), a key of an earlier version (with the new one), or a value of
            the wrong type or out of range.
    """
    settings = _read_run(Path(path))
    violations = apply_overrides(settings, overrides)
    file = take_deepspeed_file(settings)
    violations += file.violations
    violations += [change.violation() for change in upgrade_keys(settings)]
    drop_defaults_of_other_policies(settings)
    fill_architecture(settings)
    broken = {violation.key for violation in violations}
    later: list[Violation] = []
    try:
        config = validate(settings)
    except ConfigError as error:
        violations += error.violations
        config, invalid, later = validate_rest(settings)
        broken |= invalid
    violations += file.disagreements(config, workers, broken)
    if not violations:
        return config
    if workers is None:
        broken.add("workers")
    later += cross_field_violations(config, workers or 1) + (further_check(config) if further_check is not None else [])
    raise ConfigError([*violations, *independent_of(broken, config, later)])


def _read_run(path: Path) -> dict[Any, Any]:
    """Read the YAML file of a run; a JSON file of DeepSpeed in its place is explained key by key."""
    try:
        settings = read_mapping(path)
    except ConfigError:
        # JSON may have tabs, which YAML refuses.
        if path.suffix != ".json":
            raise
        settings = read_deepspeed_json(str(path))
    if is_deepspeed_json(settings, Config.model_fields):
        raise ConfigError(describe_keys(str(path), settings))
    return settings


def dump_config(config: Config) -> str:
    """Write the configuration as YAML with every field; `load_config` reads it back as an equal one."""
    return render(config.model_dump())
