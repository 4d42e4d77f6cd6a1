"""The Hugging Face folder of model.pretrained: where it is, and the model that its config.json describes."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_moe.config.checks.trial_model import expected_types
from dist_moe.config.deepspeed_keys.entries import same
from dist_moe.config.renamed_keys import load_stored_config
from dist_moe.config.schema import Config
from dist_moe.config.sections.checkpoint import CheckpointConfig
from dist_moe.config.sections.run import RunConfig
from dist_moe.errors import ConfigError, Violation, reason_of
from dist_moe.families.record import Family
from dist_moe.families.registry import FAMILIES
from dist_moe.files import UNSEEN_REMEDY, entries, why_unseen
from dist_moe.section import expand_home
from dist_moe.text import listed, nearest, shown
from dist_moe.untrusted import printable, read_json

OWN_PREFIX = "dist_moe_"
"""Prefix of the model_type of a weights folder whose routing the architecture cannot express."""
SETTINGS = "config.json"
STEP_FOLDER = re.compile(r"step-[0-9]{6,}")
BASE_KEYS = (
    *("model_type", "torch_dtype", "dtype", "auto_map", "name_or_path", "_name_or_path", "_commit_hash", "num_labels"),
    *("rope_theta", "rope_scaling", "attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_experts_implementation", "output_attentions", "quantization_config", "per_layer_config"),
)
"""Keys of every model's config.json that the base of the config classes reads without declaring them."""
MOST_NAMED = 10
LONGEST_KEY = 80
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A name on the Hugging Face Hub, `owner/model` or `model`; a relative path may be spelled the same."""


def tokenizer_folder(config: Config) -> Path | None:
    """The folder with the tokenizer of data.tokenizer=pretrained; without model.pretrained's, that of a checkpoint."""
    if config.data.tokenizer != "pretrained" or config.model.pretrained is None:
        return None
    folder, checkpoint = Path(config.model.pretrained), next(own_checkpoints(config), None)
    return folder if is_model_folder(folder) or checkpoint is None else checkpoint / "model"


def text_vocabulary(config: Config) -> int:
    """The maximum number of tokens of the vocabulary: data.vocabulary, or that of the pretrained model.

    Raises:
        ConfigError: data.tokenizer=pretrained without a model that has a vocabulary.
    """
    if config.data.tokenizer != "pretrained":
        return config.data.vocabulary
    size, folder = config.model.config.get("vocab_size"), config.model.pretrained
    if size is None and folder is not None:
        # The configuration is not resolved, as that of a checkpoint with overrides.
        try:
            size = read_json(Path(folder) / SETTINGS, follow=True).get("vocab_size")
        except (OSError, ValueError) as error:
            raise ConfigError([unreadable(folder, error)]) from None
    if type(size) is not int:
        rule = "needs the folder of a model" if folder is None else f"needs a vocab_size in the {SETTINGS} of {folder}"
        remedy = "set model.pretrained to the folder of a Hugging Face model, or use bytes or bpe"
        raise ConfigError([Violation("data.tokenizer", "pretrained", rule, remedy)])
    return size


def is_model_folder(folder: Path) -> bool:
    """Whether it has the config.json of a Hugging Face model."""
    return os.path.isfile(folder / SETTINGS)


def own_checkpoints(config: Config) -> Iterator[Path]:
    """Yield the checkpoints that the run may resume from, the newest first, without opening them."""
    return _checkpoints(config.run.dir, config.checkpoint.resume)


def _checkpoints(run_dir: str, resume: str) -> Iterator[Path]:
    if resume == "never":
        return
    if resume != "auto":
        checkpoints = [Path(resume)]
    else:
        candidates: list[Path] = []
        with contextlib.suppress(OSError):  # the check of run.dir reports it
            candidates += (path for path in entries(Path(run_dir, "checkpoints")) if STEP_FOLDER.fullmatch(path.name))
        checkpoints = sorted(candidates, key=lambda path: int(path.name[5:]), reverse=True)
    yield from (path for path in checkpoints if os.path.isfile(path / "config.yaml"))


