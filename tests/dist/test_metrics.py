"""Tests of the metrics on several ranks: MaxVio of micro-batches, and all values of whole runs."""

import statistics
from pathlib import Path

import pytest

from dist_moe.balancing.load import max_vio_floor
from dist_moe.comm.mesh import Mesh
from tests.dist.balanced import whole_run
from tests.dist.pool import RankPool
from tests.dist.reported_steps import MICRO_BATCHES, SIZES, ReportedSteps, loads_of_a_step, micro_loads, report_steps
from tests.dist.small import DEEPSEEK, ragged_batch, share

WITH_FLOOR = {"max_vio_computation", "rank_load", "load_deviation_percent", "load_entropy", "dead_experts"}
SHARED = {"load_deviation_percent", "load_cov", "experts_per_token", "experts_per_token_p50", "experts_per_token_p99"}


def computation_batches(workers: int, expert_parallel: int, layer: int) -> list[list[int]]:
    """Sum `micro_loads` over the ranks of each expert-parallel group: one list for each micro-batch of a group."""
    batches = []
    for first in range(0, workers, expert_parallel):
        for micro_batch in range(MICRO_BATCHES):
            batch = [0] * SIZES[layer]
            for rank in range(first, first + expert_parallel):
                for expert, count in enumerate(micro_loads(rank)[micro_batch][layer].tolist()):
                    batch[expert] += count
            batches.append(batch)
    return batches


