"""What the launch's terminal shows of rank 0, and what its log contains."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.launch.supervise.pty import PASSED, TerminalFilter, Transcript

LAUNCH = """
import subprocess, sys
from pathlib import Path
from dist_moe.launch.supervise.monitor import WorkerMonitor
from dist_moe.launch.supervise.pty import terminal_environment
import os
worker = '''
import os, sys
from pathlib import Path
from dist_moe.launch.supervise.agent import fork_worker
from dist_moe.launch.supervise.protocol import Rendezvous
rank = int(sys.argv[3])
fork_worker(Rendezvous.parse(sys.argv[1]), rank, 2, Path(sys.argv[2]))
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
with WorkerMonitor("127.0.0.1", 2, Path(sys.argv[1]), multi_host=False) as monitor:
    environment = {**os.environ, **terminal_environment(sys.stdout)}
    workers = []
    for rank in range(2):
        argv = [sys.executable, "-c", worker, str(monitor.rendezvous), sys.argv[1], str(rank)]
        workers.append(subprocess.Popen(argv, env=environment))
    while monitor.unfinished() and not monitor.failures():
        monitor.wait(0.1)
        monitor.poll()
    assert not monitor.failures(), monitor.failures()
"""
LIMIT_S = 30.0


def run_on_terminal(argv: list[str]) -> str:
    """Run a command on a terminal of 77 columns, and return what it writes there."""
    reading, writing = pty.openpty()
    sized = ["sh", "-c", 'stty cols 77 rows 20; exec "$@"', "sh", *argv]
    # os.environ lacks LINES and COLUMNS, which readline, once imported, sets in the C environment only.
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


def test_terminal_output_of_rank_0_is_shown_as_it_is_and_logged_without_control_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    seen = run_on_terminal([sys.executable, "-c", LAUNCH, str(tmp_path)])
    assert "\x1b[31mone\x1b[0m\r\n" in seen, seen
    assert "[rank 1] two\r\n" in seen and "[rank 0]" not in seen
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "one\n" in log and "\x1b" not in log and "\n\n" not in log
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "two\n"


def test_transcript_leaves_out_a_live_line_that_is_drawn_over() -> None:
    output = b"\x1b[?25lstep 1\r\x1b[2Ktext\r\nstep 1\r\x1b[2K\x1b[31mstep 2\x1b[0m\r\x1b[2Kstep 2\n\x1b[?25h\nend"
    lines = b"text\nstep 2\nend\n"
    whole = Transcript()
    assert whole.feed(output) + whole.feed(b"") == lines
    parts = Transcript()
    assert b"".join(parts.feed(bytes([byte])) for byte in output) + parts.feed(b"") == lines


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ("\x1b\x1b[6n]52;c;ZXZpbA==\x1b\x1b[6n\\", "]52;c;ZXZpbA==\\"),
        ("\x1b\x1b[6n[6n", "[6n"),
        ("\x1b\x1b[6nc", "c"),
        ("\x1b\x07]0;t\x1b\x07\\", "]0;t\\"),
        ("\x1b\x1b[31mred\x1b\x1b\x1b[0m", "\x1b[31mred\x1b[0m"),
    ],
)
def test_what_is_left_of_removed_escapes_makes_no_new_one(output: str, shown: str) -> None:
    assert TerminalFilter().feed(output) == shown
    parts = TerminalFilter()
    assert "".join(map(parts.feed, output)) == shown


PIECES = st.sampled_from(
    ["\x1b", "\x9b", "[", "]", "P", "\x07", "\\", "6n", "c", "31m", "?25h", ";", "a", "\x18", " ", "\n"]
)


@given(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=8))
def test_no_escape_is_shown_but_colors_and_movements(parts: list[str]) -> None:
    filtered = TerminalFilter()
    in_parts = "".join(map(filtered.feed, parts))
    for shown in (in_parts, TerminalFilter().feed("".join(parts))):
        assert not {"\x1b", "\x9b", "\x07"} & set(PASSED.sub("", shown)), repr(shown)
