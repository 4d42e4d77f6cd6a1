"""Rotary parameters that transformers accepts without a check, or ignores: their types, and what has no effect."""

from collections.abc import Callable, Mapping
from typing import Any

from dist_moe.errors import Violation
from dist_moe.families.record import Family
from dist_moe.text import listed, nearest, shown

KEY = "rope_parameters"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _positive_or_null(value: Any) -> bool:
    return value is None or _positive(value)


def _not_negative(value: Any) -> bool:
    return value is None or (_number(value) and value >= 0)


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_number, value))


POSITIVE = (_positive, "a number above 0")
POSITIVE_OR_NULL = (_positive_or_null, "a number above 0, or null")
# Key of rope_parameters -> whether a value is accepted, and which ones are.
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rope_theta": POSITIVE,
    "factor": (lambda value: _number(value) and value >= 1, "a number of 1 or more"),
    "original_max_position_embeddings": (lambda value: type(value) is int and value >= 1, "a whole number above 0"),
    "attention_factor": POSITIVE_OR_NULL,
    "beta_fast": POSITIVE_OR_NULL,
    "beta_slow": POSITIVE_OR_NULL,
    "mscale": (_not_negative, "a number of 0 or more, or null"),
    "mscale_all_dim": (_not_negative, "a number of 0 or more, or null"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "short_factor": (_numbers, "a list of numbers"),
    "long_factor": (_numbers, "a list of numbers"),
    "partial_rotary_factor": (lambda value: _positive(value) and value <= 1, "a number above 0, up to 1"),
}


def rotary_violations(family: Family, arguments: Mapping[str, Any], stated: Mapping[str, Any]) -> list[Violation]:
    """What is wrong with rope_parameters, as far as their keys are known; the trial of the model finds the rest.

    Args:
        family: The family of the model.
        arguments: Keyword arguments of the Hugging Face config class.
        stated: The keys of model.pretrained, which may have what has no effect.
    """
    parameters = arguments.get(KEY)
    if not isinstance(parameters, Mapping):
        return []
    found = _violation(family, parameters, stated.get(KEY))
    if found is not None and parameters == stated.get(KEY):
        rule, remedy = f"{found.rule}, and is the value of model.pretrained", "correct the config.json of that folder"
        found = found._replace(rule=rule, remedy=remedy)
    return [found] if found is not None else []


def _violation(family: Family, parameters: Mapping[str, Any], stated: Any) -> Violation | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if (violation := _unknown_kind(parameters, kind)) is not None:
        return violation
    wrong = [(key, value, RULES[key]) for key, value in parameters.items() if key in RULES]
    rules = [
        f"has {key}={shown(value)}, which is not {words}" for key, value, (fits, words) in wrong if not fits(value)
    ]
    remedy = f"leave {KEY} out, or correct its values"
    if not rules and parameters != stated:
        rules = [f"has {key}, which has no effect {reason}" for key, reason in _unused(family, parameters, kind)]
        remedy = "leave it out"
    return Violation(f"model.config.{KEY}", parameters, listed(rules, last="and"), remedy) if rules else None


def _unknown_kind(parameters: Mapping[str, Any], kind: Any) -> Violation | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    key, known = f"model.config.{KEY}", sorted({"default", *ROPE_INIT_FUNCTIONS})
    other = parameters.get("type", kind)
    if other != kind:
        rule = f"has the type {shown(other)} and the rope_type {shown(kind)}"
        return Violation(key, parameters, rule, "leave out type, the older name of rope_type")
    if kind in known:
        return None
    close = nearest(str(kind), known)
    rule = f"has the rope_type {shown(kind)}, which transformers does not know"
    return Violation(key, parameters, rule, f"did you mean {close}?" if close else f"use {listed(known)}")


def _unused(family: Family, parameters: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    """Keys that this kind of rotary embeddings has, or reads, without effect -> where."""
    if family.is_probed:  # what the attention of a family reads is not known
        return []
    unused = []
    if kind != "proportional" and parameters.get("partial_rotary_factor", 1) != 1:
        unused.append(("partial_rotary_factor", f"with the rope_type {kind} in a {family.architecture}"))
    fixed = parameters.get("attention_factor") is not None
    scales = {"mscale": "mscale_all_dim", "mscale_all_dim": "mscale"} if kind == "yarn" else {}
    for key, partner in scales.items():
        if not parameters.get(key) or key in family.rotary_keys_of_attention:
            continue
        if fixed:
            unused.append((key, "where attention_factor is given"))
        elif not parameters.get(partner):
            unused.append((key, f"without {partner}"))
    if kind == "longrope" and fixed and parameters.get("factor") is not None:
        unused.append(("factor", "where attention_factor is given"))
    return unused
