"""What the commands of all launchers share: the command itself and the workers' environment."""

import contextlib
import json
import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.errors import UserError, needs_folder
from dist_moe.files import new_private_file
from dist_moe.launch.outer_job import without_outer_job
from dist_moe.worker.contract import PORT_VARIABLE
from dist_moe.worker.network import INTERFACE_VARIABLES, LOOPBACK_INTERFACE

DEFAULT_PORT = 29500
# Variables that an outer launcher may have set, with which the workers would join its job.
OUTER_JOB_VARIABLES = (
    # What torchrun reads of its options from the environment unless they are on its command line.
    "PET_NODE_RANK",
    "PET_RDZV_BACKEND",
    "PET_RDZV_ENDPOINT",
    "PET_RDZV_CONF",
    "PET_STANDALONE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    PORT_VARIABLE,
)
# Text that neither a shell nor pdsh (%h, %n) changes.
SHELL_SAFE = re.compile(r"[\w@+=:,./-]*", re.ASCII)
SHELL_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
LINE_BREAK = " \\\n    "
# Device files below /dev: NVIDIA, WSL, AMD, and Intel.
DEVICE_FILES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "accel*")


class LaunchError(UserError, RuntimeError):
    """A job that cannot be started. The message has value, rule and remedy."""


@dataclass(frozen=True)
class Command:
    """A launcher's command, ready to run.

    Attributes:
        launcher: The name of the launcher.
        argv: Program and arguments.
        environment: The whole environment of the launcher, which the workers inherit.
        remote_commands: Further commands of the same job, started together with `argv`; one for each other host. They
            run `remote_exec` by ssh, which reads the variables of its command from stdin.
        sent_variables: For `argv` and each of `remote_commands`, the variables to send, or None where it runs here.
        restarts: Whether the launcher restarts failed workers.
        replaces_workers: Whether the launcher may start a worker of a rank again, or continue with fewer workers.
        files: Files that the command reads, path -> text, which `written` makes for the length of the job.
        holders: For each host, by its name, the command that keeps `held_variables` in a file there
            (`supervise/secret_file.py`).
        held_variables: Variables of the workers that must not reach an argument list.
    """

    launcher: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    remote_commands: tuple[tuple[str, ...], ...] = ()
    sent_variables: tuple[Mapping[str, str] | None, ...] = ()
    restarts: bool = False
    replaces_workers: bool = False
    files: Mapping[Path, str] = field(default_factory=dict)
    holders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    held_variables: Mapping[str, str] = field(default_factory=dict)

    def processes(self) -> list[tuple[tuple[str, ...], Mapping[str, str] | None]]:
        """Return the argument list of each process, and the variables to send to its stdin."""
        commands = (self.argv, *self.remote_commands)
        return list(zip(commands, self.sent_variables or (None,) * len(commands), strict=True))

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write the files of the command, which may hold secrets, for this user alone, and remove them at the end.

        A program (a text that begins with `#!`) can be executed.

        Raises:
            RunFolderError: A file cannot be written.
        """
        made: list[Path] = []
        try:
            for path, text in self.files.items():
                with needs_folder(path.parent):
                    write_private(path, text, made)
            yield
        finally:
            for path in reversed(made):
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def lines(self, base: Mapping[str, str]) -> list[str]:
        """Return the commands for a shell whose environment is `base`: one option or variable a line.

        Only variables that differ from `base` are written; one that puts folders before its value keeps `$NAME`.
        """
        removed = [["-u", name] for name in sorted(base.keys() - self.environment.keys())]
        changed = [[_assignment(name, value, base)] for name, value in sorted(self.environment.items())]
        changed = [words for words in changed if words != [""]]
        variables = [["env"], *map(_quoted, removed), *changed] if removed or changed else []
        commands = [[*variables, *by_option(self.argv)], *map(by_option, self.remote_commands)]
        lines = [LINE_BREAK.join(" ".join(words) for words in parts) for parts in commands]
        sent = self.sent_variables or (None,) * len(lines)
        return [
            line if values is None else f"(printf '%s\\n' {shlex.quote(json.dumps(dict(values)))}; cat) | {line}"
            for line, values in zip(lines, sent, strict=True)
        ]


def _assignment(name: str, value: str, base: Mapping[str, str]) -> str:
    """Return NAME=VALUE as a word for a shell; empty where `base` has it already."""
    before = base.get(name)
    if value == before:
        return ""
    if before and value.endswith(os.pathsep + before) and SHELL_NAME.fullmatch(name):
        return f'{name}={shlex.quote(value.removesuffix(before))}"${name}"'
    return f"{name}={shlex.quote(value)}" if SHELL_NAME.fullmatch(name) else shlex.quote(f"{name}={value}")


def _quoted(words: Iterable[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def by_option(argv: Sequence[str]) -> list[list[str]]:
    """Divide a command into its program, with `-m MODULE`, and each option with its values, quoted for a shell."""
    parts: list[list[str]] = [[]]
    for index, word in enumerate(argv):
        if word.startswith("-") and len(word) > 1 and index > 0 and not (word == "-m" and index == 1):
            parts.append([])
        parts[-1].append(shlex.quote(word))
    return parts


def write_private(path: Path, text: str, made: list[Path]) -> None:
    """Write a file that its owner alone can read, in a new folder where there is none; add what was made to `made`."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o700)
        made.append(path.parent)
    path.unlink(missing_ok=True)
    with new_private_file(path, 0o700 if text.startswith("#!") else 0o600) as file:
        made.append(path)
        file.write(text)


