"""The families whose records were made by program, from the router of a small model: `make families` writes them.

A model is checked against its record when it is built, so that a record of another version of transformers is never
used in silence.
"""

import functools
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from dist_moe.families.record import Family

RECORDS = "records.json"


SINCE = "since"
"""Key of a record with the version of transformers that it was made with, where the pinned one has no such family."""


def read_records(transformers: str | None = None) -> dict[str, Family]:
    """Return the families by architecture.

    Args:
        transformers: A version, whose families are returned; None for the installed one.
    """
    present = release(transformers or version("transformers"))
    records = json.loads(files("dist_moe.families").joinpath(RECORDS).read_text(encoding="utf-8"))
    found = {}
    for architecture, values in records.items():
        if release(values.pop(SINCE, "0.0")) <= present:
            found[architecture] = _make_family(architecture, values)
    return found


def release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in text.split(".")[:2])


def _make_family(architecture: str, values: dict[str, Any]) -> Family:
    experts, values["untrained"] = values.pop("experts_class"), tuple(values.get("untrained", ()))
    is_encoder = values.get("encoder", False)
    return Family(
        architecture=architecture,
        block="",
        router="",
        experts="",
        few_layers={},
        moe_layers=functools.partial(_moe_layers, architecture, experts, is_encoder),
        layers_remedy=_layers_remedy,
        shape_violations=lambda settings: [],
        is_probed=True,
        **values,
    )


def _layers_remedy(settings: Any) -> tuple[str, str]:
    return "num_hidden_layers", "give more layers, or change the keys that select the MoE layers"


def _moe_layers(architecture: str, experts: str, is_encoder: bool, settings: Any) -> list[int]:
    settings_json = json.dumps(settings.to_dict(), sort_keys=True, default=str)
    return list(_layers_with(architecture, experts, is_encoder, settings_json))


@functools.lru_cache(maxsize=32)
def _layers_with(architecture: str, experts: str, is_encoder: bool, settings_json: str) -> tuple[int, ...]:
    """Return the indices of the layers that have experts, in the model on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING

    from dist_moe.families.model_class import model_class

    arguments: Mapping[str, Any] = json.loads(settings_json)
    settings = CONFIG_MAPPING[architecture].from_dict(dict(arguments))
    with torch.device("meta"):
        model = model_class(settings, is_encoder)._from_config(settings)
    names = [name for name, module in model.named_modules() if type(module).__name__ == experts]
    found = (re.search(r"\.(\d+)\.", f".{name}.") for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))
