"""Which process an agent takes for the launcher of its worker; the rest of the agent is tested with the monitor."""

import os
import subprocess

import psutil
import pytest

from dist_moe.launch.supervise.agent import launcher_process
from dist_moe.worker.contract import LAUNCH_VARIABLE


@pytest.mark.parametrize(
    ("own", "other", "is_launcher"),
    [("tcp://a@b:1", "tcp://a@b:1", True), ("tcp://a@b:1", "tcp://c@b:1", False), ("tcp://a@b:1", None, False)],
)
def test_launcher_process_has_the_same_launch(
    monkeypatch: pytest.MonkeyPatch, own: str, other: str | None, is_launcher: bool
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, own)
    environment = {name: value for name, value in os.environ.items() if name != LAUNCH_VARIABLE}
    environment |= {LAUNCH_VARIABLE: other} if other else {}
    # It writes once it runs: before, as during an exec, the kernel may show an empty environment.
    command, pipe = ["sh", "-c", "echo; read line"], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            found = launcher_process(process.pid)
            expected = psutil.Process(process.pid) if is_launcher else None
        finally:
            process.kill()
    assert found == expected


def test_launcher_process_is_none_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent ends the launcher with the launch, so any other parent must not be taken for one."""
    monkeypatch.delenv(LAUNCH_VARIABLE, raising=False)
    assert launcher_process(os.getppid()) is None


def test_launcher_process_is_none_for_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "tcp://a@b:1")
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert launcher_process(process.pid) is None
