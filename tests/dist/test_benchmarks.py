"""A tiny case of every program of the benchmark, through the code that measures; no times are judged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.block.measure import measure_block
from benchmarks.cases import CASES, COARSE, DEEPSEEK, BlockCase, StartCase, StepCase, entries
from benchmarks.environment import cores
from benchmarks.start import measure_start
from benchmarks.step.measure import measure_steps, require_memory
from benchmarks.step.session import CannotRun

TINY = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
}
QWEN = {**COARSE, **TINY, "num_experts": 4, "head_dim": 8}
DEEPSEEK_TINY = {**DEEPSEEK, **TINY, "n_routed_experts": 4}
SEEN: list[str] = []


def tiny(folder: Path, *programs: str) -> StepCase:
    """A case of two workers with 2 x 16 tokens each."""
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"expert token load bias {n} router {n * n}"}) + "\n" for n in range(99))
    )
    case = CASES["coarse-fp32"]
    assert isinstance(case, StepCase)
    sizes = replace(case, model=QWEN, sequences=2, length=16, warmup_steps=1)
    return replace(sizes, entries=entries(*programs), sources=(str(text),), tokenizer="bytes")


@pytest.mark.skipif(len(cores()) < 2, reason="each worker needs a core")
@pytest.mark.slow
def test_every_program_trains_a_tiny_case_on_the_same_tokens(tmp_path: Path) -> None:
    case = tiny(tmp_path, "ours-gloo", "ours-mpi", "autoep-tuned", "autoep-mpi", "hf-tuned", "classic")
    rows = {row.name: row for row in measure_steps(case, rounds=2, steps=1, log=SEEN.append)}
    assert {name: row.reason for name, row in rows.items() if row.reason} == {
        "autoep-mpi": "DeepSpeed's backend mpi is that of torch, and this build of torch has none"
    }
    measured = [row for row in rows.values() if row.measured]
    # ln 257 = 5.549; all start from other values of the same distribution, and read the same tokens.
    assert {len(row.seconds) for row in measured} == {2} and all(5.3 < (row.loss or 0) < 5.7 for row in measured)
    assert rows["ours-gloo"].loss == pytest.approx(rows["ours-mpi"].loss, abs=1e-3)
    assert rows["autoep-tuned"].loss == pytest.approx(rows["hf-tuned"].loss, abs=1e-3)
    for row in measured:
        assert row.experts_per_token == 2.0 and 0 <= (row.max_vio or 0) < 1 and (row.peak_mib or 0) > 100
    # Two layers, forward and backward, forth and back: 64 rows of 32 floats, or as many back as arrived at rank 0.
    exchanged = {name: row.bytes.get("all_to_all_single", 0) for name, row in rows.items()}
    assert exchanged["ours-gloo"] == exchanged["ours-mpi"] and exchanged["hf-tuned"] == 0
    assert exchanged["ours-gloo"] == pytest.approx(2 * 2 * 2 * 64 * 32 * 4, rel=0.3)


@pytest.mark.skipif(len(cores()) < 2, reason="each worker needs a core")
@pytest.mark.slow
@pytest.mark.full
def test_a_peer_that_cannot_run_a_case_is_a_row_with_a_reason(tmp_path: Path) -> None:
    case = tiny(tmp_path, "ours-gloo", "autoep", "classic")
    case = replace(case, architecture="deepseek_v3", model=DEEPSEEK_TINY, overrides=("balance.policy=none",))
    rows = {row.name: row for row in measure_steps(case, rounds=1, steps=1, log=SEEN.append)}
    assert rows["ours-gloo"].measured
    assert rows["autoep"].reason == "it has no balance.policy=none" and not rows["classic"].measured


def test_more_workers_than_cores_are_not_measured(tmp_path: Path) -> None:
    case = replace(tiny(tmp_path, "ours-gloo"), workers=1000)
    (row,) = measure_steps(case, rounds=1, steps=1, log=SEEN.append)
    assert row.reason.startswith("needs 1000 cores")


@pytest.mark.slow
def test_every_block_is_measured_beside_its_limit() -> None:
    programs = ("ours", "autoep", "hf", "loop", "classic", "ours-threshold")
    case = BlockCase(
        name="tiny",
        programs=programs,
        hidden=32,
        width=16,
        experts=4,
        top_k=2,
        tokens=64,
        precision="fp32",
        zipf_exponent=1.0,
    )
    rows = measure_block(case, rounds=2)
    assert [(row.name, row.reason, len(row.seconds)) for row in rows] == [
        (name, "", 2) for name in (*programs, "limit")
    ]


@pytest.mark.slow
@pytest.mark.full
def test_a_start_is_measured_beside_the_imports() -> None:
    rows = {row.name: row for row in measure_start(StartCase(name="tiny", launchers=("none",), workers=1), rounds=1)}
    assert set(rows) == {"limit", "ours-none"} and all(row.measured for row in rows.values())
    # A worker imports the same packages, and then trains a step.
    assert rows["ours-none"].seconds[0] > 0.8 * rows["limit"].seconds[0]


def test_a_program_without_room_in_memory_is_not_started() -> None:
    require_memory(1.0)
    with pytest.raises(CannotRun, match=r"needs about 1,000,000,000 MiB of memory, and [\d,]+ MiB are available"):
        require_memory(1e9)
