"""What a person sees of rank 0 on a terminal, and what its log keeps."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.launch.supervise.pty import Transcript

LAUNCH = """
import subprocess, sys
from pathlib import Path
from dist_moe.launch.supervise.monitor import Hub
from dist_moe.launch.supervise.pty import terminal_environment
import os
worker = '''
import os, sys
from pathlib import Path
from dist_moe.launch.supervise.agent import mind
from dist_moe.launch.supervise.protocol import Meeting
rank = int(sys.argv[3])
mind(Meeting.parse(sys.argv[1]), rank, 2, Path(sys.argv[2]))
from rich.console import Console
from dist_moe.worker.exit import write_record
console = Console(legacy_windows=False)
if rank == 0:
    assert console.is_terminal and console.width == 77, console
    with console.status("live \u00e9"):
        console.print("[red]one[/red]")
else:
    assert not console.is_terminal
    console.print("two")
write_record(Path(sys.argv[2]), rank, "finished", code=0)
'''
with Hub("127.0.0.1", 2, Path(sys.argv[1]), apart=False) as hub:
    environment = {**os.environ, **terminal_environment(sys.stdout)}
    workers = []
    for rank in range(2):
        argv = [sys.executable, "-c", worker, str(hub.meeting), sys.argv[1], str(rank)]
        workers.append(subprocess.Popen(argv, env=environment))
    while hub.unfinished() and not hub.failures():
        hub.wait(0.1)
        hub.look()
    assert not hub.failures(), hub.failures()
"""
LIMIT_S = 30.0


def seen_on_a_terminal(argv: list[str]) -> str:
    """What a command shows on a terminal of 77 columns."""
    reading, writing = pty.openpty()
    sized = ["sh", "-c", 'stty cols 77 rows 20; exec "$@"', "sh", *argv]
    # Without env it would have LINES and COLUMNS, which readline, once imported, has set behind Python's back.
    with subprocess.Popen(sized, stdin=writing, stdout=writing, env=dict(os.environ)):
        os.close(writing)
        seen = b""
        while True:
            try:
                part = os.read(reading, 1 << 16)
            except OSError:
                break
            seen += part
    os.close(reading)
    return seen.decode()


def test_rank_0_draws_on_the_launchs_terminal_and_its_log_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    seen = seen_on_a_terminal([sys.executable, "-c", LAUNCH, str(tmp_path)])
    assert "\x1b[31mone\x1b[0m\r\n" in seen, seen
    assert "[rank 1] two\r\n" in seen and "[rank 0]" not in seen
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "one\n" in log and "live é\n" in log and "\x1b" not in log and "\n\n" not in log
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "two\n"


def test_a_live_line_is_logged_once_for_each_change_however_it_travels() -> None:
    drawn = b"\x1b[?25lstep 1\r\x1b[2Ktext\nstep 1\r\x1b[2K\x1b[31mstep 2\x1b[0m\r\x1b[2Kstep 2\n\x1b[?25h\nend"
    told = b"step 1\ntext\nstep 2\nend\n"
    whole = Transcript()
    assert whole.receive(drawn) + whole.receive(b"") == told
    parts = Transcript()
    assert b"".join(parts.receive(bytes([one])) for one in drawn) + parts.receive(b"") == told
