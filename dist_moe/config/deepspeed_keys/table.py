"""One table of every key of DeepSpeed's JSON: set by a field here, allowed below train.deepspeed, or refused."""

from collections.abc import Mapping

from dist_moe.config.deepspeed_keys import blocks, zero
from dist_moe.config.deepspeed_keys.convert import choice, number, numbers, whole
from dist_moe.config.deepspeed_keys.entries import Allowed, Entry, OneOf, Ours, Refused

SCHEDULE = "train.learning_rate, train.warmup_steps, train.schedule_steps and train.final_learning_rate_ratio"
BATCH = "train.global_batch_size and train.micro_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
MICRO_BATCH = "train_micro_batch_size_per_gpu"
OPTIMIZER = "has no other value with train.optimizer"
OF_DEEPSPEED = "is of an optimizer of DeepSpeed, and the optimizers here are those of PyTorch"
BF16 = "changes the precision of gradients or moments"
FP16 = "is of fp16, which is not supported"
TYPES = "changes the data type of weights or gradients, which train.precision sets"
COSINE = "is of another schedule than that of a run, which is a linear warmup from 0 and a cosine"

BATCHES: tuple[Entry, ...] = (
    Ours("train_batch_size", "train.global_batch_size", whole),
    Ours(MICRO_BATCH, "train.micro_batch_size", whole),
    Ours(ACCUMULATION, "train.global_batch_size", whole),
    Refused(
        "managed_gradient_accumulation",
        "lets DeepSpeed step outside of the micro-batches that a run counts",
        f"remove it; {BATCH} set the accumulation",
        unless=(True,),
    ),
    Refused(
        "gradient_allreduce_op",
        "adds up the gradients of the ranks, where the loss here is the mean over the global batch",
        "remove it, or set it to mean",
        unless=("mean",),
    ),
    Refused(
        "prescale_gradients",
        "divides gradients before they are reduced, which DeepSpeed refuses at ZeRO 2",
        "remove it, or set it to false",
        unless=(False,),
    ),
    Refused(
        "gradient_predivide_factor",
        "divides gradients before they are reduced, which DeepSpeed refuses at ZeRO 2",
        "remove it, or set it to 1",
        unless=(1.0,),
    ),
    Ours("gradient_clipping", "train.gradient_clipping", number),
)

OPTIMIZERS: tuple[Entry, ...] = (
    Ours("optimizer", "train.optimizer"),
    Ours("optimizer.type", "train.optimizer", choice({"adamw": "adamw", "adam": "adamw", "sgd": "sgd"})),
    Ours("optimizer.params.lr", "train.learning_rate", number),
    Ours("optimizer.params.betas", "train.betas", numbers),
    Ours("optimizer.params.weight_decay", "train.weight_decay", number),
    Ours("optimizer.params.momentum", "train.momentum", number),
    Refused("optimizer.params.eps", OPTIMIZER, "remove it, or set it to 1e-8", unless=(1e-8,)),
    Refused("optimizer.params.adam_w_mode", OPTIMIZER, "remove it, or set it to true", unless=(True,)),
    Refused("optimizer.params.bias_correction", OPTIMIZER, "remove it, or set it to true", unless=(True,)),
    Refused("optimizer.params.amsgrad", OPTIMIZER, "remove it, or set it to false", unless=(False,)),
    Refused("optimizer.params.torch_adam", OF_DEEPSPEED, unless=(True, False)),
    Refused(
        "optimizer.params.max_grad_norm",
        "is read by DeepSpeed and then used nowhere",
        "set train.gradient_clipping instead",
        unless=(0,),
    ),
    Refused("optimizer.legacy_fusion", OF_DEEPSPEED, "remove it, or set it to false", unless=(False,)),
    Refused(
        "zero_allow_untested_optimizer", "is always true here", "remove it; train.optimizer needs it", unless=(True,)
    ),
    Refused("zero_force_ds_cpu_optimizer", "is of offloading, which is refused", unless=(True, False)),
)

