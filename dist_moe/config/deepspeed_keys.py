"""The keys of DeepSpeed's configuration that fields here set, and that train.deepspeed must not set again."""

from collections.abc import Mapping
from typing import Any

from dist_moe.errors import Violation

# Dotted key of DeepSpeed -> the field here that sets it.
OWNED_DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "elasticity": "train.global_batch_size and train.micro_batch_size",
    "gradient_allreduce_op": "train.global_batch_size (the loss is the mean over its tokens)",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.optimizer",
    "zero_allow_untested_optimizer": "train.optimizer",
    "scheduler": "train.learning_rate, train.warmup_steps and train.final_learning_rate_ratio",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.param_dtype": "train.precision",
    "data_types.buffer_dtype": "train.precision",
    "data_types.keep_in_fp32_modules": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero_stage",
    # With it, DeepSpeed's map from a parameter to its slice of the optimizer, which checkpoints use, is wrong.
    "zero_optimization.round_robin_gradients": "parallel.zero_stage (to false)",
    "expert_parallel": "parallel.expert_parallel",
    "use_data_before_expert_parallelism": "parallel.expert_parallel",
    "checkpoint": "checkpoint.interval",
    "steps_per_print": "observe.interval",
    "tensorboard": "observe.tensorboard",
}


def deepspeed_violations(settings: Mapping[str, Any]) -> list[Violation]:
    """Return one violation for each key of `train.deepspeed` that another field sets."""
    found = []
    for dotted, field in OWNED_DEEPSPEED_KEYS.items():
        section, _, key = dotted.partition(".")
        value = settings.get(section)
        if key and section in settings and not isinstance(value, Mapping):
            rule, remedy = "must be a mapping", f"write its keys below {section}"
            violation = Violation(f"train.deepspeed.{section}", value, rule, remedy)
            if violation not in found:
                found.append(violation)
        elif key and isinstance(value, Mapping) and key in value:
            found.append(_owned(dotted, value[key], field))
        elif not key and section in settings:
            found.append(_owned(dotted, value, field))
    return found


def _owned(dotted: str, value: Any, field: str) -> Violation:
    return Violation(f"train.deepspeed.{dotted}", value, "is not set here", f"remove it; {field} sets it in DeepSpeed")
