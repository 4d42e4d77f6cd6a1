"""The entries of the keys for output, profiling, checkpoints, data and parallelism, which are mostly refused."""

from dist_moe.config.deepspeed_keys.convert import choice, whole
from dist_moe.config.deepspeed_keys.entries import BOOLEAN, Allowed, Entry, Ours, Refused

OFF = "remove it, or set it to false"
DISABLE = "remove it, or set enabled to false"
OUTPUT = "prints what DeepSpeed measures, whose messages are turned off here"
REMOVED = "is of a feature that DeepSpeed has removed"
UNUSED = "is read by DeepSpeed and then used nowhere"
CHECKPOINTS = "is of DeepSpeed's own checkpoints, which are not written here"
SAVE = "remove it; checkpoint.* sets how this project saves"
MONITOR = "is a monitor of DeepSpeed, which logs nothing of a run here"
PARALLELISM = "splits the model or the sequence over ranks, which is not supported here"
DATA = "is of DeepSpeed's data loader, and a run here has its own"


def _block(key: str, reason: str, inner: tuple[str, ...], remedy: str = DISABLE) -> Refused:
    """Return the entry of a mapping that has no effect while its key `enabled` is false."""
    return Refused(key, reason, remedy, switch=("enabled", False), inner=inner)


OBSERVED: tuple[Entry, ...] = (
    Ours("steps_per_print", "observe.interval", whole),
    Ours("tensorboard", "observe.tensorboard"),
    Ours("tensorboard.enabled", "observe.tensorboard", choice({True: True, False: False})),
    Refused("tensorboard.output_path", "has no place here: events are written below run.dir", unless=("",)),
    Refused(
        "tensorboard.job_name", "has no place here: events are written below run.dir", unless=("DeepSpeedJobName",)
    ),
    _block(
        "wandb", MONITOR, ("enabled", "group", "team", "project"), remedy=f"{DISABLE}; observe.* sets the monitoring"
    ),
    _block(
        "csv_monitor", MONITOR, ("enabled", "output_path", "job_name"), remedy=f"{DISABLE}; run.dir has metrics.jsonl"
    ),
    _block(
        "comet",
        MONITOR,
        (
            *("enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name"),
            *("experiment_key", "online", "mode"),
        ),
        remedy=f"{DISABLE}; observe.* sets the monitoring",
    ),
    Refused("wall_clock_breakdown", OUTPUT, f"{OFF}; the log of a run has the times of its steps", unless=(False,)),
    Refused("memory_breakdown", OUTPUT, OFF, unless=(False,)),
    Refused("dump_state", OUTPUT, f"{OFF}; dist-moe config prints the configuration", unless=(False,)),
    Refused("log_level", OUTPUT, "remove it; --verbose reports what is decided", unless=(None,)),
    Refused("vocabulary_size", OUTPUT, "remove it; the tokenizer sets it", unless=(None,)),
    _block("comms_logger", OUTPUT, ("enabled", "prof_all", "prof_ops", "verbose", "debug")),
    _block(
        "flops_profiler",
        "runs the model under hooks in the middle of a run",
        (
            *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed"),
            "output_file",
        ),
    ),
    Allowed("timers.throughput.enabled", BOOLEAN, "whether DeepSpeed times the steps (its result is not shown)"),
    Allowed("timers.throughput.synchronized", BOOLEAN, "whether the device is synchronized for that"),
    Refused("disable_python_gc", "turns off the garbage collector of the whole process", OFF, unless=(False,)),
)

