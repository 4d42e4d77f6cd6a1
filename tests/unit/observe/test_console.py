"""Tests of the terminal output, written into a buffer as a terminal and as a file."""

import contextlib
import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dist_moe.observe.console import RunConsole, format_duration, step_line
from tests.unit.observe.samples import VARYING, evaluation_sample, step_sample


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def buffer_console(terminal: bool) -> tuple[Console, io.StringIO]:
    buffer = io.StringIO()
    width = 140 if terminal else 40  # lines must not be folded, however narrow rich takes a file to be
    return Console(file=buffer, force_terminal=terminal, width=width, color_system=None), buffer


def table_cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if re.match(r" +(\d+|mean) +\d", line)]
    return [re.findall(r"mean|[\d.]+(?: %| \(expert \d+\))?", row) for row in rows]


def test_each_logged_step_is_one_line_in_a_file() -> None:
    console, buffer = buffer_console(terminal=False)
    clock = Clock()
    with RunConsole(steps=200, console=console, clock=clock) as shown:
        clock.now_s = 5.0
        shown.step(step_sample(step=10))
        clock.now_s = 10.0
        shown.step(step_sample(step=20, loss=2.25))
    first, second = buffer.getvalue().splitlines()
    assert first.startswith("step  10/200  loss 2.5000  12,346 tokens/s  MaxVio 0.500 (floor 0.")
    assert first.endswith("left 1:35")
    assert second.startswith("step  20/200  loss 2.2500") and second.endswith("left 1:30")


def test_a_resumed_run_estimates_the_remaining_time_from_its_own_steps() -> None:
    console, buffer = buffer_console(terminal=False)
    clock = Clock()
    with RunConsole(steps=200, first_step=100, console=console, clock=clock) as shown:
        clock.now_s = 50.0
        shown.step(step_sample(step=150))
    assert buffer.getvalue().rstrip().endswith("left 0:50")


LIVE_RUN = """
import sys
from pathlib import Path
from dist_moe.observe.console import RunConsole
from tests.unit.observe.samples import VARYING, evaluation_sample, step_sample
times = iter(range(1_000_000))
with RunConsole(steps=100_000, clock=lambda: float(next(times))) as shown:
    for step in range(1, 31):
        shown.advance(step)
        if step % 10 == 0:
            more = {"k_histograms": VARYING, "threshold": 0.4, "auxiliary_loss": 0.012}
            shown.step(step_sample(step=step, loss=step / 10, **more))
    if sys.argv[1] == "live":
        print(end="", flush=True)
        import os
        os._exit(0)
    shown.advance(100_000)
    shown.summary(evaluation_sample(), {"checkpoint": Path("here")}, None)
"""


