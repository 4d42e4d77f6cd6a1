"""Evaluates the model of a checkpoint or a Hugging Face folder, with its own tokenizer, on any text."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.format.hf_weights import load_weights, read_config
from dist_moe.checkpoint.format.layout import resolve_path, step_of, weights_folder
from dist_moe.checkpoint.training_state import read_counters
from dist_moe.comm.init import init_distributed, set_threads
from dist_moe.comm.mesh import make_mesh
from dist_moe.config import Config, load_stored_config
from dist_moe.config.messages import validate
from dist_moe.config.sections.task import TaskConfig
from dist_moe.config.yaml_io import apply_overrides
from dist_moe.data.cache import cache_folder
from dist_moe.data.corpus import prepare
from dist_moe.data.labeled.prepare import prepare_labeled
from dist_moe.data.labeled.sources import labeled_source_files
from dist_moe.data.source_manifest import compare_sources
from dist_moe.data.sources import source_files
from dist_moe.engine.train_state import RunData
from dist_moe.errors import ABSENT, ConfigError, Violation
from dist_moe.families.registry import family_of
from dist_moe.model.convert import find_layers
from dist_moe.model.head import has_head, label_names
from dist_moe.model.tasks.classification import ClassificationTask
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.observe.evaluation import EvaluationMetrics
from dist_moe.policies.shares import TargetShares
from dist_moe.text import counted, listed
from dist_moe.train.evaluate import ValidationSet, evaluate, validation_set
from dist_moe.worker.rank_info import rank_info_from_env

READ_FIELDS = (
    *("data.sources", "data.sequence_length", "data.validation_fraction", "observe.validation_sequences"),
    *("train.micro_batch_size", "parallel.backend", "parallel.timeout_s", "parallel.shared_memory"),
    "run.threads",
)
"""The fields that an evaluation reads; everything else is given by the checkpoint."""
LONGEST_BY_DEFAULT = 512
HELD_OUT = "the held-out part"


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The evaluation of a checkpoint.

    Attributes:
        checkpoint: The folder that was evaluated.
        text: What text it was evaluated on, in words.
        metrics: The record that a run itself writes at its end.
        target_shares: The target shares of the experts of a layer, which the measures are relative to.
    """

    checkpoint: Path
    text: str
    metrics: EvaluationMetrics
    target_shares: TargetShares


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = (), without_bias: bool = False) -> CheckpointEvaluation:
    """Evaluate the model of a checkpoint or of a Hugging Face folder, with its tokenizer.

    The text is that of the checkpoint's configuration, of which the validation split is evaluated; or that of an
    override of `data.sources`, of which all is evaluated where the model was trained on none of these files, and
    `data.validation_fraction` and `observe.validation_sequences` do not ask for less.
    Works in a single process or as one worker of a launcher.

    Args:
        path: As `resolve_path`.
        overrides: `key=value` replacements of READ_FIELDS.
        without_bias: Evaluate it with selection biases of 0.

    Raises:
        CheckpointError, WeightsError: The path is not a checkpoint, or it is damaged.
        ConfigError: An override is wrong, or has no meaning here; or nothing names a text.
    """
    checkpoint = resolve_path(path, read=("model/",))
    if checkpoint.name == "model" and (checkpoint.parent / "config.yaml").is_file():
        checkpoint = checkpoint.parent
    folder = weights_folder(checkpoint)
    model_config, _ = read_config(folder)
    refuse_unread(overrides)
    stored = checkpoint / "config.yaml"
    if os.path.lexists(stored):
        given, trained_on = load_stored_config(stored, overrides), load_stored_config(stored).data.sources
    else:
        given, trained_on = folder_config(folder, model_config, overrides), []
    refuse_too_long(given, model_config)
    rank_info = rank_info_from_env(os.environ, alone_in_batch=True)
    set_threads(given.run.threads, rank_info)
    asked = {override.partition("=")[0].strip() for override in overrides}
    part = choose_part(given, trained_on, checkpoint, asked)
    data = read_data(given, part, model_config, folder)
    if part.fraction is None and "observe.validation_sequences" not in asked:
        given = given.model_copy(update={"observe": given.observe.model_copy(update={"validation_sequences": 0})})
    with init_distributed(rank_info, given.parallel.backend, given.parallel.timeout_s) as dist_context:
        experts: int = getattr(model_config, family_of(model_config.model_type).experts_key)
        expert_parallel = rank_info.world_size if experts % rank_info.world_size == 0 else 1
        mesh = make_mesh(expert_parallel, shared_memory=given.parallel.shared_memory)
        model = load_weights(folder, mesh)
        if without_bias:
            for layer in find_layers(model):
                layer.router.selection_bias.zero_()
        task = (ClassificationTask if has_head(model_config) else LanguageModelTask)(model).to(dist_context.device)
        text = validation_set(given, data)
        shares = given.balance.target_shares(experts)
        metrics = evaluate(task, text, mesh, dist_context.device, step_of(checkpoint) or 0, shares)
    return CheckpointEvaluation(
        checkpoint, describe_text(given, data, text, part), metrics, given.balance.target_shares
    )


