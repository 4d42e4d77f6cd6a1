"""The public names, their signatures and their docstrings: what users write against does not change unnoticed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dist_moe
from dist_moe.api import PUBLIC

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("public_api.txt")


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """What a class defines for its users, with what it inherits from our own classes."""
    for name in sorted(dir(owner)):
        is_ours = any(name in vars(base) and base.__module__.startswith("dist_moe") for base in owner.__mro__)
        if is_ours and (not name.startswith("_") or name in ("__enter__", "__exit__")):
            yield name, inspect.getattr_static(owner, name)


def signatures() -> str:
    """Every public name with its signature, and the public methods of classes; fields have their types."""
    lines = []
    for name in sorted(dist_moe.__all__):
        value = getattr(dist_moe, name)
        if isinstance(value, str):
            lines.append(f"{name}: str")
            continue
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"{name}: {', '.join(base.__name__ for base in value.__bases__)}")
            continue
        lines.append(f"{name}{inspect.signature(value)}")
        for member, attribute in members(value) if inspect.isclass(value) else ():
            if inspect.isfunction(attribute):
                lines.append(f"    {member}{inspect.signature(attribute)}")
            else:
                lines.append(f"    {member}")
    return "\n".join(lines) + "\n"


def test_the_signatures_are_those_of_the_golden_file() -> None:
    assert signatures() == GOLDEN.read_text(), f"after an intended change, write what is left into {GOLDEN.name}"


def test_every_name_is_imported_when_it_is_used_and_listed() -> None:
    assert set(dist_moe.__all__) == {*PUBLIC, "__version__"}
    assert set(dist_moe.__all__) <= set(dir(dist_moe))
    for name, module in PUBLIC.items():
        assert getattr(dist_moe, name) is getattr(importlib.import_module(module), name)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dist_moe' has no attribute 'Balancr'"):
        _ = dist_moe.Balancr


def test_no_module_has_the_name_of_something_public() -> None:
    """The import of a submodule sets its name in the package, where the name was that of a function before."""
    assert not {module.name for module in pkgutil.iter_modules(dist_moe.__path__)} & set(dist_moe.__all__)


def test_every_public_name_has_a_docstring() -> None:
    for name in set(dist_moe.__all__) - {"__version__"}:
        value = getattr(dist_moe, name)
        assert (inspect.getdoc(value) or "").endswith("."), name
        for member, attribute in members(value) if inspect.isclass(value) else ():
            if inspect.isfunction(attribute) and not member.startswith("__"):
                assert inspect.getdoc(attribute), f"{name}.{member}"


def test_the_import_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, dist_moe; dir(dist_moe); dist_moe.__version__\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'deepspeed', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_balancing_loads_neither_the_trainer_nor_other_frameworks() -> None:
    code = (
        "import sys, dist_moe; dist_moe.balance\n"
        "print(*sorted({'transformers.trainer', 'deepspeed', 'accelerate', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
