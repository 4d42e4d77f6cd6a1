"""The commands of the documentation that are marked `<!-- run -->`, run as they are printed, shortened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.shortened import PROGRAMS
from tests.documents import ROOT, blocks, markdown_files

LIMIT_S = 180
"""For one command; a block has as many times that as it has commands."""
KEPT_OUT = {".git", ".venv", "build", "dist", "runs"}
PROGRAM = f"""#!/bin/sh
PYTHONPATH={ROOT} exec {sys.executable} -m tests.dist.shortened "$(basename "$0")" "$@"
"""
# Tasks that take long or install: that make knows what to do for them is all that is seen here.
MAKE = """#!/bin/sh
case " $* " in *" train "*) exec /usr/bin/make "$@" ;; *) exec /usr/bin/make -n "$@" ;; esac
"""


def working_folder(folder: Path) -> Path:
    """Makes `folder` look like a checkout after `make setup`, in which runs are short; returns its programs."""
    for entry in ROOT.iterdir():
        if entry.name not in KEPT_OUT:
            (folder / entry.name).symlink_to(entry)
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    documents = [part for page in pages for part in page.split("\n\n") if len(part) > 400]
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, script in {"make": MAKE, **dict.fromkeys(PROGRAMS, PROGRAM)}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    for stamp in (".installed", ".installed-docs"):
        (folder / ".venv" / stamp).touch()
    return programs


@pytest.mark.slow
@pytest.mark.timeout(20 * LIMIT_S)
@pytest.mark.parametrize("path", [path for path in markdown_files() if any(b.run for b in blocks(path))], ids=str)
def test_the_commands_of_a_page_run_as_printed(path: Path, tmp_path: Path) -> None:
    programs = working_folder(tmp_path)
    search = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "OMP_NUM_THREADS": "1", "DIST_MOE_CACHE": str(tmp_path / "cache")}
    for block in blocks(path):
        if not block.run:
            continue
        argv, limit_s = ["bash", "-euo", "pipefail", "-c", block.text], LIMIT_S * len(block.commands())
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=limit_s)
        assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