class Stated(NamedTuple):
    """What model.pretrained says of the model.

    Attributes:
        keys: Every known key as a plain value.
        violations: What is wrong.
        notices: What is not used, one line each.
    """

    keys: dict[str, Any]
    violations: list[Violation]
    notices: tuple[str, ...] = ()


def stated_model(config: Config, cls: Any, known: set[str]) -> Stated:
    """Read the keys of the model from the folder of model.pretrained.

    If the folder does not exist any more and the run may resume from a checkpoint, they are read from that.

    Args:
        config: The configuration.
        cls: The Hugging Face config class.
        known: Its keys that define the model.
    """
    if config.model.pretrained is None:
        return Stated({}, [])
    folder = Path(config.model.pretrained)
    if is_model_folder(folder):
        return _stated(folder, config.model.architecture, cls, known)
    for checkpoint in own_checkpoints(config):
        try:
            previous = load_stored_config(checkpoint / "config.yaml").model
        except ConfigError:
            continue
        if previous.pretrained is not None and previous.architecture == config.model.architecture:
            return Stated(previous.config, [])
    return Stated({}, [_no_folder(config.model.pretrained)])


def fill_architecture(settings: Mapping[Any, Any]) -> None:
    """Write model.architecture into nested settings that leave it out, in place, from model.pretrained.

    It is read from the folder or, where that is gone, from a checkpoint that the run may resume from. Where neither
    has a known one, any is written: `stated_model` refuses the folder.
    """
    model = settings.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("pretrained"), str) or model.get("architecture"):
        return
    model["architecture"] = next((each for each in _architectures(settings) if each in FAMILIES), next(iter(FAMILIES)))


def _architectures(settings: Mapping[Any, Any]) -> Iterator[str]:
    try:
        found = read_json(Path(expand_home(settings["model"]["pretrained"])) / SETTINGS, follow=True).get("model_type")
        yield str(found).removeprefix(OWN_PREFIX)
        return
    except (OSError, ValueError):
        pass
    places = {"run.dir": RunConfig().dir, "checkpoint.resume": CheckpointConfig().resume}
    for dotted in places:
        section, _, name = dotted.partition(".")
        values = settings.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            with contextlib.suppress(ValueError):  # the field refuses it
                places[dotted] = expand_home(values[name])
    for checkpoint in _checkpoints(*places.values()):
        with contextlib.suppress(ConfigError):
            yield load_stored_config(checkpoint / "config.yaml").model.architecture


def _no_folder(pretrained: str) -> Violation:
    """Return why a value is not the folder of a model."""
    folder, supported = Path(pretrained), listed(FAMILIES)
    if reason := why_unseen(folder / SETTINGS):
        return Violation("model.pretrained", pretrained, reason, UNSEEN_REMEDY)
    if not folder.exists() and HUB_NAME.fullmatch(pretrained):
        rule = "is no folder here, and models are not fetched from the Hugging Face Hub"
        name = pretrained.rpartition("/")[2]
        remedy = f"fetch it with `hf download {pretrained} --local-dir {name}`, and set model.pretrained={name}"
        return Violation("model.pretrained", pretrained, rule, remedy)
    missing = f"has no {SETTINGS}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    rule = f"{missing}, and the run has no checkpoint that holds its keys"
    remedy = f"give the folder of a Hugging Face model ({supported}), which every host can read"
    return Violation("model.pretrained", pretrained, rule, remedy)


def unreadable(folder: str, error: Exception) -> Violation:
    """Return the violation of a folder whose config.json cannot be read."""
    rule = f"has a {SETTINGS} that cannot be read ({reason_of(error)})"
    return Violation("model.pretrained", folder, rule, "give another folder")


