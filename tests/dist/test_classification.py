"""Runs that classify: the same on any layout, resumed bit for bit, and each held-out example evaluated once."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.comm.mesh import make_mesh
from dist_moe.train.evaluate import evaluate, read_rows, validation_set
from dist_moe.train.generate import generate
from tests.dense import dense_folder
from tests.dist.loaded import run_loaded
from tests.dist.pool import RankPool
from tests.dist.resumable import overrides_of, same_bits, started, steps, train, write_examples
from tests.folders import make_wordpiece
from tests.selection import full

CLASSIFY = (
    "task.kind=classification",
    "run.threads=1",
    "data.sequence_length=48",
    "data.validation_fraction=0.2",
    "train.micro_batch_size=4",
    "train.learning_rate=0.01",
    "observe.validation_sequences=0",
    "model.config.initializer_range=0.1",
)
LAYOUTS = {  # workers, overrides
    "1": (1, ()),
    "2, EP 2, accumulated": (2, ("parallel.expert_parallel=2", "train.micro_batch_size=1")),
    "4, EP 2, ZeRO 2": (4, ("parallel.expert_parallel=2", "parallel.zero_stage=2", "train.micro_batch_size=2")),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"))


def validation(run: Path) -> dict[str, Any]:
    """The record of the run's evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["event"] == "validation")


