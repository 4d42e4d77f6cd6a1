"""What the section `task` asks for that does not go together."""

from dist_moe.config.pretrained import weights_source
from dist_moe.config.schema import Config
from dist_moe.errors import Violation
from dist_moe.families.record import Family
from dist_moe.text import counted, listed


def task_violations(config: Config) -> list[Violation]:
    """Return what is wrong among the fields of `task`."""
    task, found = config.task, []
    repeated = sorted({label for label in task.labels or () if (task.labels or []).count(label) > 1})
    if repeated:
        rule = f"repeats {listed(map(repr, repeated), last='and')}"
        found.append(Violation("task.labels", task.labels, rule, "give each class once"))
    if task.kind == "regression":
        for name in ("labels", "class_weights"):
            if (value := getattr(task, name)) is not None:
                rule, remedy = "is of classes, which a regression does not have", "leave it null"
                found.append(Violation(f"task.{name}", value, rule, remedy))
    elif isinstance(task.class_weights, list):
        weights, labels = task.class_weights, task.labels
        if labels is None:
            rule, remedy = "has no task.labels, whose order it follows", "set task.labels, or use balanced"
            found.append(Violation("task.class_weights", weights, rule, remedy))
        elif len(weights) != len(labels):
            rule = f"has {counted(len(weights), 'weight')} for {len(labels)} classes"
            found.append(Violation("task.class_weights", weights, rule, "give one weight for each class"))
    return found


def encoder_violations(config: Config, family: Family) -> list[Violation]:
    """What an encoder cannot be trained for."""
    source = weights_source(config.model)
    is_gone = source.value is not None and not source.exists()
    if not family.encoder or is_gone or config.task.kind != "language_model":
        return []
    key, value = (source.key, source.value) if source.exists() else ("model.architecture", config.model.architecture)
    rule = f"is an encoder ({family.architecture}): its tokens see later ones, so it has no next-token loss"
    decoder = "a qwen3_moe" if family.feed_forward is None else "a llama or a qwen3"
    return [Violation(key, value, rule, f"use a decoder, such as {decoder}, or set task.kind=classification")]
