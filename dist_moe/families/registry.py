"""The families by architecture: every module of this package that has a `FAMILY`."""

import importlib
import pkgutil

from dist_moe import families
from dist_moe.families.dense import DENSE
from dist_moe.families.record import Family


def _find_families() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names if name != "registry"]
    records = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.architecture: family for family in records}


FAMILIES = _find_families()
ARCHITECTURES: dict[str, Family] = {**FAMILIES, **DENSE}
"""Those and the dense families, whose models become MoE models."""


def family_of(architecture: str) -> Family:
    """The family with this Hugging Face `model_type`.

    Raises:
        ValueError: The family is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture} is not a known family; use {' or '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]
