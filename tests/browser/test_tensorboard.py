"""TensorBoard with real runs in Chromium: the first view has curves, of a model of 60 layers too."""

import json
import urllib.request
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium
from tests.browser.conftest import PICTURES
from tests.browser.tensorboard import tensorboard, wait_for_curves

MOST_CURVES = 25
"""Cards with curves; about 1,000 of a model of 60 layers if each layer had its own."""


@pytest.mark.parametrize("name", ["debug", "deep"])
def test_the_first_view_has_curves_with_data(browser: Chromium, work: Path, name: str) -> None:
    with tensorboard(work / "runs" / name) as address:
        with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=60) as answer:
            tags = {tag for of_run in json.load(answer).values() for tag in of_run}
        # Curves as SVG, whose points can be counted.
        with browser.open(f"{address}/?forceSVG=true#timeseries", height=1400) as opened:
            curves = wait_for_curves(opened)
            opened.picture(PICTURES / f"tensorboard-{name}.png", height=1400)
            assert len(curves) >= 2
            assert all(max(points) >= 10 for points in curves.values()), curves
            assert set(curves) <= tags
            assert any("loss" in tag for tag in curves), "the loss is in the first view"
            assert opened.hosts == {address.removeprefix("http://")} and opened.errors == []
        assert len(tags) <= MOST_CURVES, sorted(tags)
