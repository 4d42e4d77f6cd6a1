"""Reads and writes settings as YAML 1.2 and reads `key=value` overrides: plain values only, no key given twice."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from dist_moe.errors import ABSENT, ConfigError, Violation
from dist_moe.text import type_words
from dist_moe.untrusted import HALF_PAIR, MAX_DIGITS, UnreadableTextError, read_text

# A configuration has some hundred values in a few kB, and nests six deep. ruamel.yaml takes seconds for a file of the
# largest size, and aliases let a few lines expand to any number of values.
LARGEST_FILE = 1 << 17
MAX_VALUES = 20_000
MAX_DEPTH = 50
LINE_WIDTH = 110
# What Python makes of bytes on the command line that are not UTF-8.
NOT_UTF8 = re.compile("[\\udc80-\\udcff]")

# A number such as .5e1, which ruamel.yaml takes for text.
BARE_FLOAT = re.compile(r"[-+]?\.[0-9]+[eE][-+]?[0-9]+")
# 8 in YAML 1.1 and 10 in YAML 1.2.
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
# Text that YAML 1.1 reads as a boolean, a number in base 60 or an octal number, or that no reader takes for an integer.
AMBIGUOUS = re.compile(r"(?i:y|n|yes|no|on|off)|[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?|[-+]?0o?[0-9_]+|[-+]?[0o]*_+")


class _Resolver(VersionedResolver):
    """Takes `.5e1` for a number, as it takes `0.5e1`."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0] and isinstance(value, str) and BARE_FLOAT.fullmatch(value):
            return Tag(suffix="tag:yaml.org,2002:float")
        return super().resolve(kind, value, implicit)


