"""The fault campaign, `python -m tests.faults`: injects faults into runs, and exits with 1 unless they survive.

- 56 process faults: signals to a worker or to the launch of two real workers, 30 of them during a save, three of an
  upcycled encoder that classifies; the run resumes with as many, fewer or more workers. On the same layout the last
  checkpoint and all metrics must be those of the undisturbed run bit for bit, on another the losses to 1e-4, and no
  complete checkpoint may be lost.
- 231 file faults in one process: damage to the newest checkpoint, which must be refused by its path, with the file
  named, and passed over otherwise; and small disks that are full, read-only or unmounted during a save.

A fault without evidence that it took effect is injected again with another seed, at most twice. Rows are appended to
the file `--rows` at once; a campaign that is started again with the same file continues.
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
from tests.faults.encoder import encoder_run
from tests.faults.job import job
from tests.faults.row import GROUPS, Row, markdown, missing, read_rows

DAMAGES_PER_KIND, DISKS_PER_KIND = 18, 5
TRIES = 3
IN_NAMESPACE = "DIST_MOE_FAULTS_IN_NAMESPACE"


class Group(StrEnum):
    """The parts of the campaign."""

    process = "process"
    file = "file"
    all = "all"


def main(
    group: Annotated[Group, typer.Option(help="Which faults to inject.")] = Group.all,
    seed: Annotated[int, typer.Option(min=0, help="Determines moments, files, positions and lengths.")] = 0,
    rows: Annotated[Path, typer.Option(help="File to which results are appended.")] = Path("runs/faults/rows.jsonl"),
    count: Annotated[int | None, typer.Option(min=1, help="At most N faults of each kind.")] = None,
) -> None:
    """Inject the planned faults that have no row yet, and print the table."""
    console = Console(width=200, highlight=False)
    with tempfile.TemporaryDirectory(prefix="dist-moe-faults-") as folder:
        if group is not Group.file:
            process_faults(Path(folder), seed, rows, count, console)
        if group is not Group.process:
            file_faults(Path(folder), seed, rows, count, console)
    if IN_NAMESPACE in os.environ:
        return
    found = read_rows(rows)
    rows.with_suffix(".md").write_text(markdown(found) + "\n", encoding="utf-8")
    console.print(markdown(found), markup=False, soft_wrap=True)
    groups = GROUPS if group is Group.all else (group.value,)
    lacking = missing(found, groups, None if count is None else kinds_of(group, seed))
    console.print("\n".join(lacking) or "every fault was survived", markup=False, soft_wrap=True)
    raise typer.Exit(bool(lacking))


def kinds_of(group: Group, seed: int) -> list[str]:
    """The kinds of a campaign; a short one must survive at least one fault of each."""
    of_processes = [] if group is Group.file else [fault.kind for fault in processes.plan(seed)]
    of_files = [] if group is Group.process else [*files.DAMAGES, *(f"disk {name}" for name in disks.KINDS)]
    return list(dict.fromkeys([*of_processes, *of_files]))


def process_faults(folder: Path, seed: int, rows: Path, count: int | None, console: Console) -> None:
    """Inject the faults of two real workers."""
    runs = {False: (write_text(folder), ()), True: encoder_run(folder)}
    for of_encoder, (text, changes) in runs.items():
        with job(text, folder / f"undisturbed-{of_encoder}", 2, None, *changes) as running:
            assert running.wait() == [0, 0], f"undisturbed-{of_encoder}"
    kinds: dict[str, int] = {}
    for fault in processes.plan(seed):
        kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
        if count is None or kinds[fault.kind] <= count:

            def inject(number: int, fault: processes.ProcessFault = fault) -> Row:
                run = folder / f"process-{fault.seed}-{number}"
                text, changes = runs[fault.of_encoder]
                undisturbed = folder / f"undisturbed-{fault.of_encoder}"
                return processes.inject(fault.of_try(number), text, run, undisturbed, changes)

            inject_until_confirmed("process", fault.kind, fault.seed, inject, rows, console)


def file_faults(folder: Path, seed: int, rows: Path, count: int | None, console: Console) -> None:
    """Inject the faults of one process, in a new mount namespace."""
    if IN_NAMESPACE not in os.environ:
        arguments = ["--group", "file", "--seed", str(seed), "--rows", str(rows.resolve())]
        arguments += [] if count is None else ["--count", str(count)]
        argv = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "tests.faults", *arguments]
        subprocess.run(argv, check=True, env=os.environ | {IN_NAMESPACE: "1", "OMP_NUM_THREADS": "1"})
        return
    text = write_text(folder)
    with init_distributed(RankInfo(0, 1, 0, 1, "env"), "gloo", 60):
        made = files.make_run(text, folder / "made")
        planned = [(name, number) for name in files.DAMAGES for number in range(count or DAMAGES_PER_KIND)]
        planned += [(name, number) for name in disks.KINDS for number in range(count or DISKS_PER_KIND)]
        for index, (name, _) in enumerate(planned):
            fault_seed = seed * 100_000 + index * 10

            def inject(number: int, name: str = name, fault_seed: int = fault_seed) -> Row:
                inject_fault = files.inject if name in files.DAMAGES else disks.inject
                run = folder / f"file-{fault_seed}-{number}"
                return inject_fault(name, fault_seed + number, text, made, run)

            kind = name if name in files.DAMAGES else f"disk {name}"
            inject_until_confirmed("file", kind, fault_seed, inject, rows, console)


def inject_until_confirmed(
    group: str, kind: str, seed: int, inject: Callable[[int], Row], rows: Path, console: Console
) -> None:
    """Inject a fault, unless it has a row; one that missed is injected again, with its own row each time."""
    done = [row for row in read_rows(rows) if row.kind == kind and row.seed // 10 == seed // 10 and row.evidence]
    for number in range(0 if done else TRIES):
        started_s = time.monotonic()
        try:
            row = inject(number)
        except Exception as error:  # a run that hangs or fails unexpectedly is a failure
            message = f"{type(error).__name__}: {error}"[:300]
            row = Row(group, kind, seed + number, False, "", "not at all", [message], time.monotonic() - started_s)
        row.append_to(rows)
        verdict = "survived" if row.survived else f"FAILED: {'; '.join(row.failures)}" if row.failures else "missed"
        line = f"{row.kind}, seed {row.seed}: {verdict}; {row.evidence}; {row.recovery}; {row.seconds:.1f} s"
        console.print(line, markup=False, soft_wrap=True)
        if row.evidence or row.failures:
            return


if __name__ == "__main__":
    typer.run(main)
