"""A program for the commands of the documentation: `dist-moe`, or one that starts it, with runs that take seconds.

    python -m tests.dist.shortened torchrun --nproc-per-node 2 -m dist_moe train configs/quickstart.yaml

A checkpoint folder `step-NNNNNN` that a shortened run has not reached stands for the newest one beside it.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from tests.command_line import parse
from tests.documents import arguments_of_dist_moe

PROGRAMS = ("dist-moe", "deepspeed", "torchrun", "mpirun", "python")
SHORT = (
    "train.warmup_steps=0",
    "data.sources=[short.jsonl]",
    "data.vocabulary=300",
    "observe.validation_sequences=4",
    "run.threads=1",
)
"""Overrides of every run; short.jsonl is in the working folder."""


def newest(word: str) -> str:
    """The word, with the newest checkpoint in place of one that is not there."""
    path = Path(word)
    if re.fullmatch(r"step-\d{6}", path.name) and not path.exists():
        return str(max(path.parent.glob("step-??????"), default=path))
    return word


def steps() -> int:
    """The steps of the next run: two more than those of any checkpoint, so that a run that is resumed trains too."""
    done = [int(folder.name[-6:]) for folder in Path("runs").glob("**/step-??????")]
    return max(done, default=0) + 2


def shortened(command: list[str]) -> list[str]:
    """The command, with `SHORT` behind the overrides of a `dist-moe` command that reads a configuration."""
    arguments = arguments_of_dist_moe(command)
    if not arguments:
        return command
    starter, arguments = command[: -len(arguments)], [newest(word) for word in arguments]
    more = (*SHORT, f"train.steps={steps()}") if {"config", "overrides"} <= set(parse(arguments)) else ()
    return [*starter, *arguments, *more]


def main() -> None:
    """Becomes the real program, which is beside this Python or behind the folder of these programs in PATH."""
    program, *rest = shortened(sys.argv[1:])
    if program == "dist-moe":
        program, rest = "python", ["-m", "dist_moe", *rest]
    path = os.environ["PATH"].partition(os.pathsep)[2]
    real = sys.executable if program == "python" else shutil.which(program, path=path)
    if real is None:
        sys.exit(f"{program} is not installed")
    os.execv(real, [real, *rest])


if __name__ == "__main__":
    main()