SAVED: tuple[Entry, ...] = (
    *(
        Refused(
            f"activation_checkpointing.{name}",
            "is read by models that call DeepSpeed's own checkpointing, and the models here do not",
            "remove it; train.activation_checkpointing saves activations",
            unless=(off,),
        )
        for name, off in (
            ("partition_activations", False),
            ("number_checkpoints", None),
            ("contiguous_memory_optimization", False),
            ("synchronize_checkpoint_boundary", False),
            ("profile", False),
            ("cpu_checkpointing", False),
        )
    ),
    Refused(
        "checkpoint",
        CHECKPOINTS,
        SAVE,
        switch=("load_universal", False),
        inner=(
            *("tag_validation", "checkpoint_serialization", "writer", "load_universal", "use_node_local_storage"),
            "parallel_write",
        ),
    ),
    Refused("datastates_ckpt", CHECKPOINTS, SAVE, unless=(False, None)),
    Refused(
        "aio",
        "is of offloading to a disk, which is refused",
        unless=(None,),
        inner=(
            *("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
            "thread_count",
        ),
    ),
)

FED: tuple[Entry, ...] = (
    Refused("dataloader_drop_last", DATA, OFF, unless=(False,)),
    _block(
        "data_efficiency",
        DATA,
        ("enabled", "seed", "data_sampling", "data_routing"),
        remedy=f"{DISABLE}; data.* sets the data",
    ),
)

SPLIT: tuple[Entry, ...] = (
    _block(
        "expert_parallel",
        "replaces the experts by those of DeepSpeed, which balance and routing here do not know",
        (
            *("enabled", "autoep_size", "expert_tensor_parallel_size", "validate_folding_routing", "async_split_plan"),
            *("preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern", "use_grouped_mm"),
            *("disable_triton_grouped_mm", "route_norm", "route_scale", "score_apply", "combine_impl"),
            *("row_weighting_impl", "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin"),
            *("comm_max_tokens_per_rank", "num_expert_groups", "num_limited_groups", "score_func", "top_k"),
            *("load_balance_coeff", "routed_scaling_factor", "expert_w1", "expert_w2", "expert_w3"),
            *("num_experts_attr", "top_k_attr", "has_shared_experts", "shared_experts_pattern"),
            *("shared_experts_gate_pattern", "expert_activation"),
        ),
        remedy=f"{DISABLE}; parallel.expert_parallel spreads the experts",
    ),
    Refused(
        "use_data_before_expert_parallelism",
        "numbers the ranks in another order than the expert groups here",
        f"{OFF}; parallel.expert_parallel sets the groups",
        unless=(False,),
    ),
    Refused(
        "tensor_parallel",
        PARALLELISM,
        "remove it, or set autotp_size to 0",
        switch=("autotp_size", 0),
        inner=(
            *("dtype", "autotp_size", "tp_overlap_comm", "vocab_parallel_lm_head", "vocab_parallel_ce_backend"),
            *("tensor_parallel", "tp", "injection_policy_tuple", "partition_config", "preset_model"),
            *("keep_module_on_host", "replace_with_kernel_inject", "kernel_inject"),
        ),
    ),
    Refused("sequence_parallel_size", PARALLELISM, "remove it, or set it to 1", unless=(1,)),
    Refused("data_parallel_size", PARALLELISM, "remove it; the number of workers follows from the launch"),
    Refused(
        "pipeline",
        PARALLELISM,
        inner=(
            *("stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned"),
            "grad_partitioned",
        ),
    ),
    Refused(
        "compile",
        "compiles the model, whose dispatch of tokens to experts has sizes that change with each step",
        "remove it, or set deepcompile to false",
        switch=("deepcompile", False),
        inner=(
            *("deepcompile", "autoep_non_moe", "free_activation", "free_activation_threshold", "offload_activation"),
            *("offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory"),
            *("debug_log", "offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather"),
            *("sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors", "passes"),
        ),
    ),
)

OTHERS: tuple[Entry, ...] = (
    _block(
        "hybrid_engine",
        "replaces the engine by one for inference between steps",
        (
            *("enabled", "max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters"),
            *("tp_gather_partition_size", "enable_cuda_graph"),
        ),
    ),
    _block(
        "autotuning",
        "starts many runs of DeepSpeed's own launcher",
        (
            *("enabled", "fast", "results_dir", "exps_dir", "overwrite", "start_profile_step", "end_profile_step"),
            *("metric", "metric_path", "tuner_type", "tuner_early_stopping", "tuner_num_trials", "arg_mappings"),
            *("model_info", "model_info_path", "mp_size", "max_train_batch_size", "min_train_batch_size"),
            *("max_train_micro_batch_size_per_gpu", "min_train_micro_batch_size_per_gpu"),
            "num_tuning_micro_batch_sizes",
        ),
    ),
    Refused(
        "weight_quantization",
        "rounds the weights to few bits",
        inner=("enabled", "num_bits", "q_type", "q_groups", "quantized_initialization", "post_init_quant"),
    ),
    Refused("disable_allgather", UNUSED, OFF, unless=(False,)),
    Refused("allgather_size", "is of an old form of zero_optimization", "set zero_optimization.allgather_bucket_size"),
    *(
        Refused(name, REMOVED)
        for name in (
            *("nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue"),
            *("sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
        )
    ),
    Refused("amp", REMOVED, "remove it; train.precision sets the precision"),
    Refused("elasticity", REMOVED, "remove it; train.global_batch_size sets the batch"),
)

ENTRIES: tuple[Entry, ...] = (*OBSERVED, *SAVED, *FED, *SPLIT, *OTHERS)
