"""The Hugging Face folder of model.pretrained or model.upcycle_from: where it is, and the model that it describes."""

import contextlib
import copy
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
from dist_moe.config.sections.model import ModelConfig
from dist_moe.config.sections.run import RunConfig
from dist_moe.errors import ConfigError, Violation, reason_of
from dist_moe.families.built_in import BUILT_IN
from dist_moe.families.composite import language_model_settings
from dist_moe.families.dense import DENSE, EXPERTS_KEY, LAYERS_KEY, TOP_K_KEY
from dist_moe.families.record import Family
from dist_moe.families.registry import ARCHITECTURES, FAMILIES, FAMILIES_TEXT
from dist_moe.files import UNSEEN_REMEDY, entries, why_unseen
from dist_moe.section import expand_home
from dist_moe.text import listed, nearest, shown
from dist_moe.untrusted import printable, read_json

OWN_PREFIX = "dist_moe_"
"""Prefix of the model_type of a weights folder whose routing the architecture cannot express."""
SECTION = "dist_moe"
"""Key of what the family's own fields cannot express, in the config.json of such a folder."""
SETTINGS = "config.json"
PRETRAINED_KEY, UPCYCLE_KEY = "model.pretrained", "model.upcycle_from"
STEP_FOLDER = re.compile(r"step-[0-9]{6,}")
BASE_KEYS = (
    *("model_type", "torch_dtype", "dtype", "auto_map", "name_or_path", "_name_or_path", "_commit_hash", "num_labels"),
    *("rope_theta", "rope_scaling", "attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_experts_implementation", "output_attentions", "quantization_config", "per_layer_config"),
)
"""Keys of every model's config.json that the base of the config classes reads without declaring them."""
LAYERS_OF_THEIR_OWN = "per_layer_config"
"""The key with what single layers have in place of the values of the other keys."""
MOST_NAMED = 10
LONGEST_KEY = 80
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A name on the Hugging Face Hub, `owner/model` or `model`; a relative path may be spelled the same."""


class WeightsSource(NamedTuple):
    """Where the weights of a run start from.

    Attributes:
        key: `model.pretrained` or `model.upcycle_from`.
        value: A folder, or the name of a built-in model; None: the weights are drawn at random.
    """

    key: str
    value: str | None

    @property
    def folder(self) -> Path | None:
        """The folder; None where there is none, or the model is built in."""
        return None if self.value is None or self.value in self.built_in else Path(self.value)

    @property
    def built_in(self) -> Mapping[str, Any]:
        """The built-in models that the key can name."""
        return BUILT_IN if self.key == UPCYCLE_KEY else {}

    def read_settings(self) -> dict[str, Any]:
        """Return the content of its config.json; of a multimodal model to start from, that of its language model.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not valid.
        """
        assert self.value is not None
        if self.value in self.built_in:
            return dict(BUILT_IN[self.value].config)
        raw = read_json(Path(expand_home(self.value)) / SETTINGS, follow=True)
        return language_model_settings(raw) if self.key == PRETRAINED_KEY else raw

    def exists(self) -> bool:
        """Whether there is such a folder, or built-in model."""
        return self.value is not None and (self.value in self.built_in or is_model_folder(Path(self.value)))


def weights_source(model: ModelConfig) -> WeightsSource:
    """Return what `model` names; model.upcycle_from where it has both, which is refused."""
    upcycled = model.upcycle_from is not None
    return WeightsSource(*((UPCYCLE_KEY, model.upcycle_from) if upcycled else (PRETRAINED_KEY, model.pretrained)))


def tokenizer_folder(config: Config) -> Path | None:
    """The folder with the tokenizer of data.tokenizer=pretrained; if it is gone, that of a checkpoint.

    None where another tokenizer is used, or that of a built-in model.
    """
    folder = weights_source(config.model).folder
    if config.data.tokenizer != "pretrained" or folder is None:
        return None
    checkpoint = next(own_checkpoints(config), None)
    return folder if is_model_folder(folder) or checkpoint is None else checkpoint / "model"


def text_vocabulary(config: Config) -> int:
    """The maximum number of tokens of the vocabulary: data.vocabulary, or that of the pretrained model.

    Raises:
        ConfigError: data.tokenizer=pretrained without a model that has a vocabulary.
    """
    if config.data.tokenizer != "pretrained":
        return config.data.vocabulary
    size, source = config.model.config.get("vocab_size"), weights_source(config.model)
    if size is None and source.value is not None:
        # The configuration is not resolved, as that of a checkpoint with overrides.
        try:
            size = source.read_settings().get("vocab_size")
        except (OSError, ValueError) as error:
            raise ConfigError([unreadable(source, error)]) from None
    if type(size) is not int:
        named = source.value
        rule = "needs the folder of a model" if named is None else f"needs a vocab_size in the {SETTINGS} of {named}"
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
        score: The gate function of an upcycled model, whose architecture has none; None: that of the family.
    """

    keys: dict[str, Any]
    violations: list[Violation]
    notices: tuple[str, ...] = ()
    score: Any = None