@pytest.fixture(scope="module")
def reference(ranks: RankPool, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker, 10 steps over a ragged number of examples."""
    folder = tmp_path_factory.mktemp("reference")
    ranks.run(train, 1, examples, folder, (*CLASSIFY, "train.steps=10"))
    return folder


@pytest.mark.parametrize("layout", ["2, EP 2, accumulated", full("4, EP 2, ZeRO 2")])
def test_trap_T47_a_run_is_the_same_on_any_layout(
    ranks: RankPool, examples: Path, tmp_path: Path, reference: Path, layout: str
) -> None:
    """The loss is the mean over the examples of the global batch, and its gradient that of this mean."""
    workers, changes = LAYOUTS[layout]
    ranks.run(train, workers, examples, tmp_path, (*CLASSIFY, "train.steps=10", *changes))
    ours, theirs = steps(tmp_path), steps(reference)
    assert ours[1]["load"] == theirs[1]["load"]
    for number, step in theirs.items():
        assert ours[number]["loss"] == pytest.approx(step["loss"], rel=1e-4), number
        assert ours[number]["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-3), number
        assert ours[number]["tokens"] == step["tokens"]
    for name in ("validation_loss", "accuracy", "macro_f1", "matthews", "examples"):
        assert validation(tmp_path)[name] == pytest.approx(validation(reference)[name], rel=1e-3), name


@pytest.mark.slow
def test_a_run_learns_and_its_checkpoint_evaluates_to_the_same_metrics(
    ranks: RankPool, examples: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks.run(train, 2, examples, run, (*CLASSIFY, "train.steps=60", "train.schedule_steps=60", "observe.interval=20"))
    record = validation(run)
    assert record["accuracy"] > 0.9 and "bits_per_byte" not in record
    checkpoint = run / "checkpoints/step-000060"

    def dist_moe(*words: str) -> str:
        done = run_loaded([sys.executable, "-m", "dist_moe", *words], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    again = json.loads(dist_moe("evaluate", str(checkpoint), "--json"))
    assert again["load"] == record["load"] and again["accuracy"] == record["accuracy"]
    assert again["validation_loss"] == pytest.approx(record["validation_loss"], rel=1e-5)
    dist_moe("checkpoint", "export", str(checkpoint), str(tmp_path / "exported"))
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    on_all = json.loads(dist_moe("evaluate", str(tmp_path / "exported"), f"data.sources=[{examples}]", "--json"))
    assert on_all["examples"] == 90 and on_all["accuracy"] > 0.9
    with pytest.raises(WeightsError, match="classifies texts and does not generate any"):
        generate(checkpoint, "film", 3, 0.0, 0)


@pytest.mark.slow
def test_trap_T44_a_resumed_classification_is_the_uninterrupted_one_bit_for_bit(
    ranks: RankPool, examples: Path, tmp_path: Path
) -> None:
    """Resumed in the second epoch, whose order is not that of the first."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(train, 2, examples, whole, (*CLASSIFY, "train.steps=12"))
    for until in (10, 12):
        ranks.run(train, 2, examples, parts, (*CLASSIFY, f"train.steps={until}"))
    assert same_bits(whole / "checkpoints/step-000012", parts / "checkpoints/step-000012") == []
    assert [step["loss"] for step in steps(whole).values()] == [step["loss"] for step in steps(parts).values()]


def evaluated(rank: int, world_size: int, overrides: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Evaluate an untrained model -> the record, and the examples that this rank read."""
    with started(rank, world_size, overrides) as (resolved, state):
        text = validation_set(resolved.config, state.data)
        stride = world_size * text.micro_batch_size
        first_rows = range(rank * text.micro_batch_size, text.rows, stride)
        own = sum(int(read_rows(text, row).label_count) for row in first_rows)
        mesh = make_mesh(resolved.expert_parallel)
        return evaluate(state.task, text, mesh, torch.device("cpu"), 0).as_dict(), own


def test_trap_T30_each_example_is_evaluated_once_over_all_ranks(
    ranks: RankPool, examples: Path, tmp_path: Path
) -> None:
    """With a number of examples that the ranks do not divide, and a limit that is not their end."""
    changes = (*CLASSIFY, "observe.validation_sequences=7", "train.steps=1", "parallel.expert_parallel=1")
    overrides = overrides_of(examples, tmp_path, *changes, "train.micro_batch_size=2")
    expected, _ = ranks.run(evaluated, 1, overrides)[0]
    found = ranks.run(evaluated, 4, overrides)
    assert sum(own for _, own in found) == expected["examples"] == 7
    right = bin(int(expected["correct_examples"], 16)).count("1")
    assert right / 7 == pytest.approx(expected["accuracy"]) and len(expected["correct_examples"]) == 2
    for record, _ in found:
        assert record["correct_examples"] == expected["correct_examples"]
        assert record["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
        assert (record["accuracy"], record["load"]) == (expected["accuracy"], expected["load"])


@pytest.mark.slow
def test_an_upcycled_encoder_classifies_resumes_and_is_evaluated(
    ranks: RankPool, examples: Path, tmp_path: Path
) -> None:
    """A BERT with a WordPiece tokenizer: bit for bit on one layout, and its checkpoint opens as any other."""
    dense_folder(tmp_path / "dense", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    make_wordpiece(tmp_path / "dense")
    source = (f"model.upcycle_from={tmp_path}/dense", "model.architecture=bert", "model.config={}", "balance.rate=0.1")
    routing = ("router.score=softmax", "balance.policy=loss_free")
    start = (*source, *routing, "model.upcycle_experts=4", "data.tokenizer=pretrained")
    changes = (*(each for each in CLASSIFY if not each.startswith("model.")), *start, "data.sequence_length=16")
    ranks.run(train, 2, examples, tmp_path / "whole", (*changes, "train.steps=4"))
    for until in (2, 4):
        ranks.run(train, 2, examples, tmp_path / "parts", (*changes, f"train.steps={until}"))
    last = "checkpoints/step-000004"
    assert same_bits(tmp_path / "whole" / last, tmp_path / "parts" / last) == []
    done = run_loaded(
        [sys.executable, "-m", "dist_moe", "evaluate", str(tmp_path / "whole" / last), "--json"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] == validation(tmp_path / "whole")["accuracy"]


@pytest.mark.slow
def test_a_classification_starts_from_a_language_model(ranks: RankPool, examples: Path, tmp_path: Path) -> None:
    """All weights but the head are those of the folder, and a regression has correlations."""
    text = tmp_path / "text.txt"
    text.write_text("a film that is wonderful indeed, and another one that is dreadful. " * 50)
    ranks.run(train, 2, text, tmp_path / "language", ("train.steps=1", "balance.policy=none"))
    folder = tmp_path / "language/checkpoints/step-000001/model"
    values = tmp_path / "values.jsonl"
    rows = [json.loads(line) for line in examples.read_text().splitlines()]
    values.write_text("\n".join(json.dumps({**row, "label": len(row["text"]) / 10}) for row in rows))
    start = (f"model.pretrained={folder}", "model.config={}", "data.tokenizer=pretrained", "balance.policy=none")
    changes = tuple(each for each in CLASSIFY if not each.startswith("model.")) + start
    ranks.run(train, 2, values, tmp_path / "run", (*changes, "task.kind=regression", "train.steps=2"))
    record = validation(tmp_path / "run")
    assert {"pearson", "spearman"} <= record.keys() and "accuracy" not in record
