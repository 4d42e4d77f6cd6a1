"""Folders of multimodal models: their language model is opened, and written back into them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_moe import from_pretrained
from dist_moe.checkpoint.errors import CheckpointError, WeightsError
from dist_moe.checkpoint.export import export
from dist_moe.checkpoint.format.hf_folder import read_headers, read_raw_config
from dist_moe.checkpoint.format.hf_weights import fill_weights, load_weights, names_of, read_config, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.errors import ConfigError
from dist_moe.families.composite import find_composite
from dist_moe.model.build import empty_model, materialize
from dist_moe.model.convert import find_layers
from tests.families.composite import build_composite, small_composite
from tests.families.small import LENGTH, VOCABULARY
from tests.family_models import ALONE, difference, random_model

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = ("qwen3_vl_moe", "step3p7", "glm5_next", "glm4v_moe", "deepseek_ocr2", "qwen3_omni_moe", "minimax_m3_vl")
"""Experts stacked and transposed in the files; gate and up stacked apart; apart, with convolutions in three; ..."""
SAME = 2e-5


def write_composite(family: str, folder: Path, **changes: Any) -> Any:
    """Write the folder of a small model with random weights; return the part of it that predicts text."""
    config = small_composite(family, **changes)
    assert config is not None
    model = build_composite(config).eval()
    model.save_pretrained(folder)
    head = find_composite(read_raw_config(folder)).head
    return model.get_submodule(head.rpartition(".")[0])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, LENGTH // 4), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a folder by what `change` makes of each (name, tensor)."""
    path = folder / "model.safetensors"
    tensors = dict(pair for name, tensor in load_file(path).items() for pair in [change(name, tensor)] if pair)
    save_file(tensors, path, {"format": "pt"})


def run_file(folder: Path, whole: Path, architecture: str = "") -> Path:
    """Write the configuration of a run that starts from a folder; of a checkpoint, which names the architecture."""
    named = f"  architecture: {architecture}\n" if architecture else ""
    text = (ROOT / "configs" / "debug.yaml").read_text(encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(
        re.sub(r"(?ms)^model:\n.*?(?=^\S)", f"model:\n  pretrained: {whole}\n{named}", text), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_of_a_multimodal_model_is_opened(tmp_path: Path, family: str) -> None:
    theirs = write_composite(family, tmp_path)
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "step3p7", "glm5_next"])
def test_a_rank_reads_its_experts_of_a_multimodal_model(tmp_path: Path, family: str) -> None:
    write_composite(family, tmp_path)
    whole = find_layers(load_weights(tmp_path, ALONE))[0].experts.local
    for rank in range(2):
        local = find_layers(load_weights(tmp_path, Mesh(2, rank, 2)))[0].experts.local
        for name, parameter in local.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[4 * rank : 4 * rank + 4])


def test_trap_T108_published_experts_are_transposed_and_those_that_transformers_saves_are_not(tmp_path: Path) -> None:
    theirs = write_composite("qwen3_vl_moe", tmp_path, moe_intermediate_size=24)
    rewrite(tmp_path, lambda name, tensor: (name, tensor.mT.contiguous() if ".experts." in name else tensor))
    ours = load_weights(tmp_path, ALONE).eval()
    assert difference(logits(ours), logits(theirs)) < SAME
    again = find_composite(read_raw_config(tmp_path)).model
    again = type(again).from_pretrained(tmp_path).eval()
    assert difference(logits(ours), logits(again)) < SAME
    for rank in range(2):
        local = find_layers(load_weights(tmp_path, Mesh(2, rank, 2)))[1].experts.local
        whole = find_layers(ours)[1].experts.local
        for name, parameter in local.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[4 * rank : 4 * rank + 4])


def test_trap_T108_square_experts_are_taken_as_transformers_saves_them(tmp_path: Path) -> None:
    """Their shape does not tell, and transformers does not transpose them."""
    theirs = write_composite("qwen3_vl_moe", tmp_path)
    shapes = {tensor.shape[1:] for name, tensor in read_headers(tmp_path).items() if name.endswith("gate_up_proj")}
    assert shapes == {(32, 32)}
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


def test_trap_T109_rows_of_a_tensor_in_pieces_are_in_their_order(tmp_path: Path) -> None:
    """Three convolutions of one shape, one after another in memory: an exchange loads without an error."""
    theirs = write_composite("glm5_next", tmp_path)
    names = names_of(tmp_path, read_config(tmp_path)[0])
    assert names is not None
    name, pieces = next((name, pieces) for name, pieces in names.pieces.items() if "conv1d" in name)
    assert [re.search(r"([qkv])_conv1d", piece.name)[1] for piece in pieces] == ["q", "k", "v"]  # type: ignore[index]
    ours = load_weights(tmp_path, ALONE).state_dict()[name]
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(ours, torch.cat([stored[piece.name] for piece in pieces]))
    assert torch.equal(ours, theirs.state_dict()[name.replace("model.", "model.language_model.", 1)])