def stated_model(config: Config, cls: Any, known: set[str]) -> Stated:
    """Read the keys of the model from the folder of model.pretrained, or of the dense one of model.upcycle_from.

    If the folder does not exist any more and the run may resume from a checkpoint, they are read from that.

    Args:
        config: The configuration.
        cls: The Hugging Face config class.
        known: Its keys that define the model.
    """
    source = weights_source(config.model)
    if source.value is None:
        return Stated({}, [])
    if source.exists():
        return _stated(source, config, cls, known)
    for checkpoint in own_checkpoints(config):
        try:
            previous = load_stored_config(checkpoint / "config.yaml").model
        except ConfigError:
            continue
        before = weights_source(previous)
        same_key = before.key == source.key and before.value is not None
        if same_key and previous.architecture == config.model.architecture:
            return Stated(previous.config, [])
    return Stated({}, [_no_folder(source)])


def fill_architecture(settings: Mapping[Any, Any]) -> None:
    """Write model.architecture into nested settings that leave it out, in place, from the folder of the weights.

    It is read from the folder or, where that is gone, from a checkpoint that the run may resume from. Where neither
    has a known one, any is written: `stated_model` refuses the folder.
    """
    model = settings.get("model")
    if not isinstance(model, dict) or model.get("architecture"):
        return
    given = (WeightsSource(f"model.{name}", model.get(name)) for name in ("upcycle_from", "pretrained"))
    source = next((each for each in given if isinstance(each.value, str)), None)
    if source is None:
        return
    known = (each for each in _architectures(settings, source) if each in ARCHITECTURES)
    model["architecture"] = next(known, next(iter(DENSE if source.key == UPCYCLE_KEY else FAMILIES)))


def _architectures(settings: Mapping[Any, Any], source: WeightsSource) -> Iterator[str]:
    try:
        yield str(source.read_settings().get("model_type")).removeprefix(OWN_PREFIX)
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


def _no_folder(source: WeightsSource) -> Violation:
    """Return why a value is not the folder of a model."""
    key, given = source.key, str(source.value)
    folder, supported = Path(given), listed(DENSE) if key == UPCYCLE_KEY else FAMILIES_TEXT
    if reason := why_unseen(folder / SETTINGS):
        return Violation(key, given, reason, UNSEEN_REMEDY)
    if not folder.exists() and HUB_NAME.fullmatch(given):
        rule = "is no folder here, and models are not fetched from the Hugging Face Hub"
        name = given.rpartition("/")[2]
        remedy = f"fetch it with `hf download {given} --local-dir {name}`, and set {key}={name}"
        if source.built_in:
            remedy += f", or use a built-in model: {listed(source.built_in)}"
        return Violation(key, given, rule, remedy)
    missing = f"has no {SETTINGS}" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    rule = f"{missing}, and the run has no checkpoint that holds its keys"
    remedy = f"give the folder of a Hugging Face model ({supported}), which every host can read"
    return Violation(key, given, rule, remedy)


