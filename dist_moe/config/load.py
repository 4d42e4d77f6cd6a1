"""A configuration out of a YAML file and `key=value` overrides, and back into YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_moe.config.messages import explain
from dist_moe.config.schema import Config
from dist_moe.config.yaml_io import parse, render
from dist_moe.errors import ABSENT, ConfigError, Violation


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file, lays the overrides over it, and validates the whole.

    overrides: texts like `train.steps=20`; the value is parsed as YAML, a later one wins.
    Raises ConfigError with everything that is wrong: an unreadable file, broken YAML, an override without
    `=`, an unknown key (the nearest known one is named), a value of the wrong type or out of range. What
    depends on several fields or on the number of workers is `check.resolve`'s part.
    """
    settings = _read(Path(path))
    violations = [found for override in overrides if (found := _override(settings, override)) is not None]
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError([*violations, *explain(error, settings)]) from None
    if violations:
        raise ConfigError(violations)
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML with every field, which `load_config` reads back as an equal one."""
    return render(config.model_dump())


def _read(path: Path) -> dict[Any, Any]:
    key = str(path)
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise ConfigError([Violation(key, ABSENT, rule, "give the path of a YAML file")]) from error
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte {error.start})"
        raise ConfigError([Violation(key, ABSENT, rule, "save it as UTF-8 text")]) from error
    except yaml.YAMLError as error:
        rule = f"is not valid YAML ({' '.join(str(error).split())})"
        raise ConfigError([Violation(key, ABSENT, rule, "correct the line it names")]) from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        rule = f"holds a {type(settings).__name__}, not a mapping"
        remedy = "write sections such as `train:` with their keys below"
        raise ConfigError([Violation(key, ABSENT, rule, remedy)])
    for name in Config.model_fields:  # a section whose keys are all commented out is an empty one
        if name in settings and settings[name] is None:
            settings[name] = {}
    return settings


def _override(settings: dict[Any, Any], override: str) -> Violation | None:
    """Writes one `a.b.c=value` into the nested settings; what is wrong with it, if anything."""
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        rule = "is not of the form key=value"
        return Violation("override", override, rule, "write for example train.steps=20")
    try:
        value = parse(text)
    except yaml.YAMLError:
        return Violation(".".join(names), text, "is not valid YAML", "quote the value: key='\"text\"'")
    place = settings
    for depth, name in enumerate(names[:-1], start=1):
        inner = place.get(name)
        if inner is None:
            inner = place[name] = {}
        elif not isinstance(inner, dict):
            rule = f"has no keys below it, so {dotted} cannot be set"
            return Violation(".".join(names[:depth]), inner, rule, "give the key of a value")
        place = inner
    place[names[-1]] = value
    return None
