"""Tests of the trace of whole runs: its counts are those of the metrics, and equal on any layout."""

from collections import defaultdict
from typing import Any

import pytest

from dist_moe.observe.routing.trace import Trace, read_trace
from tests.dist.balanced import whole_run
from tests.dist.pool import RankPool

OVERRIDES = (
    "train.steps=2",
    "train.micro_batch_size=3",
    "observe.interval=1",
    "observe.trace_interval=1",
    "observe.trace_tokens=4",
)


@pytest.fixture(scope="module")
def traces(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Trace, list[dict[str, Any]]]]:
    """The trace and the metrics of a run on one worker, and of one on two expert-parallel workers."""
    folder, found = tmp_path_factory.mktemp("traced"), {}
    for number in range(8):
        (folder / f"text-{number}.txt").write_text(f"{number} to be, or not to be: that is the question\n" * 20)
    for workers in (1, 2):
        _, lines = ranks.run(whole_run, workers, str(folder), [*OVERRIDES, "checkpoint.resume=never"])[0]
        found[workers] = (read_trace(folder / "run"), [line for line in lines if line["event"] == "step"])
    return found


def loads(trace: Trace, *keys: str) -> dict[tuple[int, ...], list[int]]:
    """Sum the counts over the rows that are equal in some columns."""
    sums: dict[tuple[int, ...], list[int]] = {}
    for row in trace.loads.to_pylist():
        key = tuple(row[name] for name in keys)
        sums[key] = [a + b for a, b in zip(sums.get(key, [0] * len(row["load"])), row["load"], strict=True)]
    return sums


@pytest.mark.parametrize("workers", [1, 2])
def test_trap_T75_the_counts_of_the_trace_are_those_of_the_metrics(traces: dict[int, Any], workers: int) -> None:
    trace, lines = traces[workers]
    counted = loads(trace, "step", "layer")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert [counted[line["step"], layer] for layer in range(2)] == line["load"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_computation_batches_of_the_trace_are_those_of_the_metrics(traces: dict[int, Any], workers: int) -> None:
    trace, lines = traces[workers]
    of_layer: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (step, layer, _, _), load in loads(trace, "step", "layer", "group", "micro_batch").items():
        of_layer[step, layer].append(max(load) / (sum(load) / len(load)) - 1)
    for line in lines:
        for layer, value in enumerate(line["max_vio_computation_per_layer"]):
            values = of_layer[line["step"], layer]
            assert sum(values) / len(values) == pytest.approx(value)


def test_two_expert_parallel_workers_record_what_one_records(traces: dict[int, Any]) -> None:
    one, two = traces[1][0], traces[2][0]
    assert {row["rank"] for row in two.loads.to_pylist()} == {0, 1}
    by_sequence = [loads(trace, "step", "layer", "sequence") for trace in (one, two)]
    first, second = ({key: load for key, load in sums.items() if key[0] == 1} for sums in by_sequence)
    assert first == second and len(first) == 2 * 12
    tokens = [
        {
            (row["layer"], row["sequence"], row["position"]): (row["token"], row["domain"], row["experts"])
            for row in trace.tokens.to_pylist()
            if row["step"] == 1
        }
        for trace in (one, two)
    ]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 2 * 12 * 4
