"""The entries of the keys below zero_optimization."""

import sys
from typing import Any

from dist_moe.config.deepspeed_keys.convert import choice
from dist_moe.config.deepspeed_keys.entries import BOOLEAN, Allowed, Entry, Ours, Refused, Whole

LARGEST_BUCKET = 1_000_000_000
"""In elements: DeepSpeed allocates a reduce bucket whole when it starts."""
SLOWER = "if it is set, ZeRO 1 is slower, since DeepSpeed copies the gradients more often"
STAGE_3 = "is read at ZeRO 3 alone, and parallel.zero_stage is at most 2"
OFFLOAD = "moves the optimizer to the CPU or to a disk, which needs an optimizer of DeepSpeed's own"
MICS = "is a key of MiCS, which DeepSpeed has removed"
LOCO = "is a key of LoCo, which DeepSpeed has removed"


def _of_stage_3(name: str, *unless: Any, prefixed: bool = False, inner: tuple[str, ...] = ()) -> list[Refused]:
    """Return the entry of a key of ZeRO 3, and that of its other name with the prefix stage3_."""
    names = [f"stage3_{name}", name] if prefixed else [name]
    return [Refused(f"zero_optimization.{one}", STAGE_3, unless=unless, inner=inner) for one in names]


ALLOWED: tuple[Entry, ...] = (
    Allowed(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        BOOLEAN,
        f"whether the gradients of several ranks are reduced in one collective; {SLOWER}",
    ),
    Allowed(
        "zero_optimization.reduce_bucket_size",
        Whole(1, LARGEST_BUCKET),
        f"the elements that are reduced at a time (memory against the number of collectives); {SLOWER}",
    ),
    Allowed(
        "zero_optimization.allgather_bucket_size",
        Whole(2, LARGEST_BUCKET, 2),
        "the elements that are gathered at a time after a step",
    ),
)

OURS: tuple[Entry, ...] = (Ours("zero_optimization.stage", "parallel.zero_stage", choice({0: 0, 1: 1, 2: 2})),)

WRONG: tuple[Entry, ...] = (
    Refused(
        "zero_optimization.contiguous_gradients",
        "gives wrong gradients at ZeRO 1 with expert parallelism (DeepSpeed writes some over others), and ends in an "
        "assertion at ZeRO 2",
        "remove it, or set it to true",
        unless=(True,),
    ),
    Refused(
        "zero_optimization.reduce_scatter",
        "ends in an assertion of DeepSpeed at ZeRO 1 and 2 if it is false",
        "remove it, or set it to true",
        unless=(True,),
    ),
    Refused(
        "zero_optimization.round_robin_gradients",
        "changes which rank holds which slice of the optimizer without changing the map that checkpoints use",
        "remove it, or set it to false",
        unless=(False,),
    ),
    Refused(
        "zero_optimization.overlap_comm",
        "reduces gradients in a second stream of the GPU, which the tests on CPUs cannot prove to be right",
        "remove it, or set it to false",
        unless=(False, None),
    ),
    Refused(
        "zero_optimization.allgather_partitions",
        "is read by DeepSpeed and then used nowhere",
        "remove it, or set it to true",
        unless=(True,),
    ),
    Refused(
        "zero_optimization.parameter_alignment",
        "changes the layout of the optimizer's shards, which checkpoints here are written from",
        "remove it, or set it to false",
        unless=(False,),
    ),
    Refused(
        "zero_optimization.compute_grad_norm",
        "leaves out the gradient norm, by which a run here clips, skips steps and reports",
        "remove it, or set it to true",
        unless=(True,),
    ),
    Refused(
        "zero_optimization.ignore_unused_parameters",
        "ends a run at a parameter without gradient",
        "remove it, or set it to true",
        unless=(True,),
    ),
    Refused(
        "zero_optimization.zero_quantized_gradients",
        "rounds gradients to few bits before they are reduced",
        "remove it, or set it to false",
        unless=(False,),
    ),
    Refused(
        "zero_optimization.zenflow",
        "postpones the update of the smaller gradients, which changes what is computed",
        unless=(None,),
        inner=(
            *("topk_ratio", "select_strategy", "select_interval", "update_interval", "overlap_step", "offload"),
            *("auto_ratio", "full_warm_up_rounds", "pt_reserved_cores_perc", "steps_per_epoch"),
        ),
    ),
    Refused(
        "zero_optimization.legacy_stage1",
        "selects an optimizer that DeepSpeed has removed",
        "remove it, or set it to false",
        unless=(False,),
    ),
)