def test_trap_T119_experts_for_images_stay_in_the_folder_and_their_biases_are_not_those_of_text(tmp_path: Path) -> None:
    """ERNIE 4.5 VL: in the files experts of both kinds have one count, and their biases are rows of one tensor."""
    whole, step = tmp_path / "whole", tmp_path / "step-000001"
    theirs: Any = write_composite("ernie4_5_vl_moe", whole)
    biases = {name: tensor for name, tensor in load_file(whole / "model.safetensors").items() if "correction" in name}
    assert {tuple(bias.shape) for bias in biases.values()} == {(2, 8)}
    drawn = {name: torch.randn(2, 8) / 8 for name in biases}
    rewrite(whole, lambda name, tensor: (name, drawn.get(name, tensor)))
    model = load_weights(whole, ALONE).eval()
    layers = find_layers(model)
    assert [layer.name for layer in layers] == [f"model.layers.{layer}.mlp.text_moe" for layer in (1, 2)]
    for layer, name in zip(layers, sorted(drawn), strict=True):
        assert torch.equal(layer.router.selection_bias, drawn[name][0])
    kind = type(find_composite(read_raw_config(whole)).model)
    theirs = kind.from_pretrained(whole).eval()
    assert difference(logits(model), logits(theirs)) < SAME
    for layer in layers:
        layer.router.selection_bias.fill_(0.5)
    save_weights(model, ALONE, step, balanced=True)
    run_file(step, whole, "ernie4_5_vl_moe_text")
    export(step, tmp_path / "out", "keep", plain=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in drawn:
        assert torch.equal(after[name], torch.stack([torch.full((8,), 0.5), drawn[name][1]]))
    images = [name for name in before if re.search(r"experts\.(8|9|1\d)\.", name)]
    assert len(images) == 2 * 8 * 3 and all(torch.equal(before[name], after[name]) for name in images)


def test_trap_T119_biases_of_another_number_of_kinds_are_refused(tmp_path: Path) -> None:
    write_composite("ernie4_5_vl_moe", tmp_path)
    rewrite(tmp_path, lambda name, tensor: (name, torch.zeros(3, 8) if "correction" in name else tensor))
    with pytest.raises(WeightsError, match=r"missing \['model.layers.1.mlp.text_moe.gate.moe_statics"):
        load_weights(tmp_path, ALONE)


def test_tensors_of_other_modalities_may_be_anything_and_those_of_the_layers_may_not(tmp_path: Path) -> None:
    write_composite("qwen3_vl_moe", tmp_path)
    rewrite(tmp_path, lambda name, tensor: None if ".visual.blocks." in name else (name, tensor))
    load_weights(tmp_path, ALONE)
    layer = "model.language_model.layers.1"
    rewrite(tmp_path, lambda name, tensor: (name.replace(f"{layer}.self_attn.q_norm", f"{layer}.other"), tensor))
    with pytest.raises(WeightsError, match=r"missing \['model.layers.1.self_attn.q_norm.weight'\], unexpected .*other"):
        load_weights(tmp_path, ALONE)


def test_a_run_takes_its_model_from_the_language_model(tmp_path: Path) -> None:
    write_composite("qwen3_vl_moe", tmp_path / "whole", vocab_size=257)
    path = run_file(tmp_path, tmp_path / "whole")
    resolved = resolve(load_config(path, ["data.sequence_length=64"]), 1)
    assert resolved.config.model.architecture == "qwen3_vl_moe_text"
    assert resolved.model_config["num_hidden_layers"] == 3 and resolved.experts == 8
    raw = read_raw_config(tmp_path / "whole")
    raw["text_config"]["num_experts_per_tok"] = "two"
    (tmp_path / "whole" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"model\.pretrained.*num_experts_per_tok"):
        resolve(load_config(path, ["data.sequence_length=64"]), 1)


def test_trap_T110_an_export_has_the_other_weights_as_they_were(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_composite("qwen3_vl_moe", whole)
    (whole / "preprocessor_config.json").write_text('{"size": 7}')
    step = tmp_path / "step-000001"
    model = load_weights(whole, ALONE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save_weights(model, ALONE, step, balanced=False)
    assert read_raw_config(step)["model_type"] == "dist_moe_qwen3_vl_moe_text"
    with pytest.raises(CheckpointError, match="only as a part of a multimodal model, whose other weights"):
        export(step, tmp_path / "out", "keep", plain=True)
    run_file(step, whole, "qwen3_vl_moe_text")
    export(step, tmp_path / "out", "keep", plain=True)
    kind = type(find_composite(read_raw_config(whole)).model)
    before, after = (kind.from_pretrained(folder).eval() for folder in (whole, tmp_path / "out"))
    others = [name for name in before.state_dict() if ".visual." in name]
    assert others and all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in others)
    assert difference(logits(after), logits(model.eval())) < SAME < difference(logits(after), logits(before))
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 7}'
    assert read_headers(tmp_path / "out").keys() == read_headers(whole).keys()


def drop_a_block(folder: Path) -> None:
    rewrite(folder, lambda name, tensor: None if ".visual.blocks.1." in name else (name, tensor))


def change_top_k(folder: Path) -> None:
    raw = read_raw_config(folder)
    raw["text_config"]["num_experts_per_tok"] = 4
    (folder / "config.json").write_text(json.dumps(raw))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_family(folder: Path) -> None:
    shutil.rmtree(folder)
    write_composite("glm4v_moe", folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_a_block, "lacks model.visual.blocks.1.*restore the folder"),
        (change_top_k, r"another language model than the checkpoint \(num_experts_per_tok differs\)"),
        (change_family, r"another language model than the checkpoint \(model_type=glm4v_moe_text differs\)"),
        (remove_weights, "cannot be read .*no file named model.safetensors.*restore it"),
    ],
)
def test_trap_T110_an_export_into_another_model_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    """What transformers does not find in a folder it draws at random."""
    write_composite("qwen3_vl_moe", tmp_path / "second")
    save_weights(load_weights(tmp_path / "second", ALONE), ALONE, tmp_path / "step", balanced=False)
    change(tmp_path / "second")
    run_file(tmp_path / "step", tmp_path / "second", "qwen3_vl_moe_text")
    with pytest.raises(CheckpointError, match=reason):
        export(tmp_path / "step", tmp_path / "out", "keep", plain=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "layer"), [("step3p7", "model.layers.3"), ("glm4v_moe", "model.language_model.layers.3")]
)
def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path, family: str, layer: str) -> None:
    theirs = write_composite(family, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), f"{layer}.eh_proj.weight": torch.ones(2, 2)}, path, {"format": "pt"})
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_heads", 0, "ZeroDivisionError"),
        ("hidden_act", "zzz", "KeyError"),
        ("depth", 10**7, "vision_config.depth=10000000 is more than the 1000 layers"),
    ],
)
def test_a_multimodal_model_that_cannot_be_built_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    write_composite("qwen3_vl_moe", tmp_path)
    raw = read_raw_config(tmp_path)
    raw["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=reason):
        load_weights(tmp_path, ALONE)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"model_type": "deepseek_vl_v2", "text_config": {}}, "holds a deepseek_vl_v2, which is not supported"),
        ({"text_config": {}}, "does not say its model_type"),
        ({"model_type": "mixtral", "text_config": {"a": 1}}, None),
        ({"model_type": "qwen3_moe", "llm_config": {}}, None),
    ],
)
def test_a_configuration_that_only_looks_multimodal_is_read_as_it_is(
    tmp_path: Path, raw: dict[str, Any], reason: str | None
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    path = run_file(tmp_path, tmp_path / "model")
    if reason is None:
        assert resolve(load_config(path), 1).config.model.architecture == raw["model_type"]
        return
    with pytest.raises(ConfigError, match=reason):
        resolve(load_config(path), 1)


def test_an_export_says_that_the_folder_of_the_run_is_gone(tmp_path: Path) -> None:
    """Gemma 4 has a language model alone, too, so that the export is not refused."""
    write_composite("gemma4", tmp_path / "whole")
    save_weights(load_weights(tmp_path / "whole", ALONE), ALONE, tmp_path / "step", balanced=False)
    run_file(tmp_path / "step", tmp_path / "whole", "gemma4_text")
    assert export(tmp_path / "step", tmp_path / "first", "keep", plain=True).notice == ""
    assert read_raw_config(tmp_path / "first")["model_type"] == "gemma4"
    shutil.rmtree(tmp_path / "whole")
    notice = export(tmp_path / "step", tmp_path / "second", "keep", plain=True).notice
    assert notice.startswith("if the run started from a multimodal model, only its language model is written: ")
    assert str(tmp_path / "whole") in notice
    assert read_raw_config(tmp_path / "second")["model_type"] == "gemma4_text"


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "granitemoe"])
def test_a_classification_starts_from_the_folder_of_any_family(tmp_path: Path, family: str) -> None:
    theirs: Any = write_composite(family, tmp_path) if family != "granitemoe" else random_model(family).theirs
    if family == "granitemoe":
        theirs.save_pretrained(tmp_path)
    config, rule = read_config(tmp_path)
    for key, value in {"problem_type": "single_label_classification", "id2label": {0: "a", 1: "b"}}.items():
        setattr(config, key, value)
    model = empty_model(config, rule, ALONE)
    materialize(model)
    fill_weights(model, ALONE, tmp_path)
    embedded: Any = model.get_input_embeddings()
    assert torch.equal(embedded.weight, theirs.get_input_embeddings().weight)


def test_a_language_model_of_a_multimodal_model_generates_and_is_saved_alone(tmp_path: Path) -> None:
    theirs = write_composite("qwen3_vl_moe", tmp_path / "whole")
    model: Any = from_pretrained(tmp_path / "whole", expert_parallel=1)
    tokens = torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = theirs.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected)
