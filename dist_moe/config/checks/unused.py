"""Notices of fields that are not at their defaults and have no effect, because of the value of another field."""

from collections.abc import Iterator
from typing import Any

from dist_moe.config.schema import Config
from dist_moe.section import Section
from dist_moe.text import shown


def unused_notices(config: Config) -> list[str]:
    """Return a notice for each field that is not at its default, and is not read."""
    return [
        f"{section}.{name}={shown(value)} has no effect {reason}"
        for section, names, reason in _without_effect(config)
        for name, value in _changed(getattr(config, section), names)
    ]


def _without_effect(config: Config) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield a section, the fields of it that are not read, and why."""
    balance, data, train = config.balance, config.data, config.train
    if config.model.upcycle_from is not None:
        yield "router", ("scaling_factor",), "with model.upcycle_from: gate weights are divided by their sum there"
    if config.task.kind == "language_model":
        yield "task", ("labels", "pooling", "class_weights"), "with task.kind=language_model"
    else:
        yield "model", ("cross_entropy",), f"with task.kind={config.task.kind}, whose loss has no vocabulary"
    if data.tokenizer != "bpe":
        yield "data", ("vocabulary",), f"with data.tokenizer={data.tokenizer}; it is the size of a bpe vocabulary"
    if not balance.has_rate:
        yield "balance", ("rate", "schedule"), f"with balance.policy={balance.policy}, which has no rate"
    if not balance.auxiliary_loss:
        yield "balance", ("auxiliary_scope",), "with balance.auxiliary_loss=0, which turns that loss off"
    if train.optimizer != "adamw":
        yield "train", ("betas",), f"with train.optimizer={train.optimizer}; they are those of adamw"
    if not config.checkpoint.keep_last:
        yield "checkpoint", ("keep_every",), "with checkpoint.keep_last=0, which keeps every checkpoint"


def _changed(section: Section, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    fields = type(section).model_fields
    for name in names:
        if (value := getattr(section, name)) != fields[name].default:
            yield name, value
