"""The model section against the real Hugging Face classes: names, routing values, and rules of shape."""

from collections.abc import Callable

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dist_moe.config import Config, ConfigError, family_of, resolve
from dist_moe.config.model import vocabulary_bound
from tests.unit.config.files import WRITTEN_FAMILIES, debug, qwen, violations

Maker = Callable[..., Config]
MAKERS: dict[str, Maker] = {"deepseek_v3": debug, "qwen3_moe": qwen}


def forward(config: Config, arguments: dict) -> None:
    """Builds the Hugging Face model and runs it on a few tokens."""
    size = {"vocab_size": vocabulary_bound(config)}
    settings = CONFIG_MAPPING[config.model.architecture](**{**size, **arguments})
    model = AutoModelForCausalLM.from_config(settings)
    logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("architecture", "router"), [("deepseek_v3", DeepseekV3TopkRouter), ("qwen3_moe", Qwen3MoeTopKRouter)]
)
def test_the_family_score_is_that_of_its_router(architecture: str, router: type[torch.nn.Module]) -> None:
    resolved = resolve(MAKERS[architecture](), workers=1)
    gate = router(CONFIG_MAPPING[architecture](**resolved.model_config))
    torch.nn.init.normal_(gate.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    logits_TE, weights_TK, ids_TK = gate(torch.randn(5, 48, generator=torch.Generator().manual_seed(1)))
    chosen = resolved.config.router
    scores_TE = logits_TE.softmax(-1) if chosen.score == "softmax" else logits_TE.sigmoid()
    expected_TK = scores_TE.gather(1, ids_TK)
    if chosen.normalize:
        expected_TK = expected_TK / expected_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(weights_TK, expected_TK * chosen.scaling_factor)


@pytest.mark.parametrize("architecture", WRITTEN_FAMILIES)
def test_the_resolved_arguments_make_a_model_that_runs(architecture: str) -> None:
    config = MAKERS[architecture]()
    forward(config, resolve(config, workers=1).model_config)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("hiden_size=48", "=48 is not a key of DeepseekV3Config; did you mean hidden_size?"),
        ("num_local_experts=8", "=8 is not a key of DeepseekV3Config; did you mean n_routed_experts?"),
        ("num_nextn_predict_layers=0", "=0 is not a key of DeepseekV3Config; did you mean num_mtp_layers?"),
        ("rope_theta=1e4", "=10000.0 is not a key of DeepseekV3Config; did you mean rope_parameters?"),
        ("eos_token_id=3", "=3 is not set here; remove it; the tokenizer (data.tokenizer) sets it"),
        (
            "vocab_size=256",
            "=256 is smaller than the 257 tokens of the bytes tokenizer; leave it out, or give 257 or more",
        ),
        (
            "n_group=5",
            "=5 does not divide the model's 12 experts into groups of 2 or more; use 1, 2, 3, 4 or 6",
        ),
        (
            "n_group=12",
            "=12 does not divide the model's 12 experts into groups of 2 or more; use 1, 2, 3, 4 or 6",
        ),
        ("topk_group=2", "=2 is not within the 1 group; use 1"),
        ("num_experts_per_tok=13", "=13 is not within the model's 12 experts; use 1 to 12"),
        ("num_experts_per_tok=0", "=0 is not within the model's 12 experts; use 1 to 12"),
        ("num_experts_per_tok=null", "=null is not within the model's 12 experts; use 1 to 12"),
        ("n_routed_experts=0", "=0 leaves the model without experts; give 1 or more"),
        ("routed_scaling_factor=0.0", "=0.0 removes or negates the gate weights; give a factor above 0"),
    ],
)
def test_wrong_keys_and_values_of_the_model(override: str, line: str) -> None:
    key = f"model.config.{override.partition('=')[0]}"
    assert [str(found) for found in violations(debug(f"model.config.{override}")).values()] == [key + line]


