"""Strikes runs, and exits with 1 unless enough struck and all is held: `python -m tests.faults`.

- 53 process faults: signals to a worker or to the launch of two real workers, 28 of them inside a save; the run goes on
  with as many, fewer or more workers. On the same layout the last checkpoint and all figures have the undisturbed
  run's bits, on another the losses to 1e-4, and no checkpoint that was complete is lost.
- 231 file faults in one process: damage to the newest checkpoint, which has to be refused by its path, with the file
  named, and passed over otherwise; and small disks that are full, read-only or gone inside a save.

A fault without proof that it struck is injected again with another seed, twice at most. Rows are appended to the file
`--rows` as they come; started again with the same one, the campaign goes on where it was.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dist_moe.comm.init import init_distributed
from dist_moe.worker.rank_info import RankInfo
from tests.dist.resumable import write_text
from tests.faults import disks, files, processes
from tests.faults.job import job
from tests.faults.row import GROUPS, Row, markdown, missing, read_rows

OF_EACH_HARM, OF_EACH_DISK = 18, 5
TRIES = 3
APART = "DIST_MOE_FAULTS_APART"


class Group(StrEnum):
    """Which part of the campaign."""

    process = "process"
    file = "file"
    all = "all"


def main(
    group: Annotated[Group, typer.Option(help="Which faults.")] = Group.all,
    seed: Annotated[int, typer.Option(min=0, help="Draws moments, files, places and lengths.")] = 0,
    rows: Annotated[Path, typer.Option(help="Where rows are appended.")] = Path("runs/faults/rows.jsonl"),
    count: Annotated[int | None, typer.Option(min=1, help="Faults of each kind, at most.")] = None,
) -> None:
    """Inject the faults of the plan that are not in the file of rows yet, and print the table."""
    console = Console(width=200, highlight=False)
    with tempfile.TemporaryDirectory(prefix="dist-moe-faults-") as folder:
        if group is not Group.file:
            process_faults(Path(folder), seed, rows, count, console)
        if group is not Group.process:
            file_faults(Path(folder), seed, rows, count, console)
    if APART in os.environ:
        return
    found = read_rows(rows)
    rows.with_suffix(".md").write_text(markdown(found) + "\n", encoding="utf-8")
    console.print(markdown(found), markup=False, soft_wrap=True)
    groups = GROUPS if group is Group.all else (group.value,)
    lacking = missing(found, groups, None if count is None else kinds_of(group, seed))
    console.print("\n".join(lacking) or "everything that struck is held", markup=False, soft_wrap=True)
    raise typer.Exit(bool(lacking))


def kinds_of(group: Group, seed: int) -> list[str]:
    """The kinds of a campaign, each of which a short one has to strike with once at least."""
    of_processes = [] if group is Group.file else [fault.kind for fault in processes.plan(seed)]
    of_files = [] if group is Group.process else [*files.HARMS, *(f"disk {name}" for name in disks.KINDS)]
    return list(dict.fromkeys([*of_processes, *of_files]))


def process_faults(folder: Path, seed: int, rows: Path, count: int | None, console: Console) -> None:
    """The faults of two real workers."""
    text, undisturbed = write_text(folder), folder / "undisturbed"
    with job(text, undisturbed, 2, None) as running:
        assert running.wait() == [0, 0], (folder / "undisturbed.log").read_text()
    kinds: dict[str, int] = {}
    for fault in processes.plan(seed):
        kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
        if count is None or kinds[fault.kind] <= count:

            def inject(number: int, fault: processes.ProcessFault = fault) -> Row:
                run = folder / f"process-{fault.seed}-{number}"
                return processes.inject(fault.of_try(number), text, run, undisturbed)

            until_struck("process", fault.kind, fault.seed, inject, rows, console)


def file_faults(folder: Path, seed: int, rows: Path, count: int | None, console: Console) -> None:
    """The faults of one process, in a mount namespace of its own."""
    if APART not in os.environ:
        words = ["--group", "file", "--seed", str(seed), "--rows", str(rows.resolve())]
        words += [] if count is None else ["--count", str(count)]
        argv = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "tests.faults", *words]
        subprocess.run(argv, check=True, env=os.environ | {APART: "1", "OMP_NUM_THREADS": "1"})
        return
    text = write_text(folder)
    with init_distributed(RankInfo(0, 1, 0, 1, "env"), "gloo", 60):
        made = files.make_run(text, folder / "made")
        planned = [(name, number) for name in files.HARMS for number in range(count or OF_EACH_HARM)]
        planned += [(name, number) for name in disks.KINDS for number in range(count or OF_EACH_DISK)]
        for place, (name, _) in enumerate(planned):
            drawn = seed * 100_000 + place * 10

            def inject(again: int, name: str = name, drawn: int = drawn) -> Row:
                program = files.inject if name in files.HARMS else disks.inject
                return program(name, drawn + again, text, made, folder / f"file-{drawn}-{again}")

            kind = name if name in files.HARMS else f"disk {name}"
            until_struck("file", kind, drawn, inject, rows, console)


def until_struck(group: str, kind: str, seed: int, inject: Callable[[int], Row], rows: Path, console: Console) -> None:
    """Inject a fault, unless a row has it already; one that missed is injected again, with its own row each time."""
    done = [row for row in read_rows(rows) if row.kind == kind and row.seed // 10 == seed // 10 and row.proof]
    for number in range(0 if done else TRIES):
        began_s = time.monotonic()
        try:
            row = inject(number)
        except Exception as error:  # a run that hangs, or ends in another error than it may, is not held
            told = f"{type(error).__name__}: {error}"[:300]
            row = Row(group, kind, seed + number, False, "", "not at all", [told], time.monotonic() - began_s)
        row.append_to(rows)
        verdict = "missed" if not row.proof else "held" if row.held else f"NOT HELD: {'; '.join(row.faults)}"
        told = f"{row.kind}, seed {row.seed}: {verdict}; {row.proof}; {row.onward}; {row.seconds:.1f} s"
        console.print(told, markup=False, soft_wrap=True)
        if row.proof or row.faults:
            return


if __name__ == "__main__":
    typer.run(main)
