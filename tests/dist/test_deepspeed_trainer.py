"""transformers' Trainer under DeepSpeed on two ranks: balanced, counted exactly, and resumed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.deepspeed_trainer import LENGTH, MICRO_BATCHES, SEQUENCES, STEPS
from tests.selection import only_first

ROOT = Path(__file__).resolve().parents[2]
RANKS, TOP_K, NAN_STEP, SAVED = 2, 2, 5, STEPS // 2


def train(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """Train on two ranks; return the load of each step, which is equal on both."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    argv += ["--module", "tests.dist.deepspeed_trainer", str(folder), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    first, second = (json.loads((folder / f"loads-{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second and first["engine"] == "DeepSpeedEngine"
    loads: list[dict[str, Any]] = first["loads"]
    return loads


@pytest.mark.slow
@pytest.mark.parametrize("stage", only_first([2, 1]))
def test_the_trainer_under_deepspeed_is_balanced_and_resumes_bit_for_bit(tmp_path: Path, stage: int) -> None:
    """With accumulation, recomputation and evaluations; a step with a NaN on one rank changes no bias."""
    whole = train(tmp_path, stage, NAN_STEP)
    assert [load["step"] for load in whole] == list(range(1, STEPS + 1))
    assignments = RANKS * MICRO_BATCHES * SEQUENCES * LENGTH * TOP_K
    assert {sum(counts) for load in whole for counts in load["counts"]} == {assignments}
    assert [load["step"] for load in whole if not load["taken"]] == [NAN_STEP]
    changed = [one["biases"] != other["biases"] for one, other in itertools.pairwise(whole)]
    assert [step for step, each in enumerate(changed, start=2) if not each] == [NAN_STEP]
    max_vio = [load["max_vio"] for load in whole]
    assert max_vio[0] > 1 and sum(max_vio[-5:]) / 5 < max_vio[0] / 2, max_vio

    (tmp_path / f"checkpoint-{STEPS}").rename(tmp_path / "last")
    assert train(tmp_path, stage) == whole[SAVED:], "the counts and biases of the whole run"
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["BalancerCallback"]["attributes"]["balancer"]
    assert (saved["steps"], saved["taken"]) == (STEPS, STEPS - 1)
