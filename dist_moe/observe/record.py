"""The files that describe a run: metrics.jsonl, events.jsonl, run.json and config.yaml."""

import functools
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
from dist_moe.files import write_atomically
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
EVENT_FILES = "events.out.tfevents.*"
"""Pattern of the names that TensorBoard's writer gives to its files."""
RUN_FILES = (
    *("checkpoints", "trace", "metrics.jsonl", "events.jsonl", "run.json", "config.yaml"),
    *(EVENT_FILES, "floor", "validation"),  # of TensorBoard
    "tensorboard",  # where earlier versions wrote these
)
"""What a run writes into run.dir, as patterns of names."""
CURVES = ("floor", "validation", "tensorboard")
"""Names of its folders of event files, which a folder of other files may have, too."""


def archive_previous_run(folder: Path) -> Path | None:
    """Move the files of a previous run into a new folder `earlier-N` in the same folder.

    The steps of two runs in one metrics.jsonl could not be distinguished, and nothing is ever deleted.

    Returns:
        The new folder; None if there was no previous run.
    """
    found = sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))
    present = [path for path in found if path.name not in CURVES or _has_event_files(path)]
    if not present:
        return None
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    archive = folder / f"earlier-{number}"
    archive.mkdir()
    for path in present:
        path.rename(archive / path.name)
    return archive


def board_folder(folder: Path, continues: bool) -> Path:
    """Return where the event files of TensorBoard are written.

    Args:
        folder: run.dir.
        continues: Whether the run is resumed; one that an earlier version started has its event files in `tensorboard`.
    """
    earlier = folder / "tensorboard"
    return earlier if continues and _has_event_files(earlier) else folder


def _has_event_files(folder: Path) -> bool:
    return any(folder.glob(EVENT_FILES))


class RunRecorder:
    """Writes a run's metrics and events line by line. A context manager, for one process of the run.

    Existing files are continued, so a resumed run may write some steps again: the last line of a step is
    valid. An incomplete last line is cut off. If the disk fails later, lines are lost and the run continues.

    Args:
        folder: run.dir.
        warn: Called when lines are lost, and when writing works again.
    """

    def __init__(self, folder: str | Path, warn: Callable[[str], None] = print) -> None:
        self.folder = Path(folder)
        self._warn = warn
        self._lines: LineFile | None = None
        self._events: LineFile | None = None

    def __enter__(self) -> Self:
        """Open the files.

        Raises:
            RunFolderError: The folder cannot be written.
        """
        lines, events = (LineFile(path, self._warn) for path in (self.metrics_path, self.events_path))
        with needs_folder(self.folder):
            lines.create()
            events.create()
        self._lines, self._events = lines, events
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines = self._events = None

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line, in the order of `write`."""
        return self.folder / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """One JSON object per line: each start of the run, each warning, and how it ended."""
        return self.folder / "events.jsonl"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics immediately. Non-finite floats become null, since JSON cannot express them.

        Raises:
            RuntimeError: The recorder is not open.
            TypeError: The record holds a value that JSON cannot express.
        """
        if self._lines is None:
            raise RuntimeError(f"{self.metrics_path} is not open; write inside `with RunRecorder(...)`")
        # Encode the whole line first, so that an error writes no part of it.
        self._lines.write(to_json(record))

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to events.jsonl immediately, with the time.

        Args:
            kind: What happened: `start`, `warning`, `stopped` or `finished`.
            step: Optimizer steps done by then.
            values: Plain values.

        Raises:
            RuntimeError: The recorder is not open.
        """
        if self._events is None:
            raise RuntimeError(f"{self.events_path} is not open; write inside `with RunRecorder(...)`")
        self._events.write(to_json({"event": kind, "time": _now(), "step": step, **values}))

    def describe(self, config: Mapping[str, Any], config_yaml: str, layout: Mapping[str, Any]) -> None:
        """Write run.json and config.yaml, replacing those of a previous start in the same folder.

        Args:
            config: The resolved configuration as plain values.
            config_yaml: The same as YAML.
            layout: Plain values of the run's layout (workers, expert_parallel, launcher, ...); the key `world`.

        Raises:
            RunFolderError: The folder cannot be written.
        """
        description = {
            "started": _now(),
            "argv": sys.argv,
            "world": dict(layout),
            "versions": versions(),
            "source": source_state(Path(__file__)),
            "host": host(),
            "config": dict(config),
        }
        with needs_folder(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "run.json", to_json(description, indent=2) + "\n")
            write_atomically(self.folder / "config.yaml", config_yaml)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the distributions that affect a run's results; None if not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for name in RECORDED_DISTRIBUTIONS:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = None
    return result


def source_state(file: Path, folder: Path | None = None) -> dict[str, str | bool | None]:
    """Find the git commit of a source file.

    Args:
        file: A file of the running code.
        folder: Count only what is in this folder of the repository; None: all of it.

    Returns:
        `commit` (hexadecimal), the last one (that changed the folder), and `dirty` (whether tracked files of the
        repository, or of the folder, differ from it); both None if git is not available or does not track the file, as
        for an installed package.
    """
    unknown: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return unknown
    within = ("--", str(folder)) if folder is not None else ()
    commit = _git(file.parent, "log", "-1", "--format=%H", *within)
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", *within)
    if commit is None or changes is None:
        return unknown
    return {"commit": commit, "dirty": bool(changes)}


def host() -> dict[str, Any]:
    """Describe processor, cores, system and accelerators of this machine."""
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


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON, with null for a number that is not finite."""
    encode = functools.partial(json.dumps, allow_nan=False, ensure_ascii=False, indent=indent)
    try:
        return encode(value)
    except ValueError:  # a float that is not finite, which is rare: looking for one takes as long as encoding
        return encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
