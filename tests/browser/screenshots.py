"""Writes the pictures of reports and of TensorBoard in the documentation: `python -m tests.browser.screenshots`.

It trains the quick start and the short runs of the tests, which takes seven minutes on two cores, or takes the runs
of an earlier call.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.browser.chromium import Chromium, chromium
from tests.browser.runs import ROOT, SHORT, UNBALANCED, dist_moe, train
from tests.browser.tensorboard import tensorboard, wait_for_pictures

SCHEMES = {"light": "", "dark": "-dark"}
QUICK_START, DEBUG = "configs/quickstart.yaml", "configs/debug.yaml"
DASHBOARD_WIDTH, DASHBOARD_HEIGHT = 1500, 2000
CURVES_MS = 5000
"""Until TensorBoard has drawn its curves, which are no elements of the page."""

DEEP = (
    "model.config.num_hidden_layers=61",  # the first layer is dense
    "model.config.n_routed_experts=16",
    "model.config.hidden_size=32",
    "model.config.moe_intermediate_size=16",
    "train.steps=60",
    "train.micro_batch_size=6",
    "observe.interval=1",
)
"""A model with 60 MoE layers, and the steps in which they become balanced."""


def main(
    work: Annotated[Path, typer.Option(help="Where the runs are, or will be made.")] = ROOT / "build/pictures",
    out: Annotated[Path, typer.Option(help="Where the pictures are written.")] = ROOT / "docs",
) -> None:
    """Write the pictures of the quick start, of a comparison, and of a model with 60 MoE layers."""
    work.mkdir(parents=True, exist_ok=True)
    for name, config, changes in (
        ("quickstart", QUICK_START, ()),
        ("debug", DEBUG, SHORT),
        ("unbalanced", DEBUG, (*SHORT, *UNBALANCED)),
        ("deep", DEBUG, DEEP),
    ):
        if not (work / "runs" / name / "checkpoints" / "latest").exists():
            train(work, name, *changes, config=config)
    pages = {"quickstart": ["quickstart"], "deep": ["deep"], "comparison": ["debug", "unbalanced"]}
    for name, runs in pages.items():
        dist_moe(work, "report", *(f"runs/{run}" for run in runs), "--out", f"{name}.html")
    with contextlib.ExitStack() as stack:
        browser = stack.enter_context(chromium())
        for scheme, suffix in SCHEMES.items():
            _first_screen(browser, work / "quickstart.html", out / f"report{suffix}.png", scheme, 1180)
        _first_screen(browser, work / "comparison.html", out / "report-comparison.png", "light", 1500)
        _heat_maps(browser, work / "deep.html", out / "report-layers.png")
        _dashboard(browser, work, "quickstart", out / "tensorboard.png")
        _dashboard(browser, work, "deep", out / "tensorboard-60-layers.png")


def _first_screen(browser: Chromium, page: Path, picture: Path, scheme: str, height: int) -> None:
    with browser.open(str(page), scheme, height=height) as opened:
        opened.picture(picture, height)


def _heat_maps(browser: Chromium, page: Path, picture: Path) -> None:
    with browser.open(str(page), height=900) as opened:
        element = opened.page.query_selector("#load")
        if element is None:
            raise RuntimeError(f"{page} has no heat maps")
        element.screenshot(path=picture)


def _dashboard(browser: Chromium, work: Path, name: str, picture: Path) -> None:
    with tempfile.TemporaryDirectory() as logdir:
        (Path(logdir) / name).symlink_to(work.resolve() / "runs" / name)  # one run, by its name
        with (
            tensorboard(Path(logdir)) as address,
            browser.open(f"{address}/#timeseries", width=DASHBOARD_WIDTH, height=DASHBOARD_HEIGHT) as opened,
        ):
            opened.page.click("button:has-text('Settings')")  # hides the pane of settings
            wait_for_pictures(opened)
            opened.page.wait_for_timeout(CURVES_MS)
            opened.picture(picture, DASHBOARD_HEIGHT, DASHBOARD_WIDTH)


if __name__ == "__main__":
    typer.run(main)
