"""What of a family's model is trained, and in which precision."""

import pytest
import torch

from dist_moe.config.sections.task import TaskConfig
from dist_moe.engine.deepspeed import cast_buffers
from dist_moe.errors import UserError
from dist_moe.families.registry import FAMILIES
from dist_moe.model.build import freeze_layers
from dist_moe.model.head import head_settings
from dist_moe.moe.router import Router
from tests.families.balanced import loss_of
from tests.families.small import VOCABULARY, families, small_config
from tests.family_models import COVERING, converted


def train_in_bf16(family: str) -> None:
    """A forward and backward pass in the precision that the engine gives a model."""
    model = converted(small_config(family)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    cast_buffers(model)
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    loss = loss_of(model, tokens)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "router" in name)
    for module in model.modules():
        if isinstance(module, Router):
            assert {value.dtype for value in module.buffers() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("family", [*COVERING, "minimax"])
def test_a_model_trains_in_bf16(family: str) -> None:
    train_in_bf16(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families().keys() - COVERING.keys() - {"minimax"}))
def test_every_other_model_trains_in_bf16(family: str) -> None:
    try:
        recorded = small_config(family).model_type in FAMILIES
    except Exception:  # a class of transformers that makes no small model; docs/families.md has the reason
        recorded = False
    if recorded:
        train_in_bf16(family)


@pytest.mark.parametrize("family", ["deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4"])
def test_what_the_loss_gives_no_gradient_is_not_in_the_optimizer(family: str) -> None:
    """Weight decay alone would shrink it."""
    config = small_config(family)
    assert FAMILIES[config.model_type].untrained == ("self_attn.indexer",)
    model = converted(config).train()
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".self_attn.indexer." in name for name in frozen)
    without = {name for name, p in model.named_parameters() if p.grad is None and p.requires_grad}
    assert not without


def test_the_head_of_an_encoder_is_trained_where_layers_are_frozen() -> None:
    """It is a child of the base model, after the layers."""
    settings = head_settings(TaskConfig(kind="classification"), ("a", "b"))
    model = converted(small_config("openai_privacy_filter", **settings))
    freeze_layers(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained if name.startswith("layers.")} == {"1", "2"}
    assert {"norm.weight", "score.weight"} < trained and "embed_tokens.weight" not in trained


def test_frozen_layers_are_refused_where_all_layers_may_read_a_module_after_them() -> None:
    with pytest.raises(UserError, match="not possible with a gemma4_text: its per_layer_model_projection comes after"):
        freeze_layers(converted(small_config("gemma4")), 1)
    model = converted(small_config("olmoe"))
    freeze_layers(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"1", "2"}
    assert "model.norm.weight" in trained and "model.embed_tokens.weight" not in trained
