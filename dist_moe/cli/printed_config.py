"""Prints a configuration with what auto and null mean for it, as far as that is known on this host."""

import os
import re
from typing import Any, NamedTuple

from dist_moe.config import Config, Resolved
from dist_moe.config.yaml_io import render
from dist_moe.text import counted


class Meaning(NamedTuple):
    """What a field with the value auto or null means.

    Attributes:
        comment: Why, or what it depends on.
        value: The value to print instead; None to keep what is written.
    """

    comment: str
    value: Any = None


def printed(resolved: Resolved, written: Config, workers_are_given: bool) -> str:
    """Return the complete configuration as YAML, with a comment behind each value that was not written as it is.

    Args:
        resolved: The configuration, checked for a number of workers.
        written: The same as the user wrote it.
        workers_are_given: Whether the user gave that number; otherwise what depends on it is left auto.
    """
    meanings = {**_of_policy(written), **_of_train(resolved, written, workers_are_given)}
    meanings |= _of_workers(resolved, written, workers_are_given)
    values = resolved.config.model_dump()
    for key, meaning in meanings.items():
        if meaning.value is not None:
            section, _, name = key.partition(".")
            values[section][name] = meaning.value
    return annotate(render(values), {key: meaning.comment for key, meaning in meanings.items()})


def annotate(text: str, comments: dict[str, str]) -> str:
    """Add comments to the lines of a YAML file of sections, by dotted key; each key has its value on its line."""
    lines, section = [], ""
    for line in text.splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        key = re.match(r"  (\w+):", line)
        comment = comments.get(f"{section}.{key[1]}") if key else None
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join([*lines, ""])


def _of_policy(written: Config) -> dict[str, Meaning]:
    policy, found = written.balance, {}
    if getattr(policy, "center", ...) is None:
        found["balance.center"] = Meaning("null: the default of the policy", getattr(policy, "centers", None))
    if getattr(policy, "rule", ...) is None:
        rule = "proportional" if getattr(policy, "proportional", False) else "sign"
        found["balance.rule"] = Meaning("null: the default of the policy", rule)
    return found


def _of_train(resolved: Resolved, written: Config, workers_are_given: bool) -> dict[str, Meaning]:
    train, found = written.train, {}
    if train.micro_batch_size == "auto":
        comment = "auto: the largest divisor of global_batch_size / workers within its bounds"
        value = resolved.config.train.micro_batch_size if workers_are_given else "auto"
        found["train.micro_batch_size"] = Meaning(comment, value)
    if train.warmup_steps != train.warmup_length:
        found["train.warmup_steps"] = Meaning(
            f"{train.warmup_steps} of a schedule of {counted(train.schedule_length, 'step')}"
        )
    if train.schedule_steps is None:
        found["train.schedule_steps"] = Meaning("null: train.steps")
    return found


def _of_workers(resolved: Resolved, written: Config, workers_are_given: bool) -> dict[str, Meaning]:
    """What depends on the number of workers and on their hosts."""
    parallel, found = written.parallel, {}
    here = workers_are_given and not (written.cluster.hosts or written.cluster.hostfile)
    if parallel.expert_parallel == "auto":
        comment = f"auto: the largest divisor of the workers and the {counted(resolved.experts, 'expert')}"
        found["parallel.expert_parallel"] = Meaning(comment, resolved.expert_parallel if workers_are_given else None)
    if parallel.all_to_all == "auto":
        comment = "auto: hierarchical where experts span several hosts with equal numbers of workers, else flat"
        found["parallel.all_to_all"] = Meaning(comment, "flat" if here else None)
    if parallel.backend == "auto":
        comment = "auto: nccl where each worker has its own GPU, else mpi under mpirun, else gloo"
        found["parallel.backend"] = Meaning(comment, _backend(resolved.workers) if here else None)
    if written.train.precision == "auto":
        comment = "auto: bf16 where the device supports it natively, else fp32"
        found["train.precision"] = Meaning(comment, _precision(resolved.workers, parallel.backend) if here else None)
    if written.run.threads == "auto":
        threads = max(1, len(os.sched_getaffinity(0)) // resolved.workers)
        found["run.threads"] = Meaning("auto: the cores of a host divided by its workers", threads if here else None)
    if written.checkpoint.resume == "auto":
        found["checkpoint.resume"] = Meaning("the newest valid checkpoint in run.dir, if there is one")
    return found


def _backend(workers: int) -> str:
    from dist_moe.comm.devices import choose_backend
    from dist_moe.worker.rank_info import RankInfo

    return choose_backend("auto", RankInfo(world_size=workers, local_world_size=workers))


def _precision(workers: int, backend: str) -> str:
    import torch

    from dist_moe.engine.precision import choose_precision

    on_gpu = (_backend(workers) if backend == "auto" else backend) == "nccl"
    device = torch.device("cuda" if on_gpu else "cpu")
    return "bf16" if choose_precision("auto", device) == torch.bfloat16 else "fp32"
