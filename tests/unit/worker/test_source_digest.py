"""The digest of the package is the same for a checkout and a wheel, and changes with its code."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_moe.worker.source_digest import PACKAGE, source_digest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "from dist_moe.worker.source_digest import PACKAGE, source_digest; print(PACKAGE); print(source_digest())"
LEFT_OUT = (
    "__pycache__/a.cpython-311.pyc",
    "part/__pycache__/b.cpython-311.pyc",
    "part/.hidden/c.py",
    ".d.swp",
    "part/b.py~",
    "a.py.orig",
)


def make_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_source_digest_is_equal_for_a_checkout_and_a_wheel(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(PACKAGE, checkout / PACKAGE.name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    package, digest = done.stdout.split()
    assert Path(package) == installed / PACKAGE.name
    assert digest == source_digest()


def test_source_digest_leaves_out_what_an_installation_has_not(tmp_path: Path) -> None:
    files = {"a.py": "1", "part/b.py": "2", "part/data.txt": "3"}
    first = make_package(tmp_path / "first", files)
    second = make_package(tmp_path / "second", files | dict.fromkeys(LEFT_OUT, "x"))
    assert source_digest(first) == source_digest(second)


@pytest.mark.parametrize(
    "change",
    [
        {"a.py": "2"},
        {"part/data.txt": "4"},
        {"part/c.py": ""},
        {"a.py": "12", "part/b.py": ""},
    ],
)
def test_source_digest_depends_on_names_and_contents(tmp_path: Path, change: dict[str, str]) -> None:
    files = {"a.py": "1", "part/b.py": "2", "part/data.txt": "3"}
    first = make_package(tmp_path / "first", files)
    second = make_package(tmp_path / "second", files | change)
    assert source_digest(first) != source_digest(second)
