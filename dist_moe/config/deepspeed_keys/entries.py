"""What an entry of the table of DeepSpeed's keys says: a field here sets the key, or it is allowed, or refused."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

AUTO = "auto"
"""The value by which Hugging Face's configurations leave a key to the program."""


class Whole(NamedTuple):
    """Accepts the multiples of `step` from `least` to `most`; 5e8 is a whole number, too."""

    least: int
    most: int
    step: int = 1

    def accepts(self, value: Any) -> bool:
        """Whether the value is one of them."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.least <= value <= self.most and value % self.step == 0

    def passed(self, value: Any) -> Any:
        """Return an accepted value as DeepSpeed gets it."""
        return int(value)

    def __str__(self) -> str:
        kind = "a whole number" if self.step == 1 else f"a multiple of {self.step}"
        return f"{kind} from {self.least:,} to {self.most:,}"


class OneOf(NamedTuple):
    """Accepts a few values."""

    values: tuple[Any, ...]

    def accepts(self, value: Any) -> bool:
        """Whether the value is one of them."""
        return any(same(value, one) for one in self.values)

    def passed(self, value: Any) -> Any:
        """Return an accepted value as DeepSpeed gets it."""
        return value

    def __str__(self) -> str:
        return " or ".join(written(value) for value in self.values)


BOOLEAN = OneOf((True, False))


class Ours(NamedTuple):
    """A key that fields of this project set.

    Attributes:
        key: The dotted key of DeepSpeed.
        field: The field that sets it, or several.
        convert: Returns the value of the field that means the same; raises ValueError with the rule where none does.
            None where no single value does.
    """

    key: str
    field: str
    convert: Callable[[Any], Any] | None = None

    @property
    def sets(self) -> str:
        """That the field, or the fields, set the key, in words."""
        return f"{self.field} {'set' if ' and ' in self.field else 'sets'} it"


class Allowed(NamedTuple):
    """A key that may be set below train.deepspeed: what is computed stays the same.

    Attributes:
        key: The dotted key of DeepSpeed.
        rule: The accepted values.
        effect: What it changes.
    """

    key: str
    rule: Whole | OneOf
    effect: str


class Refused(NamedTuple):
    """A key that is not passed on.

    Attributes:
        key: The dotted key of DeepSpeed.
        reason: Why, worded to follow the key.
        remedy: What to do instead.
        unless: Values with which it has no effect. They are accepted, and not passed on either.
        switch: For a mapping: a key in it and the value with which, or without which, the mapping has no effect.
        inner: The keys of the mapping.
    """

    key: str
    reason: str
    remedy: str = "remove it"
    unless: tuple[Any, ...] = ()
    switch: tuple[str, Any] | None = None
    inner: tuple[str, ...] = ()

    def without_effect(self, value: Any) -> bool:
        """Whether the key has no effect with this value."""
        if self.switch is not None and isinstance(value, Mapping):
            name, off = self.switch
            return any(same(value.get(name, off), one) for one in (off, AUTO, None))
        return any(same(value, one) for one in self.unless)


Entry = Ours | Allowed | Refused


def same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; true is not 1, 5e8 is 500000000, and a tuple is a list."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def written(value: Any) -> str:
    """Return a value of JSON as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
