"""What a run leaves on disk to be read later: metrics.jsonl, run.json and config.yaml."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dist_moe.errors import needs_folder
from dist_moe.observe.jsonl import LineFile

RECORDED_DISTRIBUTIONS = (
    "dist-moe-train",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "tensorboard",
)


OF_A_RUN = ("checkpoints", "tensorboard", "metrics.jsonl", "run.json", "config.yaml")


def set_aside(folder: Path) -> Path | None:
    """Move what an earlier run left in `folder` into a folder `earlier-N` in it -> that folder; None if it held no run.

    Two runs in one metrics.jsonl could not be told apart, and nothing is deleted.
    """
    left = [name for name in OF_A_RUN if (folder / name).exists()]
    if not left:
        return None
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for name in left:
        (folder / name).rename(aside / name)
    return aside


class RunRecorder:
    """Writes a run's metrics line by line; for one process of the run, as a context manager.

    An existing metrics.jsonl is continued, so a resumed run may write some steps again: the last line of a
    step is the one that counts. A last line that an earlier process did not finish is cut off. A disk that fails later
    costs lines, and no run: `warn` is told.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], None] = print) -> None:
        self.folder = Path(folder)
        self._warn = warn
        self._lines: LineFile | None = None

    def __enter__(self) -> Self:
        """Errors: RunFolderError where the folder cannot be written."""
        lines = LineFile(self.metrics_path, self._warn)
        with needs_folder(self.folder):
            lines.begin()
        self._lines = lines
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines = None

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line, in the order of `write`."""
        return self.folder / "metrics.jsonl"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, at once. A float that is not finite becomes null, as JSON has no word for it.

        Raises:
            RuntimeError: the recorder is not open.
            TypeError: the record holds something that JSON cannot.
        """
        if self._lines is None:
            raise RuntimeError(f"{self.metrics_path} is not open; write inside `with RunRecorder(...)`")
        # The line is made whole before any of it is written, so an error leaves no half line behind.
        self._lines.write(_json(record))

    def describe(self, config: Mapping[str, Any], config_yaml: str, world: Mapping[str, Any]) -> None:
        """Write run.json and config.yaml, replacing those of an earlier start in the same folder.

        Args:
            config: the resolved configuration as plain values.
            config_yaml: the same as YAML that loads back equal.
            world: plain values that say how the run is laid out (workers, expert_parallel, launcher, ...).

        Raises:
            RunFolderError: the folder cannot be written.
        """
        description = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": sys.argv,
            "world": dict(world),
            "versions": versions(),
            "source": source_state(Path(__file__)),
            "host": host(),
            "config": dict(config),
        }
        with needs_folder(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(self.folder / "run.json", _json(description, indent=2) + "\n")
            _replace(self.folder / "config.yaml", config_yaml)


def versions() -> dict[str, str | None]:
    """Versions of Python and the distributions that decide a run's numbers; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in RECORDED_DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_state(file: Path) -> dict[str, str | bool | None]:
    """The git commit that a source file belongs to.

    Args:
        file: a file of the code that runs.

    Returns:
        `commit` (hexadecimal) and `dirty` (whether tracked files of the repository differ from it); both None
        where git is absent or does not track the file, as for an installed package.
    """
    unknown: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return unknown
    commit = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return unknown
    return {"commit": commit, "dirty": bool(changes)}


def host() -> dict[str, Any]:
    """Processor, cores, system and accelerators of this machine."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _replace(path: Path, text: str) -> None:
    # A reader, or a crash half way, sees the old file or the new one.
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