@pytest.fixture(
    scope="module", params=[(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)], ids=lambda layout: "w{}-ep{}".format(*layout)
)
def layout(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Workers and expert parallelism."""
    workers, expert_parallel = request.param
    return workers, expert_parallel


@pytest.fixture(scope="module")
def reports(ranks: RankPool, layout: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> list[ReportedSteps]:
    """What each rank observed of three steps: logged, not logged, and skipped."""
    workers, expert_parallel = layout
    return ranks.run(report_steps, workers, expert_parallel, str(tmp_path_factory.mktemp("run")), timeout_s=60)


def test_trap_T30_all_ranks_report_a_step_with_the_same_collectives(
    layout: tuple[int, int], reports: list[ReportedSteps]
) -> None:
    """One collective over all ranks and one in the expert-parallel group for a logged step, none for others."""
    workers, expert_parallel = layout
    logged = 0 if workers == 1 else 1 if expert_parallel == 1 else 2
    assert [of_rank.collectives for of_rank in reports] == [[logged, 0, logged]] * workers
    assert [line["skipped"] for line in reports[0].lines] == [False, True]


def test_warnings_and_the_end_are_recorded_with_their_step_by_rank_0_alone(reports: list[ReportedSteps]) -> None:
    events = [{key: value for key, value in event.items() if key != "time"} for event in reports[0].events]
    assert events == [
        {"event": "warning", "step": 3, "text": "one"},
        {"event": "warning", "step": 3, "text": "another"},
        {"event": "stopped", "step": 3, "checkpoint": "step-000003"},
    ]


def test_trap_T19_max_vio_computation_is_that_of_each_micro_batch_of_each_group(
    layout: tuple[int, int], reports: list[ReportedSteps]
) -> None:
    wanted, floors = [], []
    for layer, size in enumerate(SIZES):
        batches = computation_batches(*layout, layer)
        wanted.append(statistics.fmean(max(batch) * size / sum(batch) - 1 for batch in batches))
        floors.append(statistics.fmean(max_vio_floor(size, sum(batch)) for batch in batches))
    for line in reports[0].lines:
        assert line["max_vio_computation_per_layer"] == pytest.approx(wanted)
        assert line["max_vio_computation"] == pytest.approx(statistics.fmean(wanted))
        assert line["max_vio_computation_floor"] == pytest.approx(statistics.fmean(floors))


def test_a_record_has_rank_load_the_mean_auxiliary_loss_and_the_threshold(
    layout: tuple[int, int], reports: list[ReportedSteps]
) -> None:
    workers, expert_parallel = layout
    for line in reports[0].lines:
        assert (line["loss"], line["threshold"]) == (pytest.approx(0.5), 0.5)
        assert line["auxiliary_loss"] == pytest.approx(statistics.fmean(range(1, workers + 1)))
        for load, rank_load in zip(line["load"], line["rank_load_per_layer"], strict=True):
            share_of_rank = len(load) // expert_parallel
            rows = [sum(load[first : first + share_of_rank]) for first in range(0, len(load), share_of_rank)]
            assert rank_load == pytest.approx(max(rows) / statistics.fmean(rows))


def test_trap_T57_the_time_of_a_step_is_all_that_passes_until_the_next(reports: list[ReportedSteps]) -> None:
    first, third = reports[0].lines
    assert [first["step_ms"], third["step_ms"]] == [2000.0, 3000.0]
    for line in (first, third):
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step"] * 1e3 / line["step_ms"])


@pytest.mark.parametrize(("workers", "expert_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_a_step_records_the_loads_of_its_micro_batches(ranks: RankPool, workers: int, expert_parallel: int) -> None:
    by_rank = ranks.run(loads_of_a_step, workers, expert_parallel)
    for rank, (own, _) in enumerate(by_rank):
        batches = share(ragged_batch(), Mesh(workers, rank, expert_parallel), 2)
        tokens = [int((batch.documents_BS >= 0).sum()) for batch in batches]
        sums = [[sum(load) for load in loads] for loads in own]
        assert sums == [[DEEPSEEK["num_experts_per_tok"] * count] * 2 for count in tokens], "two layers each"
    whole = by_rank[0][1]
    for layer, load in enumerate(whole):
        micro = [loads[layer] for own, _ in by_rank for loads in own]
        assert [sum(counts) for counts in zip(*micro, strict=True)] == load


@pytest.mark.parametrize("workers", [2, 4])
def test_whole_runs_write_every_metric(ranks: RankPool, tmp_path: Path, workers: int) -> None:
    """Threshold routing with a target that moves the threshold, and an auxiliary loss."""
    for number in range(8):
        (tmp_path / f"text-{number}.txt").write_text(f"{number} to be, or not to be: that is the question\n" * 20)
    overrides = ["train.steps=3", "observe.interval=1", "router.selection=threshold", "router.score=softmax"]
    overrides += ["router.target_experts_per_token=3", "balance.policy=adaptive_weight", "balance.auxiliary_loss=0.01"]
    printed, lines = ranks.run(whole_run, workers, str(tmp_path), overrides)[0]
    saved = [line for line in lines if line["event"] == "checkpoint"]
    assert [line["step"] for line in saved] == [3] and saved[0]["stall_ms"] >= saved[0]["write_ms"] > 0
    lines = [line for line in lines if line["event"] != "checkpoint"]
    steps, end = lines[:-1], lines[-1]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0]["threshold"] == pytest.approx(0.4), "the threshold that routed step 1, not the updated one"
    assert steps[1]["threshold"] != steps[0]["threshold"]
    for step in steps:
        for name in WITH_FLOOR:
            assert step[name] is not None and step[f"{name}_floor"] is not None
        assert step["auxiliary_loss"] > 0 or step["step"] == 1, "step 1 has no previous load"
        assert step["max_vio_computation"] > step["max_vio"], "the micro-batches of a step balance each other"
        assert all(1.0 <= load <= workers for load in step["rank_load_per_layer"])
    for line in lines:
        assert line.keys() >= SHARED
        taken = [number * count for number, count in enumerate(line["experts_per_token_histogram"], start=1)]
        assert sum(taken) == sum(map(sum, line["load"]))
        assert line["experts_per_token"] == pytest.approx(sum(taken) / sum(line["experts_per_token_histogram"]))
        per_layer = zip(line["load"], line["experts_per_token_per_layer"], strict=True)
        tokens = [sum(load) / mean for load, mean in per_layer]
        assert tokens == pytest.approx([sum(line["experts_per_token_histogram"]) / 2] * 2), "each token in each layer"
    assert f"experts/token {steps[2]['experts_per_token']:.2f}  threshold" in printed
    assert "auxiliary loss" in printed
    assert end["event"] == "validation" and "deviation" in printed
