"""The page docs/deepspeed.md, written from the table of DeepSpeed's keys."""

import itertools
from collections.abc import Iterable

from dist_moe.config.deepspeed_keys.entries import Allowed, Ours, Refused, written
from dist_moe.config.deepspeed_keys.table import TABLE

HEADING = """# DeepSpeed's keys

The configuration of DeepSpeed is made from the fields of a run. `train.deepspeed` adds keys to it: a mapping, or the
path of a JSON file, such as `train.deepspeed=~/ds_config.json`, which each host reads. `dist-moe config ds_config.json`
says of each key of a file which field of a run sets it, with the value to write.

This page has every key of DeepSpeed 0.19.8, as a table. Each is set by a field of a run, or allowed, or refused before
any process starts, as a key that is not on this page is. A refused key is accepted with a value with which it has no
effect, and so is `auto`; neither is passed on, so that a file need not be cleaned of them.

A key is allowed where the tests prove that it does not change what is computed: with each value, alone and in pairs, at
ZeRO 0, 1 and 2, with and without expert parallelism, the gradients of a small model equal those of one process in fp64
(`tests/dist/test_deepspeed_keys.py`, on CPUs). The order in which ranks are added up may differ, and so the last bit.
"""
OURS = """## Set by fields of a run

In a mapping these keys are refused. In a file they are accepted if the value is what the field sets, or `auto`;
otherwise the error says which value to give the field.
"""
ALLOWED = "## Allowed\n"
REFUSED = "## Refused\n"


def markdown() -> str:
    """Return the page."""
    ours = [entry for entry in TABLE.values() if isinstance(entry, Ours)]
    allowed = [entry for entry in TABLE.values() if isinstance(entry, Allowed)]
    refused = [entry for entry in TABLE.values() if isinstance(entry, Refused)]
    lines = [HEADING, OURS, *_table(("key", "field"), ((_code(one.key), _field(one)) for one in ours))]
    rows = ((_code(one.key), str(one.rule), f"{one.effect[0].upper()}{one.effect[1:]}.") for one in allowed)
    lines += ["", ALLOWED, *_table(("key", "accepts", "what it changes"), rows)]
    columns = ("key", "why", "remedy", "accepted, without effect")
    lines += ["", REFUSED, *_table(columns, _joined(map(_refused, refused)))]
    return "\n".join(lines) + "\n"


def _joined(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows that follow each other and say the same of their keys as one."""
    grouped = itertools.groupby(rows, key=lambda row: row[1:])
    return [(", ".join(key for key, *_ in rows), *rest) for rest, rows in grouped]


def _refused(entry: Refused) -> tuple[str, ...]:
    keys = _code(entry.key)
    if entry.inner:
        keys += f" with {', '.join(map(_code, entry.inner))}"
    values = [_code(written(value) or '""') for value in entry.unless]
    if entry.switch is not None:
        name, off = entry.switch
        values.append(f"{_code(name)} {_code(written(off))} or absent")
    return keys, f"It {entry.reason}.", f"{entry.remedy[0].upper()}{entry.remedy[1:]}.", ", ".join(values)


def _field(entry: Ours) -> str:
    return entry.field if " " in entry.field else _code(entry.field)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)]


def _code(text: str) -> str:
    return f"`{text}`"


def _escaped(text: str) -> str:
    """Return text for a cell of a table, where bars and stars mean something else."""
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(markdown(), end="")
