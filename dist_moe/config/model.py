"""The model of a configuration, validated with its Hugging Face config class: its keys and routing values."""

import contextlib
import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from dist_moe.config.checks.rotary import KEY as ROPE_KEY
from dist_moe.config.checks.rotary import rotary_violations
from dist_moe.config.checks.task import encoder_violations
from dist_moe.config.checks.trial_model import (
    blamed,
    complaints_about_rope,
    default_of,
    expected_types,
    trial_violations,
)
from dist_moe.config.checks.upcycling import upcycled_arguments, upcycling_violations
from dist_moe.config.model_checks import (
    shape_violations,
    size_violations,
    unsupported_notices,
    unsupported_violations,
)
from dist_moe.config.pretrained import UPCYCLE_KEY, agreement, stated_model, weights_source
from dist_moe.config.schema import Config
from dist_moe.config.sections.model import ModelConfig
from dist_moe.config.sections.router import RouterConfig
from dist_moe.errors import ABSENT, Violation
from dist_moe.families.record import Family
from dist_moe.families.registry import family_of
from dist_moe.interpreter import without_collections
from dist_moe.text import counted, divisors, listed, nearest, shown, up_to

# Keys of the config class that are set elsewhere -> where.
OWNED_MODEL_KEYS: dict[str, str] = {
    "bos_token_id": "the tokenizer (data.tokenizer) sets it",
    "eos_token_id": "the tokenizer (data.tokenizer) sets it",
    "pad_token_id": "the tokenizer (data.tokenizer) sets it",
    "output_router_logits": "the router records what balance.policy needs",
    "router_aux_loss_coef": "balance.policy and balance.auxiliary_loss set the balancing",
}
# Keys of older published files -> their present key.
RENAMED_KEYS = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}
KEY = "model.config."
BYTES_VOCABULARY = 257  # 256 bytes and the end token
# The routing values where neither the configuration nor the family has one.
DEFAULT_ROUTING: dict[str, Any] = {"normalize": False, "scaling_factor": 1.0, "groups": 1, "topk_groups": 1}

VARYING_SELECTIONS = ("threshold", "expert_threshold")
"""Selections in which tokens take different numbers of experts."""


@dataclass(frozen=True)
class ModelFacts:
    """A valid model, with its routing values.

    Attributes:
        arguments: Keyword arguments of the Hugging Face config class, routing values included; vocab_size only where
            the configuration has it, and the ids of the special tokens None until the tokenizer is known.
        experts: Routed experts of a layer.
        router: `config.router` with every field filled.
        model: `config.model` with the keys of model.pretrained written out, so that a checkpoint does not need that
            folder.
        notices: What of model.pretrained is not used, one line each.
    """

    arguments: dict[str, Any]
    experts: int
    router: RouterConfig
    model: ModelConfig
    notices: tuple[str, ...] = ()


class Reading(NamedTuple):
    """What `read_model` found.

    Attributes:
        facts: None where the config class refuses its arguments, or the routing values are invalid.
        experts: Routed experts of a layer; None where it is not known.
        violations: What is wrong.
        arguments: The known keys of the config class, without routing values; None where there is no model.
    """

    facts: ModelFacts | None
    experts: int | None
    violations: list[Violation]
    arguments: dict[str, Any] | None = None


@without_collections()
def read_model(config: Config) -> Reading:
    """Build the Hugging Face config of `config.model` and `config.router`, and try its model; imports transformers."""
    from transformers import CONFIG_MAPPING

    reading = _read(config)
    refused = {found.key.removeprefix(KEY) for found in reading.violations}
    if reading.arguments is None or "model.config" in refused:
        return reading
    cls: Any = CONFIG_MAPPING[config.model.architecture]
    arguments = {"vocab_size": max(1, vocabulary_bound(config)), **reading.arguments, **_no_special_tokens(cls)}
    own, length = set(config.model.config), config.data.sequence_length
    failed = trial_violations(config.model.architecture, arguments, refused, own, length)
    return reading._replace(violations=[*reading.violations, *failed])


