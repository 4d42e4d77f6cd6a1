"""The head of a model that classifies: one linear layer over a pooled hidden state.

Whether a model has one is written in its Hugging Face config, in the fields that transformers has for it: problem_type,
id2label, label2id, and classifier_pooling as ModernBERT's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dist_moe.config.sections.task import PoolingName, TaskConfig

HEAD = "score"
"""The name of the head, below the model, as in the classes *ForSequenceClassification of decoders."""
HEAD_TENSOR = f"{HEAD}.weight"
LANGUAGE_MODEL_HEAD = "lm_head"
HEAD_KEYS = ("problem_type", "id2label", "label2id", "classifier_pooling")
"""Keys of the Hugging Face config of a model that has one."""
CLASSIFICATION, REGRESSION = "single_label_classification", "regression"


def head_settings(task: TaskConfig, labels: Sequence[str]) -> dict[str, Any]:
    """Return the keys of the Hugging Face config of a model for a task; none for a language model.

    Args:
        task: The section.
        labels: The names of the classes, by index.
    """
    if task.kind == "language_model":
        return {}
    names = list(labels) if task.kind == "classification" else ["value"]
    return {
        "problem_type": REGRESSION if task.kind == "regression" else CLASSIFICATION,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "classifier_pooling": task.pooling or "mean",
    }


def has_head(config: PretrainedConfig) -> bool:
    """Whether the model of a config classifies, or computes a value."""
    return config.problem_type in (CLASSIFICATION, REGRESSION)


def problem_of(raw: Mapping[str, Any]) -> str | None:
    """Return what the head of a model computes, from its config.json; None if it has none."""
    problem = raw.get("problem_type")
    return problem if problem in (CLASSIFICATION, REGRESSION) else None


def describe_head(config: PretrainedConfig) -> str:
    """Describe what the weights of a head mean: its classes by index, and the pooling. Raises ValueError."""
    what = "regression" if config.problem_type == REGRESSION else f"task.labels={list(label_names(config))}"
    return f"{what} with task.pooling={pooling_of(config)}"


def label_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of the classes of a model with a head, by index; none for a regression."""
    names = {int(index): name for index, name in (config.id2label or {}).items()}
    return () if config.problem_type == REGRESSION else tuple(names[index] for index in sorted(names))


def pooling_of(config: PretrainedConfig) -> PoolingName:
    """Return the pooling of a model with a head. Raises ValueError if it is unknown."""
    # Classes of transformers with a head of this name have no such key, and see the last token.
    pooling = getattr(config, "classifier_pooling", "last")
    if pooling not in get_args(PoolingName):
        raise ValueError(f"classifier_pooling={pooling} is not {', '.join(get_args(PoolingName))}")
    return cast(PoolingName, pooling)


def attach_head(model: PreTrainedModel) -> None:
    """Give a model the head that its config asks for, without bias; that of a language model is removed, in place."""
    if hasattr(model, LANGUAGE_MODEL_HEAD):
        delattr(model, LANGUAGE_MODEL_HEAD)
        model.config.tie_word_embeddings = False
    model.add_module(HEAD, nn.Linear(model.config.hidden_size, int(model.config.num_labels or 1), bias=False))


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the head of a model that has one."""
    return cast(nn.Linear, model.get_submodule(HEAD))
