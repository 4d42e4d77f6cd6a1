"""Whether the parts of a configuration fit together, and fit a number of workers."""

from dataclasses import dataclass
from math import gcd
from typing import Any

from dist_moe.config.balancing import balancing_violations
from dist_moe.config.model import read_model
from dist_moe.config.schema import Config
from dist_moe.config.sections.train import TrainConfig
from dist_moe.errors import ConfigError, Violation
from dist_moe.text import divisors, listed


@dataclass(frozen=True)
class Resolved:
    """A configuration that can run on a given number of workers, with what follows from it.

    config: with router.*, train.schedule_steps and, after model.pretrained, model.config filled in.
    workers: processes, all hosts together.
    expert_parallel: workers that share one set of experts.
    accumulation: micro-batches of each worker in an optimizer step.
    experts: routed experts of an MoE layer.
    model_config: keyword arguments of the Hugging Face config class, routing values written in. vocab_size
    is there only where the file gives it, and bos_, eos_ and pad_token_id are None: whoever has the
    tokenizer sets them.
    """

    config: Config
    workers: int
    expert_parallel: int
    accumulation: int
    experts: int
    model_config: dict[str, Any]


def resolve(config: Config, workers: int) -> Resolved:
    """Checks every rule that joins fields or depends on the number of workers.

    Raises ConfigError with all violations at once. Needs neither a GPU nor a process group, but transformers.
    """
    if workers < 1:
        raise ConfigError([Violation("workers", workers, "is not positive", "give 1 or more")])
    facts, experts, violations = read_model(config)
    violations += _batch_violations(config.train, workers)
    violations += _schedule_violations(config.train)
    if experts is not None:
        violations += _expert_parallel_violations(config, workers, experts)
    accumulation = max(1, config.train.global_batch_size // (workers * config.train.micro_batch_size))
    if facts is not None:
        violations += balancing_violations(config, facts.router, facts.experts)
    if violations or facts is None:
        raise ConfigError(violations)
    train, asked = config.train, config.parallel.expert_parallel
    filled = train.model_copy(update={"schedule_steps": train.schedule_steps or train.steps})
    return Resolved(
        config=config.model_copy(update={"router": facts.router, "train": filled, "model": facts.model}),
        workers=workers,
        expert_parallel=gcd(workers, facts.experts) if asked == "auto" else asked,
        accumulation=accumulation,
        experts=facts.experts,
        model_config=facts.arguments,
    )


def _batch_violations(train: TrainConfig, workers: int) -> list[Violation]:
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (workers * micro) == 0:
        return []
    if batch % workers == 0:
        rule = f"does not divide the {batch // workers} sequences of each of {workers} workers"
        remedy = f"use {listed(divisors(batch // workers))}"
        return [Violation("train.micro_batch_size", micro, rule, remedy)]
    rule = f"does not divide among {workers} workers with micro-batches of {micro}"
    step = workers * micro
    multiples = [count for count in (batch // step * step, (batch // step + 1) * step) if count]
    fitting = [count for count in divisors(batch) if count % micro == 0 and batch % (count * micro) == 0]
    remedy = f"use {listed(multiples)}" + (f", or {listed(fitting)} workers" if fitting else "")
    return [Violation("train.global_batch_size", batch, rule, remedy)]


def _schedule_violations(train: TrainConfig) -> list[Violation]:
    found = []
    length = train.schedule_steps or train.steps
    if length < train.steps:
        rule = f"is shorter than train.steps={train.steps}"
        remedy = f"give {train.steps} or more, or null"
        found.append(Violation("train.schedule_steps", train.schedule_steps, rule, remedy))
    if train.warmup_steps > length:
        rule = f"is longer than the schedule of {length} steps"
        found.append(Violation("train.warmup_steps", train.warmup_steps, rule, f"give at most {length}"))
    if train.momentum and train.optimizer != "sgd":
        rule = f"has no meaning with train.optimizer={train.optimizer}"
        found.append(Violation("train.momentum", train.momentum, rule, "set it to 0, or use sgd"))
    return found


def _expert_parallel_violations(config: Config, workers: int, experts: int) -> list[Violation]:
    asked = config.parallel.expert_parallel
    if asked == "auto":
        return []
    parts = [f"the {workers} workers"] if workers % asked else []
    parts += [f"the model's {experts} experts"] if experts % asked else []
    if not parts:
        return []
    rule = f"does not divide {listed(parts, last='or')}"
    remedy = f"use {listed(divisors(gcd(workers, experts)))}"
    return [Violation("parallel.expert_parallel", asked, rule, remedy)]
