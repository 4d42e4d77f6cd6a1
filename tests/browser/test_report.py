"""The report of real runs in Chromium: it opens offline, its charts carry data, and the pointer shows values."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Dialog

from tests.browser.chromium import Chromium, OpenedPage
from tests.browser.conftest import PICTURES
from tests.browser.runs import dist_moe
from tests.unit.observe.report.sample_runs import hostile_run

CURVES = """() => [...document.querySelectorAll('svg.chart')].map((chart) => {
  const [x, y, width, height] = JSON.parse(document.getElementById('data').textContent).charts[chart.id].box;
  const paths = [...chart.querySelectorAll('path.line')];
  return [chart.id, paths.map((path) => (path.getAttribute('d').match(/[ML]/g) ?? []).length), paths.every((path) => {
    const box = path.getBBox();
    return box.x >= x - 1 && box.x + box.width <= x + width + 1
      && box.y >= y - 1 && box.y + box.height <= y + height + 1;
  })];
})"""
"""Of each chart: its name, the points of each curve, and whether all curves are inside it."""


@pytest.fixture(scope="module")
def pages(work: Path) -> dict[str, Path]:
    """The pages of the runs, and of a comparison."""
    runs = {name: [f"runs/{name}"] for name in ("debug", "deep")} | {"both": ["runs/debug", "runs/unbalanced"]}
    for name, folders in runs.items():
        dist_moe(work, "report", *folders, "--out", f"{name}.html")
    return {name: work / f"{name}.html" for name in runs}


def last_validation(work: Path, run: str) -> float:
    lines = [json.loads(line) for line in (work / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    value: float = lines[-1]["validation_loss"]
    return value


def check_charts(opened: OpenedPage, steps: int) -> None:
    found = {name: (points, inside) for name, points, inside in opened.page.evaluate(CURVES)}
    assert {"loss", "max-vio", "tokens-per-s", "load-deviation-percent", "rank-load", "bias"} <= set(found)
    for name, (points, inside) in found.items():
        assert inside, name
        assert max(points) == steps, name
    assert opened.errors == [] and opened.hosts <= {""}, "nothing is loaded from elsewhere"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "steps"), [("debug", 20), ("deep", 16), ("both", 20)])
def test_a_report_opens_offline_and_its_charts_carry_data(
    browser: Chromium, pages: dict[str, Path], work: Path, name: str, steps: int, scheme: str
) -> None:
    with browser.open(str(pages[name]), scheme) as opened:
        check_charts(opened, steps)
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        run = "deep" if name == "deep" else "debug"
        assert f"{last_validation(work, run):.4f}" in opened.page.inner_text("#result")
        opened.picture(PICTURES / f"report-{name}-{scheme}.png")


def test_the_pointer_shows_the_values_of_a_chart_and_of_a_heat_map(
    browser: Chromium, pages: dict[str, Path], work: Path
) -> None:
    lines = [json.loads(line) for line in (work / "runs/debug/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    with browser.open(str(pages["debug"])) as opened:
        chart = opened.page.query_selector("#loss")
        assert chart is not None
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        assert box is not None
        opened.page.mouse.move(box["x"] + box["width"] * 0.97, box["y"] + box["height"] / 2)
        shown = opened.page.inner_text("#pointer")
        assert "step 20" in shown and f"training: {steps[-1]['loss']:.4f}" in shown
        assert f"validation: {last_validation(work, 'debug'):.4f}" in shown
        assert opened.page.evaluate("pixelsAreTrue") is True
        layer = opened.page.query_selector_all("svg.map")[-1]
        layer.scroll_into_view_if_needed()
        image = layer.query_selector("image")
        cells = image and image.bounding_box()
        assert cells
        load = steps[9]["load"][-1]
        opened.page.mouse.move(cells["x"] + cells["width"] * 9.5 / 20, cells["y"] + cells["height"] * 3.5 / len(load))
        opened.page.wait_for_function("document.querySelector('#pointer').innerText.includes('expert 3, step 10')")
        shown = opened.page.inner_text("#pointer")
        ratio = load[3] * len(load) / sum(load)
        found = re.search(r"([\d.]+) × mean", shown)
        if ratio == 0:
            assert "no tokens" in shown
        elif ratio <= 5:
            assert found and float(found[1]) == pytest.approx(ratio, rel=0.03)
        opened.page.mouse.move(2, 2)
        assert not opened.page.is_visible("#pointer") and opened.errors == []


def test_sixty_layers_are_below_one_line_and_open_on_request(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open(str(pages["deep"])) as opened:
        assert pages["deep"].stat().st_size < 4_000_000
        visible = [each for each in opened.page.query_selector_all("svg.map") if each.is_visible()]
        assert len(visible) == 2 and opened.count("svg.map") == 62, "all layers at a glance, and the least balanced one"
        before = opened.page.evaluate("document.documentElement.scrollHeight")
        opened.page.click("text=Load of each expert, 60 layers")
        assert all(each.is_visible() for each in opened.page.query_selector_all("svg.map"))
        assert before < 7000 < opened.page.evaluate("document.documentElement.scrollHeight")
        opened.picture(PICTURES / "report-deep-layers.png")


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open(str(pages["both"]), width=390, height=800) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        opened.picture(PICTURES / "report-narrow.png")


def test_trap_T90_a_hostile_run_runs_no_script_and_loads_nothing(browser: Chromium, tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "<img src=x onerror=alert(1)>")
    dist_moe(tmp_path, "report", str(run), "--out", "page.html")
    with browser.open(str(tmp_path / "page.html")) as opened:
        dialogs: list[str] = []

        def note(dialog: Dialog) -> None:
            dialogs.append(dialog.message)
            dialog.dismiss()

        opened.page.on("dialog", note)
        opened.page.wait_for_timeout(500)
        assert (dialogs, opened.errors, opened.hosts - {""}) == ([], [], set())
        assert opened.count("img, iframe, object, b") == 0 and opened.count("svg.chart") > 3
        assert "<script>alert(1)</script>" in opened.page.inner_text("body")