SCHEDULES: tuple[Entry, ...] = (
    Ours("scheduler", SCHEDULE),
    Refused(
        "scheduler.type",
        "chooses a schedule of DeepSpeed, and a run has its own",
        f"remove it; {SCHEDULE} set the schedule",
    ),
    Ours("scheduler.params.warmup_max_lr", "train.learning_rate", number),
    Ours("scheduler.params.warmup_num_steps", "train.warmup_steps", whole),
    Ours("scheduler.params.total_num_steps", "train.schedule_steps", whole),
    Ours("scheduler.params.cos_min_ratio", "train.final_learning_rate_ratio", number),
    Refused("scheduler.params.warmup_type", COSINE, "remove it, or set it to linear", unless=("linear",)),
    Refused("scheduler.params.warmup_min_ratio", COSINE, "remove it, or set it to 0", unless=(0,)),
    Refused("scheduler.params.warmup_min_lr", COSINE, "remove it, or set it to 0", unless=(0,)),
    *(
        Refused(f"scheduler.params.{name}", COSINE, f"remove it; {SCHEDULE} set the schedule")
        for name in (
            *("lr_range_test_min_lr", "lr_range_test_step_rate", "lr_range_test_step_size", "lr_range_test_staircase"),
            *("cycle_first_step_size", "cycle_first_stair_count", "cycle_second_step_size"),
            *("cycle_second_stair_count", "decay_step_size", "cycle_min_lr", "cycle_max_lr", "decay_lr_rate"),
            *("cycle_min_mom", "cycle_max_mom", "decay_mom_rate"),
        )
    ),
)


def _bf16(name: str) -> tuple[Entry, ...]:
    """Return the entries of the two names of the block of bf16."""
    return (
        Ours(name, "train.precision"),
        Ours(f"{name}.enabled", "train.precision", choice({True: "bf16", False: "fp32"})),
        Refused(f"{name}.check_grad_overflow", "is always true here", "remove it, or set it to true", unless=(True,)),
        *(
            Refused(f"{name}.{key}", BF16, "remove it, or set it to false", unless=(False,))
            for key in ("immediate_grad_update", "bf16_master_weights_and_grads", "bf16_optimizer_states")
        ),
    )


PRECISION: tuple[Entry, ...] = (
    *_bf16("bf16"),
    *_bf16("bfloat16"),
    Refused(
        "fp16",
        FP16,
        "remove it, or set enabled to false; train.precision is fp32 or bf16",
        switch=("enabled", False),
        inner=(
            *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
            *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
        ),
    ),
    Refused(
        "torch_autocast",
        TYPES,
        "remove it, or set enabled to false; set train.precision",
        switch=("enabled", False),
        inner=("enabled", "dtype", "lower_precision_safe_modules"),
    ),
    Refused(
        "data_types.grad_accum_dtype",
        "is refused by DeepSpeed at ZeRO 0, and selects another optimizer at ZeRO 1",
        "remove it; set train.precision",
        unless=(None,),
    ),
    Refused("data_types.param_dtype", TYPES, "remove it; set train.precision", unless=(None,)),
    Refused("data_types.buffer_dtype", TYPES, "remove it; set train.precision", unless=(None,)),
    Refused("data_types.keep_in_fp32_modules", TYPES, "remove it, or set it to auto", unless=("auto",)),
    Allowed(
        "communication_data_type",
        OneOf(("fp32", None)),
        "the data type in which gradients are reduced; bf16 and fp16 would round them",
    ),
    Refused(
        "seq_parallel_communication_data_type",
        "is of DeepSpeed's sequence parallelism, which is not used here",
        unless=("fp32", None),
    ),
)

ENTRIES: tuple[Entry, ...] = (*BATCHES, *OPTIMIZERS, *SCHEDULES, *PRECISION, *zero.ENTRIES, *blocks.ENTRIES)
TABLE: Mapping[str, Entry] = {entry.key: entry for entry in ENTRIES}
"""Dotted key of DeepSpeed -> its entry. A mapping has an entry where all of it has one meaning."""
