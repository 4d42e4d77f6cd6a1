"""Initial values of a model: those of its class, equal on every layout; and which parameters decay."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dist_moe.comm.mesh import Mesh
from dist_moe.model.build import build_model, empty_model, family_rule, materialize, parameter_groups
from dist_moe.model.convert import find_layers
from dist_moe.moe import dispatch, experts
from dist_moe.moe.kernels import kernels_for
from tests.experts import gated_experts
from tests.families.small import small_config
from tests.unit.model.samples import ALONE, FAMILIES, small_model, tokens


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN, instead of its random content."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def class_built(architecture: str) -> PreTrainedModel:
    """The family's small model as transformers makes it, on the CPU at once."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **FAMILIES[architecture][0]))


def is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def rotary_tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that no file holds."""
    tables = {name: value for name, value in model.named_buffers() if "inv_freq" in name}
    assert len(tables) == 2
    return tables


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_trap_T51_rotary_tables_and_norms_are_those_of_the_class(architecture: str) -> None:
    ours, theirs = small_model(architecture), class_built(architecture)
    norms = {name: value for name, value in theirs.named_parameters() if is_norm(name)}
    assert len(norms) > 6
    found: dict[str, Tensor] = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    for name, value in {**norms, **rotary_tables(theirs)}.items():
        assert torch.equal(found[name], value), name
    assert not any(value.isnan().any() for value in found.values())


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_trap_T51_rotary_tables_are_there_before_a_file_is_read(architecture: str) -> None:
    config = AutoConfig.for_model(architecture, **FAMILIES[architecture][0])
    model = empty_model(config, family_rule(config, "sigmoid"), ALONE)
    assert all(value.is_meta for value in rotary_tables(model).values())
    materialize(model)
    found = rotary_tables(model)
    for name, value in rotary_tables(class_built(architecture)).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_initial_values_are_drawn_as_the_class_draws_them(architecture: str) -> None:
    ours, theirs = small_model(architecture).state_dict(), class_built(architecture)
    drawn = [(name, p.detach()) for name, p in theirs.named_parameters() if not is_norm(name)]
    for name, value in drawn:
        twin = ours[name.replace(".experts.", ".experts.local.")]
        assert twin.shape == value.shape
        assert float(twin.std()) == pytest.approx(float(value.std()), rel=0.15), name
        assert abs(float(twin.mean())) < 5 * float(value.std()) / value.numel() ** 0.5, name
    values = [tuple(ours[name].flatten()[:4].tolist()) for name, _ in drawn if name in ours]
    assert len(set(values)) == len(values), "two modules have equal initial values"


def test_the_padding_row_of_the_embedding_is_zero() -> None:
    embedding: Any = small_model("qwen3_moe", pad_token_id=3).get_input_embeddings()
    zero_rows = embedding.weight.eq(0).all(dim=1)
    assert zero_rows.nonzero().flatten().tolist() == [3]


def test_a_padding_token_that_the_class_cannot_be_without_is_trained() -> None:
    config = small_config("step3p7")
    settings = {key: value for key, value in config.to_dict().items() if key not in ("pad_token_id", "model_type")}
    assert type(config)(**settings).pad_token_id is not None
    embedding: Any = build_model("step3p5", settings, "sigmoid", ALONE, seed=0).get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight.ne(0).any(dim=1).all()


def experts_of(model: PreTrainedModel) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(layer, global id) -> weights of each expert that a model holds."""
    return {
        (layer.name, expert): (gated_experts(layer).gate_up_proj[place], gated_experts(layer).down_proj[place])
        for layer in find_layers(model)
        for place, expert in enumerate(layer.experts.mesh.local_experts(layer.experts.num_experts))
    }


def test_trap_T26_no_two_experts_have_equal_initial_values() -> None:
    experts = list(experts_of(small_model("deepseek_v3")).values())
    assert len(experts) == 24
    for first, (gate_up, down) in enumerate(experts):
        for other_gate_up, other_down in experts[:first]:
            assert not torch.equal(gate_up, other_gate_up) and not torch.equal(down, other_down)


@pytest.mark.parametrize("expert_parallel", [2, 4])
def test_trap_T26_initial_experts_do_not_depend_on_the_layout(expert_parallel: int) -> None:
    alone = small_model("deepseek_v3")
    whole, dense = experts_of(alone), dict(alone.named_parameters())
    seen: set[tuple[str, int]] = set()
    for rank in range(4):
        model = small_model("deepseek_v3", mesh=Mesh(4, rank, expert_parallel))
        here = experts_of(model)
        assert len(here) == 24 // expert_parallel
        seen |= here.keys()
        for key, weights in here.items():
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, whole[key], strict=True))
        for name, value in model.named_parameters():
            assert ".experts.local." in name or torch.equal(value, dense[name]), name
    assert seen == whole.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_norms_biases_and_embeddings_do_not_decay(architecture: str, tied: bool) -> None:
    bias: dict[str, Any] = {"attention_bias": True, "q_lora_rank": 8} if architecture == "deepseek_v3" else {}
    model = small_model(architecture, ALONE, tie_word_embeddings=tied, **bias)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in parameter_groups(model, 0.1)}
    assert groups.keys() == {0.1, 0.0}
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    plain = {name for name in names if is_norm(name) or name.endswith(".bias") or "embed_tokens" in name}
    assert any(name.endswith(".bias") for name in plain) == bool(bias)
    assert groups[0.0] == {names[name] for name in plain}
    assert groups[0.1] == {names[name] for name in names.keys() - plain}
    assert ("lm_head.weight" in names) == (not tied)


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = small_model("qwen3_moe")
    frozen = find_layers(model)[0].router.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters())) - 1
    assert id(frozen) not in held


def test_the_name_of_the_kernels_reaches_every_part_of_a_layer() -> None:
    settings, score = FAMILIES["qwen3_moe"]
    model = build_model("qwen3_moe", settings, score, ALONE, seed=0, moe_kernels="torch")
    asked: list[Any] = []

    def recorded(device: torch.device, name: Any = "auto") -> Any:
        asked.append(name)
        return kernels_for(device, name)

    parts = [mock.patch.object(module, "kernels_for", recorded) for module in (dispatch, experts)]
    with parts[0], parts[1]:
        model(tokens())
    # In each layer: the order of rows, the gathered rows, the gate, the sums.
    assert asked == ["torch"] * 4 * len(find_layers(model))
