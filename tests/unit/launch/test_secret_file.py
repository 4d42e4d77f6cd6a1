"""Variables that must not reach an argument list, kept in a file on each host: real processes on this one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_moe.errors import UserError
from dist_moe.launch.supervise import secret_file
from dist_moe.launch.supervise.remote_exec import variables_line
from dist_moe.launch.supervise.secret_file import file_here, kept_on_hosts, restart_with_variables

LIMIT_S = 30.0


def keeper(path: Path) -> list[str]:
    return [sys.executable, "-m", "dist_moe.launch.supervise.secret_file", str(path)]


def test_variables_are_kept_for_the_owner_alone_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "variables"
    with kept_on_hosts({"a": keeper(path)}, {"TOKEN": "t0-secret"}):
        assert json.loads(file_here(path).read_text()) == {"TOKEN": "t0-secret"}
        assert (file_here(path).stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        for child in psutil.Process().children(recursive=True):
            assert not any("t0-secret" in word for word in child.cmdline())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_has_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    kept = kept_on_hosts({"node7": keeper(tmp_path / "theirs" / "variables")}, {"TOKEN": "t0"})
    with (
        pytest.raises(UserError, match=r"^node7 cannot keep the variables of its workers; see its message above$"),
        kept,
    ):
        pass
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_file_of_another_holder_stays(tmp_path: Path) -> None:
    """A second holder of the same path is refused, and does not remove what the first has made."""
    path = tmp_path / "new" / "variables"
    with kept_on_hosts({"a": keeper(path)}, {"TOKEN": "t0"}):
        argv = keeper(path)
        done = subprocess.run(
            argv, input='{"TOKEN": "t1"}\n', capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"{file_here(path)} cannot be made (File exists)"), done.stderr
        assert json.loads(file_here(path).read_text()) == {"TOKEN": "t0"}


def test_a_folder_that_cannot_be_made_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    argv = keeper(tmp_path / "no" / "such" / "variables")
    done = subprocess.run(argv, input="{}\n", capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be made (No such file or directory)" in done.stderr


def test_hosts_that_do_not_answer_are_named_after_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_file, "READY_LIMIT_S", 0.5)
    monkeypatch.setattr(secret_file, "END_LIMIT_S", 0.2)
    says_so = ["sh", "-c", "echo ready; cat >/dev/null"]
    others = psutil.Process().children()
    kept = kept_on_hosts({"a": says_so, "b": ["sleep", "60"], "c": ["sleep", "60"]}, {"TOKEN": "t0"})
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r"^b, c did not keep the variables of its workers within 0\.5 s; check that"),
        kept,
    ):
        pass
    assert time.monotonic() - began < 5
    assert psutil.Process().children() == others


def test_many_variables_are_sent_to_a_host_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KiB by itself; a launch that waits for the rest could not be ended."""
    monkeypatch.setattr(secret_file, "END_LIMIT_S", 0.2)
    began = time.monotonic()
    with kept_on_hosts({"a": ["sleep", "60"]}, {"LONG": "x" * 500_000}, interrupted=lambda: True):
        pass
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match=r"of at most 1,048,576; shorten cluster\.environment"):
        variables_line({"LONG": "x" * 1_100_000})


HANGING = """
import os, sys
from pathlib import Path
from dist_moe.launch.command import Command
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.run_job import run
command = Command("deepspeed", ("touch", sys.argv[1] + "/started"), dict(os.environ),
                  holders={"a": ("sh", "-c", "touch $0/up; sleep 600", sys.argv[1])}, held_variables={"A": "b"})
with WorkerMonitor("127.0.0.1", 2, Path(sys.argv[1])) as monitor:
    print(run(command, sys.argv[1], monitor))
"""


@pytest.mark.parametrize(("signals", "limit_s"), [([signal.SIGTERM], 8.0), ([signal.SIGINT, signal.SIGINT], 5.0)])
def test_a_launch_obeys_signals_while_a_host_does_not_answer(
    tmp_path: Path, signals: list[signal.Signals], limit_s: float
) -> None:
    argv = [sys.executable, "-c", HANGING, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as launch:
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "up").exists():
            assert launch.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        for signum in signals:
            launch.send_signal(signum)
            time.sleep(0.2)
        printed = launch.communicate(timeout=LIMIT_S)[0]
        assert time.monotonic() - began < limit_s
    name = signals[0].name
    assert printed == f"JobOutcome(code={128 + signals[0]}, message='stopped by {name}; every process has ended')\n"
    assert not (tmp_path / "started").exists()


def test_a_worker_starts_anew_with_the_variables(tmp_path: Path) -> None:
    path = tmp_path / "variables"
    file_here(path).write_text(json.dumps({"TOKEN": "t0", "DIST_MOE_LAUNCH": "tcp://x@127.0.0.1:1"}))
    code = """
import os
from dist_moe.launch.supervise import secret_file
from dist_moe.launch.supervise.remote_exec import variables_line
from dist_moe.launch.supervise.secret_file import restart_with_variables
restart_with_variables(os.environ)
print(os.environ["TOKEN"], os.environ["DIST_MOE_LAUNCH"], os.environ["DIST_MOE_LAUNCH_FILE"])
"""
    environment = {**os.environ, "DIST_MOE_LAUNCH": f"file:{path}"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.split() == ["t0", "tcp://x@127.0.0.1:1", f"file:{path}"]


def test_a_file_that_is_gone_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start the job again by `dist-moe launch`"):
        restart_with_variables({"DIST_MOE_LAUNCH": f"file:{tmp_path / 'gone'}"})
