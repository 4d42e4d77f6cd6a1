"""Three hosts for all tests of this folder, and `dist-moe launch` on the first of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_moe.config import dump_config, load_config
from tests.cluster.engine import Engine, engine
from tests.cluster.hosts import Ended, Host, environment, hosts, inner

ROOT = Path(__file__).resolve().parents[2]
DIST_MOE = Path(sys.executable).parent / "dist-moe"
LIMIT_S = 200.0
GONE_LIMIT_S = 10.0
BASE = "localhost/python:3.11"

Start = Callable[..., "Launch"]


class Launch:
    """`dist-moe launch` on the first host, with its output in files."""

    def __init__(self, host: Host, folder: Path, arguments: tuple[str, ...], **variables: str) -> None:
        self.folder, self.began_s = folder, time.monotonic()
        self.output, self.errors = folder / "stdout.txt", folder / "stderr.txt"
        command = host.argv([str(DIST_MOE), "launch", "run.yaml", *arguments], folder)
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, env=environment() | variables, stdout=output, stderr=errors)

    @property
    def pid(self) -> int:
        """The pid of the launch itself."""
        return inner(self.process)

    def wait_for_step(self, step: int) -> None:
        """Wait until its output reports this step."""
        deadline = time.monotonic() + LIMIT_S
        while not count_step(step, self.output.read_text(errors="replace")):
            assert self.process.poll() is None and time.monotonic() < deadline, self.errors.read_text(errors="replace")
            time.sleep(0.1)

    def end(self, limit_s: float = LIMIT_S) -> Ended:
        self.process.wait(timeout=limit_s)
        output, errors = (path.read_text(errors="replace") for path in (self.output, self.errors))
        return Ended(self.process.returncode, output, errors, time.monotonic() - self.began_s)


@dataclass(frozen=True)
class Images:
    """An engine with the image dist-moe:cpu; more targets are built on the same base."""

    engine: Engine
    cpu: str

    def build(self, target: str, context: Path = ROOT) -> str:
        return self.engine.build(target, BASE, context)


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    with engine() as up:
        up.make_base(BASE)
        yield Images(up, up.build("cpu", BASE))


@pytest.fixture(scope="session")
def alone_in_a_container(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the debug run in one process; in the image, since its text is that interpreter's source files."""
    folder = tmp_path_factory.mktemp("alone-in-a-container")
    folder.chmod(0o777)
    options = ["--rm", "--network", "none", "--volume", f"{folder}:/runs"]
    overrides = ["run.dir=/runs/debug", "run.threads=1"]
    images.engine.podman("run", *options, images.cpu, "train", "/opt/configs/debug.yaml", *overrides, limit_s=LIMIT_S)
    return folder / "debug"


@pytest.fixture(scope="session")
def three() -> Iterator[list[Host]]:
    with hosts(3) as up:
        yield up


@pytest.fixture
def start(three: list[Host], tmp_path: Path) -> Iterator[Start]:
    """`start(slots, *arguments, steps=4, **variables)` launches on the first hosts.

    slots: the number of workers on each; (): on the first, without a cluster. variables: of the launch's environment.
    """
    launches = []

    def launch(slots: tuple[int, ...], *arguments: str, steps: int = 4, **variables: str) -> Launch:
        write_config(tmp_path, three, slots, steps)
        launches.append(Launch(three[0], tmp_path, arguments, **variables))
        return launches[-1]

    yield launch
    for started in launches:
        if started.process.poll() is None:
            for _ in range(2):  # the first one asks for a checkpoint
                os.kill(started.pid, signal.SIGINT)
                time.sleep(0.2)
            started.process.wait(timeout=30)
    left = until_gone(three)
    assert not left, left


def write_config(folder: Path, up: list[Host], slots: tuple[int, ...], steps: int) -> None:
    """Write run.yaml: the debug run with 24 sequences in a step, so that it divides among 2, 3 and 4 workers."""
    entries = ", ".join(f"{{name: {host.name}, slots: {count}}}" for host, count in zip(up, slots, strict=False))
    overrides = [
        f"cluster.hosts=[{entries}]",
        "run.dir=run",
        "run.threads=1",
        f"train.steps={steps}",
        "train.schedule_steps=100000",
        "train.global_batch_size=24",
        "observe.interval=1",
    ]
    (folder / "run.yaml").write_text(dump_config(load_config(ROOT / "configs" / "debug.yaml", overrides)))


def count_step(step: int, output: str) -> int:
    """Return how often an output reports a step."""
    return len(re.findall(rf"\bstep +{step}/", output))


def logged(run: Path) -> list[int]:
    """Return the steps of metrics.jsonl in its order; an evaluation has the step of the last one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] != "checkpoint"]


def until_gone(up: list[Host]) -> list[str]:
    """Return what still runs on the hosts after the time that ending may take."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (left := [line for host in up for line in host.processes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
