"""The YAML that configurations are written in: safe tags, numbers like 1e-6, no key given twice."""

from collections.abc import Hashable
from re import compile as pattern
from typing import Any

import yaml

# PyYAML follows YAML 1.1, where a number with an exponent needs a dot and a sign: `1e-6` would be a text.
# This is the float of YAML 1.2, less the integers.
FLOAT = pattern(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """Plain values only; a key given twice in one mapping is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(name, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    problem = f"found the key {key!r} twice"
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping", node.start_mark, problem, name.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would read as a number; writes no anchors; loses no character of a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # Unusual line breaks (U+0085, U+2028) survive in double quotes only.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _text)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse(text: str) -> Any:
    """The value that the YAML text stands for; yaml.YAMLError if it is none."""
    return yaml.load(text, Loader=Loader)


def render(value: Any) -> str:
    """YAML text that `parse` reads back as an equal value, in the given order of keys."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
