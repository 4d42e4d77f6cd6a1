"""Fixtures: a text, a run with three checkpoints, and a copy of the run for each test that damages it."""

import shutil
from pathlib import Path

import pytest

from tests.dist.resumable import write_text
from tests.unit.train.runs import train


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="package")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("made") / "run"
    done = train(text, run, "train.steps=6", "checkpoint.interval=2")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that the test may damage."""
    return shutil.copytree(made, tmp_path / "run")
