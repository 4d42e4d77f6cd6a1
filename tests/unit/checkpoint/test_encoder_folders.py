"""Folders of encoders: of the base model or of one with a head of transformers, and what a classifier is saved as."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OpenAIPrivacyFilterForTokenClassification, OpenAIPrivacyFilterModel, PreTrainedModel

import dist_moe
from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.export import export
from dist_moe.checkpoint.format.hf_folder import read_headers, read_raw_config
from dist_moe.checkpoint.format.hf_weights import fill_weights, load_weights, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.config.sections.task import TaskConfig
from dist_moe.model.convert import find_layers
from dist_moe.model.head import head_of, head_settings
from dist_moe.replace.saving import has_known_family
from tests.families.small import small_config
from tests.family_models import ALONE, converted, difference, logits

ENCODER = "openai_privacy_filter"
LABELS = ("bad", "good")
SAME = 2e-5


def token_classifier(folder: Path, **changes: Any) -> PreTrainedModel:
    """Write the folder of a model that classifies tokens, with as many labels as texts have -> the model."""
    torch.manual_seed(0)
    config = small_config(ENCODER, id2label=dict(enumerate(LABELS)), label2id={}, **changes)
    model = OpenAIPrivacyFilterForTokenClassification._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return model


def classifier(mesh: Mesh = ALONE, pooling: Any = "mean") -> PreTrainedModel:
    """A model that classifies texts, with initial values."""
    settings = head_settings(TaskConfig(kind="classification", pooling=pooling), LABELS)
    return converted(small_config(ENCODER, **settings), mesh)


@pytest.mark.parametrize("headed", [True, False])
def test_a_classifier_starts_from_the_weights_of_a_folder(tmp_path: Path, headed: bool) -> None:
    theirs = token_classifier(tmp_path)
    if not headed:
        theirs.model.save_pretrained(tmp_path)
    assert any(name.startswith("model.") for name in read_headers(tmp_path)) is headed
    for rank in range(2):
        part = classifier(Mesh(2, rank, 2))
        fill_weights(part, Mesh(2, rank, 2), tmp_path)
        wanted = theirs.model.layers[1].mlp.experts.gate_up_proj[4 * rank : 4 * rank + 4]
        assert torch.equal(find_layers(part)[1].experts.local.get_parameter("gate_up_proj"), wanted)
    ours = classifier()
    fill_weights(ours, ALONE, tmp_path)
    assert difference(logits(ours), logits(theirs.model)) < SAME


def test_the_base_model_of_a_folder_with_a_head_of_transformers_is_opened(tmp_path: Path) -> None:
    theirs = token_classifier(tmp_path)
    ours = dist_moe.from_pretrained(tmp_path, expert_parallel=1)
    assert difference(logits(ours), logits(theirs.model)) < SAME


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_trap_T118_the_head_of_tokens_is_not_that_of_texts(tmp_path: Path, pooling: str) -> None:
    """Both are `score`, of one shape."""
    theirs = token_classifier(tmp_path)
    ours = classifier(pooling=pooling)
    drawn = head_of(ours).weight.clone()
    assert drawn.shape == theirs.get_parameter("score.weight").shape
    fill_weights(ours, ALONE, tmp_path)
    assert torch.equal(head_of(ours).weight, drawn)


@pytest.mark.parametrize("extra", ["model.layers.0.mlp.extra", "model.layers.3.input_layernorm.weight"])
def test_what_is_not_of_a_head_is_not_left_out(tmp_path: Path, extra: str) -> None:
    token_classifier(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, extra: torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"unexpected \\['{extra}'\\]"):
        fill_weights(classifier(), ALONE, tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    token_classifier(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.down_proj_bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="missing"):
        fill_weights(classifier(), ALONE, tmp_path)


def test_a_classifier_is_saved_and_opened_with_its_head(tmp_path: Path) -> None:
    ours = classifier()
    save_weights(ours, ALONE, tmp_path, balanced=False)
    assert read_raw_config(tmp_path)["model_type"] == f"dist_moe_{ENCODER}"
    again = load_weights(tmp_path, ALONE).eval()
    assert torch.equal(logits(again), logits(ours))
    assert torch.equal(head_of(again).weight, head_of(ours).weight)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_transformers_opens_the_plain_export_of_a_classifier(tmp_path: Path, dtype: Any) -> None:
    """As its base model; the head is in the folder, and this package reads it again."""
    ours = classifier()
    save_weights(ours, ALONE, tmp_path / "ours", balanced=False)
    assert not export(tmp_path / "ours", tmp_path / "plain", dtype, plain=True).without_bias
    raw = read_raw_config(tmp_path / "plain")
    assert (raw["model_type"], raw["architectures"]) == (ENCODER, ["OpenAIPrivacyFilterModel"])
    theirs = OpenAIPrivacyFilterModel.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    limit = SAME if dtype == "keep" else 0.05
    assert difference(logits(theirs), logits(ours)) < limit
    again = classifier()
    torch.nn.init.zeros_(head_of(again).weight)
    fill_weights(again, ALONE, tmp_path / "plain")
    weights = [head_of(each).weight.detach() for each in (again, ours)]
    assert difference(*weights) < limit
    assert difference(logits(again), logits(theirs)) < SAME


def test_a_plain_export_with_other_classes_is_refused(tmp_path: Path) -> None:
    save_weights(classifier(), ALONE, tmp_path / "ours", balanced=False)
    export(tmp_path / "ours", tmp_path / "plain", "keep", plain=True)
    with pytest.raises(WeightsError, match="which differs from the task"):
        fill_weights(classifier(pooling="first"), ALONE, tmp_path / "plain")


def test_biases_are_left_out_of_a_plain_export(tmp_path: Path) -> None:
    ours = classifier()
    for layer in find_layers(ours):
        layer.router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    save_weights(ours, ALONE, tmp_path / "ours", balanced=True)
    assert export(tmp_path / "ours", tmp_path / "plain", "keep", plain=True).without_bias
    theirs = OpenAIPrivacyFilterModel.from_pretrained(tmp_path / "plain").eval()
    assert difference(logits(theirs), logits(ours)) > SAME
    for layer in find_layers(ours):
        layer.router.selection_bias.zero_()
    assert difference(logits(theirs), logits(ours)) < SAME


def test_a_model_with_a_head_of_transformers_is_not_saved_with_another_routing(tmp_path: Path) -> None:
    """Its names are those of another class than the one that is trained."""
    theirs: Any = token_classifier(tmp_path / "theirs")
    assert has_known_family(theirs.model) and not has_known_family(theirs)
    dist_moe.route(theirs)
    with pytest.raises(
        dist_moe.UserError,
        match=r"class OpenAIPrivacyFilterForTokenC.*encoders are trained as base models",
    ):
        theirs.save_pretrained(tmp_path / "routed")
    assert not (tmp_path / "routed").exists()
