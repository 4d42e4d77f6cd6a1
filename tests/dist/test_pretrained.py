"""Runs that begin with a Hugging Face folder: its biases are kept, and a run that goes on does not need it any more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.dist.pool import RankPool
from tests.dist.resumable import steps, tensors, train, write_text
from tests.folders import make_folder, make_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def begun_with(folder: Path, architecture: str, *further: str) -> tuple[str, ...]:
    make_folder(folder, architecture, torch.bfloat16)
    make_tokenizer(folder)
    fixed = (f"model.architecture={architecture}", "model.config={}", f"model.pretrained={folder}")
    return (*fixed, "data.tokenizer=pretrained", "data.validation_fraction=0.3", *further)


def biases(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(" ")[2]: bias for name, bias in found.items() if name.endswith("correction_bias")}


def test_trap_T40_a_run_keeps_the_biases_that_it_begins_with(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """A rate of 0, so that nothing else moves them."""
    begun = begun_with(tmp_path / "model", "deepseek_v3", "balance.rate=0.0", "train.steps=1")
    ranks.run(train, 2, text, tmp_path / "run", begun)
    stored = biases(load_file(tmp_path / "model/model.safetensors"))
    kept = biases(tensors(tmp_path / "run/checkpoints/step-000001"))
    assert len(stored) == 2 and stored.keys() == kept.keys()
    assert all(bias.any() and torch.equal(kept[name], bias.float()) for name, bias in stored.items())


def test_a_run_goes_on_without_the_folder(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """From its own checkpoint and tokenizer, as if it had never stopped; also with the folder at another place."""
    begun = begun_with(tmp_path / "model", "qwen3_moe", "train.schedule_steps=20")
    ranks.run(train, 2, text, tmp_path / "whole", (*begun, "train.steps=4"))
    ranks.run(train, 2, text, tmp_path / "parts", (*begun, "train.steps=2"))
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    ranks.run(train, 2, text, tmp_path / "parts", (*begun, "train.steps=3"))
    ranks.run(train, 2, text, tmp_path / "parts", (*begun, f"model.pretrained={moved}", "train.steps=4"))
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert list(parts) == [1, 2, 3, 4]
    assert [step["loss"] for step in parts.values()] == [step["loss"] for step in whole.values()]
    files = [folder / "tokenizer.json" for folder in (moved, tmp_path / "parts/checkpoints/step-000004/model")]
    assert files[0].read_bytes() == files[1].read_bytes()
