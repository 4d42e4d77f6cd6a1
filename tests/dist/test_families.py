"""Families of each kind through `dist-moe train`: trained on two workers, balanced, and opened by transformers."""

from pathlib import Path

import pytest
from transformers import OpenAIPrivacyFilterForTokenClassification

from tests.dist.pool import RankPool
from tests.families.small import small_config
from tests.families.trained import INITIALIZER_RANGE, VOCABULARY, try_training
from tests.family_models import COVERING
from tests.selection import full

ENCODER = "openai_privacy_filter"
QUICK = ("gpt_oss", "minimax_m2", "nemotron_h")
MULTIMODAL = ("qwen3_vl_moe", "qwen3_omni_moe", "step3p7", "gemma4", "llama4")
"""Multimodal models."""
OTHERS = sorted({*COVERING, *MULTIMODAL} - {*QUICK, ENCODER, MULTIMODAL[0]})


@pytest.mark.slow
@pytest.mark.parametrize("family", [*QUICK, ENCODER, MULTIMODAL[0], *map(full, OTHERS)])
def test_a_family_is_trained_balanced_and_opened_by_transformers(ranks: RankPool, tmp_path: Path, family: str) -> None:
    found = try_training(family, ranks, tmp_path)
    assert found.works, found
    if family in MULTIMODAL:
        assert found.opened == "multimodal"
        return
    in_files = family in ("glm4_moe", "nemotron_h", "minimax_m2", "afmoe", "ernie4_5_moe")
    assert found.opened == ("folder" if in_files else "export")


@pytest.mark.slow
@pytest.mark.parametrize("headed", [True, full(False)])
def test_an_encoder_is_trained_from_the_folder_of_transformers(ranks: RankPool, tmp_path: Path, headed: bool) -> None:
    """Of a model that classifies tokens, or of the base model."""
    config = small_config(ENCODER, vocab_size=VOCABULARY, initializer_range=INITIALIZER_RANGE)
    theirs = OpenAIPrivacyFilterForTokenClassification._from_config(config)
    (theirs if headed else theirs.model).save_pretrained(tmp_path / "theirs")
    found = try_training(ENCODER, ranks, tmp_path, tmp_path / "theirs")
    assert found.works and found.opened == "export", found