def _read(config: Config) -> Reading:
    from transformers import CONFIG_MAPPING

    family = family_of(config.model.architecture)
    cls: Any = CONFIG_MAPPING[family.architecture]
    known = known_keys(cls, family)
    stated, violations, file_notices, stated_score = stated_model(config, cls, known)
    violations = [*violations, *agreement(config, stated)]
    violations += upcycling_violations(config, family, {**stated, **config.model.config})
    violations += encoder_violations(config, family)
    if family.feed_forward is not None and not stated:
        return Reading(None, None, violations)
    if not config.model.config and not stated:
        if not violations:
            rule = f"give {ModelConfig.model_fields['config'].description}, or set model.pretrained"
            violations.append(Violation("model.config", ABSENT, "is missing", rule))
        return Reading(None, None, violations)
    own, model = config.model.config, config.model.model_copy(update={"config": {**stated, **config.model.config}})
    config = config.model_copy(update={"model": model})
    violations += _key_violations(config, cls, known)
    arguments = {key: value for key, value in model.config.items() if key in known}
    if weights_source(model).key == UPCYCLE_KEY and family.feed_forward is not None:
        arguments |= upcycled_arguments(config, arguments.get("num_hidden_layers"))
    fields = routing_fields(family)
    if config.router.selection in VARYING_SELECTIONS:
        # The family's values are for K experts. Null means the papers': the scores themselves.
        fields |= {"normalize": None, "scaling_factor": None}
    oversized = size_violations(arguments)
    violations += _write_routing(config, arguments, fields, own)
    rotary = rotary_violations(family, arguments, stated)
    violations += rotary
    if oversized:
        return Reading(None, None, [*violations, *oversized], arguments)
    tried = {key: value for key, value in arguments.items() if key != ROPE_KEY or not rotary}
    try:
        with complaints_about_rope():  # the trial of the model reports them
            settings = cls(**{"vocab_size": vocabulary_bound(config), **tried, **_no_special_tokens(cls)})
    except Exception:  # the class of another library may raise anything
        experts = arguments.get(family.experts_key)
        known_experts = experts if type(experts) is int and experts > 0 else None
        return Reading(None, known_experts, [*violations, *_refusals(config, cls, tried)], arguments)
    filled = {name: _value(config, settings, name, field) for name, field in fields.items()}
    experts = getattr(settings, family.experts_key)
    violations += shape_violations(config, settings) + unsupported_violations(config, settings, own, stated)
    if experts < 1:
        rule = "leaves the model without experts"
        violations.append(Violation(f"model.config.{family.experts_key}", experts, rule, "give 1 or more"))
        return Reading(None, None, violations, arguments)
    if routing := _routing_violations(config, experts, filled):
        return Reading(None, experts, [*violations, *routing], arguments)
    written = {field: filled[name] for name, field in fields.items() if field is not None}
    filled["score"] = config.router.score or stated_score or family.score
    if config.router.selection in VARYING_SELECTIONS:
        filled["max_experts"] = config.router.max_experts or experts
    router = config.router.model_copy(update=filled)
    complete = {**arguments, **written, **_no_special_tokens(cls)}
    notices = (*unsupported_notices(config, own, stated), *file_notices)
    return Reading(ModelFacts(complete, experts, router, model, notices), experts, violations, arguments)


def _write_routing(
    config: Config, arguments: dict[str, Any], fields: Mapping[str, str | None], own: Mapping[str, Any]
) -> list[Violation]:
    """Write the values of `router` into the arguments of the config class, in place; return what contradicts them."""
    violations = []
    for name, field in fields.items():
        value = getattr(config.router, name)
        if value is None:
            continue
        given = arguments.get(field) if field is not None else None
        if field is None and name in ("groups", "topk_groups") and value != 1:
            rule = f"asks for expert groups, which {config.model.architecture} does not have"
            violations.append(Violation(f"router.{name}", value, rule, "leave it null"))
        elif given is not None and given != value:
            owner = "model.config." if field in own else "model.pretrained's "
            rule = f"differs from {owner}{field}={given}"
            violations.append(Violation(f"router.{name}", value, rule, "set one of the two"))
        elif field is not None:
            arguments[field] = value
    return violations


def vocabulary_bound(config: Config) -> int:
    """The maximum number of tokens of the tokenizer (bpe may find fewer merges than data.vocabulary).

    The tokens of a pretrained tokenizer are counted when it is loaded.
    """
    return {"bytes": BYTES_VOCABULARY, "bpe": config.data.vocabulary, "pretrained": 1}[config.data.tokenizer]


ROUTING_VALUES = ("top_k", "normalize", "scaling_factor", "groups", "topk_groups")
"""The fields of `router` that the Hugging Face config may hold too."""


def routing_fields(family: Family) -> dict[str, str | None]:
    """The family's key for each of `ROUTING_VALUES`; None where it has none."""
    return {
        "top_k": family.top_k_key,
        "normalize": family.normalize_key,
        "scaling_factor": family.scaling_factor_key,
        "groups": family.groups_key,
        "topk_groups": family.topk_groups_key,
    }


def routing_key(config: Config, name: str) -> str:
    """The key to change for a routing value: that of the family where the field of `router` is null."""
    field = routing_fields(family_of(config.model.architecture))[name]
    return f"router.{name}" if field is None or getattr(config.router, name) is not None else f"model.config.{field}"


@functools.cache
def _no_special_tokens(cls: Any) -> dict[str, None]:
    """Return None for the ids of special tokens that a config class can be without.

    Its defaults (DeepSeek-V3: bos 0, eos 1) would be ordinary bytes of our vocabulary.
    """
    optional: dict[str, None] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        with contextlib.suppress(Exception):  # the class of another library may raise anything
            cls(**{key: None})
            optional[key] = None
    return optional


