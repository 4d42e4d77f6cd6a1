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
