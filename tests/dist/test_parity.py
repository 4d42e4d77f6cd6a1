"""Parity in small: 12 cases that cover every pair of values; `python -m tests.parity` trains them all."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.dist.pool import RankPool
from tests.parity.case import LAUNCHERS, POOL, Case, covering, every_case, other_routings
from tests.parity.check import check_checkpointing, check_controls, check_launched, check_pool
from tests.parity.reference import References
from tests.parity.report import Row, show
from tests.parity.setting import clipping
from tests.parity.trace import Trace, compare, read_trace
from tests.parity.train import train
from tests.selection import full, only_first, slow

PAIRS = covering(every_case(POOL), 2)
OTHERS = other_routings([Case(POOL, 4, 2, 2, 3, "sgd"), Case(POOL, 2, 2, 0, 1, "adamw")])
TWICE = Case(POOL, 4, 4, 2, 1, "adamw")
QUICK = [*covering(PAIRS, 1), OTHERS[0], OTHERS[3], OTHERS[-2]]
CONTROLS = [Case(POOL, 4, 4, 0, 1, "sgd"), Case(POOL, 2, 2, 2, 1, "adamw")]
LAUNCHED = Case(POOL, 2, 2, 1, 3, "adamw")


@pytest.fixture(scope="module")
def references(ranks: RankPool) -> References:
    return References(ranks)


@pytest.fixture(scope="module")
def known() -> dict[Case, Trace]:
    """The traces of the runs so far, for the tests that compare with the same case."""
    return {}


@pytest.fixture
def tell() -> Iterator[Callable[[Row], None]]:
    """Fails on a row with a fault; at least one row must come."""
    rows: list[Row] = []

    def hear(row: Row) -> None:
        rows.append(row)
        assert not row.faults, f"{row.case} ({row.what}): {row.faults}\n{row.difference}"

    yield hear
    assert rows


@pytest.mark.parametrize("case", [*QUICK, *(full(case) for case in [*PAIRS, *OTHERS] if case not in QUICK)], ids=str)
def test_trap_T50_losses_and_norms_are_those_of_one_worker(
    ranks: RankPool, references: References, known: dict[Case, Trace], case: Case
) -> None:
    """T22, T24, T47, T48, T50: 20 steps, clipped in every one, under SGD and under AdamW."""
    reference = references[case]
    known[case] = train(ranks, case, reference.seed).trace
    difference = compare(known[case], reference.trace, clipping(case.routing))
    assert not difference.faults(), difference


def test_two_runs_on_one_layout_are_equal_bit_for_bit(
    ranks: RankPool, references: References, known: dict[Case, Trace], tell: Callable[[Row], None]
) -> None:
    check_pool(ranks, [TWICE], references, known, tell)


@pytest.mark.parametrize("launcher", [slow(launcher) for launcher in LAUNCHERS])
def test_a_launcher_s_run_is_the_pool_s_bit_for_bit(
    ranks: RankPool,
    references: References,
    known: dict[Case, Trace],
    tell: Callable[[Row], None],
    launcher: str,
) -> None:
    check_launched(ranks, [dataclasses.replace(LAUNCHED, start=launcher)], references, known, tell)


@pytest.mark.parametrize("case", only_first(CONTROLS), ids=str)
def test_expert_gradients_times_the_degree_are_noticed(
    ranks: RankPool, references: References, tell: Callable[[Row], None], case: Case
) -> None:
    check_controls(ranks, [case], references, tell)


@pytest.mark.slow
def test_trap_T01_activation_checkpointing_changes_nothing(
    ranks: RankPool, references: References, known: dict[Case, Trace], tell: Callable[[Row], None]
) -> None:
    """T1, T2: the same losses, loads, biases and weights, bit for bit."""
    check_checkpointing(ranks, [LAUNCHED], references, known, tell)


def test_the_small_set_covers_every_pair() -> None:
    cases = every_case(POOL)
    assert len(cases) == 72
    assert len(PAIRS) <= 14
    fields = ["workers", "expert_parallel", "zero_stage", "micro_batches", "optimizer"]
    for first, second in itertools.combinations(fields, 2):
        wanted = {(getattr(case, first), getattr(case, second)) for case in cases}
        assert {(getattr(case, first), getattr(case, second)) for case in PAIRS} == wanted


CLIPPING = 0.1
LONG = 2.5 * CLIPPING
TRACE = Trace(
    losses=(5.0, 4.0, 4.0),
    norms=(LONG, LONG),
    loads=(((600, 400), (500, 500)), ((500, 500), (501, 499))),
    biases={"a": (0.1, -0.1)},
    files={"model-00001-of-00001.safetensors": "0"},
)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"losses": (5.0, 4.0, 4.0005)}, "losses differ by 1.2e-04"),
        ({"losses": (5.0, math.nan, 4.0)}, "losses differ by nan"),
        ({"norms": (LONG, LONG * 1.0002)}, "norms differ by 2.0e-04"),
        ({"norms": (LONG, math.nan)}, "norms differ by nan"),
        ({"loads": (((601, 399), (500, 500)), TRACE.loads[1])}, "loads differ in step 1"),
        ({"loads": (TRACE.loads[0], ((500, 500), (504, 496)))}, "0.15% of a step's assignments differ"),
        ({"biases": {"a": (0.1, -0.2)}}, "biases differ though all loads are equal"),
    ],
)
def test_a_difference_is_a_fault(change: dict[str, Any], fault: str) -> None:
    assert not compare(TRACE, TRACE, CLIPPING).faults()
    faults = compare(dataclasses.replace(TRACE, **change), TRACE, CLIPPING).faults()
    assert any(found.startswith(fault) for found in faults), faults


def test_a_gradient_that_is_hardly_clipped_is_a_fault() -> None:
    short = dataclasses.replace(TRACE, norms=(LONG, 1.9 * CLIPPING))
    assert compare(short, short, CLIPPING).faults() == ["clipping keeps 0.53 of a gradient, more than half"]


def test_a_later_assignment_may_differ_and_then_a_bias() -> None:
    changed = dataclasses.replace(TRACE, loads=(TRACE.loads[0], ((500, 500), (502, 498))), biases={"a": (0.1, -0.12)})
    assert not compare(changed, TRACE, CLIPPING).faults()
    assert changed.unequal(TRACE) == ["loads", "biases"]


def test_a_run_that_did_not_log_every_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    with pytest.raises(ValueError, match="does not hold 20 logged steps"):
        read_trace(tmp_path)


def test_one_fault_fails_the_whole() -> None:
    good = Row(TWICE, "parity", compare(TRACE, TRACE, CLIPPING), "", [], 1.0)
    bad = dataclasses.replace(good, faults=["losses differ"])
    console = Console(record=True, file=io.StringIO(), width=160)
    assert show([good, good], console)
    assert not show([good, bad], console)
    assert "1 of 2 hold" in console.export_text()
