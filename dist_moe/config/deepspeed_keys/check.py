"""Checks settings of DeepSpeed against the table, and takes from them what may be passed on."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dist_moe.config.deepspeed_keys.entries import AUTO, Allowed, Entry, Ours, Refused
from dist_moe.config.deepspeed_keys.table import TABLE
from dist_moe.errors import Violation
from dist_moe.text import listed, nearest
from dist_moe.untrusted import printable

FIELD = "train.deepspeed"
LONGEST_KEY = 80
"""What a message shows of a key, in characters; no key of DeepSpeed is as long."""


class Found(NamedTuple):
    """One key of settings.

    Attributes:
        key: The dotted key.
        value: Its value.
        entry: Its entry in the table; None for a mapping without one of its own, and for a key that is not known.
        known: Whether DeepSpeed has the key.
        flat: Whether a name has dots, in place of mappings.
    """

    key: str
    value: Any
    entry: Entry | None
    known: bool
    flat: bool = False


def find_keys(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[Found]:
    """Yield each key that the table decides on; a mapping is followed where the table has keys below it.

    Args:
        settings: Settings of DeepSpeed, or one mapping in them.
        prefix: The dotted path of the mapping, with a dot at its end.
    """
    for name, value in settings.items():
        key = f"{prefix}{printable(str(name))[:LONGEST_KEY]}"
        if "." in str(name):
            yield Found(key, value, None, False, flat=True)
            continue
        entry = TABLE.get(key)
        nested = any(known.startswith(f"{key}.") for known in TABLE)
        if nested and isinstance(value, Mapping):
            yield from find_keys(value, f"{key}.")
        else:
            yield Found(key, value, entry, nested or entry is not None)
        if isinstance(entry, Refused) and entry.inner and isinstance(value, Mapping):
            unknown = [one for one in value if one not in entry.inner]
            yield from (Found(f"{key}.{printable(str(one))[:LONGEST_KEY]}", value[one], None, False) for one in unknown)


def deepspeed_violations(settings: Mapping[Any, Any], where: str = f"{FIELD}.") -> list[Violation]:
    """Return a violation for each key that is unknown, refused, set by a field here, or has a value out of range.

    Args:
        settings: The mapping of train.deepspeed.
        where: What to write before each key.
    """
    found = []
    for one in find_keys(settings):
        if isinstance(one.entry, Ours):
            rule, remedy = "is not set here", f"remove it; {one.entry.sets} in DeepSpeed"
            found.append(Violation(f"{where}{one.key}", one.value, rule, remedy))
        elif (violation := key_violation(one, where)) is not None:
            found.append(violation)
    return found


def key_violation(found: Found, where: str) -> Violation | None:
    """Return what is wrong with a key that no field here sets; None where nothing is.

    Args:
        found: The key.
        where: What to write before it.
    """
    entry, key = found.entry, f"{where}{found.key}"
    if found.flat and found.key in set(known_keys()):
        remedy = f"write {' in the mapping '.join(reversed(found.key.split('.')))}"
        return Violation(key, found.value, "is not a key of DeepSpeed, whose names have no dots", remedy)
    if not found.known:
        return Violation(key, found.value, "is not a key of DeepSpeed", _similar(found.key, where))
    if entry is None:
        return Violation(key, found.value, "should be a mapping", f"write its keys below {found.key}")
    if found.value == AUTO or isinstance(entry, Ours):
        return None
    if isinstance(entry, Allowed):
        allowed = entry.rule.accepts(found.value)
        return None if allowed else Violation(key, found.value, f"is not {entry.rule}", f"give {entry.effect}")
    return None if entry.without_effect(found.value) else Violation(key, found.value, entry.reason, entry.remedy)


def allowed_settings(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the nested settings that may be passed to DeepSpeed; those without effect are left out.

    Args:
        settings: Settings of DeepSpeed.
    """
    passed: dict[str, Any] = {}
    for one in find_keys(settings):
        if not isinstance(one.entry, Allowed) or one.value == AUTO or not one.entry.rule.accepts(one.value):
            continue
        *sections, name = one.key.split(".")
        mapping = passed
        for section in sections:
            mapping = mapping.setdefault(section, {})
        mapping[name] = one.entry.rule.passed(one.value)
    return passed


def _similar(key: str, where: str) -> str:
    """Return the remedy for an unknown key: the known one that is spelled like it, here or else elsewhere."""
    known = {name: name.rpartition(".")[2] for name in known_keys()}
    section, _, name = key.rpartition(".")
    siblings = {last: dotted for dotted, last in known.items() if dotted.rpartition(".")[0] == section}
    close = nearest(name, siblings)
    if close is not None:
        return f"did you mean {_named(siblings[close], where)}?"
    if isinstance(TABLE.get(section), Refused):
        return f"the keys of {section} are {listed(siblings, last='and')}"
    usable = {dotted: known[dotted] for dotted in known if isinstance(TABLE.get(dotted), Allowed | Ours)}
    namesake = name if name in usable.values() else nearest(name, usable.values())
    if namesake is not None:
        return f"did you mean {listed(_named(dotted, where) for dotted, last in usable.items() if last == namesake)}?"
    allowed = listed((entry.key for entry in TABLE.values() if isinstance(entry, Allowed)), last="and")
    return f"the keys that may be set are {allowed}"


def _named(key: str, where: str) -> str:
    """Return a known key for a question, with what becomes of it."""
    entry = TABLE.get(key)
    if isinstance(entry, Ours):
        return f"{key}, which {entry.sets.removesuffix(' it')}"
    if isinstance(entry, Refused):
        return f"{key}, which is refused"
    return f"{where}{key}" if where.endswith(".") else key


def known_keys() -> Iterator[str]:
    """Yield the dotted name of every key of the table, with those of mappings that have one entry, and the mappings."""
    seen = set()
    for key, entry in TABLE.items():
        parts = key.split(".")
        inner = [f"{key}.{name}" for name in entry.inner] if isinstance(entry, Refused) else []
        for name in [*(".".join(parts[:depth]) for depth in range(1, len(parts) + 1)), *inner]:
            if name not in seen:
                seen.add(name)
                yield name
