"""Fixtures of the tests in a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium, chromium
from tests.browser.runs import DEEP, SHORT, UNBALANCED, train, train_classification

PICTURES = Path(__file__).resolve().parents[2] / "build" / "browser"
"""Where the tests leave what they saw."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    """One browser for all tests."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `debug`, `unbalanced`, `deep` and `classification`, of two workers each."""
    folder = tmp_path_factory.mktemp("work")
    train(folder, "debug", *SHORT)
    train(folder, "unbalanced", *SHORT, *UNBALANCED)
    train(folder, "deep", *SHORT, *DEEP)
    train_classification(folder)
    return folder