OFFLOADED: tuple[Entry, ...] = (
    Refused(
        "zero_optimization.offload_optimizer",
        OFFLOAD,
        "remove it, or set its device to none; parallel.zero_stage=2 and train.activation_checkpointing save memory",
        unless=(None,),
        switch=("device", "none"),
        inner=(
            *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
            *("ratio", "super_offload", "cpuadam_cores_perc"),
        ),
    ),
    Refused(
        "zero_optimization.offload_param",
        STAGE_3,
        "remove it, or set its device to none",
        unless=(None,),
        switch=("device", "none"),
        inner=("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    ),
    Refused("zero_optimization.cpu_offload", OFFLOAD, "remove it, or set it to false", unless=(False, None)),
    Refused("zero_optimization.cpu_offload_param", STAGE_3, "remove it, or set it to false", unless=(False, None)),
    Refused("zero_optimization.cpu_offload_use_pin_memory", OFFLOAD, unless=(False, True, None)),
)

REMOVED: tuple[Entry, ...] = (
    Refused("zero_optimization.mics_shard_size", MICS),
    Refused("zero_optimization.mics_hierarchical_params_gather", MICS),
    Refused("zero_optimization.zeropp_loco_param", LOCO),
)

CHECKPOINTS: tuple[Entry, ...] = tuple(
    Refused(f"zero_optimization.{name}", "is of DeepSpeed's own checkpoints, which are not written here", unless=(off,))
    for name, off in (("load_from_fp32_weights", True), ("elastic_checkpoint", False))
)

STAGE_3_KEYS: tuple[Entry, ...] = (
    *_of_stage_3("sub_group_size", 1_000_000_000),
    *_of_stage_3("prefetch_bucket_size", 50_000_000, prefixed=True),
    *_of_stage_3("param_persistence_threshold", 100_000, prefixed=True),
    *_of_stage_3("model_persistence_threshold", sys.maxsize, prefixed=True),
    *_of_stage_3("max_live_parameters", 1_000_000_000, prefixed=True),
    *_of_stage_3("max_reuse_distance", 1_000_000_000, prefixed=True),
    *_of_stage_3("gather_16bit_weights_on_model_save", False, prefixed=True),
    *_of_stage_3("module_granularity_threshold", 0, prefixed=True),
    *_of_stage_3("use_all_reduce_for_fetch_params", False, prefixed=True),
    *_of_stage_3("allgather_sequential", False, prefixed=True),
    *_of_stage_3("stage3_gather_fp16_weights_on_model_save", False),
    *_of_stage_3("zero_hpz_partition_size", 1),
    *_of_stage_3("zero_quantized_weights", False),
    *_of_stage_3("zero_quantized_nontrainable_weights", False),
    *_of_stage_3("memory_efficient_linear", True),
    *_of_stage_3("pipeline_loading_checkpoint", False),
    *_of_stage_3("override_module_apply", True),
    *_of_stage_3("log_trace_cache_warnings", False),
    *_of_stage_3("enable_sanity_checks", False),
    *_of_stage_3("save_muon_momentum_buffer_in_memory", False),
    *_of_stage_3("leaf_module", inner=("classes", "names", "name_suffixes")),
)

ENTRIES: tuple[Entry, ...] = (*OURS, *ALLOWED, *WRONG, *OFFLOADED, *CHECKPOINTS, *STAGE_3_KEYS, *REMOVED)