@pytest.mark.parametrize(
    ("make", "overrides", "lines"),
    [
        (
            qwen,
            {"num_experts": "many", "hidden_size": 1.5},
            [
                "model.config.num_experts=many should be a whole number; correct it, or leave it out (the default is "
                "128)",
                "model.config.hidden_size=1.5 should be a whole number; correct it, or leave it out (the default is "
                "2048)",
            ],
        ),
        (
            debug,
            {"num_experts_per_tok": 2.5},
            [
                "model.config.num_experts_per_tok=2.5 should be a whole number or null; correct it, or leave it out "
                "(the default is 8)",
            ],
        ),
        (
            debug,
            {"num_hidden_layers": 1, "first_k_dense_replace": 1},
            ["model.config.first_k_dense_replace=1 leaves no MoE layer among the 1 layer; give 0"],
        ),
        (
            qwen,
            {
                "rope_parameters": "{rope_type: llama3, factor: 2.0, original_max_position_embeddings: 64, "
                "low_freq_factor: 1.0, high_freq_factor: null}"
            },
            None,
        ),
        (
            debug,
            {
                "rope_parameters": "{rope_type: longrope, factor: 2.0, original_max_position_embeddings: 64, "
                "short_factor: [1, 1, 1, 1], long_factor: [1, 1, 1, 1]}",
                "num_attention_heads": 0,
                "num_key_value_heads": 0,
            },
            None,
        ),
    ],
)
def test_what_the_class_refuses_has_its_key_and_value(
    make: Maker, overrides: dict[str, object], lines: list[str] | None
) -> None:
    found = violations(make(*(f"model.config.{key}={value}" for key, value in overrides.items())))
    assert "model.config" not in found
    assert set(found) <= {f"model.config.{key}" for key in overrides}
    if lines is not None:
        assert sorted(map(str, found.values())) == sorted(lines)


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("{1: 2, rope_type: default}", ["model.config.rope_parameters.1=2 has a key that is not a text"]),
        (
            "{a: [{true: {null: 3}}]}",
            [
                'model.config.rope_parameters.a[0].true={"null": 3} has a key that is not a text',
                "model.config.rope_parameters.a[0].true.null=3 has a key that is not a text",
            ],
        ),
    ],
)
def test_keys_that_are_not_texts_are_refused(value: str, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        debug(f"model.config.rope_parameters={value}")
    remedy = "; remove it, or quote the key"
    assert [str(violation) for violation in caught.value.violations] == [f"{line}{remedy}" for line in lines]


def test_keys_that_only_the_modelling_code_reads() -> None:
    assert resolve(qwen("model.config.head_dim=16"), workers=1).model_config["head_dim"] == 16
    assert list(violations(debug("model.config.head_dim=16"))) == ["model.config.head_dim"]


def test_a_bpe_vocabulary_must_fit() -> None:
    sized = ("data.tokenizer=bpe", "data.vocabulary=600")
    assert list(violations(debug(*sized, "model.config.vocab_size=599"))) == ["model.config.vocab_size"]
    assert resolve(debug(*sized, "model.config.vocab_size=608"), 1).model_config["vocab_size"] == 608


def test_routing_values_are_written_into_the_model() -> None:
    bare = debug("model.config.num_experts_per_tok=null", "model.config.n_group=null", "model.config.topk_group=null")
    router = {"top_k": 3, "groups": 4, "topk_groups": 2, "scaling_factor": 2.0, "normalize": False}
    wanted = bare.router.model_copy(update=router)
    without_scale = {
        key: bare.model.config[key] for key in bare.model.config if "scal" not in key and "norm" not in key
    }
    model = bare.model.model_copy(update={"config": without_scale})
    resolved = resolve(bare.model_copy(update={"router": wanted, "model": model}), workers=1)
    written = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}
    assert written.items() <= resolved.model_config.items()
    assert resolved.model_config["norm_topk_prob"] is False
    assert resolved.config.router == wanted.model_copy(update={"score": "sigmoid"})


def test_a_class_default_is_used_and_blamed_by_its_name() -> None:
    config = debug()
    lean = {key: value for key, value in config.model.config.items() if key not in ("n_group", "topk_group")}
    config = config.model_copy(update={"model": config.model.model_copy(update={"config": lean})})
    assert list(violations(config)) == ["model.config.n_group"]  # DeepSeek-V3's own 8 groups, of 12 experts
    assert not violations(config.model_copy(update={"router": debug("router={groups: 2, topk_groups: 1}").router}))


