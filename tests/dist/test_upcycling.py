"""Runs that make an MoE model of a dense one, on several ranks: their start, resuming, and their weights elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dist_moe.checkpoint.export import export
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import load_config, resolve
from dist_moe.data.labeled.prepare import LabeledData
from dist_moe.data.stream import IGNORE_INDEX, Stream
from dist_moe.moe.select import Rule, ThresholdRouting, TopK
from dist_moe.train.setup import tokenize
from tests.dense import EXPERTS, dense_folder, outputs, upcycled
from tests.dist.pool import RankPool
from tests.dist.resumable import ROOT, overrides_of, same_bits, steps, tensors, train, write_text
from tests.selection import only_first
from tests.unit.model.samples import tokens

RULES: tuple[Rule, ...] = (TopK(1, "softmax"), TopK(2, "softmax"), ThresholdRouting(0.4, EXPERTS))
ARCHITECTURES = ("bert", "llama")


def first_outputs(rank: int, world_size: int, folder: Path, expert_parallel: int) -> list[Tensor]:
    """The outputs of each architecture under each rule, before any step."""
    mesh = make_mesh(expert_parallel)
    return [
        outputs(upcycled(folder / architecture, architecture, mesh, rule), tokens().roll(rank, dims=1))
        for architecture in ARCHITECTURES
        for rule in RULES
    ]


def test_trap_T58_an_upcycled_model_starts_with_the_result_of_the_dense_one(ranks: RankPool, tmp_path: Path) -> None:
    """With each expert-parallel degree, each rank with other tokens."""
    models = {architecture: dense_folder(tmp_path / architecture, architecture) for architecture in ARCHITECTURES}
    for expert_parallel in (1, 2):
        for rank, found in enumerate(ranks.run(first_outputs, 2, tmp_path, expert_parallel)):
            wanted = [outputs(model, tokens().roll(rank, dims=1)) for model in models.values() for _ in RULES]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense model for the bytes of a text."""
    made = tmp_path_factory.mktemp("dense")
    dense_folder(made, "qwen3", vocab_size=257, max_position_embeddings=256)
    return made


def run_of(folder: Path, *overrides: str) -> tuple[str, ...]:
    fixed = ("model.architecture=qwen3", "model.config={}", f"model.upcycle_from={folder}", "model.upcycle_every=2")
    return (*fixed, "model.upcycle_noise=0.01", "train.schedule_steps=20", *overrides)


ROUTING = {
    "top-1": ("router.top_k=1",),
    "top-2": ("router.top_k=2",),
    "threshold": ("router.selection=threshold", "balance.policy=adaptive_weight", "balance.rate=0.05"),
    "budget": ("router.selection=threshold", "router.target_experts_per_token=1.8", "balance.policy=none"),
}


