"""The families by architecture: every module of this package that has a `FAMILY`, and the records made by program."""

import importlib
import pkgutil

from dist_moe import families
from dist_moe.families.dense import DENSE
from dist_moe.families.probed import read_records
from dist_moe.families.record import Family


def _find_families() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names if name != "registry"]
    records = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    written = {family.architecture: family for family in records}
    return {**written, **{name: family for name, family in read_records().items() if name not in written}}


FAMILIES = _find_families()
ARCHITECTURES: dict[str, Family] = {**FAMILIES, **DENSE}
"""Those and the dense families, whose models become MoE models."""
FAMILIES_TEXT = "deepseek_v3, qwen3_moe or another one of docs/families.md"
"""The families of MoE models in the text of messages, of which there are too many to list them."""


def family_of(architecture: str) -> Family:
    """The family with this Hugging Face `model_type`.

    Raises:
        ValueError: The family is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture} is not a known family; use {FAMILIES_TEXT}")
    return ARCHITECTURES[architecture]