def unreadable(source: WeightsSource, error: Exception) -> Violation:
    """Return the violation of a folder whose config.json cannot be read."""
    rule = f"has a {SETTINGS} that cannot be read ({reason_of(error)})"
    return Violation(source.key, source.value, rule, "give another folder")


def _unusable_type(source: WeightsSource, model_type: Any, architecture: str) -> tuple[str, str] | None:
    """Return why a model of this type cannot be used, and what to do; None if it can."""
    upcycled, name = source.key == UPCYCLE_KEY, str(model_type)
    supported = listed(DENSE) if upcycled else FAMILIES_TEXT
    if model_type is not None and not isinstance(model_type, str):
        return f"has the model_type {shown(model_type)}, which is not a text", "correct its config.json"
    if name.startswith(OWN_PREFIX) and (upcycled or name.removeprefix(OWN_PREFIX) not in DENSE):
        if upcycled and name.removeprefix(OWN_PREFIX) in ARCHITECTURES:
            return "holds an MoE model, which has experts already", f"use model.pretrained={source.value}"
        rule = f"has routing that {name.removeprefix(OWN_PREFIX)} cannot express"
        return rule, "resume from its checkpoint, with checkpoint.resume=PATH/step-NNNNNN"
    if upcycled and name in FAMILIES:
        return f"holds a {name}, which has experts already", f"use model.pretrained={source.value}"
    if not upcycled and name in DENSE:
        remedy = f"make an MoE model of it with {UPCYCLE_KEY}={source.value}, or give the folder of an MoE model"
        return f"holds a {name}, which is dense", remedy
    if name.removeprefix(OWN_PREFIX) not in ARCHITECTURES:
        rule = f"holds a {name}, which is not supported" if model_type else "does not say its model_type"
        return rule, f"give the folder of a model ({supported}), or add the family (docs/extending.md)"
    if name.removeprefix(OWN_PREFIX) != architecture:
        remedy = f"set model.architecture to it, or leave that out, or give the folder of a {architecture}"
        return f"holds a {name}", remedy
    return None


def _stated(source: WeightsSource, config: Config, cls: Any, known: set[str]) -> Stated:
    architecture = config.model.architecture

    def refuse(rule: str, remedy: str) -> Stated:
        return Stated({}, [Violation(source.key, source.value, rule, remedy)])

    try:
        raw = source.read_settings()
    except (OSError, ValueError) as error:
        return Stated({}, [unreadable(source, error)])
    if refused := _unusable_type(source, raw.get("model_type"), architecture):
        return refuse(*refused)
    if raw.get("quantization_config") is not None:
        return refuse("is quantized", "give its weights in bf16 or fp32")
    upcycled = source.key == PRETRAINED_KEY and ARCHITECTURES[architecture].feed_forward is not None
    if upcycled and (wrong := _without_experts(raw)):
        return refuse(wrong, "export it again, or give another folder")
    routing = raw.pop(SECTION, {})
    raw["model_type"] = architecture
    try:
        settings = cls.from_dict(cls._decode_special_floats(raw))  # the infinite ends of ranges
        given = settings.to_dict()  # has the value of all layers where some layers have their own
        stated = {key: getattr(settings, key) for key in sorted(known - given.keys()) if hasattr(settings, key)}
        stated |= {key: given[key] for key in sorted(known & given.keys())}
        values: dict[str, Any] = json.loads(json.dumps(stated))
        if given.get(LAYERS_OF_THEIR_OWN) == cls(**copy.deepcopy(values)).to_dict().get(LAYERS_OF_THEIR_OWN):
            raw.pop(LAYERS_OF_THEIR_OWN, None)  # the class computes it from the other keys
    except Exception as error:  # the class of another library may raise anything for unexpected values
        reason = " ".join(str(error.__cause__ or error).split())
        if expected := expected_types(reason):
            name = reason.partition("'")[2].partition("'")[0]
            rule = f"has {name}={shown(raw.get(name))} in its {SETTINGS}, which should be {expected}"
            return refuse(rule, f"correct its {SETTINGS}, or give another folder")
        return refuse(f"is refused by {cls.__name__} ({reason})", "give another folder")
    family = ARCHITECTURES[architecture]
    violations = _file_violations(source, raw, family)
    if upcycled:
        violations += _routing_violations(source, config, routing)
        return Stated(values, violations, (), routing.get("score") if isinstance(routing, dict) else None)
    return Stated(values, violations, _unused_keys(source, raw, cls, family))