def _stated(folder: Path, architecture: str, cls: Any, known: set[str]) -> Stated:
    def refuse(rule: str, remedy: str) -> Stated:
        return Stated({}, [Violation("model.pretrained", str(folder), rule, remedy)])

    try:
        raw = read_json(folder / SETTINGS, follow=True)
    except (OSError, ValueError) as error:
        return Stated({}, [unreadable(str(folder), error)])
    model_type = raw.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        return refuse(f"has the model_type {shown(model_type)}, which is not a text", "correct its config.json")
    if model_type is not None and model_type.startswith(OWN_PREFIX):
        rule = f"has routing that {model_type.removeprefix(OWN_PREFIX)} cannot express"
        return refuse(rule, "resume from its checkpoint, with checkpoint.resume=PATH/step-NNNNNN")
    if model_type not in FAMILIES:
        rule = f"holds a {model_type}, which is not supported" if model_type else "does not say its model_type"
        return refuse(rule, f"give the folder of a {listed(FAMILIES)} model, or add the family (docs/extending.md)")
    if model_type != architecture:
        remedy = f"set model.architecture to it, or leave that out, or give the folder of a {architecture}"
        return refuse(f"holds a {model_type}", remedy)
    if raw.get("quantization_config") is not None:
        return refuse("is quantized", "give its weights in bf16 or fp32")
    try:
        settings = cls.from_dict(raw)
        stated = {key: getattr(settings, key) for key in sorted(known) if hasattr(settings, key)}
        values: dict[str, Any] = json.loads(json.dumps(stated))
    except Exception as error:  # the class of another library may raise anything for unexpected values
        reason = " ".join(str(error.__cause__ or error).split())
        if expected := expected_types(reason):
            name = reason.partition("'")[2].partition("'")[0]
            rule = f"has {name}={shown(raw.get(name))} in its {SETTINGS}, which should be {expected}"
            return refuse(rule, f"correct its {SETTINGS}, or give another folder")
        return refuse(f"is refused by {cls.__name__} ({reason})", "give another folder")
    violations = _file_violations(folder, raw, FAMILIES[architecture])
    return Stated(values, violations, _unused_keys(raw, cls, FAMILIES[architecture]))


def _file_violations(folder: Path, raw: Mapping[str, Any], family: Family) -> list[Violation]:
    """What config.json asks for in keys that the config class does not have, and the architecture is not."""
    asked = {**family.file_keys, "per_layer_config": ((None, {}), "gives layers different shapes")}
    return [
        Violation("model.pretrained", str(folder), f"has {key}={shown(raw[key])}, which {rule}", "give another folder")
        for key, (accepted, rule) in asked.items()
        if key in raw and accepted and not any(same(raw[key], value) for value in accepted)
    ]


def _unused_keys(raw: Mapping[str, Any], cls: Any, family: Family) -> tuple[str, ...]:
    """Return a notice of the keys of config.json that neither the class nor the base of all classes has."""
    from transformers import GenerationConfig

    declared = {field.name for field in dataclasses.fields(cls)} | {*cls.attribute_map, *cls.attribute_map.values()}
    declared |= {*family.undeclared_keys, *family.file_keys, *BASE_KEYS}
    declared |= GenerationConfig._get_default_generation_params().keys()
    computed = cls()  # a file of transformers has the values that its class computes, too
    unused = [key for key in raw if key not in declared and not hasattr(computed, key)]
    if not unused:
        return ()
    names = listed((_with_nearest(key, declared) for key in unused), last="and", most=MOST_NAMED)
    return (f"the {SETTINGS} of model.pretrained has {names}, which {cls.__name__} does not have, and is not used",)


def _with_nearest(key: str, declared: set[str]) -> str:
    name, close = printable(key)[:LONGEST_KEY], nearest(key, declared)
    return f"{name} (did you mean {close}?)" if close else name


def agreement(config: Config, stated: dict[str, Any]) -> list[Violation]:
    """What is wrong between `config` and the keys of model.pretrained."""
    violations = [
        Violation(f"model.config.{key}", value, f"differs from the {stated[key]} of model.pretrained", "leave it out")
        for key, value in config.model.config.items()
        if key in stated and stated[key] != value
    ]
    if config.data.tokenizer == "pretrained" and config.model.pretrained is None:
        rule, remedy = "needs the folder of a model", "set model.pretrained, or use bytes or bpe"
        violations.append(Violation("data.tokenizer", "pretrained", rule, remedy))
    return violations
