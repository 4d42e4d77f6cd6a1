"""Folders of other families: opened from those of transformers, and written with its names or for `--plain`."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.export import export
from dist_moe.checkpoint.format.hf_folder import read_headers, read_raw_config
from dist_moe.checkpoint.format.hf_weights import load_weights, names_in_files, save_weights
from dist_moe.checkpoint.format.model_tensors import family_names, parameter_slices
from dist_moe.checkpoint.inspect import inspect_checkpoint
from dist_moe.comm.mesh import Mesh
from dist_moe.families.model_class import language_model_class, model_class
from dist_moe.families.registry import family_of
from dist_moe.model.convert import find_layers
from dist_moe.moe.select import TopK
from tests.families.small import small_config
from tests.family_models import ALONE, COVERING, converted, difference, logits, random_model

STACKED = ("granitemoe", "gpt_oss", "gemma4", "llama4", "mistral4", "hy_v4", "openai_privacy_filter")
SAME = 2e-5


@pytest.mark.parametrize("family", COVERING)
def test_a_folder_of_transformers_is_opened_and_the_saved_one_opens_there(tmp_path: Path, family: str) -> None:
    theirs, config = random_model(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_weights(tmp_path / "theirs", ALONE).eval()
    assert difference(logits(ours), logits(theirs)) < SAME
    save_weights(ours, ALONE, tmp_path / "ours", balanced=False)
    assert torch.equal(logits(load_weights(tmp_path / "ours", ALONE).eval()), logits(ours))
    out = tmp_path / "ours"
    if family in STACKED:
        assert read_raw_config(out)["model_type"] == f"dist_moe_{config.model_type}"
        exported = export(tmp_path / "ours", tmp_path / "plain", "keep", plain=True)
        assert not exported.without_bias
        out = tmp_path / "plain"
    else:
        assert read_headers(out).keys() == read_headers(tmp_path / "theirs").keys()
    again = model_class(config, family_of(config.model_type).encoder).from_pretrained(out).eval()
    assert difference(logits(again), logits(theirs)) < SAME


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_rank_reads_its_experts(tmp_path: Path, family: str) -> None:
    random_model(family).theirs.save_pretrained(tmp_path)
    whole = find_layers(load_weights(tmp_path, ALONE))[0].experts.local
    for rank in range(2):
        local = find_layers(load_weights(tmp_path, Mesh(2, rank, 2)))[0].experts.local
        for name, parameter in local.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[4 * rank : 4 * rank + 4])


def test_trap_T102_gate_and_up_have_their_own_names_in_the_files() -> None:
    """w1 and w3 have one shape: an exchange of the two loads without an error."""
    names = family_names(small_config("mixtral"))
    assert names is not None and names.is_complete
    prefix, stored = "model.layers.1.mlp.experts.3", "model.layers.1.block_sparse_moe.experts.3"
    assert [names.stored[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down")] == [
        f"{stored}.{part}.weight" for part in ("w1", "w3", "w2")
    ]


def test_stacks_keep_their_place() -> None:
    names = family_names(small_config("granitemoe"))
    assert names is not None and not names.is_complete
    prefix = "model.layers.0.block_sparse_moe"
    assert names.stacked[f"{prefix}.experts.gate_up_proj"] == f"{prefix}.input_linear.weight"


def test_a_bias_without_a_place_is_left_out_of_a_plain_export(tmp_path: Path) -> None:
    model = converted(small_config("olmoe"))
    for layer in find_layers(model):
        layer.router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    save_weights(model, ALONE, tmp_path / "ours", balanced=True)
    assert read_raw_config(tmp_path / "ours")["model_type"] == "dist_moe_olmoe"
    assert export(tmp_path / "ours", tmp_path / "plain", "keep", plain=True).without_bias
    assert difference(logits(load_weights(tmp_path / "plain", ALONE).eval()), logits(model.eval())) > SAME
    for layer in find_layers(model):
        layer.router.selection_bias.zero_()
    theirs = language_model_class(model.config).from_pretrained(tmp_path / "plain").eval()
    assert difference(logits(theirs), logits(model)) < SAME


def test_a_bias_with_a_place_is_exported(tmp_path: Path) -> None:
    model = converted(small_config("minimax_m2"))
    for layer in find_layers(model):
        layer.router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    save_weights(model, ALONE, tmp_path / "ours", balanced=True)
    theirs = language_model_class(model.config).from_pretrained(tmp_path / "ours").eval()
    assert difference(logits(theirs), logits(model)) < SAME


def test_a_rule_that_the_family_does_not_have_is_not_exported_plainly(tmp_path: Path) -> None:
    model = converted(small_config("olmoe"))
    for layer in find_layers(model):
        layer.router.rule = TopK(3, "sigmoid")
    save_weights(model, ALONE, tmp_path / "ours", balanced=False)
    with pytest.raises(CheckpointError, match="which olmoe cannot express; export without --plain"):
        export(tmp_path / "ours", tmp_path / "plain", "keep", plain=True)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("family", ["afmoe", "minimax_m2", "ernie4_5_moe", "glm4_moe", "exaone_moe"])
def test_an_export_in_bf16_keeps_selection_biases_in_fp32(tmp_path: Path, family: str, plain: bool) -> None:
    model = converted(small_config(family))
    for layer in find_layers(model):
        layer.router.selection_bias.fill_(1.001)
    save_weights(model, ALONE, tmp_path / "ours", balanced=True)
    export(tmp_path / "ours", tmp_path / "out", "bf16", plain)
    dtypes = {name: tensor.dtype for name, tensor in read_headers(tmp_path / "out").items()}
    biases = {name for name in dtypes if name.endswith(("correction_bias", "expert_bias"))}
    assert len(biases) == len(find_layers(model)) and {dtypes[name] for name in biases} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {"BF16"}
    assert len(inspect_checkpoint(tmp_path / "out")["balance"]) == len(biases)


def test_the_names_in_the_files_are_known_where_master_weights_are_looked_up(tmp_path: Path) -> None:
    model = converted(small_config("minimax_m2"))
    save_weights(model, ALONE, tmp_path, balanced=True)
    names, stored = names_in_files(tmp_path), read_headers(tmp_path)
    assert {names.get(part.name, part.name) for part in parameter_slices(model, ALONE)} <= stored.keys()
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names


def test_names_are_found_without_memory_for_the_model() -> None:
    """A layer of the published size has 500 million parameters."""
    config = MixtralConfig(num_hidden_layers=1)
    names = family_names(config)
    assert names is not None and names.is_complete


def test_a_family_without_its_bias_has_no_place_for_one(tmp_path: Path) -> None:
    theirs, _ = random_model("lfm2_moe", use_expert_bias=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_weights(tmp_path / "theirs", ALONE).eval()
    assert difference(logits(ours), logits(theirs)) < SAME
    save_weights(ours, ALONE, tmp_path / "ours", balanced=True)
    assert read_raw_config(tmp_path / "ours")["model_type"] == "dist_moe_lfm2_moe"


def test_a_stack_with_many_experts_is_opened(tmp_path: Path) -> None:
    theirs, _ = random_model("granitemoe", num_local_experts=64)
    theirs.save_pretrained(tmp_path)
    assert difference(logits(load_weights(tmp_path, ALONE).eval()), logits(theirs)) < SAME


def test_any_scaling_factor_is_that_of_the_record() -> None:
    assert find_layers(converted(small_config("glm4_moe", routed_scaling_factor=2.8265)))
