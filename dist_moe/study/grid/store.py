"""The results of a study: one JSON file, written again after each cell, so that an interrupted study resumes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_moe.errors import UserError, needs_folder, reason_of
from dist_moe.files import write_atomically
from dist_moe.section import broken_fields
from dist_moe.study.grid.plan import Cell
from dist_moe.text import counted
from dist_moe.untrusted import parse_json, read_text

FORMAT = 1
LARGEST = 1 << 28


@dataclass(frozen=True)
class CellResult:
    """The result of one cell.

    Attributes:
        case: Name of the case.
        arm: Name of the arm.
        seed: Of the run.
        digest: Of the cell.
        values: Measures by name: each number of the run's last evaluation, `NAME_worst` for the largest of its layers,
            and those of `grid.cells`. None: not finite.
        curves: Measures of the logged steps by name, with their step numbers as `step`.
        loads: `evaluation`, the lists of the run's last evaluation (its load, values by layer, which examples were
            right); of a language model also what `grid.sequence_loads` counts.
        commit: Of the code.
        changed: Whether files of the code differed from the commit.
        made: When, on what processor, and with which versions.
    """

    case: str
    arm: str
    seed: int
    digest: str
    values: dict[str, float | None]
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    loads: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    changed: bool | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """Case, arm and seed."""
        return self.case, self.arm, self.seed


def results_file(out: Path) -> Path:
    """The file of the results."""
    return out / "results.json"


def read_results(path: Path) -> list[CellResult]:
    """Read a file of results; none where there is no file.

    Raises:
        UserError: The file cannot be read, or is damaged.
    """
    if not path.exists():
        return []
    try:
        content = parse_json(read_text(path, follow=True, largest=LARGEST))
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format={content.get('format')}, not {FORMAT}; give another --out")
        return TypeAdapter(list[CellResult]).validate_python(content["cells"])
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {broken_fields(error)}; restore it, or give another --out") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); restore it, or give another --out") from None


def refuse_others(path: Path, cells: Sequence[Cell], results: Iterable[CellResult]) -> None:
    """Refuse a file with results that the plan does not have, and that writing the file again would lose.

    Raises:
        UserError: There are some.
    """
    known = {cell.digest for cell in cells}
    if others := [result for result in results if result.digest not in known]:
        raise UserError(
            f"{path} has {counted(len(others), 'result')} of another plan or preset, which would be lost; give another "
            "--out, restore the plan, or move the file away"
        )


def write_results(path: Path, study: str, preset: str, cells: Sequence[Cell], results: Iterable[CellResult]) -> None:
    """Write the results in the order of the plan.

    Raises:
        RunFolderError: The file cannot be written.
    """
    order = {cell.key: number for number, cell in enumerate(cells)}
    ordered = sorted(results, key=lambda result: order[result.key])
    head = {"format": FORMAT, "study": study, "preset": preset, "planned": len(cells)}
    lines = ",\n".join(json.dumps(asdict(result), allow_nan=False, sort_keys=True) for result in ordered)
    text = json.dumps(head)[:-1] + ', "cells": [\n' + lines + "\n]}\n"
    with needs_folder(path, "--out", "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def finished(cells: Sequence[Cell], results: Iterable[CellResult]) -> dict[tuple[str, str, int], CellResult]:
    """Return the results that belong to the cells, by case, arm and seed.

    A cell of another study with the same configuration counts too.
    """
    by_digest = {result.digest: result for result in results}
    found = {}
    for cell in cells:
        if result := by_digest.get(cell.digest):
            found[cell.key] = CellResult(**{**vars(result), "case": cell.case, "arm": cell.arm})
    return found
