"""The configurations of these tests: configs/debug.yaml with overrides."""

from pathlib import Path

from dist_moe.config import Config, ConfigError, Violation, load_config, resolve
from dist_moe.families.registry import FAMILIES

WRITTEN_FAMILIES = [name for name, family in FAMILIES.items() if not family.is_probed]
"""Those with a module of their own, whose keys are all checked."""

CONFIGS = Path(__file__).parents[3] / "configs"
DEBUG = CONFIGS / "debug.yaml"

QWEN = (
    "model.architecture=qwen3_moe",
    "model.config={vocab_size: 257, hidden_size: 48, intermediate_size: 96, moe_intermediate_size: 32, "
    "num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_experts: 8, "
    "num_experts_per_tok: 2}",
)


def debug(*overrides: str) -> Config:
    """Load configs/debug.yaml with overrides: a DeepSeek-V3 with 12 experts."""
    return load_config(DEBUG, overrides)


def qwen(*overrides: str) -> Config:
    """Load the same run with a Qwen3-MoE with 8 experts."""
    return load_config(DEBUG, [*QWEN, *overrides])


def violations(config: Config, workers: int = 1) -> dict[str, Violation]:
    """Return the violations that `resolve` raises, by key; empty if there are none."""
    try:
        resolve(config, workers)
    except ConfigError as error:
        return {violation.key: violation for violation in error.violations}
    return {}
