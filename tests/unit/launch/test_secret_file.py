"""Variables that must not reach an argument list, kept in a file on each host: real processes on this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_moe.errors import UserError
from dist_moe.launch.supervise.secret_file import file_here, kept_on_hosts, restart_with_variables

LIMIT_S = 30.0


def keeper(path: Path) -> list[str]:
    return [sys.executable, "-m", "dist_moe.launch.supervise.secret_file", str(path)]


def test_variables_are_kept_for_the_owner_alone_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "variables"
    with kept_on_hosts([keeper(path)], {"TOKEN": "t0-secret"}):
        assert json.loads(file_here(path).read_text()) == {"TOKEN": "t0-secret"}
        assert (file_here(path).stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        for child in psutil.Process().children(recursive=True):
            assert not any("t0-secret" in word for word in child.cmdline())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_has_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o755)
    kept = kept_on_hosts([keeper(tmp_path / "theirs" / "variables")], {"TOKEN": "t0"})
    with pytest.raises(UserError, match="cannot keep the variables"), kept:
        pass
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_worker_starts_anew_with_the_variables(tmp_path: Path) -> None:
    path = tmp_path / "variables"
    file_here(path).write_text(json.dumps({"TOKEN": "t0", "DIST_MOE_LAUNCH": "tcp://x@127.0.0.1:1"}))
    code = """
import os
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
