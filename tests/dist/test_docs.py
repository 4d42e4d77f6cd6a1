"""The commands of the documentation that are marked `<!-- run -->`, run as they are printed, shortened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.shortened import PROGRAMS
from tests.documents import ROOT, Block, all_blocks
from tests.selection import full

LIMIT_S = 280
RUN = [block for block in all_blocks() if block.run]
FIRST_PAGES = {
    Path("README.md"),
    Path("docs/quickstart.md"),
}  # a newcomer runs these; the blocks of a page follow each other
PROGRAM_FOLDER = Path(".venv/bin")
KEPT_OUT = {".git", ".venv", "build", "dist", "runs"}
PROGRAM = f"""#!/bin/sh
PYTHONPATH={ROOT} exec {sys.executable} -m tests.dist.shortened "$(basename "$0")" "$@"
"""
# Tasks that take long or install: that make knows what to do for them is all that is seen here.
MAKE = """#!/bin/sh
case " $* " in *" train "*) exec /usr/bin/make "$@" ;; *) exec /usr/bin/make -n "$@" ;; esac
"""


def working_folder(folder: Path) -> None:
    """Makes `folder` look like a checkout after `make setup`, in which runs are short."""
    for entry in ROOT.iterdir():
        if entry.name not in KEPT_OUT:
            (folder / entry.name).symlink_to(entry)
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    documents = [part for page in pages for part in page.split("\n\n") if len(part) > 400]
    rows = ({"text": part, "label": "short" if len(part) < 600 else "long"} for part in documents)
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in ("my.txt", "texts/one.txt"):
        (folder / text).parent.mkdir(exist_ok=True)
        (folder / text).write_text("\n\n".join(documents[:20]), encoding="utf-8")
    programs = folder / PROGRAM_FOLDER
    programs.mkdir(parents=True)
    for name, script in {"make": MAKE, **dict.fromkeys(PROGRAMS, PROGRAM)}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (programs / "activate").touch()  # the search path of the test has the folder already
    for stamp in (".installed", ".installed-docs"):
        (folder / ".venv" / stamp).touch()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A working folder for each page, whose blocks follow each other in it."""
    made = {path: tmp_path_factory.mktemp(path.stem) for path in {block.path for block in RUN}}
    for folder in made.values():
        working_folder(folder)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("block", [block if block.path in FIRST_PAGES else full(block) for block in RUN], ids=str)
def test_the_commands_of_a_block_run_as_printed(block: Block, folders: dict[Path, Path]) -> None:
    folder = folders[block.path]
    search = os.pathsep.join([str(folder / PROGRAM_FOLDER), str(Path(sys.executable).parent), os.environ["PATH"]])
    of_make = {"ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}  # those of `make test-all ARGS=...`
    outside = {name: value for name, value in os.environ.items() if name not in of_make}
    environment = outside | {"PATH": search, "OMP_NUM_THREADS": "1", "DIST_MOE_CACHE": str(folder / "cache")}
    argv = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