def on_terminal(columns: int, *words: str) -> tuple[str, list[str]]:
    """Run LIVE_RUN on a real terminal -> what it wrote, and the lines that the terminal shows at the end."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"TERM": "xterm"}
    argv = [sys.executable, "-c", LIVE_RUN, *words]
    with subprocess.Popen(argv, stdin=writing, stdout=writing, stderr=writing, env=environment):
        os.close(writing)
        output = b""
        with contextlib.suppress(OSError):
            while part := os.read(reading, 1 << 16):
                output += part
    os.close(reading)
    return output.decode(), screen(output.decode())


def screen(output: str) -> list[str]:
    """The lines that a terminal shows after `output`; long lines are not folded."""
    lines, row, column = [""], 0, 0
    for text in re.findall(r"\x1b\[[0-?]*[ -/]*[@-~]|[\r\n]|[^\x1b\r\n]+", output):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text.endswith("A") and text.startswith("\x1b["):
            row -= int(text[2:-1] or 1)
        elif text == "\x1b[2K":
            lines[row] = ""
        elif not text.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [50, 80])
def test_a_terminal_keeps_the_logged_steps_above_a_bar_with_the_remaining_time(columns: int) -> None:
    output, lines = on_terminal(columns, "live")
    assert [line[:30] for line in lines[:3]] == [
        f"step {step:>6}/100000  loss {step / 10:.4f}"[:30] for step in (10, 20, 30)
    ]
    live = lines[3]
    assert re.match(r"step     30/100000  left \d+:\d\d:\d\d ", live) and "━" in live, live
    assert len(live) <= columns
    assert len(lines) == 4
    assert "step     13/100000  left" in output, "the bar moves between logged steps"


def test_the_results_come_last_and_the_bar_is_gone() -> None:
    _, lines = on_terminal(80, "end")
    assert lines[3] == "Load over the validation text (100 target tokens)"
    assert lines[-1] == "checkpoint       here"
    assert not any("━" in line or "evaluating" in line for line in lines)


def test_warnings_and_evaluations_are_whole_lines_in_a_file() -> None:
    console, buffer = buffer_console(terminal=False)
    with RunConsole(steps=200, console=console) as shown:
        shown.warn("one [a] that is much longer than forty characters and is not folded", "two")
        shown.evaluation(evaluation_sample(step=20))
    lines = buffer.getvalue().splitlines()
    assert lines[0] == "warning: one [a] that is much longer than forty characters and is not folded"
    assert lines[1] == "warning: two"
    assert lines[2].startswith(
        "validation after 20 steps  loss 2.0000  bits/byte 1.1542  MaxVio_global 0.500 (floor 0."
    )


def test_step_line_shows_skipped_steps_only_if_there_are_any() -> None:
    assert "skipped" not in step_line(step_sample(), steps=20, remaining_s=None)
    assert "skipped 1 (including this step)" in step_line(step_sample(skipped=True), steps=20, remaining_s=None)


def test_step_line_shows_threshold_and_auxiliary_loss_only_where_they_are_used() -> None:
    plain = step_line(step_sample(), steps=20, remaining_s=None)
    assert not [word for word in ("experts/token", "threshold", "auxiliary") if word in plain]
    shown = step_line(
        step_sample(k_histograms=VARYING, threshold=0.4, auxiliary_loss=0.0123), steps=20, remaining_s=None
    )
    assert "  experts/token 1.47  threshold 0.400  auxiliary loss 0.0123  left" in shown


def test_step_line_of_a_model_without_moe_layers_has_no_max_vio() -> None:
    assert "MaxVio" not in step_line(step_sample(loads=()), steps=20, remaining_s=3.0)


def test_the_summary_shows_loss_load_and_paths(tmp_path: Path) -> None:
    buffer = io.StringIO()
    shown = RunConsole(steps=20, console=Console(file=buffer, width=80))
    shown.summary(evaluation_sample(), {"metrics": tmp_path / "metrics.jsonl"}, tensorboard=tmp_path / "tb")
    text = buffer.getvalue()
    assert table_cells(text) == [
        ["0", "1.000", "0.189", "27.22 %", "0.00 (expert 1)", "2.00 (expert 0)"],
        ["1", "0.000", "0.230", "0.00 %", "1.00 (expert 0)", "1.00 (expert 0)"],
        ["mean", "0.500", "0.210", "13.61 %"],
    ]
    assert "/token" not in text.replace("nats/token", ""), "every token takes two experts"
    assert "validation loss  2.0000 nats/token after 20 steps" in text
    assert "bits per byte    1.1542" in text
    assert f"metrics          {tmp_path}/metrics.jsonl\n" in text
    assert f"curves           tensorboard --logdir {tmp_path}/tb\n" in text


def test_the_summary_says_so_where_the_loss_is_not_a_number() -> None:
    buffer = io.StringIO()
    shown = RunConsole(steps=20, console=Console(file=buffer, width=80))
    shown.summary(evaluation_sample(), {}, None)
    assert "warning" not in buffer.getvalue()
    shown.summary(replace(evaluation_sample(), validation_loss=math.nan), {}, None)
    assert "warning: the validation loss is nan: on this text the model has a value that is not" in buffer.getvalue()


def test_the_summary_shows_experts_per_token_where_they_vary() -> None:
    buffer = io.StringIO()
    RunConsole(steps=20, console=Console(file=buffer, width=80)).summary(
        evaluation_sample(k_histograms=VARYING), {}, None
    )
    assert "experts \n" in buffer.getvalue()
    assert "/token \n" in buffer.getvalue()
    assert [cells[-1] for cells in table_cells(buffer.getvalue())] == ["1.71", "1.33", "1.47"]


def test_the_summary_without_tensorboard_or_tokens_or_layers() -> None:
    buffer = io.StringIO()
    shown = RunConsole(steps=20, console=Console(file=buffer, width=80))
    shown.summary(evaluation_sample(loads=([0, 0],)), {}, tensorboard=None)
    shown.summary(evaluation_sample(loads=()), {}, tensorboard=None)
    assert "tensorboard" not in buffer.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-:--"), (-3.0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")],
)
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
