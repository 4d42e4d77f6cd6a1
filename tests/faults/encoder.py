"""The run of an upcycled encoder that classifies, balanced by a rule with memory, as a target of faults."""

from pathlib import Path

from tests.dense import dense_folder
from tests.dist.resumable import write_examples
from tests.folders import make_wordpiece


def encoder_run(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write a dense encoder and examples -> the examples, and the overrides of its run."""
    dense = folder / "dense"
    dense_folder(dense, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    make_wordpiece(dense)
    changes = (
        *("task.kind=classification", "data.tokenizer=pretrained", "data.validation_fraction=0.2"),
        *(f"model.upcycle_from={dense}", "model.architecture=bert", "model.config={}", "model.upcycle_experts=4"),
        *("router.score=softmax", "balance={policy: momentum}", "train.learning_rate=0.01"),
    )
    return write_examples(folder), changes
