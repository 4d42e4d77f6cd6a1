"""What each comparison passes and fails, in words with a remedy, and the table."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.doctor.context import experts_taken
from dist_moe.doctor.estimates import (
    Claim,
    Memory,
    Shape,
    checkpoint_bytes,
    compare_disk,
    compare_memory,
    estimate_memory,
    free_memory,
    kept_checkpoints,
)
from dist_moe.doctor.finding import Finding, Outcome, bytes_in_words, read_json, table, write_json
from dist_moe.doctor.machines import compare_rank_infos, compare_versions, patterns
from dist_moe.doctor.network import compare_clocks, refused

DEBUG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"


def settings(*words: str, workers: int = 4) -> object:
    return resolve(load_config(DEBUG, words), workers).config


def test_another_version_on_one_rank_is_named() -> None:
    same = {"python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.17.0"}
    assert compare_versions([same] * 4).outcome is Outcome.passed
    found = compare_versions([same, same, same | {"torch": "2.11.0"}, same])
    assert found.outcome is Outcome.failed and found.remedy
    assert found.found == "rank 2 has torch 2.11.0, most have 2.13.0"


def test_more_threads_than_cores_is_a_warning() -> None:
    assert compare_rank_infos([("a", 4, 2), ("a", 4, 2)], "gloo").outcome is Outcome.passed
    crowded = compare_rank_infos([("a", 4, 2), ("b", 4, 4), ("b", 4, 4)], "gloo")
    assert crowded.outcome is Outcome.warned and "b: 8 threads of 2 ranks on 4 cores" in crowded.found


def test_the_patterns_hold_what_they_are_called() -> None:
    found = patterns(4)
    assert len({count for row in found["even"] for count in row}) == 1
    assert 0 in found["some empty"][0] and sum(found["none"][3]) == 0
    assert all(sum(row[:3]) == 0 < row[3] for row in found["all to one"])


def test_memory_is_summed_over_the_ranks_of_a_host() -> None:
    needed, small = Memory(fixed=6, activations=3, copy=1), Claim("b", 7, 7)
    assert compare_memory(needed, [Claim("a", 10, 17), Claim("a", 7, 17), small]).outcome is Outcome.passed
    short = compare_memory(needed, [Claim("a", 10, 16), Claim("a", 7, 17), small])
    assert short.outcome is Outcome.failed and "b has" not in short.found
    assert "a has 16 B free, and 2 ranks need 17 B" in short.found
    assert 0 < free_memory() < 1 << 50


def test_what_a_threshold_takes_is_its_budget() -> None:
    threshold = ("router.selection=threshold", "router.score=softmax", "balance.policy=adaptive_weight")
    assert experts_taken(settings(*threshold, "router.max_experts=6")) == 6  # type: ignore[arg-type]
    assert experts_taken(settings(*threshold, "router.max_experts=6", "router.target_experts_per_token=2.5")) == 3  # type: ignore[arg-type]


def test_clocks_that_are_apart_are_told_by_their_hosts() -> None:
    assert compare_clocks([("a", 100.0), ("b", 100.4)]).outcome is Outcome.passed
    found = compare_clocks([("a", 100.0), ("b", 103.5), ("c", 101.0)])
    assert found.outcome is Outcome.warned and found.found == "that of b is 3.5 s before that of a"


def test_a_port_that_nobody_listens_at_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank_info = server.getsockname()
        assert refused(rank_info, 3.0) == ""
    assert f"127.0.0.1:{rank_info[1]} (" in refused(rank_info, 3.0)


def test_disk() -> None:
    assert compare_disk(10, 3, 30).outcome is Outcome.passed
    assert compare_disk(10, 3, 29).outcome is Outcome.failed


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("train.steps=20", "checkpoint.interval=0"), 1),
        (("train.steps=20", "checkpoint.interval=5"), 5),
        (("train.steps=20", "checkpoint.interval=5", "checkpoint.keep_last=2"), 3),
        (("train.steps=20", "checkpoint.interval=5", "checkpoint.keep_last=1", "checkpoint.keep_every=10"), 4),
        (("train.steps=20", "checkpoint.interval=10", "checkpoint.keep_last=9"), 3),
    ],
)
def test_how_many_checkpoints_lie_on_the_disk(words: tuple[str, ...], count: int) -> None:
    assert kept_checkpoints(settings(*words)) == count  # type: ignore[arg-type]


SHAPE = Shape(dense=1000, experts=4000, layers=3, width=8, taken=2, expert_width=4, vocabulary=100)


@pytest.mark.parametrize(
    ("words", "bf16", "parameters_bytes", "owned_bytes"),
    [
        (("parallel.zero_stage=0",), False, 8 * 3000, 8 * 3000),
        (("parallel.zero_stage=1",), False, 8 * 3000, 12 * (250 + 1000)),
        (("parallel.zero_stage=2",), True, 4 * 3000, 12 * (250 + 1000)),
        (("parallel.zero_stage=0",), True, 4 * 3000, 12 * 3000),
        (("parallel.zero_stage=1", "train.optimizer=sgd"), False, 8 * 3000, 4 * (250 + 1000)),
    ],
)
def test_fixed_memory_by_hand(words: tuple[str, ...], bf16: bool, parameters_bytes: int, owned_bytes: int) -> None:
    """Four ranks, expert parallel 2: half of the experts each, two ranks with the same."""
    config = settings(*words, "parallel.expert_parallel=2", "checkpoint.asynchronous=false")
    found = estimate_memory(config, SHAPE, Mesh(4, 0, 2), bf16)  # type: ignore[arg-type]
    assert found.fixed == parameters_bytes + owned_bytes and found.copy == 0
    beside = settings(*words, "parallel.expert_parallel=2")
    copies = [estimate_memory(beside, SHAPE, Mesh(4, rank, 2), bf16).copy for rank in range(4)]  # type: ignore[arg-type]
    assert sum(copies) == checkpoint_bytes(beside, SHAPE, bf16)  # type: ignore[arg-type]


def test_recomputation_takes_less() -> None:
    deep = replace(SHAPE, layers=30)
    plain, again = (
        estimate_memory(settings(f"train.activation_checkpointing={flag}"), deep, Mesh(1, 0, 1), False).activations  # type: ignore[arg-type]
        for flag in ("false", "true")
    )
    assert again < plain / 5


def test_the_table_fits_a_terminal_and_json_comes_back(tmp_path: Path) -> None:
    findings = [
        Finding("disk", Outcome.failed, "x " * 90, "buy one"),
        Finding("text", Outcome.passed, "[b]7[/b]"),
    ]
    write_json(findings, tmp_path / "new/findings.json")
    assert read_json(tmp_path / "new/findings.json") == findings
    with (console := Console(width=80, color_system=None)).capture() as shown:
        console.print(table(findings))
    assert max(map(len, shown.get().splitlines())) <= 80
    assert "-> buy one" in shown.get() and "[b]7[/b]" in shown.get()


def test_sizes_in_words() -> None:
    assert [bytes_in_words(size) for size in (7, 1500, 2_500_000, 3e9, 4e12)] == [
        "7 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "4.00 TB",
    ]
