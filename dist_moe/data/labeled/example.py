"""A labeled example, and the names under which files keep its parts."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dist_moe.errors import DataError
from dist_moe.text import listed
from dist_moe.untrusted import HALF_PAIR

SplitName = Literal["train", "validation"]
# The columns of a text and of its pair: of this package's own files, and of GLUE's tasks and their like.
TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("gold_label", "label", "is_duplicate", "Quality", "score")
NEEDED = "columns or fields `text`, `label` and, for pairs, `text_pair`"


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and its label.

    Attributes:
        key: Decides the split, by a hash, where the source has none: examples with one key stay together.
        text: The text.
        text_pair: The second text; None for a single one.
        label: The name of the class, or the text of a number.
        split: The split that the source itself puts it into; None where it has none.
    """

    key: str
    text: str
    text_pair: str | None
    label: str
    split: SplitName | None = None


class Columns(NamedTuple):
    """Where a table keeps the parts of an example: names of columns.

    Attributes:
        text: That of the text.
        text_pair: That of the second text; None for single ones.
        label: That of the label.
    """

    text: str
    text_pair: str | None
    label: str

    def example(self, row: Mapping[str, Any], where: str, split: SplitName | None = None) -> Example:
        """Make the example of a row. Raises DataError, which names `where`."""
        texts = [_text(row.get(name), name, where) for name in (self.text, self.text_pair) if name is not None]
        label = label_text(row.get(self.label), self.label, where)
        key = row.get("key")
        if isinstance(key, str):
            _check_whole(key, "key", where)
        if key is None:
            key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        elif not isinstance(key, str):
            raise DataError(where, "has a field 'key' that is not a text", "write a text, or leave it out")
        return Example(key, texts[0], texts[1] if len(texts) > 1 else None, label, split)


def find_columns(names: Collection[str], where: str) -> Columns:
    """Find the columns of the texts and the label by their names. Raises DataError where there are none."""
    texts = next((each for each in TEXT_COLUMNS if set(each) <= set(names)), None)
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if texts is None or label is None:
        missing = "text" if texts is None else "label"
        shown = listed(sorted(map(repr, names)), last="and", most=6)
        raise DataError(where, f"has no {missing} among {shown}", f"give a file with the {NEEDED}")
    return Columns(texts[0], texts[1] if len(texts) > 1 else None, label)


def label_text(value: Any, name: str, where: str) -> str:
    """Return a label as a text: a name, or a number as it is written. Raises DataError for anything else."""
    if isinstance(value, str) and value.strip():
        _check_whole(value, name, where)
        return value.strip()
    if isinstance(value, bool | int | float):
        return str(value)
    remedy = "write a name or a number"
    raise DataError(where, f"has a label ({name}) that is neither a text nor a number", remedy)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(where, f"has a field {name!r} that is not a text", f"give the {NEEDED}")
    _check_whole(value, name, where)
    return value


def _check_whole(value: str, name: str, where: str) -> None:
    if HALF_PAIR.search(value):
        raise DataError(where, f"has a field {name!r} with half of a surrogate pair", "write whole characters")


def sorted_labels(labels: Collection[str]) -> Sequence[str]:
    """Return the names of classes in a fixed order: by number where all are numbers, else by name."""
    try:
        # By name, too: "1" and "01" are names of one number.
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)
