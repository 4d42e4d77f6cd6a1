"""Tests of the command line of the benchmark."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from benchmarks import __main__ as command
from benchmarks.__main__ import chosen, main
from benchmarks.cases import CASES, QUICK, Case
from benchmarks.row import Row


def test_without_names_all_cases_are_chosen() -> None:
    assert chosen(None, quick=False) == list(CASES.values())
    assert chosen([], quick=True) == list(QUICK)
    assert chosen(["fine-fp32"], quick=False) == [CASES["fine-fp32"]]


@pytest.mark.parametrize(
    ("name", "quick", "message"),
    [
        ("fine-fp32", True, r"fine-fp32 is not a quick case; leave out --quick to measure it"),
        ("none", True, r"unknown case none; --list prints the cases"),
        ("none", False, r"unknown case none; --list prints the cases"),
    ],
)
def test_a_case_that_cannot_be_chosen_is_an_error_with_its_remedy(name: str, quick: bool, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        chosen([name], quick)


@pytest.mark.parametrize(("load", "keep", "refused"), [(1.5, True, True), (1.0, True, False), (1.5, False, False)])
def test_results_of_a_busy_machine_are_not_kept(
    load: float, keep: bool, refused: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[str] = []

    def measure(case: Case, rounds: int, steps: int, log: Callable[[str], None]) -> list[Row]:
        measured.append(case.name)
        return [Row("ours-gloo", seconds=[1.0] * rounds)]

    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "results_path", lambda environment: tmp_path / "kept.json")

    def run() -> None:
        main(["coarse-fp32"], keep=keep, out=tmp_path / "bench.json")

    if refused:
        with pytest.raises(typer.BadParameter, match=r"is 1\.50, and --keep needs at most 1\.0.*or leave out --keep"):
            run()
    else:
        run()
    assert measured == ([] if refused else ["coarse-fp32"])
    assert (tmp_path / "kept.json").is_file() == (keep and not refused)