@pytest.mark.parametrize("name", ["top_k=3", "scaling_factor=2.0", "normalize=false", "groups=2", "topk_groups=2"])
def test_set_in_both_places_and_different(name: str) -> None:
    key = f"router.{name.partition('=')[0]}"
    (found,) = violations(debug(f"router.{name}")).values()
    assert found.key == key
    assert found.rule.startswith("differs from model.config.")


def test_a_large_routing_value_is_blamed_by_its_own_name() -> None:
    assert list(violations(debug("router.groups=1000000000000", "model.config.n_group=null"))) == ["router.groups"]
    assert list(violations(debug("router.top_k=1000000000000", "model.config.num_experts_per_tok=null"))) == [
        "router.top_k"
    ]


def test_too_few_experts_in_the_groups() -> None:
    few = ("model.config.n_group=6", "model.config.topk_group=1", "model.config.num_experts_per_tok=3")
    assert violations(debug(*few))["model.config.topk_group"].remedy == "use 2 or more"
    assert not violations(debug(*few, "model.config.topk_group=2"))


def test_a_family_without_groups() -> None:
    assert list(violations(qwen("router.groups=4"))) == ["router.groups"]
    resolved = resolve(qwen("router.groups=1", "router.score=sigmoid", "router.scaling_factor=2.5"), workers=1)
    assert (resolved.config.router.score, resolved.config.router.scaling_factor) == ("sigmoid", 2.5)
    assert (resolved.config.router.groups, resolved.config.router.normalize) == (1, False)


BROKEN = [
    (debug, "num_key_value_heads=2"),
    (debug, "qk_rope_head_dim=7"),
    (debug, "first_k_dense_replace=null"),
    (debug, "hidden_act=foo"),
    (debug, "v_head_dim=null"),
    (debug, "hidden_size=46"),
    (debug, "moe_intermediate_size=30"),
    (qwen, "head_dim=7"),
    (qwen, "num_key_value_heads=3"),
    (qwen, "decoder_sparse_step=0"),
    (qwen, "moe_intermediate_size=0"),
]


@pytest.mark.parametrize(("make", "override"), BROKEN)
def test_each_rule_of_shape_refuses_a_model_that_fails(make: Maker, override: str) -> None:
    config = make(f"model.config.{override}")
    assert f"model.config.{override.partition('=')[0]}" in violations(config)
    with pytest.raises((RuntimeError, TypeError, KeyError, ZeroDivisionError, IndexError)):
        forward(config, config.model.config)


@pytest.mark.parametrize(
    ("make", "override", "key"),
    [
        (debug, "first_k_dense_replace=3", "first_k_dense_replace"),
        (qwen, "mlp_only_layers=[0, 1]", "mlp_only_layers"),
        (qwen, "decoder_sparse_step=3", "mlp_only_layers"),
    ],
)
def test_a_model_without_moe_layers_is_refused(make: Maker, override: str, key: str) -> None:
    assert list(violations(make(f"model.config.{override}"))) == [f"model.config.{key}"]


@pytest.mark.parametrize(
    ("make", "overrides"),
    [
        (debug, {}),
        (debug, {"first_k_dense_replace": 0}),
        (qwen, {"num_hidden_layers": 5, "decoder_sparse_step": 2}),
        (qwen, {"num_hidden_layers": 4, "mlp_only_layers": [1]}),
    ],
)
def test_moe_layers_are_those_of_the_real_model(make: Maker, overrides: dict) -> None:
    config = make()
    arguments = {"vocab_size": 257, **resolve(config, workers=1).model_config, **overrides}
    settings = CONFIG_MAPPING[config.model.architecture](**arguments)
    model = AutoModelForCausalLM.from_config(settings)
    real = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert family_of(config.model.architecture).moe_layers(settings) == real


def test_widths_of_bf16_are_coarser() -> None:
    assert not violations(debug("model.config.hidden_size=44"))
    found = violations(debug("model.config.hidden_size=44", "train.precision=bf16"))
    assert list(found) == ["model.config.hidden_size"]
