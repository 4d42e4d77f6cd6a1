"""The size of the models of the checkpoint benchmark, and the overrides that give it to dist_moe's."""

WIDTH, MOE_WIDTH, EXPERTS, LAYERS, TOKENS = 256, 512, 16, 4, 512

OVERRIDES = (
    f"model.config.hidden_size={WIDTH}",
    "model.config.intermediate_size=512",
    f"model.config.num_hidden_layers={LAYERS + 1}",
    f"model.config.n_routed_experts={EXPERTS}",
    f"model.config.moe_intermediate_size={MOE_WIDTH}",
    "data.sequence_length=128",
    f"train.global_batch_size={2 * TOKENS // 128}",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "parallel.zero_stage=1",
)
