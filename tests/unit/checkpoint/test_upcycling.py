"""MoE models made of dense ones: they start with the result of the dense model, and are saved and opened again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from dist_moe.checkpoint.errors import WeightsError
from dist_moe.checkpoint.format.dense_folder import Upcycling
from dist_moe.checkpoint.format.hf_weights import fill_weights, load_weights, save_weights
from dist_moe.comm.mesh import Mesh
from dist_moe.families.dense import DENSE
from dist_moe.model.convert import find_layers
from dist_moe.moe.select import ExpertThreshold, RandomRouting, Rule, ThresholdRouting, TopK
from tests.dense import EXPERTS, SHAPES, dense_folder, outputs, upcycled
from tests.unit.model.samples import ALONE, tokens

RULES: dict[str, Rule] = {
    "top-1": TopK(1, "softmax"),
    "top-2": TopK(2, "softmax"),
    "top-2 normalized": TopK(2, "softmax", normalize=True),
    "sigmoid, scaled": TopK(3, "sigmoid", routed_scaling_factor=2.5),
    "softmax of the selected": TopK(2, "softmax_selected"),
    "sqrt-softplus": TopK(2, "sqrt_softplus", normalize=True),
    "groups": TopK(2, "sigmoid", groups=2, topk_groups=1),
    "threshold": ThresholdRouting(0.4, EXPERTS),
    "expert thresholds": ExpertThreshold(2, EXPERTS, 1, "sigmoid"),
    "random": RandomRouting(2, 0.0, "softmax"),
}
CASES = [*((name, "top-2") for name in DENSE), *((name, rule) for name in ("bert", "llama") for rule in RULES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """(folder, model) of each dense architecture."""
    made = {}
    for name in DENSE:
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, dense_folder(folder, name))
    return made


@pytest.mark.parametrize(("architecture", "rule"), dict.fromkeys(CASES))
def test_trap_T58_an_upcycled_model_starts_with_the_result_of_the_dense_one(
    folders: dict[str, tuple[Path, Any]], architecture: str, rule: str
) -> None:
    """Under every routing, with the padding of an encoder."""
    folder, dense = folders[architecture]
    model = upcycled(folder, architecture, ALONE, RULES[rule])
    mask_BS = torch.ones_like(tokens())
    if DENSE[architecture].encoder:
        mask_BS[1, 15:] = 0
    found, wanted = (outputs(each, tokens(), mask_BS)[mask_BS.bool()] for each in (model, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert len(find_layers(model)) == 2


@pytest.mark.parametrize("architecture", DENSE)
def test_the_router_has_the_logits_that_are_asked_for(folders: dict[str, tuple[Path, Any]], architecture: str) -> None:
    for wanted in (0.5, 1.7):
        model = upcycled(folders[architecture][0], architecture, ALONE, upcycling=Upcycling(0.0, wanted, seed=0))
        routers = [layer.router for layer in find_layers(model)]
        for router in routers:
            router.open_record(None)
        outputs(model, tokens(rows=8))
        logits = torch.stack([router.close_record().logits_TE for router in routers])
        assert float(logits.std()) == pytest.approx(wanted, rel=0.35)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_trap_T26_noise_and_routers_do_not_depend_on_the_layout(
    folders: dict[str, tuple[Path, Any]], architecture: str
) -> None:
    """Nor do two experts, or two tensors, have the same noise; its size is that of the copied tensor."""
    folder, dense = folders[architecture]
    noisy = Upcycling(0.05, 1.7, seed=3)
    whole = find_layers(upcycled(folder, architecture, ALONE, upcycling=noisy))
    exact = find_layers(upcycled(folder, architecture, ALONE))
    for rank in range(4):
        mesh = Mesh(4, rank, 4)
        of_rank = find_layers(upcycled(folder, architecture, mesh, upcycling=noisy))
        for ours, all_of_them in zip(of_rank, whole, strict=True):
            assert torch.equal(ours.router.weight, all_of_them.router.weight)
            for name, parameter in ours.experts.local.named_parameters():
                wanted = all_of_them.experts.local.get_parameter(name)[2 * rank : 2 * rank + 2]
                assert torch.equal(parameter, wanted), name
    for layer, copy in zip(whole, exact, strict=True):
        for name, part in layer.experts.local.parts.items():
            source = copy.experts.local.parts[name]
            noise = torch.stack([part.view(expert) - source.view(expert) for expert in range(EXPERTS)])
            rms = source.view(0).square().mean().sqrt()
            assert float(noise.square().mean().sqrt() / rms) == pytest.approx(0.05, rel=0.3), name
            assert len(noise.flatten(1)[:, 0].unique()) == EXPERTS
    assert dense.config.model_type == architecture


@pytest.mark.parametrize("architecture", ["bert", "qwen2"])
def test_an_upcycled_model_is_saved_and_opened_again(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path, architecture: str
) -> None:
    """Also by ranks that hold a part of the experts; transformers refuses the folder."""
    rule = ThresholdRouting(0.4, EXPERTS)
    model = upcycled(folders[architecture][0], architecture, ALONE, rule, Upcycling(0.1, 1.7, seed=0))
    save_weights(model, ALONE, tmp_path, balanced=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == f"dist_moe_{architecture}" and settings["moe_layers"] == [1, 3]
    again = load_weights(tmp_path, ALONE).eval()
    assert torch.equal(outputs(again, tokens()), outputs(model, tokens()))
    mesh = Mesh(2, 1, 2)
    half = load_weights(tmp_path, mesh)
    for ours, whole in zip(find_layers(half), find_layers(model), strict=True):
        for name, parameter in ours.experts.local.named_parameters():
            assert torch.equal(parameter, whole.experts.local.get_parameter(name)[4:])
    with pytest.raises(ValueError, match=f"dist_moe_{architecture}"):
        AutoModel.from_pretrained(tmp_path)
    missing = load_file(tmp_path / "model-00001-of-00001.safetensors")
    name = next(name for name in missing if ".experts.7." in name)
    del missing[name]
    save_file(missing, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        fill_weights(again, ALONE, tmp_path)


def rewrite(folder: Path, changes: dict[str, Tensor | None], rename: dict[str, str] | None = None) -> None:
    """Write the tensors of a folder into one file, with changes."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    kept = {name: tensor for name, tensor in {**found, **changes}.items() if tensor is not None}
    for earlier, present in (rename or {}).items():
        kept = {name.replace(present, earlier): tensor for name, tensor in kept.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_names_of_older_files_and_other_heads_are_read(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path, "bert")
    found = {"bert.": "", "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    rewrite(tmp_path, {}, {earlier: present for earlier, present in found.items() if present})
    stored = load_file(tmp_path / "model.safetensors")
    headed = {f"bert.{name}": tensor for name, tensor in stored.items()}
    headed |= {"cls.predictions.bias": torch.ones(3), "bert.embeddings.position_ids": torch.arange(64)}
    save_file(headed, tmp_path / "model.safetensors", {"format": "pt"})
    model = upcycled(tmp_path, "bert", ALONE)
    torch.testing.assert_close(outputs(model, tokens()), outputs(dense, tokens()), rtol=1e-5, atol=2e-5)


def test_a_tied_output_layer_is_read_once(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path, "qwen2", tie_word_embeddings=True)
    model: Any = upcycled(tmp_path, "qwen2", ALONE, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(outputs(model, tokens()), outputs(dense, tokens()), rtol=1e-5, atol=2e-5)


DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({DOWN: None}, f"missing \\['{DOWN}'\\]"),
        ({"lm_head.weight": None}, r"missing \['lm_head.weight'\]"),
        ({"model.layers.4.mlp.down_proj.weight": torch.ones(2)}, r"unexpected \['model.layers.4.mlp.down_proj"),
        ({DOWN: torch.ones(32, 47)}, r"has the shape \[32, 47\] instead of \[32, 48\]"),
        ({DOWN: torch.ones(32, 48, dtype=torch.int32)}, "is I32"),
    ],
)
def test_a_dense_folder_that_does_not_match_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    dense_folder(tmp_path, "llama")
    rewrite(tmp_path, changes)
    with pytest.raises(WeightsError, match=message):
        upcycled(tmp_path, "llama", ALONE)


def test_biases_that_gated_experts_do_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlp\.gate_proj is not a linear layer without bias"):
        upcycled(tmp_path, "llama", ALONE, mlp_bias=True)


@pytest.mark.parametrize("architecture", [name for name, family in DENSE.items() if not family.encoder])
def test_documents_of_a_packed_row_do_not_see_each_other(
    folders: dict[str, tuple[Path, Any]], architecture: str
) -> None:
    model: Any = upcycled(folders[architecture][0], architecture, ALONE)
    positions_BS = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    first_BS, second_BS = tokens(), tokens()
    second_BS[:, :10] = second_BS[:, :10].flip(1)
    with torch.no_grad():
        packed = {"position_ids": positions_BS, "use_cache": False}
        found = [model(input_ids=each, **packed).logits for each in (first_BS, second_BS)]
    assert not torch.allclose(found[0][:, :10], found[1][:, :10])
    torch.testing.assert_close(found[0][:, 10:], found[1][:, 10:], rtol=1e-5, atol=1e-5)


def test_every_dense_architecture_has_a_small_model() -> None:
    assert set(SHAPES) == set(DENSE)
