"""Small models of every MoE family of transformers, made by program from the default of its config class."""

import copy
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from dist_moe.families.model_class import find_language_model_class, text_model_class

LAYERS, EXPERTS, TOP_K, WIDTH, VOCABULARY, LENGTH = 3, 8, 2, 32, 128, 128
LARGEST = 10_000_000
"""Parameters of a small model."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "num_sliding_attention_heads", "linear_num_heads"), 4
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads", "indexer_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(EXPERT_KEYS, EXPERTS),
    **dict.fromkeys(TOP_K_KEYS, TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers", "pad_token_id"), 0),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "max_position_embeddings": LENGTH,
    "sliding_window": 16,
    "index_topk": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a small model, for the keys that a config class has."""
LAYER_LISTS = re.compile(r"(layer_types|layers_block_type|mlp_layer_types|indexer_types|mlp_only_layers|moe_layers)$")
"""Keys with a value for each layer."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "deepseek_ocr2": {
        **{"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": TOP_K},
        **{"topk_method": "greedy", "topk_group": 1, "n_group": 1},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "deepseek_v2": {"topk_method": "greedy", "topk_group": 1, "n_group": 1, "num_experts_per_tok": TOP_K},
    "gemma4": {"enable_moe_block": True},
    "diffusion_gemma": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5,
        }
    },
    "glm5_next": {"qk_rope_head_dim": 0, "head_dim": 0},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        **{"intermediate_size_mlp": 48, "moe_layers": [1, 2], "no_rope_layers": [1, 1, 0]},
        **{"layer_types": ["chunked_attention", "chunked_attention", "full_attention"]},
        **{"attention_chunk_size": 16, "floor_scale": 16},
    },
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "step3p7": {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the default and the sizes above do not give."""


def families() -> dict[str, Path]:
    """Return the modeling file of each family with stacked experts, by the folder of the family."""
    folder = Path(inspect.getfile(transformers)).parent / "models"
    found = {}
    for path in sorted(folder.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "use_experts_implementation" in text or re.search(r"class \w+Experts\b.*nn\.Module", text):
            found[path.parent.name] = path
    return found


def small_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a small model: of the text part, where a family has others.

    Args:
        family: Its model_type.
        changes: Values of keys, in place of the small ones.
    """
    names = (family, family.replace("_", "-"), f"{family}_text")
    text = CONFIG_MAPPING[next(name for name in names if name in CONFIG_MAPPING)]().get_text_config()
    kind, given = type(text), text.to_dict()
    own = {**OWN.get(family, {}), **changes}
    attempts = [
        {key: size for key, size in SIZES.items() if given.get(key) is not None},
        {key: size for key, size in SIZES.items() if key in given},
    ]
    errors: list[Exception] = []
    for lists in (_one_of_each(given), {}, {key: None for key in given if LAYER_LISTS.search(key)}):
        for sizes in attempts:
            try:
                config = kind(**copy.deepcopy({**sizes, **lists, **own}))
                with torch.device("meta"):
                    parameters = sum(parameter.numel() for parameter in build(config).parameters())
                if parameters > LARGEST:
                    raise ValueError(f"the small model has {parameters:,} parameters; name its sizes in SIZES or OWN")
                return kind(**copy.deepcopy({**sizes, **lists, **own}))
            except Exception as error:  # classes of another library raise errors of any type
                errors.append(error)
    raise errors[0]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration: with an output layer where transformers has one for it."""
    config._experts_implementation = "eager"
    kind: Any = find_language_model_class(config) or text_model_class(type(config))
    model: PreTrainedModel = kind._from_config(config)
    return model


def _one_of_each(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return lists for LAYERS layers with every kind of layer that the default has, the last one repeated."""
    found = {}
    for key, value in given.items():
        if LAYER_LISTS.search(key) and isinstance(value, list) and value and isinstance(value[0], str):
            kinds = list(dict.fromkeys(value))
            found[key] = [*kinds, *[kinds[-1]] * LAYERS][:LAYERS]
    return found
