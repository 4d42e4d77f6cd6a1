"""Tests of the block without garbage collections, in processes of their own, since pytest's has torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.interpreter import UNUSED_PACKAGES

PROGRAM = """
import gc
{before}
from dist_moe.interpreter import without_collections

with without_collections(), without_collections():
    inside = gc.isenabled()
    {work}
print(inside, gc.isenabled(), gc.get_freeze_count() > 0)
"""
DEBUG = Path(__file__).resolve().parents[2] / "configs/debug.yaml"
NOT_FOR_TRAINING = {
    *("matplotlib", *UNUSED_PACKAGES, "pandas", "torchvision", "setuptools", "mpi4py", "typer"),
    *("torch._inductor.compile_fx", "torch._functorch.aot_autograd", "torch.distributed.elastic"),
}
"""What a worker might import by accident, for 0.1 to 2 s."""


@pytest.mark.parametrize(
    ("before", "work", "found"),
    [
        ("", "import email", "False True True"),
        ("import torch", "import email", "True True False"),
        ("gc.disable()", "import email", "False False False"),
    ],
)
def test_collections_are_paused_once_and_only_before_torch_is_imported(before: str, work: str, found: str) -> None:
    program = PROGRAM.format(before=before, work=work)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == found.split()


def test_collections_continue_after_an_error() -> None:
    program = """
import gc
from dist_moe.interpreter import without_collections

try:
    with without_collections():
        raise ImportError
except ImportError:
    print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "True"


def test_trap_T56_a_worker_loads_nothing_that_training_does_not_use() -> None:
    hidden = "import sys; from dist_moe.interpreter import hide_unused_packages; hide_unused_packages()"
    shown = "print(*(name for name, module in sys.modules.items() if module is not None))"
    argv = [sys.executable, "-c", f"{hidden}; import dist_moe.train.loop; {shown}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    imported = set(done.stdout.split())
    assert {"torch", "transformers.modeling_utils", "deepspeed", "PIL.Image", "tensorboard"} <= imported
    assert imported & NOT_FOR_TRAINING == set()


def test_a_command_does_not_import_packages_that_it_does_not_use() -> None:
    """They are installed, or the test cannot fail."""
    assert all(importlib.util.find_spec(name) for name in UNUSED_PACKAGES)
    argv = [sys.executable, "-X", "importtime", "-m", "dist_moe", "config", str(DEBUG)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "transformers" in imported and not imported & set(UNUSED_PACKAGES)


def test_a_package_that_is_in_use_stays() -> None:
    program = "import sys, scipy; from dist_moe.interpreter import hide_unused_packages; hide_unused_packages()"
    shown = "print(sys.modules['scipy'] is scipy, sys.modules['sklearn'])"
    argv = [sys.executable, "-c", f"{program}; {shown}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "None"]