def _without_experts(raw: Mapping[str, Any]) -> str | None:
    """Return which key of an upcycled model is not valid, which its config class does not declare; None if all are."""
    for key in (EXPERTS_KEY, TOP_K_KEY):
        value = raw.get(key)
        if type(value) is not int or value < 1:
            return f"has {key}={shown(value)} in its {SETTINGS}, which is not a positive integer"
    layers = raw.get(LAYERS_KEY)
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        return f"has {LAYERS_KEY}={shown(layers)} in its {SETTINGS}, which is not a list of indices of layers"
    return None


def _routing_violations(source: WeightsSource, config: Config, routing: Any) -> list[Violation]:
    """What of the router differs from that of the upcycled model in the folder; its architecture has none."""
    if not isinstance(routing, dict):
        return [
            Violation(source.key, source.value, f"has no valid section dist_moe in its {SETTINGS}", "export it again")
        ]
    stored, violations = routing.get("selection", "top_k"), []
    asked = {"selection": stored, "score": routing.get("score", "softmax")}
    for name, value in asked.items():
        given = getattr(config.router, name)
        if given is not None and given != value and stored in ("top_k", "threshold"):
            rule = f"differs from the {value} of model.pretrained"
            violations.append(Violation(f"router.{name}", given, rule, f"set router.{name}={value}"))
    return violations


def _file_violations(source: WeightsSource, raw: Mapping[str, Any], family: Family) -> list[Violation]:
    """What config.json asks for in keys that the config class does not have, and the architecture is not."""
    asked = {**family.file_keys, LAYERS_OF_THEIR_OWN: ((None, {}), "gives layers different shapes")}
    return [
        Violation(source.key, source.value, f"has {key}={shown(raw[key])}, which {rule}", "give another folder")
        for key, (accepted, rule) in asked.items()
        if key in raw and accepted and not any(same(raw[key], value) for value in accepted)
    ]


def _unused_keys(source: WeightsSource, raw: Mapping[str, Any], cls: Any, family: Family) -> tuple[str, ...]:
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
    return (f"the {SETTINGS} of {source.key} has {names}, which {cls.__name__} does not have, and is not used",)


def _with_nearest(key: str, declared: set[str]) -> str:
    name, close = printable(key)[:LONGEST_KEY], nearest(key, declared)
    return f"{name} (did you mean {close}?)" if close else name


def agreement(config: Config, stated: dict[str, Any]) -> list[Violation]:
    """What is wrong between `config` and the keys of the folder of its weights."""
    source = weights_source(config.model)
    violations = [
        Violation(f"model.config.{key}", value, f"differs from the {stated[key]} of {source.key}", "leave it out")
        for key, value in config.model.config.items()
        if key in stated and stated[key] != value
    ]
    if config.data.tokenizer == "pretrained" and source.value is None:
        rule, remedy = "needs the folder of a model", "set model.pretrained, or use bytes or bpe"
        violations.append(Violation("data.tokenizer", "pretrained", rule, remedy))
    return violations