def known_keys(cls: Any, family: Family) -> set[str]:
    """The keys that define the model: those that the class itself declares, without its base and the owned ones."""
    from transformers import PreTrainedConfig

    declared = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
    return (declared | set(family.undeclared_keys)) - set(OWNED_MODEL_KEYS)


def _key_violations(config: Config, cls: Any, known: set[str]) -> list[Violation]:
    reverse = {key: alias for alias, key in cls.attribute_map.items()}
    aliases = {**cls.attribute_map, **reverse, **RENAMED_KEYS}
    violations = []
    for key, value in config.model.config.items():
        violate = functools.partial(Violation, f"model.config.{key}", value)
        if key in OWNED_MODEL_KEYS:
            violations.append(violate("is not set here", f"remove it; {OWNED_MODEL_KEYS[key]}"))
        elif key not in known:
            close = aliases.get(key) if aliases.get(key) in known else nearest(key, known)
            remedy = f"did you mean {close}?" if close else f"the known keys are {listed(sorted(known), last='and')}"
            violations.append(violate(f"is not a key of {cls.__name__}", remedy))
    size = config.model.config.get("vocab_size")
    bound = vocabulary_bound(config)
    if isinstance(size, int) and size < bound:
        rule = f"is smaller than the {counted(bound, 'token')} of the {config.data.tokenizer} tokenizer"
        remedy = f"leave it out, or give {bound} or more"
        if config.model.pretrained is not None:
            remedy = "use data.tokenizer=pretrained"
        violations.append(Violation("model.config.vocab_size", size, rule, remedy))
    return violations


def _refusals(config: Config, cls: Any, arguments: Mapping[str, Any]) -> list[Violation]:
    """Why the class refuses its arguments: each key without which it does not, or else the reason alone."""

    def refusal(given: Mapping[str, Any]) -> str | None:
        try:
            with complaints_about_rope():
                # The class writes into the dictionaries that it is given.
                cls(**copy.deepcopy({"vocab_size": vocabulary_bound(config), **given, **_no_special_tokens(cls)}))
        except Exception as error:  # the class of another library may raise anything
            return " ".join(str(error.__cause__ or error).split())
        return None

    found = []
    for key, reason in blamed(refusal, arguments):
        rule, remedy = f"is refused by {cls.__name__} ({reason})", "give a value that the class accepts"
        if key is None:
            found.append(Violation("model.config", ABSENT, rule, remedy))
            continue
        if expected := expected_types(reason):
            default = default_of(config.model.architecture, key)
            rule, remedy = f"should be {expected}", f"correct it, or leave it out (the default is {shown(default)})"
        found.append(Violation(f"model.config.{key}", arguments[key], rule, remedy))
    return found


def _value(config: Config, settings: Any, name: str, field: str | None) -> Any:
    value = getattr(config.router, name) if field is None else getattr(settings, field)
    family = family_of(config.model.architecture)
    defaults = {**DEFAULT_ROUTING, **family.defaults, "scaling_factor": family.default_factor(settings)}
    return defaults.get(name) if value is None else value


def _routing_violations(config: Config, experts: int, filled: dict[str, Any]) -> list[Violation]:
    """What is wrong among the routing values; `filled` has them by their names in `router`."""

    def violation(name: str, rule: str, remedy: str) -> Violation:
        return Violation(routing_key(config, name), filled[name], rule, remedy)

    top_k, groups, topk_groups = filled["top_k"], filled["groups"], filled["topk_groups"]
    if top_k is not None and not isinstance(top_k, int):
        return [violation("top_k", "is not one integer for all layers", f"use {up_to(experts)}")]
    violations = []
    if top_k is None or not 1 <= top_k <= experts:
        rule = f"is not within the model's {counted(experts, 'expert')}"
        violations.append(violation("top_k", rule, f"use {up_to(experts)}"))
    elif top_k == 1 and filled["normalize"] and config.router.selection not in VARYING_SELECTIONS:
        rule = "makes the weight of a token's one expert 1 for any score, so the router cannot learn"
        violations.append(violation("normalize", rule, "set it to false, or top_k above 1"))
    if filled["scaling_factor"] <= 0:
        violations.append(violation("scaling_factor", "removes or negates the gate weights", "give a factor above 0"))
    # The score of a group is that of its two best experts (arXiv 2412.19437, section 2.1.2), so it needs two.
    possible = [count for count in divisors(experts) if count == 1 or experts // count >= 2]
    if groups not in possible:
        rule = f"does not divide the model's {counted(experts, 'expert')} into groups of 2 or more"
        violations.append(violation("groups", rule, f"use {listed(possible)}"))
    elif not 1 <= topk_groups <= groups:
        rule = f"is not within the {counted(groups, 'group')}"
        violations.append(violation("topk_groups", rule, f"use {up_to(groups)}"))
    elif not violations and topk_groups * (experts // groups) < top_k:
        rule = f"leaves {counted(topk_groups * (experts // groups), 'expert')} for a token that takes {top_k}"
        violations.append(violation("topk_groups", rule, f"use {-(-top_k * groups // experts)} or more"))
    return violations
