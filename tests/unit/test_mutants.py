"""The mutant runner on a small project: what is caught, what survives, and what it refuses to call either."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalogue import CATALOGUE, CatalogueError, read_catalogue

ROOT = Path(__file__).resolve().parents[2]
CODE = "def double(value):\n    return value * 2\n\n\ndef unused():\n    return 7\n"
TEST = """
import time

import code_under_test


def test_trap_T01_double():
    result = code_under_test.double(2)
    if result == 6:
        time.sleep(600)
    assert result == 4
"""
NODE = "test_code.py::test_trap_T01_double"


def project(folder: Path, *entries: dict[str, str]) -> Path:
    """A git checkout with one function, one test and the given mutants."""
    (folder / "code_under_test.py").write_text(CODE)
    (folder / "test_code.py").write_text(TEST)
    (folder / CATALOGUE).parent.mkdir(parents=True)
    lines = []
    for number, entry in enumerate(entries):
        whole = {
            "name": f"number {number}",
            "trap": "T01",
            "file": "code_under_test.py",
            "test": NODE,
        } | entry
        lines += ["[[mutant]]", *(f"{key} = '''{value}'''" for key, value in whole.items())]
    (folder / CATALOGUE).write_text("\n".join(lines))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def run_mutants(root: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and what was printed."""
    argv = [sys.executable, "-m", "tests.mutants", "--root", str(root), *arguments]
    done = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    return done.returncode, done.stdout


def test_a_caught_mutant_is_success_and_the_tree_is_left_alone(tmp_path: Path) -> None:
    root = project(tmp_path, {"find": "value * 2", "replace": "value * 4"}, {"find": "* 2", "replace": "+ 3"})
    code, output = run_mutants(root)
    assert code == 0 and "2 of 2 mutants caught" in output, output
    assert (root / "code_under_test.py").read_text() == CODE


@pytest.mark.slow
def test_a_survivor_a_broken_mutant_and_a_hang_are_told_apart(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        {"name": "unseen", "find": "return 7", "replace": "return 8"},
        {"name": "no python", "find": "def unused():", "replace": "def unused(:"},
        {"name": "no such name", "find": "value * 2", "replace": "value * two"},
        {"name": "endless", "find": "value * 2", "replace": "value * 3"},
    )
    code, output = run_mutants(root, "--limit-s", "20")
    assert code == 1 and "1 of 4 mutants caught" in output, output
    assert "unseen: SURVIVED" in output
    assert "no python: BROKEN" in output
    assert "no such name: BROKEN" in output
    assert "no end within 20" in output


def test_a_test_that_fails_without_a_change_says_nothing(tmp_path: Path) -> None:
    root = project(tmp_path, {"find": "value * 2", "replace": "value * 4"})
    (root / "code_under_test.py").write_text(CODE.replace("value * 2", "(value * 2) + 1"))
    code, output = run_mutants(root)
    assert code == 1 and "must pass on the unchanged code" in output, output


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"find": "value", "replace": "x"}, "occurs 2 times"),
        ({"find": "absent", "replace": "x"}, "occurs 0 times"),
        ({"find": "value * 2", "replace": "value * 2"}, "are equal"),
        ({"find": "value * 2", "replace": "0", "trap": "1"}, "T and two or three digits"),
        ({"find": "value * 2", "replace": "0", "trap": "T02"}, "must be named test_trap_T02_"),
        (
            {"find": "value * 2", "replace": "0", "test": "test_code.py::test_trap_T01_x"},
            "no test test_trap_T01_x",
        ),
        ({"find": "value * 2", "replace": "0", "test": "gone.py::test_trap_T01_x"}, "no file gone.py"),
        ({"find": "value * 2", "replace": "0", "file": "gone.py"}, "no file gone.py"),
        ({"find": "value * 2"}, "must have exactly the keys"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named(tmp_path: Path, entry: dict[str, str], fault: str) -> None:
    root = project(tmp_path, {"name": "this one"} | entry)
    with pytest.raises(CatalogueError, match="this one") as caught:
        read_catalogue(root)
    assert fault in str(caught.value)


def test_every_mutant_is_code_whose_names_exist(tmp_path: Path) -> None:
    for number, mutant in enumerate(read_catalogue(ROOT)):
        changed = mutant.apply((ROOT / mutant.file).read_text())
        if mutant.file.endswith(".py"):
            (tmp_path / f"mutant_{number}_{Path(mutant.file).stem}.py").write_text(changed)
    argv = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,E9", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_test_of_a_mutant_is_collected() -> None:
    tests = sorted({mutant.test for mutant in read_catalogue(ROOT)})
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-4000:]
