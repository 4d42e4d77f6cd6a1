"""Tests of the comparisons behind the checks, of the estimates, and of the table of findings."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config, resolve
from dist_moe.doctor.context import DoctorContext, experts_per_token
from dist_moe.doctor.estimates import (
    MemoryEstimate,
    MemoryNeed,
    ModelShape,
    checkpoint_bytes,
    compare_disk,
    compare_memory,
    estimate_memory,
    free_memory,
    max_checkpoints,
)
from dist_moe.doctor.finding import Finding, Outcome, read_json, table, write_json
from dist_moe.doctor.machines import compare_placement, compare_versions, patterns
from dist_moe.doctor.network import compare_clocks, connection_error
from dist_moe.doctor.training_checks import small_task
from dist_moe.model.attention import NAME
from dist_moe.model.cross_entropy import chunk_rows
from dist_moe.model.norm import FusedRMSNorm
from dist_moe.worker.rank_info import RankInfo

ALONE, CPU = Mesh(1, 0, 1), torch.device("cpu")
DEBUG = Path(__file__).resolve().parents[3] / "configs" / "debug.yaml"
SHAPE = ModelShape(
    dense=1000, experts=4000, layers=3, hidden_size=8, experts_per_token=2, expert_size=4, vocabulary=100
)


def config_with(*overrides: str, workers: int = 4) -> Config:
    return resolve(load_config(DEBUG, overrides), workers).config


def test_compare_versions_names_the_rank_that_differs() -> None:
    same = {"python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.17.0"}
    assert compare_versions([same] * 4).outcome is Outcome.passed
    finding = compare_versions([same, same, same | {"torch": "2.11.0"}, same])
    assert finding.outcome is Outcome.failed and finding.remedy
    assert finding.found == "rank 2 has torch 2.11.0, most have 2.13.0"


def test_compare_placement_warns_of_more_threads_than_cores() -> None:
    assert compare_placement([("a", 4, 2), ("a", 4, 2)], "gloo").outcome is Outcome.passed
    finding = compare_placement([("a", 4, 2), ("b", 4, 4), ("b", 4, 4)], "gloo")
    assert finding.outcome is Outcome.warned and "b: 8 threads of 2 ranks on 4 cores" in finding.found


def test_all_to_all_patterns_match_their_names() -> None:
    by_name = patterns(4)
    assert len({count for row in by_name["even"] for count in row}) == 1
    assert 0 in by_name["some empty"][0] and sum(by_name["none"][3]) == 0
    assert all(sum(row[:3]) == 0 < row[3] for row in by_name["all to one"])


def test_compare_memory_adds_the_ranks_of_a_host() -> None:
    estimate, small = MemoryEstimate(fixed=6, activations=3, checkpoint_copy=1), MemoryNeed("b", 7, 7)
    enough = [MemoryNeed("a", 10, 17), MemoryNeed("a", 7, 17), small]
    assert compare_memory(estimate, enough).outcome is Outcome.passed
    short = compare_memory(estimate, [MemoryNeed("a", 10, 16), MemoryNeed("a", 7, 17), small])
    assert short.outcome is Outcome.failed and "b has" not in short.found
    assert "a has 16 bytes free, and its 2 ranks need 17 bytes" in short.found


def test_free_memory_is_plausible() -> None:
    assert 0 < free_memory() < 1 << 50


def test_experts_per_token_of_threshold_routing_is_its_target() -> None:
    threshold = ("router.selection=threshold", "router.score=softmax", "balance.policy=adaptive_weight")
    assert experts_per_token(config_with(*threshold, "router.max_experts=6")) == 6
    assert (
        experts_per_token(config_with(*threshold, "router.max_experts=6", "router.target_experts_per_token=2.5")) == 3
    )


def test_compare_clocks_names_the_hosts() -> None:
    assert compare_clocks([("a", 100.0), ("b", 100.4)]).outcome is Outcome.passed
    finding = compare_clocks([("a", 100.0), ("b", 103.5), ("c", 101.0)])
    assert finding.outcome is Outcome.warned
    assert finding.found == "the clock of b is 3.5 s ahead of that of a"


def test_connection_error_names_a_closed_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert connection_error(address, 3.0) == ""
    assert f"127.0.0.1:{address[1]} (" in connection_error(address, 3.0)


def test_compare_disk() -> None:
    enough, short = compare_disk(10, 3, 30), compare_disk(10, 3, 29)
    assert enough.outcome is Outcome.passed and short.outcome is Outcome.failed
    assert enough.found == "3 checkpoints of 10 bytes, 30 bytes in total; 30 bytes free"
    assert compare_disk(10, 1, 30).found == "1 checkpoint of 10 bytes; 30 bytes free"


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (("train.steps=20", "checkpoint.interval=0"), 1),
        (("train.steps=20", "checkpoint.interval=5"), 5),
        (("train.steps=20", "checkpoint.interval=5", "checkpoint.keep_last=2"), 3),
        (("train.steps=20", "checkpoint.interval=5", "checkpoint.keep_last=1", "checkpoint.keep_every=10"), 4),
        (("train.steps=20", "checkpoint.interval=10", "checkpoint.keep_last=9"), 3),
    ],
)
def test_max_checkpoints(overrides: tuple[str, ...], count: int) -> None:
    assert max_checkpoints(config_with(*overrides)) == count


@pytest.mark.parametrize(
    ("overrides", "bf16", "parameters_bytes", "owned_bytes"),
    [
        (("parallel.zero_stage=0",), False, 8 * 3000, 8 * 3000),
        (("parallel.zero_stage=1",), False, 8 * 3000, 12 * (250 + 1000)),
        (("parallel.zero_stage=2",), True, 4 * 3000, 12 * (250 + 1000)),
        (("parallel.zero_stage=0",), True, 4 * 3000, 12 * 3000),
        (("parallel.zero_stage=1", "train.optimizer=sgd"), False, 8 * 3000, 4 * (250 + 1000)),
    ],
)
def test_estimate_memory_by_hand(
    overrides: tuple[str, ...], bf16: bool, parameters_bytes: int, owned_bytes: int
) -> None:
    """Four ranks, expert parallel 2: each rank has half of the experts, and two ranks have the same half."""
    config = config_with(*overrides, "parallel.expert_parallel=2", "checkpoint.asynchronous=false")
    estimate = estimate_memory(config, SHAPE, Mesh(4, 0, 2), bf16, CPU)
    assert estimate.fixed == parameters_bytes + owned_bytes and estimate.checkpoint_copy == 0
    asynchronous = config_with(*overrides, "parallel.expert_parallel=2")
    copies = [estimate_memory(asynchronous, SHAPE, Mesh(4, rank, 2), bf16, CPU).checkpoint_copy for rank in range(4)]
    assert sum(copies) == checkpoint_bytes(asynchronous, SHAPE, bf16)


def test_parameters_that_are_not_trained_have_a_weight_alone() -> None:
    frozen = replace(SHAPE, frozen_dense=400, frozen_experts=1000, frozen_layers=1)
    config = config_with("parallel.zero_stage=0", "parallel.expert_parallel=2", "checkpoint.asynchronous=false")
    whole, part = (estimate_memory(config, shape, Mesh(2, 0, 2), False, CPU) for shape in (SHAPE, frozen))
    assert whole.fixed - part.fixed == (4 + 8) * (400 + 1000 // 2)
    assert part.activations < whole.activations
    assert checkpoint_bytes(config, SHAPE, True) - checkpoint_bytes(config, frozen, True) == 12 * (400 + 1000)


@pytest.mark.parametrize(
    ("mesh", "stage", "gradient_bytes"),
    [
        (Mesh(1, 0, 1), 1, 4 * 5000),
        (Mesh(2, 0, 2), 1, 2 * 1000 + 4 * 2000),
        (Mesh(2, 0, 1), 1, 2 * 5000),
        (Mesh(1, 0, 1), 0, 2 * 5000),
        (Mesh(1, 0, 1), 2, 2 * 5000),
    ],
)
def test_gradients_of_one_rank_are_in_fp32_at_zero_1(mesh: Mesh, stage: int, gradient_bytes: int) -> None:
    config = config_with(f"parallel.zero_stage={stage}", f"parallel.expert_parallel={mesh.expert_parallel}")
    parameters = 1000 + 4000 // mesh.expert_parallel
    owned = parameters if stage == 0 else 5000 // mesh.world_size
    fixed = estimate_memory(config, SHAPE, mesh, True, CPU).fixed
    assert fixed == 2 * parameters + gradient_bytes + 12 * owned


def test_buffers_in_shared_memory_are_estimated_where_rows_go_through_them() -> None:
    of_two = ("data.sequence_length=256", "train.micro_batch_size=6")

    def activations(mesh: Mesh, device: str = "cpu", shared: str = "true") -> int:
        config = config_with(*of_two, f"parallel.shared_memory={shared}", workers=mesh.world_size)
        return estimate_memory(config, SHAPE, mesh, True, torch.device(device)).activations

    config = config_with(*of_two, workers=2)
    rows = config.train.sequences_per_forward * config.data.sequence_length * SHAPE.experts_per_token
    without = activations(Mesh(2, 0, 2), shared="false")
    assert activations(Mesh(2, 0, 2)) == without + 2 * 1.25 * rows * SHAPE.hidden_size * 2
    assert activations(Mesh(2, 0, 1)) == without == activations(Mesh(2, 0, 1), shared="false")
    assert activations(Mesh(2, 0, 2), "cuda") == activations(Mesh(2, 0, 2), "cuda", "false")


LONG = ("data.sequence_length=256", "train.micro_batch_size=12")


def loss_bytes(name: str, shape: ModelShape = SHAPE) -> int:
    """The estimated activations of the loss alone, in bf16: without layers."""
    config = config_with(*LONG, f"model.cross_entropy={name}", workers=1)
    return estimate_memory(config, replace(shape, layers=0), ALONE, True, CPU).activations


def test_logits_are_estimated_by_the_implementation_of_the_loss() -> None:
    config = config_with(*LONG, workers=1)
    tokens = config.train.sequences_per_forward * config.data.sequence_length
    large = replace(SHAPE, vocabulary=100_000)
    assert loss_bytes("plain", large) == tokens * 100_000 * 8
    rows = chunk_rows(tokens, 100_000, 4, "cpu")
    assert rows < tokens
    assert loss_bytes("chunked", large) == rows * 100_000 * 8 + 8 * (tokens * 2 + 100_000 * 4)
    assert loss_bytes("auto", large) == loss_bytes("chunked", large)
    assert loss_bytes("auto", replace(large, linear_head=False)) == loss_bytes("plain", large)


def test_the_small_model_has_the_implementations_of_the_run(tmp_path: Path) -> None:
    found = []
    for words in ((), ("model.attention=sdpa", "model.norm=plain", "model.cross_entropy=plain")):
        resolved = resolve(load_config(DEBUG, words), 1)
        context = DoctorContext(resolved, DistContext(RankInfo(), CPU, "gloo"), ALONE, tmp_path, None)
        task = small_task(context, ALONE)
        fused = any(isinstance(module, FusedRMSNorm) for module in task.modules())
        found.append((task.model.config._attn_implementation, fused, task.cross_entropy))
    assert found == [(NAME, True, "auto"), ("sdpa", False, "plain")]


def test_activation_checkpointing_lowers_the_estimate() -> None:
    deep = replace(SHAPE, layers=30)
    plain, recomputed = (
        estimate_memory(config_with(f"train.activation_checkpointing={flag}"), deep, ALONE, False, CPU).activations
        for flag in ("false", "true")
    )
    assert recomputed < plain / 5


def test_the_table_fits_a_terminal_and_json_round_trips(tmp_path: Path) -> None:
    findings = [
        Finding("disk", Outcome.failed, "x " * 90, "buy one"),
        Finding("text", Outcome.passed, "[b]7[/b]"),
    ]
    write_json(findings, tmp_path / "new/findings.json")
    assert read_json(tmp_path / "new/findings.json") == findings
    with (console := Console(width=80, color_system=None)).capture() as output:
        console.print(table(findings))
    assert max(map(len, output.get().splitlines())) <= 80
    assert "-> buy one" in output.get() and "[b]7[/b]" in output.get()
