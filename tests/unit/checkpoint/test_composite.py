"""Folders of models with other parts: their language model is opened, and written back into the whole."""

import json
import re
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
from dist_moe.checkpoint.format.hf_weights import load_weights, names_of, read_config, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.errors import ConfigError
from dist_moe.families.composite import find_composite
from dist_moe.model.convert import find_layers
from tests.families.small import LENGTH, VOCABULARY
from tests.families.whole import build_whole, small_whole
from tests.family_models import ALONE, difference

ROOT = Path(__file__).resolve().parents[3]
WHOLES = ("qwen3_vl_moe", "step3p7", "glm5_next", "glm4v_moe", "deepseek_ocr2", "qwen3_omni_moe", "minimax_m3_vl")
"""Experts stacked and transposed in the files; gate and up stacked apart; apart, with convolutions in three; ..."""
SAME = 2e-5


def write_whole(family: str, folder: Path, **changes: Any) -> Any:
    """Write the folder of a small model with random weights; return the part of it that predicts text."""
    config = small_whole(family, **changes)
    assert config is not None
    model = build_whole(config).eval()
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


@pytest.mark.parametrize("family", WHOLES)
def test_the_language_model_of_a_whole_model_is_opened(tmp_path: Path, family: str) -> None:
    theirs = write_whole(family, tmp_path)
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "step3p7", "glm5_next"])
def test_a_rank_reads_its_experts_of_a_whole_model(tmp_path: Path, family: str) -> None:
    write_whole(family, tmp_path)
    whole = find_layers(load_weights(tmp_path, ALONE))[0].experts.local
    for rank in range(2):
        local = find_layers(load_weights(tmp_path, Mesh(2, rank, 2)))[0].experts.local
        for name, parameter in local.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[4 * rank : 4 * rank + 4])


def test_trap_T108_published_experts_are_transposed_and_those_that_transformers_saves_are_not(tmp_path: Path) -> None:
    theirs = write_whole("qwen3_vl_moe", tmp_path, moe_intermediate_size=24)
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


def test_trap_T109_rows_of_a_tensor_in_pieces_are_in_their_order(tmp_path: Path) -> None:
    """Three convolutions of one shape, one after another in memory: an exchange loads without an error."""
    theirs = write_whole("glm5_next", tmp_path)
    names = names_of(tmp_path, read_config(tmp_path)[0])
    assert names is not None
    name, pieces = next((name, pieces) for name, pieces in names.pieces.items() if "conv1d" in name)
    assert [re.search(r"([qkv])_conv1d", piece.name)[1] for piece in pieces] == ["q", "k", "v"]  # type: ignore[index]
    ours = load_weights(tmp_path, ALONE).state_dict()[name]
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(ours, torch.cat([stored[piece.name] for piece in pieces]))
    assert torch.equal(ours, theirs.state_dict()[name.replace("model.", "model.language_model.", 1)])


def test_tensors_of_other_parts_may_be_anything_and_those_of_the_layers_may_not(tmp_path: Path) -> None:
    write_whole("qwen3_vl_moe", tmp_path)
    rewrite(tmp_path, lambda name, tensor: None if ".visual.blocks." in name else (name, tensor))
    load_weights(tmp_path, ALONE)
    layer = "model.language_model.layers.1"
    rewrite(tmp_path, lambda name, tensor: (name.replace(f"{layer}.self_attn.q_norm", f"{layer}.other"), tensor))
    with pytest.raises(WeightsError, match=r"missing \['model.layers.1.self_attn.q_norm.weight'\], unexpected .*other"):
        load_weights(tmp_path, ALONE)


def test_a_run_takes_its_model_from_the_language_model(tmp_path: Path) -> None:
    write_whole("qwen3_vl_moe", tmp_path / "whole", vocab_size=257)
    path = run_file(tmp_path, tmp_path / "whole")
    resolved = resolve(load_config(path, ["data.sequence_length=64"]), 1)
    assert resolved.config.model.architecture == "qwen3_vl_moe_text"
    assert resolved.model_config["num_hidden_layers"] == 3 and resolved.experts == 8
    raw = read_raw_config(tmp_path / "whole")
    raw["text_config"]["num_experts_per_tok"] = "two"
    (tmp_path / "whole" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"model\.pretrained.*num_experts_per_tok"):
        resolve(load_config(path, ["data.sequence_length=64"]), 1)


def test_trap_T110_an_export_has_the_other_parts_as_they_were(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_whole("qwen3_vl_moe", whole)
    (whole / "preprocessor_config.json").write_text('{"size": 7}')
    step = tmp_path / "step-000001"
    model = load_weights(whole, ALONE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save_weights(model, ALONE, step, balanced=False)
    assert read_raw_config(step)["model_type"] == "dist_moe_qwen3_vl_moe_text"
    with pytest.raises(CheckpointError, match="only as a part of another model, whose other parts"):
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


def test_an_export_into_another_model_is_refused(tmp_path: Path) -> None:
    write_whole("qwen3_vl_moe", tmp_path / "first")
    write_whole("qwen3_vl_moe", tmp_path / "second", moe_intermediate_size=24)
    save_weights(load_weights(tmp_path / "first", ALONE), ALONE, tmp_path / "step", balanced=False)
    run_file(tmp_path / "step", tmp_path / "second", "qwen3_vl_moe_text")
    with pytest.raises(CheckpointError, match="has another language model than the checkpoint"):
        export(tmp_path / "step", tmp_path / "out", "keep", plain=True)
    assert not (tmp_path / "out").exists()


def test_a_language_model_of_a_whole_model_generates_and_is_saved_alone(tmp_path: Path) -> None:
    theirs = write_whole("qwen3_vl_moe", tmp_path / "whole")
    model = from_pretrained(tmp_path / "whole", expert_parallel=1)
    tokens = torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = theirs.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected)
