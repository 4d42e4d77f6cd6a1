"""Tests of results in files, of the ratios that follow, and of their comparison with committed ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.__main__ import check_results
from benchmarks.cases import BlockCase
from benchmarks.ratchet import compare, missing
from benchmarks.results import Measured, ratios, read_results, write_results
from benchmarks.row import Row
from benchmarks.tables import table


def full_and_quick() -> tuple[Measured, Measured]:
    """One case as `make bench` and as `make bench-quick` measure it, with other programs and numbers of rounds."""
    full, quick = record(1.0), record(4.0)
    full.rows[2:] = [Row("autoep-tuned", seconds=[1.5] * 3), Row("autoep-mpi", reason="it is not installed")]
    for row in quick.rows[:2]:
        row.seconds.append(row.seconds[-1])
    return full, quick


def record(own_s: float, peer_s: float = 2.0, own_mib: float = 100.0, case: str = "coarse") -> Measured:
    """A case of this package and one peer, with a spread of 1 % and memory."""
    rows = [
        Row("ours-gloo", seconds=[own_s * factor for factor in (0.99, 1.0, 1.01)], peak_mib=own_mib),
        Row("autoep", seconds=[peer_s] * 3, peak_mib=200.0),
        Row("hf", reason="it is not installed"),
    ]
    return Measured(case, "step", 4096, {"cpu": "any"}, rows)


def test_ratios_are_of_what_was_measured() -> None:
    (ratio,) = ratios(record(own_s=1.0))
    assert (ratio.case, ratio.program, ratio.other, ratio.memory) == ("coarse", "ours-gloo", "autoep", 0.5)
    assert ratio.speed.median == 2.0


def test_programs_of_this_package_alone_are_compared_with_the_first() -> None:
    rows = [Row("ours", seconds=[1.0]), Row("ours-threshold", seconds=[2.0]), Row("limit", seconds=[0.5])]
    found = {(r.program, r.other): r.speed.median for r in ratios(Measured("block", "block", 1, {}, rows))}
    expected = {("ours", "limit"): 0.5, ("ours-threshold", "limit"): 0.25, ("ours-threshold", "ours"): 0.5}
    assert found == expected


@pytest.mark.parametrize(("own_s", "slower"), [(1.0, False), (1.04, False), (1.08, True), (0.5, False)])
def test_slower_is_what_the_tolerance_does_not_explain(own_s: float, slower: bool) -> None:
    (change,) = compare([record(1.0)], [record(own_s)])
    assert change.tolerance == pytest.approx(0.05)
    assert change.slower is slower and not change.larger


def spread_by(own_s: float, factor: float) -> Measured:
    """A record whose own rounds have quartiles of about `factor` around the median."""
    found = record(own_s)
    found.rows[0].seconds[:] = [own_s / (1 + 2 * factor), own_s, own_s * (1 + 2 * factor)]
    return found


def test_the_tolerance_grows_with_the_spread_of_both_runs() -> None:
    (change,) = compare([record(1.0)], [spread_by(1.08, 0.08)])
    assert change.tolerance == pytest.approx(0.08, abs=0.01) and not change.slower and not change.noisy
    (change,) = compare([record(1.0)], [spread_by(1.12, 0.08)])
    assert change.slower


def test_rounds_that_differ_too_much_are_not_compared(tmp_path: Path) -> None:
    now = spread_by(1.3, 0.3)
    (change,) = compare([record(1.0)], [now])
    assert change.tolerance == 0.1 and change.noisy and not change.slower
    path, console = tmp_path / "machine.json", Console(width=250, record=True)
    write_results(path, [record(1.0)])
    with pytest.raises(typer.Exit) as stop:
        check_results([now], path, console)
    assert stop.value.exit_code == 2
    text = console.export_text()
    assert "NOISY  coarse: ours-gloo / autoep: 2.00 -> 1.54 times as fast (too noisy to compare: the rounds" in text
    assert "measure again where nothing else runs" in text


def test_a_slower_machine_is_no_slower_program() -> None:
    (change,) = compare([record(1.0, peer_s=2.0)], [record(3.0, peer_s=6.0)])
    assert not change.slower


def test_memory_is_compared_too() -> None:
    (change,) = compare([record(1.0)], [record(1.0, own_mib=106.0)])
    assert change.larger and not change.slower


def test_a_program_that_no_longer_runs_is_missing() -> None:
    now = record(1.0)
    now.rows[0].reason = "it failed"
    assert missing([record(1.0), record(1.0, case="another")], [now]) == ["coarse: ours-gloo / autoep was not measured"]


def test_a_file_keeps_the_cases_that_were_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.json"
    write_results(path, [record(1.0), record(1.0, case="fine")])
    write_results(path, [record(4.0, case="fine")])
    assert read_results(path) == [record(1.0), record(4.0, case="fine")]


def test_a_file_keeps_the_programs_that_were_not_measured_again(tmp_path: Path) -> None:
    path, (full, quick) = tmp_path / "machine.json", full_and_quick()
    write_results(path, [full, record(1.0, case="fine")])
    write_results(path, [quick])
    assert read_results(path) == [full, quick, record(1.0, case="fine")]
    # A ratio that both have is the newer one, and none has a time of each run.
    changes = {(c.before.program, c.before.other): c.before.speed.median for c in compare(read_results(path), [full])}
    assert changes == pytest.approx({("ours-gloo", "autoep"): 0.5, ("ours-gloo", "autoep-tuned"): 1.5}, rel=0.01)
    write_results(path, [full])
    assert read_results(path) == [full, record(1.0, case="fine")]


def test_a_quick_run_after_a_full_one_misses_nothing() -> None:
    full, quick = full_and_quick()
    assert missing([full], [quick]) == []
    skipped = replace(full, rows=[Row("all", reason="this CPU emulates bf16")])
    assert missing([full], [skipped]) == []


def test_a_case_that_fails_misses_each_of_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: BlockCase, rounds: int) -> list[Row]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(command, "measure_block", fail)
    case = BlockCase(name="block", programs=("ours", "hf"), precision="fp32")
    now = Measured("block", "block", 1, {}, command.measure(case, 1, 1, print))
    assert [(row.name, row.reason) for row in now.rows] == [(name, "no memory") for name in ("ours", "hf", "limit")]
    rows = [Row(name, seconds=[1.0]) for name in ("ours", "hf", "limit")]
    before = replace(now, rows=rows)
    assert len(missing([before], [now])) == 2
    assert len(missing([before, before], [now])) == 2


@pytest.mark.parametrize(("own_s", "code"), [(1.0, 0), (1.2, 1)])
def test_the_check_ends_with_1_where_something_is_slower(own_s: float, code: int, tmp_path: Path) -> None:
    path, console = tmp_path / "machine.json", Console(width=200, record=True)
    write_results(path, [record(1.0)])
    if code == 0:
        check_results([record(own_s)], path, console)
    else:
        with pytest.raises(typer.Exit) as stop:
            check_results([record(own_s)], path, console)
        assert stop.value.exit_code == code
    expected = "SLOWER coarse: ours-gloo / autoep: 2.00 -> 1.67" if code else "ok     coarse: ours-gloo / autoep"
    assert expected in console.export_text()


def test_the_check_ends_with_2_without_committed_results(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as stop:
        check_results([record(1.0)], tmp_path / "none.json", Console(width=200))
    assert stop.value.exit_code == 2


def test_trap_T46_a_time_has_routing_and_loss_beside_it() -> None:
    step = record(own_s=1.0)
    step.rows[0] = replace(step.rows[0], loss=8.317, max_vio=0.81, max_vio_floor=0.12, experts_per_token=4.0)
    console = Console(width=250, record=True)
    console.print(table(step))
    text = console.export_text()
    assert "ours-gloo: times as fast" in text and "faster by" not in text
    assert "4,096 (4,076 to 4,117)" in text and "2.00 (1.99 to 2.01)" in text and "it is not installed" in text
    assert "8.317" in text and "0.81 (0.12)" in text and "4.00" in text
