"""The configuration reference: complete, equal to the schema, and equal to its page of the documentation."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from dist_moe.cli import main as cli
from dist_moe.cli.reference import accepts, entries, markdown, yaml_text
from dist_moe.config import Config
from dist_moe.config.messages import field_paths
from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.config.sections.data import DataConfig
from dist_moe.config.sections.train import TrainConfig
from dist_moe.policies.registry import foreign_defaults

ROOT = Path(__file__).resolve().parents[3]
REQUIRED = {
    "model.architecture",
    "data.sequence_length",
    "train.steps",
    "train.global_batch_size",
    "train.learning_rate",
}


def test_the_yaml_has_every_field_at_its_default() -> None:
    written = yaml.safe_load(yaml_text())
    flat = {f"{section}.{key}": value for section, keys in written.items() for key, value in keys.items()}
    of_other_policies = {f"balance.{field}" for field in foreign_defaults("loss_free")}
    assert list(flat) == [path for path in field_paths() if path not in of_other_policies]
    required = {key: 1 for key in REQUIRED} | {"model.architecture": "deepseek_v3", "data.sequence_length": 2}
    smallest: dict[str, dict[str, object]] = {"model": {}, "data": {}, "train": {}}
    for key, value in required.items():
        section, _, name = key.partition(".")
        smallest[section][name] = value
    defaults = Config.model_validate(smallest).model_dump(mode="json")
    for key, value in flat.items():
        section, _, name = key.partition(".")
        expected = None if key in REQUIRED else defaults[section][name]
        assert value == expected, key


def test_every_field_has_a_sentence_and_its_accepted_values_above_it() -> None:
    lines = yaml_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  ") and not line.startswith("  #"):
            assert lines[number - 1].startswith("  # "), line


def test_entries_name_ranges_choices_and_the_keys_of_list_items() -> None:
    train = {entry.key: entry for entry in entries(TrainConfig, "train")}
    assert train["train.final_learning_rate_ratio"].accepts == "number, >= 0, <= 1"
    assert train["train.optimizer"].accepts == "adamw | sgd"
    assert train["train.steps"].required and not train["train.optimizer"].required
    data = {entry.key: entry.accepts for entry in entries(DataConfig, "data")}
    assert data["data.sources"] == "list of text"
    hosts = {entry.key: entry.default for entry in entries(ClusterConfig, "cluster")}
    assert hosts["cluster.hosts[].slots"] == 1


def test_fields_of_other_policies_are_comments_that_name_them() -> None:
    text = " ".join(yaml_text().replace("#", "").split())
    assert "clip (number, > 1 | null): With adaptive_weight: The largest weight of an expert" in text
    assert "| `policy` | `loss_free` | none \\| loss_free \\| adaptive_weight" in markdown()


def test_alternatives_are_named_once() -> None:
    assert accepts({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]}) == (
        "integer, >= 1 | auto | null"
    )
    assert accepts({"anyOf": [{"type": "null"}, {"type": "null"}]}) == "null"


def test_the_page_of_the_documentation_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown(), "run `python -m dist_moe.cli.reference > docs/configuration.md`"


def test_the_command_prints_the_reference_without_a_config() -> None:
    result = CliRunner().invoke(cli.app, ["config", "--reference"])
    assert (result.exit_code, result.stdout) == (0, yaml_text())
