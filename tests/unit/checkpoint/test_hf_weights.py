"""Weights folders against transformers: equal names, shapes and logits in both directions, or a refusal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.hf_weights import EARLIER_FIELDS, load_weights, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.data.tokenizer import byte_tokenizer
from dist_moe.model.build import build_model, family_rule
from dist_moe.model.convert import find_layers
from dist_moe.moe.select import RandomRouting, Rule, ThresholdRouting, TopK
from tests.experts import gated_experts
from tests.unit.model.samples import ALONE, FAMILIES, logits, perturb, small_model, stored_tensors, tokens

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v3", {}),
    ("deepseek_v3", {"tie_word_embeddings": True}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2, "q_lora_rank": 8, "norm_topk_prob": False}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False}),
]


def set_biases(model: PreTrainedModel, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in find_layers(model):
        bias_E = layer.router.selection_bias
        bias_E.copy_(scale * torch.randn(bias_E.shape, generator=generator))


def trained_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A model with perturbed weights; DeepSeek's with a selection bias that changes its logits."""
    model = small_model(architecture, **changes)
    perturb(model)
    if architecture == "deepseek_v3":
        without = logits(model, tokens())
        set_biases(model)
        assert not torch.equal(without, logits(model, tokens()))
    return model


def transformers_folder(architecture: str, folder: Path, **changes: Any) -> Any:
    """Write a folder of several files with save_pretrained -> its model."""
    config = AutoConfig.for_model(architecture, **{**FAMILIES[architecture][0], **changes})
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    perturb(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def save(model: PreTrainedModel, folder: Path, balanced: bool | None = None) -> None:
    has_bias = model.config.model_type == "deepseek_v3"
    save_weights(model, ALONE, folder, has_bias if balanced is None else balanced)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_transformers_loads_our_folder_with_equal_logits(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    model = trained_model(architecture, **changes)
    save(model, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    theirs, info = loaded
    assert not any(info.values()), info
    torch.testing.assert_close(logits(theirs, tokens()), logits(model, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_save_weights_writes_the_names_and_shapes_of_save_pretrained(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    save(trained_model(architecture, **changes), tmp_path / "ours")
    config = AutoConfig.for_model(architecture, **{**FAMILIES[architecture][0], **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    ours = stored_tensors(tmp_path / "ours")
    assert ours == stored_tensors(tmp_path / "theirs")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_save_weights_keeps_the_dtype_and_writes_the_configs_of_save_pretrained(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model: Any = trained_model(architecture)
    save(model.to(dtype), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "theirs")
    assert stored_tensors(tmp_path / "ours") == stored_tensors(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        ours = json.loads((tmp_path / "ours" / name).read_text())
        assert ours == json.loads((tmp_path / "theirs" / name).read_text())


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_load_weights_loads_a_folder_of_save_pretrained_with_equal_logits(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    theirs = transformers_folder(architecture, tmp_path, **changes)
    ours = load_weights(tmp_path, ALONE)
    torch.testing.assert_close(logits(ours, tokens()), logits(theirs, tokens()), rtol=1e-5, atol=1e-5)


def test_trap_T40_a_pretrained_correction_bias_is_kept(tmp_path: Path) -> None:
    theirs = transformers_folder("deepseek_v3", tmp_path / "theirs")
    ours = load_weights(tmp_path / "theirs", ALONE)
    stored = {name: b for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias")}
    assert len(stored) == len(find_layers(ours)) == 2
    for layer in find_layers(ours):
        assert layer.router.selection_bias.any()
        assert torch.equal(layer.router.selection_bias, stored[f"{layer.name}.gate.e_score_correction_bias"])


def inexpressible_model(case: str) -> PreTrainedModel:
    """A model whose routing its architecture cannot express."""
    if case == "softmax on DeepSeek":
        return small_model("deepseek_v3", score="softmax")
    if case == "sigmoid on Qwen3":
        return small_model("qwen3_moe", score="sigmoid")
    if case == "scaling on Qwen3":
        settings, score = FAMILIES["qwen3_moe"]
        rule = family_rule(AutoConfig.for_model("qwen3_moe", **settings), score)
        return build_model("qwen3_moe", settings, replace(rule, routed_scaling_factor=2.5), ALONE, seed=0)
    rules: dict[str, Rule] = {
        "threshold": ThresholdRouting(0.3, 3, bias_in_gate_weights=True),
        "forced": RandomRouting(2, 1.0, "sigmoid"),
        "multiplicative": TopK(2, "sigmoid", normalize=True, multiplicative=True),
        "softmax after": TopK(2, "softmax_selected"),
    }
    if case in rules:
        model = build_model("deepseek_v3", FAMILIES["deepseek_v3"][0], rules[case], ALONE, seed=0)
        set_biases(model)
        for layer in find_layers(model):
            if layer.router.threshold is not None:
                layer.router.threshold.fill_(0.55)  # as the controller of a target would set it
        return model
    model = small_model("qwen3_moe")
    if case == "groups on Qwen3":
        for layer in find_layers(model):
            assert isinstance(layer.router.rule, TopK)
            layer.router.rule = replace(layer.router.rule, groups=4, topk_groups=1)
    else:
        set_biases(model)
    return model


ON_DEEPSEEK = ["softmax on DeepSeek", "threshold", "forced", "multiplicative", "softmax after"]
ON_QWEN = ["bias on Qwen3", "sigmoid on Qwen3", "scaling on Qwen3", "groups on Qwen3"]


@pytest.mark.parametrize("case", [*ON_QWEN, *ON_DEEPSEEK])
def test_inexpressible_routing_is_refused_by_transformers_and_loaded_by_load_weights(tmp_path: Path, case: str) -> None:
    model = inexpressible_model(case)
    plain = small_model(model.config.model_type)
    assert not torch.allclose(logits(model, tokens()), logits(plain, tokens())), "the case changes nothing"
    save(model, tmp_path, balanced=False)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"dist_moe_{model.config.model_type}"):
            auto.from_pretrained(tmp_path)
    opened = load_weights(tmp_path, ALONE)
    assert torch.equal(logits(opened, tokens()), logits(model, tokens()))
    assert find_layers(opened)[0].router.rule == find_layers(model)[0].router.rule


@pytest.mark.parametrize("case", [*ON_QWEN, *ON_DEEPSEEK])
def test_load_weights_reads_the_names_of_earlier_versions(tmp_path: Path, case: str) -> None:
    model = inexpressible_model(case)
    save(model, tmp_path, balanced=False)
    config_file = tmp_path / "config.json"
    content = json.loads(config_file.read_text())
    earlier = {name: old for old, name in EARLIER_FIELDS.items()}
    content["dist_moe"] = {earlier.get(name, name): value for name, value in content["dist_moe"].items()}
    config_file.write_text(json.dumps(content))
    opened = load_weights(tmp_path, ALONE)
    assert torch.equal(logits(opened, tokens()), logits(model, tokens()))
    assert find_layers(opened)[0].router.rule == find_layers(model)[0].router.rule


@pytest.mark.parametrize(("architecture", "refused"), [("qwen3_moe", True), ("deepseek_v3", False)])
def test_a_balanced_run_writes_the_same_model_type_from_its_first_step(
    tmp_path: Path, architecture: str, refused: bool
) -> None:
    model = small_model(architecture)
    save(model, tmp_path, balanced=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("dist_moe_") == refused
    assert torch.equal(logits(load_weights(tmp_path, ALONE), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("case", ["plain", "bias on Qwen3"])
def test_transformers_loads_the_tokenizer_of_the_folder(tmp_path: Path, case: str) -> None:
    save(small_model("deepseek_v3") if case == "plain" else inexpressible_model(case), tmp_path)
    ours = byte_tokenizer()
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "To be, or naïve? <|endoftext|>\n"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_id, ours.vocab_size)


def test_trap_T42_experts_are_ordered_as_numbers(tmp_path: Path) -> None:
    """Each of 12 experts has a unique constant in a folder of transformers; sorted as text, 10 precedes 2."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **FAMILIES["qwen3_moe"][0]))
    experts = theirs.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(12):
            experts.gate_up_proj[expert] = expert + 0.25
            experts.down_proj[expert] = expert + 0.5
    theirs.save_pretrained(tmp_path)
    for rank in range(2):
        local = gated_experts(find_layers(load_weights(tmp_path, Mesh(2, rank, 2)))[0])
        experts = range(rank * 6, rank * 6 + 6)
        assert [weight.unique().tolist() for weight in local.gate_up_proj] == [[e + 0.25] for e in experts]
        assert [weight.unique().tolist() for weight in local.down_proj] == [[e + 0.5] for e in experts]


def change_file(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a saved folder, or remove those with the value None."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.experts.11.down_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
OTHER_EXPERT, OTHER_LAYER = DOWN.replace("11", "12"), DOWN.replace("layers.1", "layers.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None, DOWN: None, BIAS: None}, f"missing ['{DOWN}', '{BIAS}', '{NORM}'], unexpected nothing"),
        (
            {"extra": torch.ones(1), OTHER_EXPERT: torch.ones(1), OTHER_LAYER: torch.ones(1)},
            f"missing nothing, unexpected ['extra', '{OTHER_LAYER}', '{OTHER_EXPERT}']",
        ),
        (
            {NORM: torch.ones(31), DOWN: torch.ones(16, 32)},
            f"['{DOWN} [16, 32] instead of [32, 16]', '{NORM} [31] instead of [32]']",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_trap_T43_tensors_that_do_not_match_are_listed(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    save(small_model("deepseek_v3"), tmp_path)
    change_file(tmp_path, changes)
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path, ALONE)
    assert message in str(caught.value)


def test_load_weights_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load_weights(tmp_path, ALONE)
    save(small_model("deepseek_v3"), tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match=r"the files \['model-00001.*do not exist"):
        load_weights(tmp_path, ALONE)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"holds no \*\.safetensors"):
        load_weights(tmp_path, ALONE)
