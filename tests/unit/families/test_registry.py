"""The registry of families: it finds every file, and each record names keys of the real config class."""

import json
from dataclasses import fields
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from dist_moe import families
from dist_moe.config.model import routing_fields
from dist_moe.families.probed import RECORDS, SINCE, read_records, release
from dist_moe.families.registry import FAMILIES, family_of


def test_every_file_with_a_record_is_a_family() -> None:
    (folder,) = families.__path__
    files = {path.stem for path in Path(folder).glob("*.py") if "FAMILY = " in path.read_text(encoding="utf-8")}
    assert {name for name, family in FAMILIES.items() if not family.is_probed} == files
    assert all(family.architecture == name for name, family in FAMILIES.items())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_family_names_keys_that_its_class_declares(architecture: str) -> None:
    family = family_of(architecture)
    declared = {field.name for field in fields(CONFIG_MAPPING[architecture])}
    keys = {family.experts_key, *(key for key in routing_fields(family).values() if key is not None)}
    assert keys <= declared
    assert not declared & set(family.undeclared_keys)
    assert set(family.positive_keys) <= declared
    assert set(family.few_layers) <= declared


@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen3_moe"])
def test_a_model_with_few_layers_has_an_moe_layer(architecture: str) -> None:
    family = family_of(architecture)
    settings = CONFIG_MAPPING[architecture](**family.few_layers)
    assert family.moe_layers(settings)
    assert settings.num_hidden_layers <= 3


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="architecture=phimoe is not a known family; use deepseek_v3, qwen3_moe or"):
        family_of("phimoe")


def test_records_made_with_a_newer_transformers_are_not_those_of_the_installed_one() -> None:
    records = json.loads(files("dist_moe.families").joinpath(RECORDS).read_text())
    newer = {name for name, values in records.items() if SINCE in values}
    assert newer == read_records("9.99.0.dev0").keys() - read_records("5.17.0").keys()
    assert all(release(records[name][SINCE]) > (5, 17) for name in newer)
    assert newer and newer.isdisjoint(FAMILIES) == (release(version("transformers")) < (5, 24))
