"""model.pretrained: the folder's config.json fills model.config, and what contradicts it is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from dist_moe.config import Config, ConfigError, dump_config, load_config, resolve
from dist_moe.config.pretrained import own_checkpoints, text_vocabulary, tokenizer_folder
from dist_moe.families.registry import FAMILIES_TEXT
from dist_moe.text import shown
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
        ("data={tokenizer: bpe, sequence_length: 32}", "model.config.vocab_size=400 is smaller than the 8,192 tokens"),
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
        ({"hidden_size": "wide"}, "has hidden_size=wide in its config.json, which should be a whole number; correct"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type"),
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


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "Qwen/Qwen3-30B-A3B",
            "model.pretrained=Qwen/Qwen3-30B-A3B is no folder here, and models are not fetched from the Hugging Face "
            "Hub; fetch it with `hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B`, and set "
            "model.pretrained=Qwen3-30B-A3B",
        ),
        (
            "/no/such",
            "model.pretrained=/no/such does not exist, and the run has no checkpoint that holds its keys; give the "
            "folder of a Hugging Face model (deepseek_v3, qwen3_moe or another one of docs/families.md), which every "
            "host can read",
        ),
        (
            "/usr",
            "model.pretrained=/usr has no config.json, and the run has no checkpoint that holds its keys; give the "
            "folder of a Hugging Face model (deepseek_v3, qwen3_moe or another one of docs/families.md), which every "
            "host can read",
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["", "qwen3_moe"])
def test_a_name_that_is_no_folder(name: str, line: str, architecture: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, name, architecture)
    (found,) = violations(load_config(path)).values()
    assert str(found) == line


def write_run(folder: Path, pretrained: str | Path, architecture: str = "") -> Path:
    """Write a run that starts from a model, without its architecture if that is empty."""
    stated = f"architecture: {architecture}, " if architecture else ""
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{dir: {folder}/run}}\nmodel: {{{stated}pretrained: {pretrained}}}\ndata: {{sequence_length: 8}}\n"
        "train: {steps: 1, global_batch_size: 2, learning_rate: 1e-3}\n"
    )
    return path


def test_the_architecture_is_read_from_the_folder(folder: Path) -> None:
    path = write_run(folder.parent, folder)
    config = load_config(path)
    assert config.model.architecture == "qwen3_moe"
    resolved = resolve(config, 1)
    checkpoint = folder.parent / "run/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(dump_config(resolved.config))
    folder.rename(folder.with_name("elsewhere"))
    assert resolve(load_config(path), 1) == resolved, "from a checkpoint, once the folder is gone"


@pytest.mark.parametrize("architecture", ["", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("model_type", "rule"),
    [("phimoe", "holds a phimoe, which is not supported"), (None, "does not say its model_type")],
)
def test_a_family_that_is_not_supported_is_refused(
    folder: Path, architecture: str, model_type: str | None, rule: str
) -> None:
    write(folder, QWEN | {"model_type": model_type})
    (found,) = violations(load_config(write_run(folder.parent, folder, architecture))).values()
    remedy = f"give the folder of a model ({FAMILIES_TEXT}), or add the family (docs/extending.md)"
    assert str(found) == f"model.pretrained={shown(str(folder))} {rule}; {remedy}"


def test_without_a_folder_the_architecture_is_needed(tmp_path: Path) -> None:
    path = write_run(tmp_path, "null")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("model.architecture is missing; give the model's family")


def test_what_a_pretrained_model_has_and_is_not_trained_is_a_notice(tmp_path: Path) -> None:
    settings = {"model_type": "deepseek_v3", **debug().model.config, "vocab_size": 400, "num_nextn_predict_layers": 1}
    folder = write(tmp_path / "model", {key: value for key, value in settings.items() if key != "num_mtp_layers"})
    path = write_run(tmp_path, folder)
    assert resolve(load_config(path), 1).notices == (
        "model.pretrained has num_mtp_layers=1, which asks for multi-token prediction, which is not trained here; its "
        "other weights are used",
    )
    written = load_config(path, ["model.config.num_mtp_layers=1"])
    assert not violations(written), "the value of the folder may be written out"


# The config.json of DeepSeek-V3, whose weights are published in fp8, without its quantization_config.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1},
    **{"first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02},
    **{"intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1},
    **{"model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
        **{"original_max_position_embeddings": 4096, "type": "yarn"},
    },
    **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4},
    **{"topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True},
    **{"v_head_dim": 128, "vocab_size": 129280},
}
QWEN3_30B_A3B: dict[str, Any] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128},
    **{"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144},
    **{"max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe"},
    **{"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False},
    **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001},
    **{"sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
}


@pytest.mark.parametrize("saved", [False, True], ids=["published", "saved"])
@pytest.mark.parametrize("settings", [DEEPSEEK_V3, QWEN3_30B_A3B], ids=["DeepSeek-V3", "Qwen3-30B-A3B"])
def test_the_published_files_are_accepted_without_a_word(tmp_path: Path, settings: dict[str, Any], saved: bool) -> None:
    folder = write(tmp_path / "model", settings)
    if saved:
        CONFIG_MAPPING[settings["model_type"]].from_pretrained(folder).save_pretrained(folder)
    notices = resolve(load_config(write_run(tmp_path, folder)), 1).notices
    assert [line for line in notices if "num_mtp_layers=1, which asks for multi-token prediction" not in line] == []


@pytest.mark.parametrize(
    ("settings", "change", "rule"),
    [
        (
            DEEPSEEK_V3,
            {"scoring_func": "softmax"},
            "has scoring_func=softmax, which asks for another gate function than",
        ),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "has topk_method=greedy, which asks for another selection than top-K"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "has moe_layer_freq=2, which asks for dense layers among the MoE layers"),
        (DEEPSEEK_V3, {"model_type": ["deepseek_v3"]}, 'has the model_type ["deepseek_v3"], which is not a text'),
        (QWEN3_30B_A3B, {"model_type": {}}, "has the model_type {}, which is not a text; correct its config.json"),
        (
            QWEN3_30B_A3B,
            {"per_layer_config": {"1": {"num_experts": 4}}},
            'has per_layer_config={"1": {"num_experts": 4}}, which gives layers different shapes',
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["", "stated"])
def test_keys_of_a_file_that_ask_for_another_model_are_refused(
    tmp_path: Path, settings: dict[str, Any], change: dict[str, Any], rule: str, architecture: str
) -> None:
    folder = write(tmp_path / "model", settings | change)
    path = write_run(tmp_path, folder, architecture and settings["model_type"])
    (found,) = violations(load_config(path)).values()
    assert str(found).startswith(f"model.pretrained={shown(str(folder))} {rule}")


def test_rotary_parameters_of_a_file_are_corrected_there(tmp_path: Path) -> None:
    wrong = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": None}
    folder = write(tmp_path / "model", QWEN3_30B_A3B | {"rope_scaling": wrong})
    (found,) = violations(load_config(write_run(tmp_path, folder))).values()
    assert found.key == "model.config.rope_parameters"
    assert found.rule == "has truncate=null, which is not true or false, and is the value of model.pretrained"
    assert found.remedy == "correct the config.json of that folder"
    # What transformers ignores, too, is no reason to refuse the folder.
    write(folder, QWEN3_30B_A3B | {"rope_scaling": {**wrong, "truncate": True, "mscale": 0.5}})
    assert not violations(load_config(write_run(tmp_path, folder)))


def test_keys_of_a_file_that_are_not_used_are_a_notice(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", QWEN3_30B_A3B | {"hidden_sizee": 5, "qqqqq\n": 1})
    assert resolve(load_config(write_run(tmp_path, folder)), 1).notices == (
        "the config.json of model.pretrained has hidden_sizee (did you mean hidden_size?) and qqqqq\\n, which "
        "Qwen3MoeConfig does not have, and is not used",
    )
    write(folder, QWEN3_30B_A3B | {f"zz{index}": 1 for index in range(1000)})
    (line,) = resolve(load_config(write_run(tmp_path, folder)), 1).notices
    assert "zz9 and 990 more, which" in line


def test_the_home_folder_is_expanded_where_the_architecture_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "q3", QWEN)
    config = load_config(write_run(tmp_path, "~/q3"))
    assert (config.model.architecture, config.model.pretrained) == ("qwen3_moe", str(tmp_path / "q3"))
    assert not violations(config)
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(dump_config(config))
    (tmp_path / "q3").rename(tmp_path / "elsewhere")
    for override in ("run.dir=~/run", "checkpoint.resume=~/run/checkpoints/step-000001"):
        assert load_config(write_run(tmp_path, "~/q3"), [override]).model.architecture == "qwen3_moe"


def test_the_vocabulary_of_a_configuration_that_is_not_resolved(folder: Path) -> None:
    assert text_vocabulary(debug("data.vocabulary=600")) == 600
    assert text_vocabulary(begun(folder, "data.tokenizer=pretrained")) == 400
    write(folder, {key: value for key, value in QWEN.items() if key != "vocab_size"})
    for config, line in (
        (begun(folder, "data.tokenizer=pretrained"), f"needs a vocab_size in the config.json of {folder}"),
        (begun(Path("/no/such"), "data.tokenizer=pretrained"), "No such file or directory"),
        (debug("data.tokenizer=pretrained"), "needs the folder of a model; set model.pretrained"),
    ):
        with pytest.raises(ConfigError, match=line):
            text_vocabulary(config)


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
    assert "does not exist, and the run has no checkpoint" in str(found)
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
