"""Reads the load of earlier steps of a run from its metrics.jsonl, for pictures of the whole run after a resumption."""

import itertools
import math
from pathlib import Path
from typing import Any

from dist_moe.untrusted import parse_json

MAX_PARSED_BYTES = 64 << 20

Load = list[list[int]]


def logged_loads(path: Path, last_step: int) -> list[tuple[int, Load]]:
    """Return the loads of the steps up to `last_step`: [(step, [L][E] assignments)], by step.

    In a file of more than 64 MiB only every second, third ... line is parsed, so that a resumption does not wait long.
    Lines that are not the record of a step with a load are omitted, and all of a file that cannot be read.

    Args:
        path: metrics.jsonl. A step that is there twice has the load of its last line.
        last_step: The step after which the run resumes.
    """
    try:
        every = math.ceil(path.stat().st_size / MAX_PARSED_BYTES)
        with path.open(encoding="utf-8", errors="replace") as lines:
            parsed = [_load_of(line) for line in itertools.islice(lines, 0, None, max(1, every))]
    except OSError:
        return []
    loads = dict(found for found in parsed if found is not None and found[0] <= last_step)
    shape = [len(row) for row in loads[max(loads)]] if loads else []
    return [(step, loads[step]) for step in sorted(loads) if [len(row) for row in loads[step]] == shape]


def _load_of(line: str) -> tuple[int, Load] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step, load = record.get("step"), record.get("load")
    is_step = record.get("event") == "step" and isinstance(step, int) and not record.get("skipped")
    return (step, load) if is_step and isinstance(step, int) and load and _is_load(load) else None


def _is_load(load: Any) -> bool:
    rows = isinstance(load, list) and all(isinstance(row, list) and row for row in load)
    return rows and all(isinstance(count, int) and 0 <= count < 1 << 62 for row in load for count in row)