def private_path(name: str, place: str | None = None) -> Path:
    """Return a path in a folder that does not exist yet, for this user alone: no other user can create it first.

    Args:
        name: The name of the file.
        place: Where the folder is to be; None for the folder for temporary files of this host.
    """
    return Path(place or tempfile.gettempdir()) / f"dist-moe-{secrets.token_hex(8)}" / name


def worker_environment(config: Config, workers: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job with all workers on this host.

    It is `base` without the variables of an outer job, and with those of `worker_variables`. PATH begins with the
    folder of this Python, so that the workers find the tools of its environment (ninja).

    Args:
        config: The configuration of the run; `run.threads` sets OMP_NUM_THREADS.
        workers: The number of workers on this host.
        base: The environment to start from.
    """
    threads = threads_per_worker(config.run.threads, workers)
    interfaces = {name: base[name] for name in INTERFACE_VARIABLES if name in base}
    return clean_env(base) | worker_variables(str(threads)) | interfaces


def worker_variables(threads: str) -> dict[str, str]:
    """Return the variables of workers that all run on one host.

    Args:
        threads: The value of OMP_NUM_THREADS.
    """
    return {
        # By default gloo resolves the host's name, which on some hosts gives an address that does not answer, and NCCL
        # takes any interface: both would listen where other hosts reach them.
        **dict.fromkeys(INTERFACE_VARIABLES, LOOPBACK_INTERFACE),
        "OMP_NUM_THREADS": threads,
        # `python -m dist_moe` must not import a folder of that name in the working folder.
        "PYTHONSAFEPATH": "1",
    }


def clean_env(base: Mapping[str, str], removed_prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Return `base` without the variables of an outer job, and with the folder of this Python first on PATH.

    Args:
        base: The environment to start from.
        removed_prefixes: Variables that begin with one of these are removed too.
    """
    own = without_outer_job(base, OUTER_JOB_VARIABLES)
    kept = {name: value for name, value in own.items() if not name.startswith(removed_prefixes)}
    programs = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join([programs, *filter(None, [base.get("PATH")])])}


def threads_per_worker(threads: int | str, workers: int) -> int:
    """Return the number of threads of each worker; "auto" divides the cores that this process may use."""
    return threads if isinstance(threads, int) else max(1, len(os.sched_getaffinity(0)) // workers)


def has_devices() -> bool:
    """Return whether this host has the device file of an accelerator."""
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)
