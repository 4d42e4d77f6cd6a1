"""Families of each kind through `dist-moe train`: trained on two workers, balanced, and opened by transformers."""

from pathlib import Path

import pytest

from tests.dist.pool import RankPool
from tests.families.trained import try_training
from tests.family_models import COVERING
from tests.selection import full

QUICK = ("gpt_oss", "minimax_m2", "nemotron_h")
MULTIMODAL = ("qwen3_vl_moe", "qwen3_omni_moe", "step3p7", "gemma4", "llama4")
"""Multimodal models."""
OTHERS = sorted({*COVERING, *MULTIMODAL} - {*QUICK, MULTIMODAL[0]})


@pytest.mark.slow
@pytest.mark.parametrize("family", [*QUICK, MULTIMODAL[0], *map(full, OTHERS)])
def test_a_family_is_trained_balanced_and_opened_by_transformers(ranks: RankPool, tmp_path: Path, family: str) -> None:
    found = try_training(family, ranks, tmp_path)
    assert found.works, found
    if family in MULTIMODAL:
        assert found.opened == "multimodal"
        return
    in_files = family in ("glm4_moe", "nemotron_h", "minimax_m2", "afmoe", "ernie4_5_moe")
    assert found.opened == ("folder" if in_files else "export")
