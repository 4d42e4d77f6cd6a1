"""Tests of the block without garbage collections, in processes of their own, since pytest's has torch."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
{before}
from dist_moe.interpreter import without_collections

with without_collections(), without_collections():
    inside = gc.isenabled()
    {work}
print(inside, gc.isenabled(), gc.get_freeze_count() > 0)
"""
NOT_FOR_TRAINING = {
    *("matplotlib", "scipy", "pandas", "torchvision", "setuptools", "mpi4py", "typer"),
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
    # transformers imports the packages of the extra `study` where they are installed, as they are for the tests.
    hidden = "import sys; sys.modules.update(dict.fromkeys(('scipy', 'sklearn')))"
    shown = "print(*(name for name, module in sys.modules.items() if module is not None))"
    argv = [sys.executable, "-c", f"{hidden}; import dist_moe.train.loop; {shown}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    imported = set(done.stdout.split())
    assert {"torch", "transformers.modeling_utils", "deepspeed", "PIL.Image", "tensorboard"} <= imported
    assert imported & NOT_FOR_TRAINING == set()