class _Constructor(SafeConstructor):
    """Refuses duplicate keys in a mapping with a merge key, and integers that are not the same in YAML 1.1 and 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: list[Any] = []
        for key_node, _ in node.value:
            if str(key_node.tag).endswith(":merge"):
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise DuplicateKeyError(None, None, f'found duplicate key "{key}" with value', key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: Any) -> Any:
        if HALF_PAIR.search(node.value):
            raise ConstructorError(None, None, "a text has half of a surrogate pair", node.start_mark)
        return super().construct_yaml_str(node)

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > MAX_DIGITS:
            problem = f"an integer has more than {MAX_DIGITS} characters"
            raise ConstructorError(None, None, problem, node.start_mark)
        if LEADING_ZERO.fullmatch(node.value):
            problem = f"{node.value} is octal in YAML 1.1 and decimal in YAML 1.2, so write it without the leading zero"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            raise ConstructorError(None, None, f"{node.value!r} is not an integer", node.start_mark) from None


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)
_Constructor.add_constructor("tag:yaml.org,2002:str", _Constructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    """Writes no anchors, and loses no character of a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # Unusual line breaks (U+0085, U+2028) survive in double quotes only.
        plain = data.isprintable() and not (AMBIGUOUS.fullmatch(data) or BARE_FLOAT.fullmatch(data))
        style = None if plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def parse(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: It is not valid YAML, has a tag other than those of plain values, gives a key twice, or nests or
            expands (by aliases) too far. The message has the line and column where there is one.
    """
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.Resolver, yaml.Constructor = _Resolver, _Constructor
        # Each list or mapping takes two characters, so most overrides are too short to nest or to expand.
        if len(text) > 2 * MAX_DEPTH or "*" in text:
            _require_bounded(yaml.parse(text))
        value = yaml.load(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except YAMLError as error:
        raise ValueError(_reason(error)) from None
    except TypeError as error:
        # A list or mapping as a key.
        raise ValueError(f"a key is not a plain value, {error}") from None
    except (LookupError, ArithmeticError) as error:
        # A text below a tag such as !!bool, of which ruamel.yaml checks nothing.
        raise ValueError(f"a value is not of its type, {error}") from None
    return value


def render(value: Any) -> str:
    """Write plain values as YAML that `parse` reads back as an equal value, with keys in the given order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = LINE_WIDTH
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file; an empty file holds an empty one.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8 or not valid YAML, or holds something else.
    """
    key = str(path)
    try:
        value = parse(read_text(path, follow=True, largest=LARGEST_FILE))
    except UnreadableTextError as error:
        raise ConfigError([Violation(key, ABSENT, f"cannot be used ({error})", "give a YAML file of a run")]) from None
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise ConfigError([Violation(key, ABSENT, rule, "give the path of a YAML file")]) from error
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte {error.start})"
        raise ConfigError([Violation(key, ABSENT, rule, "save it as UTF-8 text")]) from error
    except ValueError as error:
        remedy = "correct the line given in the message"
        raise ConfigError([Violation(key, ABSENT, f"is not valid YAML ({error})", remedy)]) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        rule = f"holds {type_words(type(value).__name__)}, not a mapping"
        remedy = "write sections such as `train:` with their keys below"
        raise ConfigError([Violation(key, ABSENT, rule, remedy)])
    return value


def apply_overrides(settings: dict[Any, Any], overrides: Sequence[str]) -> list[Violation]:
    """Write overrides like `train.steps=20` into nested settings, in place; a later one wins.

    Returns:
        One violation for each override that is not of this form, or that sets a key below a value.
    """
    found = (_apply_override(settings, override) for override in overrides)
    return [violation for violation in found if violation is not None]


def _apply_override(settings: dict[Any, Any], override: str) -> Violation | None:
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        rule = "is not of the form key=value"
        return Violation("override", override, rule, "write for example train.steps=20")
    if len(names) > MAX_DEPTH:
        rule = f"is a key of more than {MAX_DEPTH} names"
        return Violation("override", override, rule, "write for example train.steps=20")
    if NOT_UTF8.search(override):
        remedy = "rename the file, or give a pattern such as texts/*.txt that matches its name"
        return Violation(dotted.strip(), text, "has bytes that are not UTF-8", remedy)
    try:
        value = parse(text)
    except ValueError as error:
        return Violation(".".join(names), text, f"is not valid YAML ({error})", "quote the value: key='\"text\"'")
    mapping = settings
    for depth, name in enumerate(names[:-1], start=1):
        inner = mapping.get(name)
        if inner is None:
            inner = mapping[name] = {}
        elif not isinstance(inner, dict):
            rule = f"has no keys below it, so {dotted} cannot be set"
            return Violation(".".join(names[:depth]), inner, rule, "give the key of a value")
        mapping = inner
    mapping[names[-1]] = value
    return None


def _reason(error: YAMLError) -> str:
    """Say what is wrong and where, in one line; the message of ruamel.yaml adds hints for its own API."""
    if not isinstance(error, MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())
    problem = " ".join(error.problem.split())
    if isinstance(error, DuplicateKeyError):
        problem = problem.partition(" with value")[0].replace("found duplicate key", "found a second key")
    mark = error.problem_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    context = f"{' '.join(error.context.split())}, " if error.context else ""
    return f"{context}{problem}{where}"


@dataclass
class _Open:
    """A list or mapping that is being read: its name for aliases, its values so far, and how deep they nest."""

    anchor: str | None
    values: int = 1
    height: int = 0


def _require_bounded(events: Iterable[Any]) -> None:
    """Raise ValueError where a text nests or expands too far, before anything is built of it.

    Args:
        events: What the parser reads, piece by piece.
    """
    anchors: dict[str, tuple[int, int]] = {}
    opened = [_Open(None)]
    for event in events:
        values, height = 1, 0
        if isinstance(event, CollectionStartEvent):
            opened.append(_Open(event.anchor))
        elif isinstance(event, CollectionEndEvent):
            ended = opened.pop()
            values, height = ended.values, ended.height + 1
            if ended.anchor is not None:
                anchors[ended.anchor] = (values, height)
        elif isinstance(event, AliasEvent):
            if any(each.anchor == event.anchor for each in opened):
                raise ValueError(f"it has the alias *{event.anchor} inside of the value that it names")
            values, height = anchors.get(event.anchor, (1, 0))
        elif not isinstance(event, ScalarEvent):
            continue
        if len(opened) + height > MAX_DEPTH:
            raise ValueError(f"it nests too deeply, in more than {MAX_DEPTH} lists and mappings")
        if not isinstance(event, CollectionStartEvent):
            opened[-1].values += values
            opened[-1].height = max(opened[-1].height, height)
        if opened[-1].values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
