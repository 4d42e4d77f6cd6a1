"""Tests of the terminal output, written into a buffer as a terminal and as a file."""

import io
import re
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


def test_a_terminal_shows_one_live_line_and_lines_above_it() -> None:
    console, buffer = buffer_console(terminal=True)
    with RunConsole(steps=200, console=console, clock=Clock()) as shown:
        shown.step(step_sample(step=10))
        shown.warn("step 10: layer 0: no tokens for expert 1 [of many]")
        shown.step(step_sample(step=20, loss=2.25))
    text = buffer.getvalue()
    assert "loss 2.5000" in text and "loss 2.2500" in text
    assert "\x1b[2K" in text, "the live line is redrawn in place"
    assert "warning: step 10: layer 0: no tokens for expert 1 [of many]" in text


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
