"""Fixtures of the tests of a launch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.launch.supervise.monitor import WorkerMonitor


@pytest.fixture
def monitor(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[WorkerMonitor]:
    """A monitor of one worker, or of as many as the parameter says, perhaps on another host."""
    with WorkerMonitor("127.0.0.1", getattr(request, "param", 1), tmp_path) as opened:
        yield opened
