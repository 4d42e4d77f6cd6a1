"""The launcher that the documentation shows, installed as it says: one file in a copy of the package."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "extending.md",)


def launcher_part() -> str:
    """Return the part of the documentation on launchers, without its heading."""
    for page in PAGES:
        found = re.search(r"^## A launcher$(.*?)(?=^## |\Z)", page.read_text() if page.exists() else "", re.M | re.S)
        if found:
            return found[1]
    raise LookupError("no page has a part `## A launcher`")


def copy_with_local_launcher(folder: Path) -> Path:
    """Copy the package into a folder and add the example as its text says; return the folder, for PYTHONPATH."""
    part = launcher_part()
    ((path, example),) = re.findall(r'^```python title="(.+?)"\n(.*?)^```$', part, re.M | re.S)
    shutil.copytree(ROOT / "dist_moe", folder / "dist_moe", ignore=shutil.ignore_patterns("__pycache__"))
    assert not (folder / path).exists()
    (folder / path).write_text(example)
    return folder
