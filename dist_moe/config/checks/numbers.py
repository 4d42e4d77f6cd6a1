"""Numbers that YAML and Python can hold, and the machine's number formats cannot."""

import math
from typing import Any

from dist_moe.config.schema import Config
from dist_moe.errors import Violation

LARGEST_FP32 = 3.4e38
LARGEST_INT64 = 2**63 - 1
# Sections whose numbers reach tensors without a bound in the schema.
OF_TENSORS = ("model", "router", "balance")


def number_violations(config: Config) -> list[Violation]:
    """Return a violation for each integer that does not fit in 64 bits, and each of a tensor that fp32 cannot hold."""
    return [
        violation
        for section, values in config.model_dump().items()
        for violation in _violations(section, values, math.inf if section not in OF_TENSORS else LARGEST_FP32)
    ]


def _violations(key: str, value: Any, largest: float) -> list[Violation]:
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in _violations(f"{key}.{name}", inner, largest)]
    if isinstance(value, list | tuple):
        # An end of a range may be infinite, as time_step_limit of Mamba layers.
        finite = [(index, inner) for index, inner in enumerate(value) if inner not in (math.inf, -math.inf)]
        return [found for index, inner in finite for found in _violations(f"{key}[{index}]", inner, largest)]
    if isinstance(value, float) and math.isnan(value):
        return [Violation(key, value, "is not a number", "give a number")]
    if isinstance(value, float) and abs(value) > largest:
        return [Violation(key, value, "does not fit in fp32", f"give a number of at most {LARGEST_FP32:g}")]
    if isinstance(value, int) and abs(value) > LARGEST_INT64:
        return [Violation(key, value, "does not fit in 64 bits", f"give an integer of at most {LARGEST_INT64}")]
    return []
