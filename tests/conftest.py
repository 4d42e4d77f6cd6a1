"""Fixtures that every test may ask for."""

import os
import signal
from collections.abc import Iterator

# Before torch is imported: two processes of tests on two cores, each with a thread per core, are several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.crash import pytest_testnodedown, pytest_xdist_make_scheduler
from tests.dist.pool import RankPool

__all__ = ["pytest_testnodedown", "pytest_xdist_make_scheduler"]
# A shell ignores it for what it starts in the background, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of up to 4 processes: `ranks.run(function, world_size, *args)` gives one result per rank."""
    with RankPool(size=4) as pool:
        yield pool
