"""Tests of the doctor on real workers: the debug run passes, and injected faults are found."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_moe.checkpoint import training_state
from dist_moe.checkpoint.snapshot import collect
from dist_moe.comm.init import DistContext, set_pg_timeouts
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import load_config, resolve
from dist_moe.doctor import training_checks
from dist_moe.doctor.checks import run_on_all_ranks
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.estimates import estimate_memory, model_shape
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.doctor.machines import check_all_to_all
from dist_moe.doctor.training_checks import check_parity, check_saving
from dist_moe.engine.deepspeed import Engine
from dist_moe.train.setup import tokenize
from dist_moe.train.step import StepRecord, train_step
from dist_moe.worker.rank_info import RankInfo
from tests.dist.pool import RankPool
from tests.dist.resumable import ROOT, overrides_of, started, write_text
from tests.dist.steps import one_step
from tests.selection import cross, only_first, slow

NAMES = [
    "configuration",
    "launch",
    "versions",
    "placement",
    "ports",
    "clocks",
    "text",
    "all-to-all",
    "bandwidth",
    "EP 1 = EP N",
    "save and load",
    "memory",
    "disk",
]


def doctor(text: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dist_moe", "doctor", "configs/debug.yaml", *overrides_of(text, run), *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_debug_run_passes_and_leaves_no_files(tmp_path: Path, launcher: str) -> None:
    text = write_text(tmp_path)
    done = doctor(text, tmp_path / "run", "--launcher", launcher, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["check"] for finding in found] == NAMES
    assert {finding["outcome"] for finding in found} <= {"pass", "warn"}
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_text_that_cannot_be_fetched_fails_one_check_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine").write_text("mine")
    done = doctor(Path("shakespeare"), run, "--launcher", "torchrun", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {one["check"]: one["outcome"] for one in json.loads((tmp_path / "found.json").read_text())}
    assert outcomes["text"] == "fail" and outcomes["EP 1 = EP N"] == "n/a" and outcomes["all-to-all"] == "pass"
    assert [path.name for path in run.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", only_first([0, 1]))
def test_a_stopped_worker_does_not_block_the_doctor(tmp_path: Path, stopped: int) -> None:
    """Stop a worker by SIGSTOP once the process group exists; findings are complete unless it is rank 0."""
    run, found = tmp_path / "new/run", tmp_path / "found.json"
    argv = [sys.executable, "-m", "dist_moe", "doctor", "configs/debug.yaml"]
    argv += [*overrides_of(write_text(tmp_path), run, "parallel.timeout_s=10"), "--launcher", "torchrun"]
    with (tmp_path / "log").open("wb") as log:
        command = subprocess.Popen([*argv, "--json", str(found)], cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not list(run.glob("doctor-*/trial")):
                assert time.monotonic() < deadline and command.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            (record,) = run.glob(f"doctor-*/workers/rank-{stopped}.json")
            os.kill(json.loads(record.read_text())["pid"], signal.SIGSTOP)
            assert command.wait(150) == 1, (tmp_path / "log").read_text()
        finally:
            command.kill()
            command.wait()
    findings = {one["check"]: one for one in json.loads(found.read_text())}
    assert findings["launch"]["outcome"] == "fail" and "the process group broke" in findings["launch"]["found"]
    if stopped == 1:
        assert list(findings) == NAMES and findings["disk"]["outcome"] == "n/a"
        assert "rank 1 does not answer" in [one["found"] for one in findings.values() if one["outcome"] == "fail"]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_workers_of_an_external_launcher_leave_no_files(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dist_moe", "doctor", "configs/debug.yaml"]
    argv += [*overrides_of(write_text(tmp_path), tmp_path / "new/run"), "--json", str(tmp_path / "found.json")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    rendezvous = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(argv, cwd=ROOT, env=os.environ | rendezvous | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")
    ]
    try:
        assert [worker.wait(150) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    found = [one["check"] for one in json.loads((tmp_path / "found.json").read_text())]
    assert found == [name for name in NAMES if name not in ("configuration", "launch")]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_invalid_configuration_starts_no_workers(tmp_path: Path) -> None:
    done = doctor(write_text(tmp_path), tmp_path / "run", "parallel.expert_parallel=5")
    assert done.returncode == 2 and "parallel.expert_parallel=5" in done.stderr
    assert not (tmp_path / "run").exists()


def context_of(rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...] = ()) -> DoctorContext:
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder, *words)), world_size)
    rank_info = RankInfo(rank, world_size, rank, world_size, "env")
    dist_context, mesh = DistContext(rank_info, torch.device("cpu"), "gloo"), make_mesh(resolved.expert_parallel)
    return DoctorContext(resolved, dist_context, mesh, folder, tokenize(resolved.config))


def run_parity_checks(rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...]) -> list[Finding]:
    context = context_of(rank, world_size, text, folder, words)
    return [check_all_to_all(context), check_parity(context)]


ADAPTIVE = ("router.selection=threshold", "router.score=softmax", "balance.policy=adaptive_weight")
DROPOUT = "model.config.attention_dropout=0.3"  # drawn again for each of the steps that are compared
GROUPS = ("model.config.n_group=4", "model.config.topk_group=2")


@pytest.mark.parametrize(
    "words", only_first([("parallel.zero_stage=0", DROPOUT), (*ADAPTIVE, "parallel.zero_stage=2"), GROUPS])
)
def test_trap_T22_expert_parallelism_is_compared_with_none(
    ranks: RankPool, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for findings in ranks.run(run_parity_checks, 2, write_text(tmp_path), tmp_path, words):
        assert [finding.outcome for finding in findings] == [Outcome.passed] * 2, findings


def training_checks_with(
    rank: int, world_size: int, text: Path, folder: Path, inject: Callable[[], None]
) -> list[Finding]:
    """Run both training checks after injecting a fault into this process."""
    inject()
    context = context_of(rank, world_size, text, folder)
    return [check_parity(context), check_saving(context)]


def inject_nothing() -> None:
    """Leave everything as it is."""


def inject_wrong_gradient() -> None:
    """Make the gradient of rank 1's experts 1 % too large under expert parallelism."""

    def wrong_step(engine: Engine, *given: object) -> StepRecord:
        if engine.mesh.expert_parallel > 1 and engine.mesh.rank == 1:
            names = dict(engine.module.named_parameters())
            down = next(names[name] for name in names if name.endswith("experts.local.down_proj"))
            down.register_hook(lambda gradient: gradient * 1.01)
        return train_step(engine, *given)  # type: ignore[arg-type]

    training_checks.train_step = wrong_step  # type: ignore[assignment]


