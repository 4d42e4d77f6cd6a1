"""The files in configs/ are valid, and have only what differs from the defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from dist_moe.config import Config, load_config, resolve
from dist_moe.config.messages import field_paths
from dist_moe.config.sections.balance import balance_fields
from dist_moe.config.yaml_io import parse
from tests.unit.config.files import CONFIGS

FILES = sorted(CONFIGS.glob("*.yaml"))


def fields_of(section: str) -> dict[str, FieldInfo]:
    if section == "balance":
        return balance_fields()
    annotation = Config.model_fields[section].annotation
    assert annotation is not None
    return dict(annotation.model_fields)


def description(path: str) -> str:
    section, _, name = path.partition(".")
    return str(fields_of(section)[name].description)


def test_there_are_files() -> None:
    assert "debug.yaml" in [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_lists_only_what_differs_from_the_default(path: Path) -> None:
    for section, fields in parse(path.read_text()).items():
        for name, value in fields.items():
            default = fields_of(section)[name].get_default(call_default_factory=True)
            assert value != default, f"{section}.{name}={value} is the default; leave it out"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_loads_and_fits_its_workers(path: Path) -> None:
    """As many as the number in the name of the file, such as gpu-8.yaml, and otherwise one."""
    workers = int(path.stem.rpartition("-")[2]) if "-" in path.stem else 1
    assert resolve(load_config(path), workers).expert_parallel == workers


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 12])
def test_the_debug_run_fits_many_worker_counts(workers: int) -> None:
    assert resolve(load_config(CONFIGS / "debug.yaml"), workers).expert_parallel == workers


def test_every_description_follows_give() -> None:
    for field in field_paths():
        assert description(field).startswith(("the ", "whether ")), field


def test_importing_the_package_does_not_import_the_heavy_libraries() -> None:
    program = (
        "import sys; import dist_moe.config; "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
