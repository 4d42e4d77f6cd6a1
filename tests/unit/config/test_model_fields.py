"""Every field of the families' config classes: it changes the model, or is refused, or is listed without effect."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, family_of, resolve
from dist_moe.config.checks.rotary import RULES
from dist_moe.config.model import OWNED_MODEL_KEYS, known_keys
from dist_moe.model.build import build_model, routing_rule
from tests.selection import cross, only_first
from tests.unit.config.files import WRITTEN_FAMILIES, debug, qwen, violations

LENGTH = 24
# One layer of each kind, and every value small.
BASE = {
    "deepseek_v3": (debug, ("model.config.num_hidden_layers=2", "model.config.n_group=2", "model.config.topk_group=1")),
    "qwen3_moe": (
        qwen,
        (
            *("model.config.num_hidden_layers=3", "model.config.mlp_only_layers=[0]"),
            *("model.config.norm_topk_prob=true", "model.config.initializer_range=0.1"),
        ),
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "attention_bias": True,
        "attention_dropout": 0.5,
        "first_k_dense_replace": 0,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "initializer_range": 0.05,
        "intermediate_size": 128,
        "kv_lora_rank": 8,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_mtp_layers": 1,
        "pretraining_tp": 2,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-1,
        "rope_interleave": False,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        "routed_scaling_factor": 3.0,
        "tie_word_embeddings": True,
        "topk_group": 2,
        "v_head_dim": 16,
        "vocab_size": 300,
        "use_cache": False,
        "max_position_embeddings": 512,
    },
    "qwen3_moe": {
        "attention_bias": True,
        "attention_dropout": 0.5,
        "decoder_sparse_step": 2,
        "head_dim": 16,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "initializer_range": 0.05,
        "intermediate_size": 128,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 64,
        "norm_topk_prob": False,
        "num_attention_heads": 8,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-1,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "vocab_size": 300,
        "use_cache": False,
        "max_position_embeddings": 512,
    },
}
# Where a change shows only together with another.
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek_v3", "num_attention_heads"): {"num_key_value_heads": 8},
    ("qwen3_moe", "use_sliding_window"): {"sliding_window": 4},
}
REFUSED = {
    "num_key_value_heads": "differs from the 4 attention heads (latent attention has equally many)",
    "num_mtp_layers": "asks for multi-token prediction, which is not trained here",
    "pretraining_tp": "asks for the tensor parallelism of another program, which the model ignores",
    "sliding_window": "has no effect while model.config.use_sliding_window is false",
}
NO_EFFECT = {
    "use_cache": "of generation by transformers, and kept in the config.json of a checkpoint",
    "max_position_embeddings": "a limit of data.sequence_length, and a value that some rotary embeddings read",
}


def with_keys(architecture: str, keys: dict[str, Any]) -> Config:
    make, base = BASE[architecture]
    config = make(*base)
    return config.model_copy(update={"model": config.model.model_copy(update={"config": config.model.config | keys})})


def outcome(config: Config) -> list[Tensor]:
    """The initial values of the model, and its logits in training."""
    resolved = resolve(config, workers=1)
    arguments = {"vocab_size": 257, **resolved.model_config}
    rule = routing_rule(resolved.config.router, resolved.config.balance, config.model.architecture)
    model = build_model(config.model.architecture, arguments, rule, Mesh(1, 0, 1), seed=0).train()
    for module in model.modules():
        if hasattr(module, "open_record"):
            module.open_record(None)
    torch.manual_seed(0)
    tokens = torch.randint(0, 257, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).repeat(2, 1)
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return [*model.state_dict().values(), logits]


def differs(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) != len(other) or not all(map(torch.equal, one, other))


@pytest.mark.parametrize("architecture", WRITTEN_FAMILIES)
def test_every_field_is_tried(architecture: str) -> None:
    cls = CONFIG_MAPPING[architecture]
    assert set(CHANGES[architecture]) == known_keys(cls, family_of(architecture))
    assert set(OWNED_MODEL_KEYS).isdisjoint(CHANGES[architecture])


@pytest.mark.parametrize("architecture", only_first(sorted(WRITTEN_FAMILIES, reverse=True)))
def test_each_field_changes_the_model_or_is_refused_or_has_no_effect(architecture: str) -> None:
    before = outcome(with_keys(architecture, {}))
    assert not differs(before, outcome(with_keys(architecture, {}))), "the comparison is exact"
    wrong = []
    for key, value in CHANGES[architecture].items():
        together = TOGETHER.get((architecture, key), {})
        config = with_keys(architecture, {key: value, **together})
        found = violations(config)
        if found:
            as_expected = list(found) == [f"model.config.{key}"] and found[f"model.config.{key}"].rule == REFUSED[key]
        else:
            as_expected = differs(before, outcome(config)) != (key in NO_EFFECT)
        if not as_expected:
            wrong.append((key, [str(violation) for violation in found.values()]))
    assert wrong == []


# Each kind of rotary embeddings, and a variant of yarn, with the keys that it needs; heads have 8 or 12 elements.
ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with scales": {
        **{"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
ROTARY_CHANGES: dict[str, Any] = {
    "rope_theta": 1000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 20,
    "attention_factor": 1.5,
    "beta_fast": 3.0,
    "beta_slow": 0.1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "truncate": False,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "partial_rotary_factor": 0.25,
}
ROTARY_WITHOUT_EFFECT = {
    ("dynamic", "factor"): "of sequences that are longer than max_position_embeddings, as in generation",
    ("longrope", "short_factor"): "of sequences up to original_max_position_embeddings",
}


@cross(("kind", list(ROTARY)), ("architecture", sorted(WRITTEN_FAMILIES)), strength=1)
def test_each_rotary_key_changes_the_model_or_is_refused_or_is_listed(architecture: str, kind: str) -> None:
    # With a small theta the few elements of a head have frequencies on both sides of each bound.
    parameters = {"rope_type": kind.partition(" ")[0], "rope_theta": 10.0, **ROTARY[kind]}
    changes = dict(ROTARY_CHANGES)
    for name in ("short_factor", "long_factor"):
        pairs = 4 if architecture == "deepseek_v3" else 6
        changes[name] = [2.0] * pairs
        parameters |= {name: [1.0] * pairs} if kind == "longrope" else {}
    assert set(changes) == set(RULES)
    config = with_keys(architecture, {"rope_parameters": parameters})
    if violations(config):
        # DeepSeek-V3's attention reads a factor, which transformers refuses for this kind.
        assert (architecture, kind) == ("deepseek_v3", "proportional")
        return
    before, wrong = outcome(config), []
    for key, value in changes.items():
        config = with_keys(architecture, {"rope_parameters": {**parameters, key: value}})
        if found := violations(config):
            as_expected = list(found) == ["model.config.rope_parameters"]
        else:
            as_expected = differs(before, outcome(config)) != ((kind, key) in ROTARY_WITHOUT_EFFECT)
        if not as_expected:
            wrong.append((key, [str(violation) for violation in found.values()]))
    assert wrong == []


@pytest.mark.parametrize(
    ("architecture", "keys", "line"),
    [
        (
            "deepseek_v3",
            {"num_mtp_layers": 2},
            "num_mtp_layers=2 asks for multi-token prediction, which is not trained ",
        ),
        ("deepseek_v3", {"pretraining_tp": 2}, "pretraining_tp=2 asks for the tensor parallelism of another program, "),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 does not say which layers are dense"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank=0 is not positive; give 1 or more, or null"),
        ("qwen3_moe", {"head_dim": [8]}, "head_dim=[8] is not an integer; give an even number, or leave it out"),
        ("qwen3_moe", {"head_dim": "8"}, "head_dim=8 is not an integer; give an even number, or leave it out"),
        ("qwen3_moe", {"mlp_only_layers": [7]}, "mlp_only_layers=[7] names a layer that is not among the 3 layers"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0 is not positive"),
        ("qwen3_moe", {"attention_dropout": 1.0}, "attention_dropout=1.0 is not in the range 0 to below 1"),
        ("qwen3_moe", {"initializer_range": -0.02}, "initializer_range=-0.02 is not in the range above 0"),
        ("qwen3_moe", {"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN is not a number; give a number"),
    ],
)
def test_what_is_asked_for_and_not_built_is_refused(architecture: str, keys: dict[str, Any], line: str) -> None:
    found = [str(violation) for violation in violations(with_keys(architecture, keys)).values()]
    assert len(found) == 1 and found[0].startswith(f"model.config.{line}"), found


@pytest.mark.parametrize("keys", [{"num_mtp_layers": 0}, {"pretraining_tp": 1}, {"pretraining_tp": None}])
def test_the_values_that_ask_for_nothing_are_accepted(keys: dict[str, Any]) -> None:
    assert not violations(with_keys("deepseek_v3", keys))


def test_a_window_that_is_off_may_be_written_out() -> None:
    for window in (None, 4096):
        assert not violations(with_keys("qwen3_moe", {"sliding_window": window, "use_sliding_window": False}))
