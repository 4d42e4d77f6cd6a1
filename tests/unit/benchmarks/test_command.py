"""Tests of the command line of the benchmark."""

import pytest
import typer

from benchmarks.__main__ import chosen
from benchmarks.cases import CASES, QUICK


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
