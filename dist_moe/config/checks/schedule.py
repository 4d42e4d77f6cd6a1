"""What is wrong between the batch size, the schedule and the optimizer, and what they change by themselves."""

from dist_moe.config.schema import Config
from dist_moe.config.sections.train import TrainConfig
from dist_moe.errors import Violation
from dist_moe.text import counted, divisors, listed, shown

MOST_LISTED = 40
"""Of many values that would do, a message has those nearest to what was given."""


def batch_violations(train: TrainConfig, workers: int) -> list[Violation]:
    """Whether the global batch divides among the workers, in whole micro-batches."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    smallest = 1 if micro == "auto" else micro
    if batch % (workers * smallest) == 0:
        return []
    if batch % workers == 0:
        share = f"the {counted(batch // workers, 'sequence')} of each of {counted(workers, 'worker')}"
        rule = f"does not divide {share}"
        near = sorted(divisors(batch // workers), key=lambda count: abs(count - smallest))[:MOST_LISTED]
        remedy = f"use {listed([*sorted(near), 'auto'])}"
        return [Violation("train.micro_batch_size", micro, rule, remedy)]
    with_micro = "" if micro == "auto" else f" with micro-batches of {micro}"
    rule = f"does not divide among {counted(workers, 'worker')}{with_micro}"
    step = workers * smallest
    multiples = [count for count in (batch // step * step, (batch // step + 1) * step) if count]
    fitting = [count for count in divisors(batch) if batch % (count * smallest) == 0]
    near = sorted(sorted(fitting, key=lambda count: abs(count - workers))[:MOST_LISTED])
    remedy = f"set train.global_batch_size to {listed(multiples)}"
    if near:
        remedy += f", or use {counted(near[0], 'worker') if len(near) == 1 else f'{listed(near)} workers'}"
    return [Violation("train.global_batch_size", batch, rule, remedy)]


def schedule_violations(train: TrainConfig) -> list[Violation]:
    """Whether the schedule covers the run, and the optimizer has the fields that are set."""
    found = []
    if train.schedule_length < train.steps:
        rule = f"is shorter than train.steps={train.steps}"
        remedy = f"give {train.steps} or more, or null"
        found.append(Violation("train.schedule_steps", train.schedule_steps, rule, remedy))
    if train.momentum and train.optimizer != "sgd":
        rule = f"has no meaning with train.optimizer={train.optimizer}"
        found.append(Violation("train.momentum", train.momentum, rule, "set it to 0, or use sgd"))
    return found


def schedule_notices(config: Config) -> list[str]:
    """What of the schedule is not used as it is written."""
    train = config.train
    if train.warmup_steps <= train.schedule_length:
        return []
    length = counted(train.schedule_length, "step")
    return [
        f"train.warmup_steps={shown(train.warmup_steps)} is longer than the schedule of {length}, "
        "so it is cut to it: the learning rate rises until the last step"
    ]
