"""The doctor on real workers: all is well with the debug run, and what is broken is found without harm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_moe.comm.bootstrap import World, limit_groups
from dist_moe.comm.mesh import make_mesh
from dist_moe.comm.place import Place
from dist_moe.config import load_config, resolve
from dist_moe.doctor.examine import together
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.doctor.machines import check_exchange
from dist_moe.doctor.sizes import estimate_memory, shape_of
from dist_moe.doctor.subject import Subject
from dist_moe.doctor.trials import check_parity
from dist_moe.train.loop import prepare_text
from tests.dist.pool import RankPool
from tests.dist.resumable import ROOT, overrides_of, started, write_text
from tests.dist.steps import one_step

NAMES = [
    "configuration",
    "launch",
    "versions",
    "places",
    "text",
    "all-to-all",
    "exchange",
    "EP 1 = EP N",
    "save and load",
    "memory",
    "disk",
]


def doctor(text: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dist_moe", "doctor", "configs/debug.yaml", *overrides_of(text, run), *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_all_is_well_and_nothing_is_left(tmp_path: Path, launcher: str) -> None:
    text = write_text(tmp_path)
    done = doctor(text, tmp_path / "run", "--launcher", launcher, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["check"] for one in found] == NAMES
    assert {one["outcome"] for one in found} <= {"pass", "warn"}
    assert not (tmp_path / "run").exists()


def test_a_failed_check_is_told_and_the_others_run(tmp_path: Path) -> None:
    """A text that cannot be had."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine").write_text("mine")
    done = doctor(tmp_path / "nowhere.jsonl", run, "--launcher", "torchrun", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {one["check"]: one["outcome"] for one in json.loads((tmp_path / "found.json").read_text())}
    assert outcomes["text"] == "fail" and outcomes["EP 1 = EP N"] == "n/a" and outcomes["all-to-all"] == "pass"
    assert [path.name for path in run.iterdir()] == ["mine"]


def test_a_wrong_configuration_starts_nothing(tmp_path: Path) -> None:
    done = doctor(write_text(tmp_path), tmp_path / "run", "parallel.expert_parallel=5")
    assert done.returncode == 2 and "parallel.expert_parallel=5" in done.stderr
    assert not (tmp_path / "run").exists()


def examined(rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...]) -> list[Finding]:
    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder, *words)), world_size)
    place = Place(rank, world_size, rank, world_size, "env")
    world, mesh = World(place, torch.device("cpu"), "gloo"), make_mesh(resolved.expert_parallel)
    subject = Subject(resolved, world, mesh, folder, prepare_text(resolved.config))
    return [check_exchange(subject), check_parity(subject)]


ADAPTIVE = ("router.selection=threshold", "router.score=softmax", "balance.policy=adaptive_weight")
GROUPS = ("model.config.n_group=4", "model.config.topk_group=2")


@pytest.mark.parametrize("words", [("parallel.zero_stage=0",), (*ADAPTIVE, "parallel.zero_stage=2"), GROUPS])
def test_trap_T22_expert_parallelism_is_compared_with_none(
    ranks: RankPool, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for findings in ranks.run(examined, 2, write_text(tmp_path), tmp_path, words):
        assert [finding.outcome for finding in findings] == [Outcome.passed] * 2, findings


def raising(rank: int, world_size: int, text: Path, folder: Path, within: bool) -> tuple[Finding, bool]:
    """Rank 1 raises in a check, before the others' collective or beside none."""

    def check(subject: Subject) -> Finding:
        if rank == 1:
            raise OSError("only here")
        if within:
            dist.all_reduce(torch.ones(1))
        return Finding("trial", Outcome.passed, "well")

    resolved = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder)), world_size)
    place = Place(rank, world_size, rank, world_size, "env")
    mesh, limit_s = make_mesh(2), 4.0
    limit_groups(limit_s)
    subject = Subject(resolved, World(place, torch.device("cpu"), "gloo"), mesh, folder, None, limit_s)
    return together("trial", check, subject)


@pytest.mark.parametrize("within", [False, True])
def test_a_check_that_raises_on_one_rank_is_told_with_its_words(ranks: RankPool, tmp_path: Path, within: bool) -> None:
    for finding, lost in ranks.run(raising, 2, write_text(tmp_path), tmp_path, within):
        assert finding.outcome is Outcome.failed and finding.found == "rank 1: OSError: only here"
        assert lost is within


def held_bytes(rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...]) -> tuple[int, int]:
    """After a step: the bytes of weights, gradients (as many), masters and moments, and what the doctor expects."""
    with started(rank, world_size, overrides_of(text, folder, *words)) as (resolved, training):
        one_step(resolved, training, 1)
        engine = training.engine
        weights = sum(parameter.nbytes for parameter in training.task.parameters())
        owners = {id(held.owner): held.owner for held in engine.held()}
        own = {id(parameter) for parameter in training.task.parameters()}
        masters = sum(owner.nbytes for key, owner in owners.items() if key not in own)
        states = (engine.optimizer_state.get(owner, {}) for owner in owners.values())
        moments = sum(state[kind].nbytes for state in states for kind in engine.settings.moments if kind in state)
        shape = shape_of(resolved, training.prepared.tokenizer.vocab_size)
        bf16 = engine.settings.bf16
        expected = estimate_memory(resolved.config, shape, world_size, engine.mesh.expert_parallel, bf16)
        return 2 * weights + masters + moments, expected.fixed


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_exact_part_of_the_memory_is_exact(ranks: RankPool, tmp_path: Path, stage: int, precision: str) -> None:
    words = (f"parallel.zero_stage={stage}", f"train.precision={precision}", "parallel.expert_parallel=2")
    for found, expected in ranks.run(held_bytes, 4, write_text(tmp_path), tmp_path, words):
        assert found == pytest.approx(expected, rel=0.02)
