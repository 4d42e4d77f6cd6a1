"""Checks whether the parts of a configuration fit together, and fit a number of workers."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from dist_moe.config.balancing import balancing_violations
from dist_moe.config.checks.devices import device_violations
from dist_moe.config.checks.numbers import number_violations
from dist_moe.config.checks.packages import package_violations
from dist_moe.config.checks.schedule import batch_violations, schedule_notices, schedule_violations
from dist_moe.config.checks.task import task_violations
from dist_moe.config.checks.unused import unused_notices
from dist_moe.config.model import Reading, read_model, routing_fields
from dist_moe.config.schema import Config
from dist_moe.errors import ConfigError, Violation
from dist_moe.families.registry import family_of
from dist_moe.text import counted, divisors, listed

SHAPE_FIELDS = ("model.architecture", "model.config", "model.pretrained", "model.upcycle_from")
# Key of a violation, or the beginning of one -> the fields that its rule reads in addition to its own.
READS: Mapping[str, tuple[str, ...]] = {
    "train.global_batch_size": ("train.micro_batch_size", "workers"),
    "train.micro_batch_size": ("train.global_batch_size", "workers"),
    "train.schedule_steps": ("train.steps",),
    "train.momentum": ("train.optimizer",),
    "train.frozen_layers": SHAPE_FIELDS,
    "parallel.expert_parallel": (*SHAPE_FIELDS, "workers"),
    "data.sequence_length": SHAPE_FIELDS,
    "data.sources": ("task.kind",),
    "data.tokenizer": ("model.pretrained", "model.upcycle_from"),
    "balance.": ("balance.policy", "router.selection", "router.score", "model.architecture"),
    "router.": (
        *("router.selection", "router.top_k", "router.max_experts", "router.score", "router.normalize"),
        *("router.scaling_factor", "router.groups", "router.topk_groups", "balance.policy", "model"),
    ),
    "model.": (*SHAPE_FIELDS, "train.precision"),
    "model.cross_entropy": ("parallel.backend",),
    "model.config.vocab_size": (*SHAPE_FIELDS, "data.tokenizer", "data.vocabulary"),
    "model.pretrained": ("model.architecture", "model.upcycle_from", "checkpoint.resume", "run.dir"),
    "model.upcycle_": ("model.upcycle_from", "model.upcycle_layers", "model.upcycle_every", "model.architecture"),
    "task.": ("task.kind", "task.labels"),
    "slurm.signal_s": ("slurm.minutes",),
}

FurtherCheck = Callable[[Config], list[Violation]]
"""A further check, of what a configuration names: what is wrong."""


@dataclass(frozen=True)
class Resolved:
    """A configuration that can run on a given number of workers, with what follows from it.

    Attributes:
        config: With router.*, train.schedule_steps, train.warmup_steps, train.micro_batch_size and, after
            model.pretrained, model.config filled in.
        workers: Processes, all hosts together.
        expert_parallel: Workers that share one set of experts.
        accumulation: Micro-batches of each worker in an optimizer step.
        experts: Routed experts of an MoE layer.
        model_config: Keyword arguments of the Hugging Face config class, routing values written in. vocab_size is there
            only where the file gives it, and bos_, eos_ and pad_token_id are None where the class accepts that: they
            come from the tokenizer.
        notices: What is valid and not used as it is written, one line each.
    """

    config: Config
    workers: int
    expert_parallel: int
    accumulation: int
    experts: int
    model_config: dict[str, Any]
    notices: tuple[str, ...] = field(default=(), compare=False)


def resolve(config: Config, workers: int, further_check: FurtherCheck | None = None) -> Resolved:
    """Check every rule that joins fields or depends on the number of workers, and fill in what follows.

    Builds the model on the meta device and runs it on two tokens. Needs neither a GPU nor a process group, but imports
    transformers.

    Args:
        config: The configuration.
        workers: Processes, all hosts together.
        further_check: A further check, whose violations are reported with the others.

    Raises:
        ConfigError: With all violations at once.
    """
    if workers < 1:
        raise ConfigError([Violation("workers", workers, "is not positive", "give 1 or more")])
    reading = read_model(config)
    violations = _violations(config, workers, reading) + (further_check(config) if further_check is not None else [])
    facts = reading.facts
    if violations or facts is None:
        raise ConfigError(violations)
    train, asked = config.train, config.parallel.expert_parallel
    micro = train.micro_batch_for(workers, config.data.sequence_length)
    lengths = {"schedule_steps": train.schedule_length, "warmup_steps": train.warmup_length}
    filled = train.model_copy(update={**lengths, "micro_batch_size": micro})
    return Resolved(
        config=config.model_copy(update={"router": facts.router, "train": filled, "model": facts.model}),
        workers=workers,
        expert_parallel=gcd(workers, facts.experts) if asked == "auto" else asked,
        accumulation=max(1, train.global_batch_size // (workers * micro)),
        experts=facts.experts,
        model_config=facts.arguments,
        notices=(*schedule_notices(config), *unused_notices(config), *facts.notices),
    )


def cross_field_violations(config: Config, workers: int) -> list[Violation]:
    """Return what `resolve` would raise; imports transformers."""
    return _violations(config, workers, read_model(config))


def plain_violations(config: Config, workers: int) -> list[Violation]:
    """Return those violations that `resolve` finds without the model, and so without importing transformers."""
    found = [*number_violations(config), *batch_violations(config.train, workers), *task_violations(config)]
    found += [*schedule_violations(config.train), *device_violations(config)]
    return [*found, *package_violations(config)]


def independent_of(broken: Set[str], config: Config, violations: Iterable[Violation]) -> list[Violation]:
    """Return the violations whose rules read none of the broken fields.

    Args:
        broken: Dotted paths of fields or sections whose intended value is not known, and "workers" where that is not.
        config: What was checked, with other values for the broken fields.
        violations: What was found.
    """
    fields = routing_fields(family_of(config.model.architecture)).values()
    routing_keys = {f"model.config.{field}" for field in fields if field is not None}

    def reads(key: str) -> list[str]:
        known = max((start for start in READS if key.startswith(start)), key=len, default="")
        own = [key, *READS.get(known, (key.partition(".")[0],))]
        return [*own, *READS["router."]] if key in routing_keys else own

    return [
        violation
        for violation in violations
        if not any(_overlap(read, field) for read in reads(violation.key) for field in broken)
    ]


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted paths are equal, or one is below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _violations(config: Config, workers: int, reading: Reading) -> list[Violation]:
    found = [*reading.violations, *plain_violations(config, workers)]
    if reading.experts is not None:
        found += _expert_parallel_violations(config, workers, reading.experts)
    if reading.facts is not None:
        found += balancing_violations(config, reading.facts.router, reading.facts.experts)
    return found


def _expert_parallel_violations(config: Config, workers: int, experts: int) -> list[Violation]:
    asked = config.parallel.expert_parallel
    if asked == "auto":
        return []
    parts = [f"the {counted(workers, 'worker')}"] if workers % asked else []
    parts += [f"the model's {counted(experts, 'expert')}"] if experts % asked else []
    if not parts:
        return []
    rule = f"does not divide {listed(parts, last='or')}"
    remedy = f"use {listed(divisors(gcd(workers, experts)))}"
    return [Violation("parallel.expert_parallel", asked, rule, remedy)]