def read_data(config: Config, part: "Part", model_config: PretrainedConfig, folder: Path) -> RunData:
    """Return the text to evaluate, tokenized by the model's tokenizer.

    Raises:
        DataError: It cannot be read, or has labels that the model does not have.
    """
    vocabulary, cache = model_config.vocab_size, cache_folder()
    if not has_head(model_config):
        return prepare(part.sources, "pretrained", vocabulary, part.fraction, cache, folder)
    task, length = task_of(model_config), config.data.sequence_length
    return prepare_labeled(part.sources, task, "pretrained", vocabulary, length, part.fraction, cache, folder)


def task_of(model_config: PretrainedConfig) -> TaskConfig:
    """Return the task of a model with a head."""
    labels = list(label_names(model_config))
    return TaskConfig(kind="classification", labels=labels) if labels else TaskConfig(kind="regression")


def refuse_unread(overrides: Sequence[str]) -> None:
    """Refuse overrides of keys that an evaluation does not read.

    Raises:
        ConfigError: With all of them.
    """
    unread = [one for one in overrides if "=" in one and one.partition("=")[0].strip() not in READ_FIELDS]
    if unread:
        rule = f"{'is' if len(unread) == 1 else 'are'} not read: the checkpoint gives its model and tokenizer"
        raise ConfigError([Violation(listed(unread, last="and"), ABSENT, rule, f"set {listed(READ_FIELDS)}")])


def folder_config(folder: Path, model_config: PretrainedConfig, overrides: Sequence[str]) -> Config:
    """Return the configuration for evaluating a Hugging Face folder, which has none of its own."""
    settings: dict[Any, Any] = {
        "model": {"architecture": model_config.model_type, "pretrained": str(folder)},
        "data": {
            "tokenizer": "pretrained",
            "sequence_length": min(LONGEST_BY_DEFAULT, model_config.max_position_embeddings),
        },
        **({"task": task_of(model_config).model_dump()} if has_head(model_config) else {}),
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.0},
    }
    violations = apply_overrides(settings, overrides)
    if not settings["data"].get("sources"):
        rule = "is missing, and the folder of a Hugging Face model names no text"
        violations.append(Violation("data.sources", ABSENT, rule, "add for example data.sources=[texts/*.txt]"))
    if violations:
        raise ConfigError(violations)
    return validate(settings)


def refuse_too_long(config: Config, model_config: PretrainedConfig) -> None:
    """Refuse sequences that are longer than the model has positions.

    Raises:
        ConfigError: They are.
    """
    longest = model_config.max_position_embeddings
    if config.data.sequence_length > longest:
        rule = f"is longer than the model's max_position_embeddings={longest}"
        key, value = "data.sequence_length", config.data.sequence_length
        raise ConfigError([Violation(key, value, rule, f"give at most {longest}")])


class Part(NamedTuple):
    """What of a text is evaluated: what is held out of these sources, or all where `fraction` is None."""

    sources: Sequence[str]
    fraction: float | None
    words: str


def choose_part(given: Config, trained_on: Sequence[str], checkpoint: Path, asked: Collection[str]) -> Part:
    """Choose all of a text that the model was not trained on, or else what was held out in training.

    Args:
        given: The configuration with the text.
        trained_on: The sources that the model was trained on.
        checkpoint: The folder of the checkpoint.
        asked: The keys of the overrides.

    Raises:
        DataError: The sources match no files, or a file cannot be read.
    """
    sources, fraction = given.data.sources, given.data.validation_fraction
    if sources == trained_on:
        return Part(sources, fraction, HELD_OUT)
    files_of = source_files if given.task.kind == "language_model" else labeled_source_files
    overlap = compare_sources(sources, trained_on, corpus_folder(checkpoint), files_of)
    if not overlap.shared:
        whole = "data.validation_fraction" not in asked
        return Part(sources, None, "all") if whole else Part(sources, fraction, HELD_OUT)
    if overlap.same is not None:
        return Part(overlap.same, fraction, HELD_OUT)
    known = f"{overlap.shared} of {counted(overlap.files, 'file')} were read in training"
    return Part(sources, fraction, f"a newly held-out part, which may hold training text ({known})")


def corpus_folder(checkpoint: Path) -> Path:
    """Return the folder of the tokens that a checkpoint was trained on, which may be gone; else one without files."""
    try:
        corpus = read_counters(checkpoint / "state").corpus
    except CheckpointError:
        corpus = "unknown"
    return cache_folder() / "tokens" / Path(corpus).name


def describe_text(config: Config, data: RunData, text: ValidationSet, evaluated: Part) -> str:
    """Say which text was evaluated."""
    part = evaluated.words
    if text.rows < text.stream.rows_per_epoch:
        part = f"the first {counted(text.rows, 'sequence')} of {part}"
    sources = listed(config.data.sources, last="and", most=3)
    return f"{sources}: {part}, of {counted(len(data.validation.tokens), 'token')}"
