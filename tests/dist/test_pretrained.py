"""Runs that start from a Hugging Face folder: its biases are kept, and a resumed run does not need the folder."""

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


def make_pretrained(folder: Path, architecture: str, *overrides: str) -> tuple[str, ...]:
    """Write a pretrained folder -> the overrides of a run that starts from it."""
    make_folder(folder, architecture, torch.bfloat16)
    make_tokenizer(folder)
    fixed = (f"model.architecture={architecture}", "model.config={}", f"model.pretrained={folder}")
    return (*fixed, "data.tokenizer=pretrained", "data.validation_fraction=0.3", *overrides)


def biases(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.rpartition(" ")[2]: bias for name, bias in found.items() if name.endswith("correction_bias")}


def test_trap_T40_a_run_keeps_the_biases_of_its_pretrained_folder(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """With a rate of 0, so that balancing does not change them."""
    overrides = make_pretrained(tmp_path / "model", "deepseek_v3", "balance.rate=0.0", "train.steps=1")
    ranks.run(train, 2, text, tmp_path / "run", overrides)
    stored = biases(load_file(tmp_path / "model/model.safetensors"))
    kept = biases(tensors(tmp_path / "run/checkpoints/step-000001"))
    assert len(stored) == 2 and stored.keys() == kept.keys()
    assert all(bias.any() and torch.equal(kept[name], bias.float()) for name, bias in stored.items())


def test_a_run_resumes_without_the_pretrained_folder(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """From its own checkpoint and tokenizer, with equal losses; also if the folder was moved."""
    overrides = make_pretrained(tmp_path / "model", "qwen3_moe", "train.schedule_steps=20")
    ranks.run(train, 2, text, tmp_path / "whole", (*overrides, "train.steps=4"))
    ranks.run(train, 2, text, tmp_path / "parts", (*overrides, "train.steps=2"))
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    ranks.run(train, 2, text, tmp_path / "parts", (*overrides, "train.steps=3"))
    ranks.run(train, 2, text, tmp_path / "parts", (*overrides, f"model.pretrained={moved}", "train.steps=4"))
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert list(parts) == [1, 2, 3, 4]
    assert [step["loss"] for step in parts.values()] == [step["loss"] for step in whole.values()]
    files = [folder / "tokenizer.json" for folder in (moved, tmp_path / "parts/checkpoints/step-000004/model")]
    assert files[0].read_bytes() == files[1].read_bytes()
