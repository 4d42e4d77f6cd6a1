"""Encoders of MoE models: recognized by program, and built from the class without an output layer."""

import pytest
import torch
from transformers import OpenAIPrivacyFilterModel

from dist_moe.families.model_class import find_model_class, model_class
from dist_moe.families.registry import FAMILIES
from tests.families.record import is_encoder, make_record, sees_later_tokens
from tests.families.small import build, small_config

ENCODER = "openai_privacy_filter"


def test_an_encoder_is_recognized_by_what_it_computes() -> None:
    assert is_encoder(ENCODER)
    assert sees_later_tokens(build(small_config(ENCODER)))
    assert not sees_later_tokens(build(small_config("gpt_oss")))


@pytest.mark.parametrize("family", ["gpt_oss", "mistral4", "qwen3_vl_moe"])
def test_a_language_model_is_no_encoder(family: str) -> None:
    """Alone, known to no auto class, and as a part of a multimodal model."""
    assert not is_encoder(family)


def test_the_record_says_so_and_what_the_router_divides_by() -> None:
    record = make_record(ENCODER)
    assert record["encoder"] is True and record["divides_by_top_k"] is True
    assert record["defaults"] == {"normalize": True, "scaling_factor": 1.0}


def test_the_record_of_a_router_that_does_not_divide() -> None:
    assert not {key for key, value in make_record("gpt_oss").items() if value} & {"encoder", "divides_by_top_k"}


def test_the_class_is_that_of_the_base_model() -> None:
    config = small_config(ENCODER)
    assert model_class(config, is_encoder=True) is find_model_class(config, is_encoder=True) is OpenAIPrivacyFilterModel
    assert find_model_class(config, is_encoder=False) is None


def test_its_layers_are_found() -> None:
    config = small_config(ENCODER, num_hidden_layers=4)
    with torch.device("meta"):
        assert FAMILIES[ENCODER].moe_layers(config) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_factor_on_the_gate_weights(top_k: int) -> None:
    config = small_config(ENCODER, num_experts_per_tok=top_k)
    assert FAMILIES[ENCODER].default_factor(config) == 1 / top_k
    assert FAMILIES["gpt_oss"].default_factor(small_config("gpt_oss")) == 1
