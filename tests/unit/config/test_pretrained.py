"""model.pretrained: the folder's config.json fills model.config, and what contradicts it is an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.config import Config, dump_config, load_config, resolve
from dist_moe.config.pretrained import own_checkpoints, tokenizer_folder
from tests.unit.config.files import DEBUG, debug, violations

QWEN: dict[str, Any] = {
    # A published file: names of its time, and ids of its own tokens.
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16"},
    **{"bos_token_id": 151643, "eos_token_id": 151645, "rope_theta": 1000000.0, "rope_scaling": None},
    **{"hidden_size": 48, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "norm_topk_prob": True},
    **{"num_experts_per_tok": 2, "vocab_size": 400, "max_window_layers": 48, "router_aux_loss_coef": 0.001},
}
# What save_pretrained writes of the same number.
RENAMED = {key: value for key, value in QWEN.items() if key != "num_experts"} | {"num_local_experts": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", QWEN)


def write(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def begun(folder: Path, *overrides: str) -> Config:
    fixed = ("model.architecture=qwen3_moe", "model.config={}", f"model.pretrained={folder}")
    return debug(*fixed, f"run.dir={folder.parent / 'run'}", *overrides)


@pytest.mark.parametrize("settings", [QWEN, RENAMED], ids=["published", "saved"])
def test_the_folder_defines_the_model(folder: Path, settings: dict[str, Any]) -> None:
    resolved = resolve(begun(write(folder, settings)), workers=1)
    keys = resolved.config.model.config
    assert (keys["num_experts"], keys["vocab_size"], keys["head_dim"]) == (8, 400, 16)
    assert keys["rope_parameters"] == {"rope_theta": 1000000.0, "rope_type": "default"}
    assert "eos_token_id" not in keys and resolved.model_config["eos_token_id"] is None
    assert (resolved.config.router.top_k, resolved.config.router.normalize) == (2, True)
    again = folder.parent / "again.yaml"
    again.write_text(dump_config(resolved.config))
    assert resolve(load_config(again), workers=1) == resolved, "keys set in both places, and equal"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.config={hidden_size: 64}", "model.config.hidden_size=64 differs from the 48 of model.pretrained"),
        ("router.top_k=3", "router.top_k=3 differs from model.pretrained's num_experts_per_tok=2; set one of the two"),
        ("model.config={hiden_size: 48}", "model.config.hiden_size=48 is not a key of Qwen3MoeConfig"),
        ("model.architecture=deepseek_v3", "holds a qwen3_moe; set model.architecture to it"),
        ("data={tokenizer: bpe, sequence_length: 32}", "model.config.vocab_size=400 is smaller than the 8192 tokens"),
    ],
)
def test_what_contradicts_the_folder_is_refused(folder: Path, override: str, line: str) -> None:
    (found,) = violations(begun(folder, override)).values()
    assert line in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dist_moe_qwen3_moe"}, "resume from its checkpoint, with checkpoint.resume="),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized; give its weights in bf16 or fp32"),
        ({"hidden_size": "wide"}, "is refused by Qwen3MoeConfig"),
        ({"num_hidden_layers": 0}, "model.config.num_hidden_layers=0 is not positive"),
    ],
)
def test_an_unusable_folder_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    assert any(message in str(found) for found in violations(begun(write(folder, QWEN | change))).values())


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": NaN}', '{"a": 1, "a": 2}', "[" * 99999, '{"a": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_no_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (found,) = violations(begun(folder)).values()
    assert "has a config.json that cannot be read" in str(found)


def test_without_folder_and_keys_there_is_no_model() -> None:
    (found,) = violations(debug("model.config={}")).values()
    assert str(found).startswith("model.config is missing; give the keys of the family's")
    (found,) = violations(debug("data.tokenizer=pretrained")).values()
    assert str(found) == (
        "data.tokenizer=pretrained needs the folder of a model; set model.pretrained, or use bytes or bpe"
    )


def test_a_resumed_run_does_not_need_the_folder(folder: Path) -> None:
    config = begun(folder, "data.tokenizer=pretrained")
    resolved = resolve(config, workers=1)
    assert tokenizer_folder(config) == folder
    gone = folder.rename(folder.with_name("elsewhere"))
    (found,) = violations(config).values()
    assert "has no config.json, and the run has no checkpoint" in str(found)
    for step in (8, 10):
        checkpoint = folder.parent / f"run/checkpoints/step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.yaml").write_text(dump_config(resolved.config))
    assert resolve(config, workers=1) == resolved
    assert tokenizer_folder(config) == checkpoint / "model"
    never = begun(folder, "checkpoint.resume=never")
    assert list(violations(never)) == ["model.pretrained"]
    by_path = begun(folder, f"checkpoint.resume={checkpoint}")
    assert list(own_checkpoints(by_path)) == [checkpoint] and not violations(by_path)
    assert resolve(begun(gone, "data.tokenizer=pretrained"), 1).config.model.config == resolved.config.model.config


def test_random_weights_stay_the_default() -> None:
    assert load_config(DEBUG).model.pretrained is None
