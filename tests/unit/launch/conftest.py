"""What the tests of a launch share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.launch.supervise.monitor import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub("127.0.0.1", 1, tmp_path) as opened:
        yield opened
