"""Three hosts for all tests of this folder, and what runs `dist-moe launch` on the first of them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Ended, Host, environment, hosts

ROOT = Path(__file__).resolve().parents[2]
DIST_MOE = Path(sys.executable).parent / "dist-moe"
LIMIT_S = 200.0
GONE_LIMIT_S = 10.0

Start = Callable[..., "Launch"]


class Launch:
    """`dist-moe launch` on the first host, with all that it prints in files."""

    def __init__(self, host: Host, folder: Path, arguments: tuple[str, ...]) -> None:
        self.folder, self.began_s = folder, time.monotonic()
        self.output, self.errors = folder / "stdout.txt", folder / "stderr.txt"
        command = host.argv([str(DIST_MOE), "launch", "run.yaml", *arguments], folder)
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, env=environment(), stdout=output, stderr=errors)

    @property
    def pid(self) -> int:
        """Of the launch itself, which nsenter has started as its child."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def wait_for_step(self, step: int) -> None:
        """Until its output tells of this step."""
        deadline = time.monotonic() + LIMIT_S
        while not told_of(step, self.output.read_text(errors="replace")):
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors.read_text(errors="replace")
            time.sleep(0.1)

    def end(self, limit_s: float = LIMIT_S) -> Ended:
        self.process.wait(timeout=limit_s)
        output, errors = (path.read_text(errors="replace") for path in (self.output, self.errors))
        return Ended(self.process.returncode, output, errors, time.monotonic() - self.began_s)


@pytest.fixture(scope="session")
def three() -> Iterator[list[Host]]:
    with hosts(3) as up:
        yield up


@pytest.fixture
def start(three: list[Host], tmp_path: Path) -> Iterator[Start]:
    """`start(slots, *arguments, steps=4)` launches on the first hosts, as many workers on each as `slots` says."""
    launches = []

    def launch(slots: tuple[int, ...], *arguments: str, steps: int = 4, host: Host | None = None) -> Launch:
        write_config(tmp_path, three, slots, steps)
        launches.append(Launch(host or three[0], tmp_path, arguments))
        return launches[-1]

    yield launch
    for one in launches:
        if one.process.poll() is None:
            os.kill(one.pid, signal.SIGTERM)
            one.process.wait(timeout=30)
    left = until_gone(three)
    assert not left, left


def write_config(folder: Path, up: list[Host], slots: tuple[int, ...], steps: int) -> None:
    """The debug run with 24 sequences in a step, so that it divides among 2, 3 and 4 workers."""
    entries = ", ".join(f"{{name: {host.name}, slots: {count}}}" for host, count in zip(up, slots, strict=False))
    text = (ROOT / "configs" / "debug.yaml").read_text()
    for before, after in {
        "  hosts: []": f"  hosts: [{entries}]",
        "dir: runs/debug": "dir: run",
        "threads: auto": "threads: 1",
        "steps: 20": f"steps: {steps}",
        "schedule_steps: null": "schedule_steps: 100000",
        "global_batch: 12": "global_batch: 24",
        "every: 5": "every: 1",
    }.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / "run.yaml").write_text(text)


def told_of(step: int, output: str) -> int:
    """How many times an output tells of a step."""
    return len(re.findall(rf"\bstep +{step}/", output))


def until_gone(up: list[Host]) -> list[str]:
    """What still runs on the hosts after the time that an end may take."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (left := [line for host in up for line in host.processes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
