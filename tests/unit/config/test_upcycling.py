"""model.upcycle_from: which layers become MoE layers, and what contradicts it, before a process starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import Config, dump_config, load_config, resolve
from dist_moe.config.checks.upcycling import chosen_layers
from dist_moe.config.sections.model import ModelConfig
from dist_moe.families.built_in import BUILT_IN
from tests.dense import DECODER
from tests.unit.config.files import debug, violations

DENSE: dict[str, Any] = {**DECODER, "model_type": "llama", "vocab_size": 400, "max_position_embeddings": 256}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**DENSE, **changes}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "dense")


def made(folder: Path | str, *overrides: str) -> Config:
    fixed = ("model.architecture=llama", "model.config={}", f"model.upcycle_from={folder}")
    return debug(*fixed, *overrides)


def test_the_folder_and_the_fields_define_the_model(folder: Path) -> None:
    """And the configuration as it is stored, with the keys of the folder, is the same."""
    resolved = resolve(made(folder, "model.upcycle_every=2", "model.upcycle_experts=6"), workers=2)
    found = {key: resolved.model_config[key] for key in ("hidden_size", "num_experts", "moe_layers", "vocab_size")}
    assert found == {"hidden_size": 32, "num_experts": 6, "moe_layers": [1, 3], "vocab_size": 400}
    router = resolved.config.router
    assert (resolved.experts, resolved.expert_parallel, router.top_k, router.score) == (6, 2, 2, "softmax")
    again = folder.parent / "again.yaml"
    again.write_text(dump_config(resolved.config))
    assert resolve(load_config(again), workers=2) == resolved


def test_the_architecture_is_that_of_the_folder(folder: Path) -> None:
    short = folder.parent / "short.yaml"
    short.write_text(
        f"model: {{upcycle_from: {folder}}}\ndata: {{sequence_length: 32}}\n"
        "train: {steps: 1, global_batch_size: 2, learning_rate: 0.001}\n"
    )
    assert load_config(short).model.architecture == "llama"
    assert load_config(short, ["model.upcycle_from=minilm"]).model.architecture == "bert"


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"upcycle_every": 2}, [1, 3, 5]),
        ({"upcycle_every": 4}, [1, 5]),
        ({"upcycle_every": 6}, [5]),
        ({"upcycle_layers": [4, 0]}, [0, 4]),
    ],
)
def test_every_nth_layer_counts_from_the_last(fields: dict[str, Any], layers: list[int]) -> None:
    model = ModelConfig(architecture="llama", upcycle_from="folder", **fields)
    assert chosen_layers(model, depth=6) == layers


PRETRAINED = "model.pretrained=elsewhere"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((PRETRAINED,), "elsewhere starts the run from other weights than model.upcycle_from="),
        (("model.config={hidden_size: 64}",), "hidden_size=64 differs from the 32 of model.upcycle_from; leave it out"),
        (("model.config={num_experts: 4}",), "num_experts=4 is not set here; use model.upcycle_experts"),
        (("model.architecture=qwen2",), "holds a llama; set model.architecture to it, or leave that out"),
        (("model.architecture=deepseek_v3",), "holds a llama; set model.architecture to it"),
        (("model.upcycle_every=5",), "model.upcycle_every=5 is more than the 4 layers of the model; use 1 to 4"),
        (("model.upcycle_layers=[1, 4]",), "upcycle_layers=[1, 4] names 4, and the model has 4 layers; use indices 0"),
        (("model.upcycle_layers=[1, 1]",), "model.upcycle_layers=[1, 1] names a layer twice"),
        (("model.upcycle_layers=[1]", "model.upcycle_every=2"), "upcycle_every=2 has no effect with model.upcycle_la"),
        (("model.upcycle_experts=2", "router.top_k=3"), "router.top_k=3 is not within the model's 2 experts"),
        (("router.top_k=1", "router.normalize=true"), "makes the weight of a token's one expert 1 for any score"),
        (("train.frozen_layers=4",), "train.frozen_layers=4 leaves no MoE layer to train: the last one is layer 3"),
        (("model.upcycle_layers=[1]", "train.frozen_layers=2"), "the last one is layer 1, counted from 0; use 0 to 1"),
    ],
)
def test_what_contradicts_the_dense_model_is_refused(folder: Path, overrides: tuple[str, ...], message: str) -> None:
    (found,) = violations(made(folder, *overrides)).values()
    assert message in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "holds a qwen3_moe, which has experts already; use model.pretrained="),
        ({"model_type": "dist_moe_llama"}, "holds an MoE model, which has experts already; use model.pretrained="),
        (
            {"model_type": "gpt2"},
            "holds a gpt2, which is not supported; give the folder of a model (bert, electra, llama,",
        ),
        ({"mlp_bias": True}, "has mlp_bias=true, which asks for biases, which gated experts do not have"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"num_key_value_heads": 3}, "model.config.num_key_value_heads=3 does not divide the 4 attention heads"),
        ({"intermediate_size": 50}, "model.config.intermediate_size=50 is not a multiple of 4"),
    ],
)
def test_a_folder_that_cannot_be_upcycled_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (found,) = violations(made(write(tmp_path / "dense", **changes))).values()
    assert message in str(found)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (found,) = violations(made(tmp_path)).values()
    assert f"model.upcycle_from={tmp_path} has no config.json" in str(found)
    (found,) = violations(made("owner/model")).values()
    assert "and set model.upcycle_from=model, or use a built-in model: minilm" in str(found)


def test_a_dense_folder_is_not_a_pretrained_moe_model(folder: Path) -> None:
    overrides = ("model.upcycle_from=null", f"model.pretrained={folder}")
    (found,) = violations(made(folder, *overrides)).values()
    assert f"holds a llama, which is dense; make an MoE model of it with model.upcycle_from={folder}" in str(found)


@pytest.mark.parametrize("name", [*(name for name in ModelConfig.model_fields if name.startswith("upcycle_"))][1:])
def test_fields_without_effect_are_refused(name: str) -> None:
    value = {"upcycle_layers": "[1]", "upcycle_router": "centered"}.get(name, "3")
    (found,) = violations(debug(f"model.{name}={value}")).values()
    assert "has no effect without model.upcycle_from; leave it out" in str(found)


def test_a_dense_architecture_alone_has_no_experts() -> None:
    found = violations(debug("model.architecture=llama", "model.config={hidden_size: 32, intermediate_size: 48}"))
    assert "is the architecture of a dense model, which has no experts" in str(found["model.architecture"])


def test_an_encoder_has_no_next_token_loss(tmp_path: Path) -> None:
    folder = write(tmp_path / "dense", model_type="bert")
    for value in (folder, "minilm"):
        (found,) = violations(made(value, "model.architecture=bert")).values()
        assert "is an encoder (bert): its tokens see later ones, so it has no next-token loss" in str(found)


UPCYCLED = {"model_type": "dist_moe_llama", "num_experts": 4, "num_experts_per_tok": 1, "moe_layers": [3]}
THRESHOLD = {"selection": "threshold", "threshold": 0.4, "max_experts": 4}


def test_an_exported_model_is_opened_with_its_own_routing(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", **UPCYCLED, dist_moe={"score": "sigmoid"})
    overrides = ("model.upcycle_from=null", f"model.pretrained={folder}")
    resolved = resolve(made(folder, *overrides), workers=1)
    assert (resolved.experts, resolved.model_config["moe_layers"]) == (4, [3])
    assert (resolved.config.router.top_k, resolved.config.router.score) == (1, "sigmoid")
    (found,) = violations(made(folder, *overrides, "router.score=softmax")).values()
    assert "router.score=softmax differs from the sigmoid of model.pretrained" in str(found)
    write(tmp_path / "model", **UPCYCLED, dist_moe=THRESHOLD)
    (found,) = violations(made(folder, *overrides)).values()
    assert "router.selection=top_k differs from the threshold of model.pretrained; set router.selection" in str(found)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_experts", None, "has num_experts=null in its config.json, which is not a positive integer"),
        ("num_experts", 0, "has num_experts=0 in its config.json, which is not a positive integer"),
        ("num_experts_per_tok", "1", "has num_experts_per_tok=1 in its config.json, which is not a positive integer"),
        ("moe_layers", None, "has moe_layers=null in its config.json, which is not a list of indices of layers"),
        ("moe_layers", ["3"], 'has moe_layers=["3"] in its config.json, which is not a list of indices of layers'),
        ("moe_layers", [-1], "has moe_layers=[-1] in its config.json, which is not a list of indices of layers"),
    ],
)
def test_an_exported_model_without_its_experts_is_refused(tmp_path: Path, key: str, value: Any, rule: str) -> None:
    folder = write(tmp_path / "model", **{**UPCYCLED, key: value})
    (found,) = violations(made(folder, "model.upcycle_from=null", f"model.pretrained={folder}")).values()
    assert (found.key, found.rule) == ("model.pretrained", rule)
    assert found.remedy == "export it again, or give another folder"


def test_built_in_models_are_described_by_their_own_files() -> None:
    for model in BUILT_IN.values():
        assert model.config["model_type"] in ("bert",) and "model.safetensors" in model.files
        assert all(len(digest) == 64 for digest in (model.sha256, *model.files.values()))
