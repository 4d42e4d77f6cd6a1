"""TensorBoard with real runs in Chromium: every card has data, of a model of 60 layers and of a classification too."""

import json
import urllib.request
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium
from tests.browser.conftest import PICTURES
from tests.browser.tensorboard import expand, tensorboard, wait_for_curves, wait_for_distributions, wait_for_pictures

MOST_CURVES = 25
"""Cards with curves; about 1,000 of a model of 60 layers if each layer had its own."""
HEIGHT = 6400
"""Of a window that shows all cards; those out of sight have no data."""
STEPS = {"debug": 20, "deep": 16, "classification": 12}
LAYERS = {"debug": 2, "deep": 60, "classification": 4}


@pytest.mark.parametrize("name", STEPS)
def test_the_first_view_has_the_loss_the_load_and_the_speed_with_data(browser: Chromium, work: Path, name: str) -> None:
    of_steps = {f"1_overview/{curve}" for curve in ("loss", "max_vio", "max_vio_worst_layer", "tokens_per_s")}
    of_task = {f"1_overview/{curve}" for curve in ("accuracy", "macro_f1", "matthews")}
    experts = {f"experts_over_steps_{number}" for number in range(1, min(4, LAYERS[name]) + 1)}
    with tensorboard(work / "runs" / name) as address:
        with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=60) as answer:
            tags = {tag for of_run in json.load(answer).values() for tag in of_run}
        # Curves as SVG, whose points can be counted.
        with browser.open(f"{address}/?forceSVG=true#timeseries", height=HEIGHT) as opened:
            curves = wait_for_curves(opened)
            pictures = wait_for_pictures(opened)
            opened.picture(PICTURES / f"tensorboard-{name}.png", height=HEIGHT)
            assert set(curves) == of_steps | (of_task if name == "classification" else set())
            assert {tag: max(curves[tag]) for tag in of_steps} == dict.fromkeys(of_steps, STEPS[name])
            assert all(max(curves[tag]) == 1 for tag in of_task & set(curves)), "one evaluation"
            expected = experts | {"layers_over_steps", "last_step", "validation"}
            assert set(pictures) == {f"2_load_pictures/{picture}" for picture in expected}
            assert min(pictures.values()) > 300
            assert opened.hosts == {address.removeprefix("http://")} and opened.errors == []
        assert len(tags) <= MOST_CURVES, sorted(tags)


@pytest.mark.parametrize("name", STEPS)
def test_the_other_groups_have_data_on_request(browser: Chromium, work: Path, name: str) -> None:
    with (
        tensorboard(work / "runs" / name) as address,
        browser.open(f"{address}/?forceSVG=true#timeseries", height=HEIGHT) as opened,
    ):
        wait_for_pictures(opened)
        expand(opened, "4_distributions")
        distributions = wait_for_distributions(opened)
        assert {"4_distributions/router_scores", "4_distributions/gate_weights"} <= set(distributions)
        expand(opened, "3_details")
        opened.page.wait_for_function("document.querySelectorAll('scalar-card').length > 10")
        curves = wait_for_curves(opened)
        opened.picture(PICTURES / f"tensorboard-{name}-all.png", height=HEIGHT)
        assert max(curves["3_details/load_deviation_percent"]) == STEPS[name]
        assert opened.errors == []