@torch.no_grad()
def dense_loss(folder: Path, text: Path, overrides: tuple[str, ...]) -> float:
    """The mean loss of the dense model on the first global batch, each document on its own."""
    config = resolve(load_config(ROOT / "configs/debug.yaml", overrides_of(text, folder, *overrides)), 2).config
    data = tokenize(config)
    assert not isinstance(data, LabeledData)
    batch = Stream(data.train, config.data.sequence_length, config.run.seed).batch(0, config.train.global_batch_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = torch.zeros(())
    for tokens_S, targets_S, documents_S in zip(batch.tokens_BS, batch.targets_BS, batch.documents_BS, strict=True):
        for document in range(int(documents_S.max()) + 1):
            own = documents_S == document
            logits_SV = model(tokens_S[own][None]).logits[0]
            total += functional.cross_entropy(logits_SV, targets_S[own], reduction="sum", ignore_index=IGNORE_INDEX)
    return float(total / batch.label_count)


@pytest.mark.parametrize("routing", ROUTING)
def test_trap_T58_the_first_logged_loss_is_that_of_the_dense_model(
    ranks: RankPool, text: Path, folder: Path, tmp_path: Path, routing: str
) -> None:
    """With expert parallelism, the first step logs the loss before any update."""
    overrides = (*run_of(folder, *ROUTING[routing]), "model.upcycle_noise=0.0")
    ranks.run(train, 2, text, tmp_path, (*overrides, "train.steps=1"))
    (first,) = steps(tmp_path).values()
    assert first["loss"] == pytest.approx(dense_loss(folder, text, overrides), abs=1e-5)


KINDS = {
    "frozen, bf16, ZeRO 2": ("train.frozen_layers=1", "train.precision=bf16", "parallel.zero_stage=2"),
    "threshold, recomputed": (
        *("router.selection=threshold", "balance.policy=adaptive_weight", "balance.rate=0.05"),
        "train.activation_checkpointing=true",
    ),
    "frozen, ZeRO 0": ("train.frozen_layers=2", "parallel.zero_stage=0"),
}


@pytest.mark.parametrize("kind", only_first(list(KINDS), 1))
def test_trap_T44_an_upcycled_run_resumes_bit_for_bit(
    ranks: RankPool, text: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    """From its checkpoint, although model.upcycle_from is still there; also when that is gone."""
    overrides = run_of(folder, *KINDS[kind])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(train, 2, text, whole, (*overrides, "train.steps=4"))
    ranks.run(train, 2, text, parts, (*overrides, "train.steps=2"))
    ranks.run(train, 2, text, parts, (*overrides, "train.steps=3"))
    moved = ("model.upcycle_from=" + str(tmp_path / "gone"), "train.steps=4")
    ranks.run(train, 2, text, parts, (*overrides, *moved))
    assert same_bits(whole / "checkpoints/step-000004", parts / "checkpoints/step-000004") == []
    losses: list[Any] = [[step["loss"] for step in steps(run).values()] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def classify(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """Texts with a class, and a run in which an encoder learns it."""
    rows = [{"text": f"{word} {number}", "label": word} for number in range(24) for word in ("good", "bad")]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("\n".join(map(json.dumps, rows)))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dense_folder(tmp_path / "bert", "bert", vocab_size=257, max_position_embeddings=256, **no_dropout)
    model = ("model.architecture=bert", "model.config={}", f"model.upcycle_from={tmp_path / 'bert'}")
    routing = ("router.selection=threshold", "balance.policy=adaptive_weight", "balance.rate=0.1")
    task = ("task.kind=classification", "data.sequence_length=32", "data.validation_fraction=0.2")
    return examples, (*model, *routing, *task, "train.frozen_layers=2", "train.schedule_steps=20")


@pytest.mark.slow
def test_an_upcycled_encoder_classifies_and_resumes_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    """With expert parallelism; one worker has the same losses."""
    examples, overrides = classify(tmp_path)
    whole, parts, alone = (tmp_path / name for name in ("whole", "parts", "alone"))
    ranks.run(train, 2, examples, whole, (*overrides, "train.steps=4"))
    for last in (2, 4):
        ranks.run(train, 2, examples, parts, (*overrides, f"train.steps={last}"))
    assert same_bits(whole / "checkpoints/step-000004", parts / "checkpoints/step-000004") == []
    ranks.run(train, 1, examples, alone, (*overrides, "train.steps=4"))
    losses: list[Any] = [[step["loss"] for step in steps(run).values()] for run in (whole, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4
    assert not any("pooler" in name for name in tensors(whole / "checkpoints/step-000004"))


@pytest.mark.slow
def test_exported_weights_start_another_run(ranks: RankPool, text: Path, folder: Path, tmp_path: Path) -> None:
    """model.pretrained opens them, and computes what the first run did at its end, on another layout."""
    threshold = ("router.selection=threshold", "balance.policy=none")
    ranks.run(train, 2, text, tmp_path / "first", run_of(folder, *threshold, "train.steps=2"))
    export(tmp_path / "first", tmp_path / "model", "keep")
    opened = ("model.architecture=qwen3", "model.config={}", f"model.pretrained={tmp_path / 'model'}")
    still = (*opened, *threshold, "train.learning_rate=0.0", "train.steps=1", "parallel.expert_parallel=1")
    ranks.run(train, 2, text, tmp_path / "second", still)
    found = [validation_loss(tmp_path / name) for name in ("first", "second")]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def validation_loss(run: Path) -> float:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(next(event["validation_loss"] for event in reversed(events) if "validation_loss" in event))