def inject_lost_moments() -> None:
    """Do not read the moments on resume."""
    training_state._restore_optimizer = lambda *given: None


@pytest.mark.parametrize(
    ("inject", "outcomes", "message"),
    [
        (inject_nothing, ["pass", "pass"], "restored bit for bit"),
        (inject_wrong_gradient, ["fail", "pass"], "rank 1: gradients of "),
        slow(inject_lost_moments, ["pass", "fail"], "restores different bits in exp_avg"),
    ],
)
def test_the_training_checks_find_an_injected_fault_and_nothing_else(
    tmp_path: Path, inject: Callable[[], None], outcomes: list[str], message: str
) -> None:
    """Use a separate pool, since the fault stays in its processes."""
    with RankPool(2) as own:
        found = own.run(training_checks_with, 2, write_text(tmp_path), tmp_path, inject)
    assert all([finding.outcome.value for finding in of_rank] == outcomes for of_rank in found[1:]), found
    assert any(message in finding.found for of_rank in found for finding in of_rank), found


def raise_on_rank_1(rank: int, world_size: int, text: Path, folder: Path, in_collective: bool) -> tuple[Finding, bool]:
    """Raise on rank 1 in a check, while the other rank waits in a collective or in none."""

    def check(context: DoctorContext) -> Finding:
        if rank == 1:
            raise OSError("only here")
        if in_collective:
            dist.all_reduce(torch.ones(1))
        return Finding("trial", Outcome.passed, "well")

    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder)), world_size)
    rank_info = RankInfo(rank, world_size, rank, world_size, "env")
    mesh, limit_s = make_mesh(2), 4.0
    set_pg_timeouts(limit_s)
    context = DoctorContext(resolved, DistContext(rank_info, torch.device("cpu"), "gloo"), mesh, folder, None, limit_s)
    return run_on_all_ranks("trial", check, context)


@pytest.mark.parametrize("in_collective", [False, True])
def test_an_exception_on_one_rank_is_reported_by_all(ranks: RankPool, tmp_path: Path, in_collective: bool) -> None:
    for finding, group_broken in ranks.run(raise_on_rank_1, 2, write_text(tmp_path), tmp_path, in_collective):
        assert finding.outcome is Outcome.failed and finding.found == "rank 1: OSError: only here"
        assert group_broken is in_collective


def allocated_bytes(
    rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Return bytes after one step, each with the doctor's estimate.

    First those of weights, gradients, master weights and moments, then those of the checkpoint copy.
    """
    with started(rank, world_size, overrides_of(text, folder, *words)) as (resolved, training):
        one_step(resolved, training, 1)
        engine = training.engine
        parameters = list(training.task.parameters())
        weights = sum(parameter.nbytes for parameter in parameters)
        gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
        owners = {id(fragment.optimizer_tensor): fragment.optimizer_tensor for fragment in engine.optimizer_fragments()}
        own = {id(parameter) for parameter in training.task.parameters()}
        masters = sum(owner.nbytes for key, owner in owners.items() if key not in own)
        states = (engine.optimizer_state.get(owner, {}) for owner in owners.values())
        moments = sum(state[kind].nbytes for state in states for kind in engine.settings.moments if kind in state)
        shape = model_shape(resolved, training.data.tokenizer.vocab_size)
        bf16 = engine.settings.bf16
        expected = estimate_memory(resolved.config, shape, engine.mesh, bf16, engine.device)
        snapshot = collect(training, 1)
        of_files = (part for parts in snapshot.tensors.values() for part in parts.items())
        random_states = sum(tensor.nbytes for name, tensor in of_files if name.startswith("random:"))
        return [
            (weights + gradients + masters + moments, expected.fixed),
            (snapshot.bytes - random_states, expected.checkpoint_copy),
        ]


@cross(("precision", ["fp32", "bf16"]), ("stage", [0, 1, 2]), ("frozen", [0, 1, 2]), strength=1)
def test_fixed_memory_and_checkpoint_copy_are_exact(
    ranks: RankPool, tmp_path: Path, stage: int, precision: str, frozen: int
) -> None:
    words = (
        *(f"parallel.zero_stage={stage}", f"train.precision={precision}", "parallel.expert_parallel=2"),
        f"train.frozen_layers={frozen}",
    )
    for pairs in ranks.run(allocated_bytes, 4, write_text(tmp_path), tmp_path, (*words, "checkpoint.interval=1")):
        for allocated, expected in pairs:
            assert allocated == pytest.approx(expected, rel=0.02)
