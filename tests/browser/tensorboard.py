"""TensorBoard as a process of the tests, on a port of its own."""

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dist_moe.worker.network import LOOPBACK, free_port
from tests.browser.chromium import OpenedPage

START_S, END_S = 180, 20
WAIT_MS = 180_000
CURVES = """() => [...document.querySelectorAll('scalar-card')].map((card) => [
  card.querySelector('tb-truncated-path')?.getAttribute('title') ?? '',
  [...card.querySelectorAll('line-chart svg path, line-chart svg circle')]
    .filter((curve) => !curve.closest('mat-icon, .dots'))
    .map((curve) => (curve.getAttribute('d')?.match(/[ML]/g) ?? [1]).length),
])"""
"""Of each card with curves: its tag, and the number of points of each curve."""
PICTURES = """() => [...document.querySelectorAll('image-card')].map((card) => [
  card.querySelector('tb-truncated-path')?.getAttribute('title') ?? '',
  card.querySelector('img')?.naturalWidth ?? 0,
])"""
"""Of each card with a picture: its tag, and the width of the picture in pixels, 0 before it is there."""
DISTRIBUTIONS = """() => [...document.querySelectorAll('histogram-card')].map((card) => [
  card.querySelector('tb-truncated-path')?.getAttribute('title') ?? '',
  [...card.querySelectorAll('tb-histogram .histogram path')].filter((path) => path.getBBox().height > 0).length,
])"""
"""Of each card with a distribution: its tag, and the number of its steps that have one."""


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Start TensorBoard for the runs in a folder, for the length of the context -> its address."""
    port = free_port()
    argv = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", LOOPBACK, "--port", str(port)]
    process = subprocess.Popen(
        [*argv, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    address, deadline_s = f"http://{LOOPBACK}:{port}", time.monotonic() + START_S
    try:
        while not _has_runs(address):
            assert process.poll() is None, f"TensorBoard ended: {process.stderr and process.stderr.read()[-3000:]}"
            assert time.monotonic() < deadline_s, "TensorBoard does not answer"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _has_runs(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=10) as answer:
            return answer.read().strip() not in (b"", b"[]")
    except OSError:
        return False


def wait_for_curves(opened: OpenedPage) -> dict[str, list[int]]:
    """Wait until the cards in view have their curves -> tag: number of points of each curve."""
    _wait(opened, CURVES, "points.length > 0")
    return {tag: points for tag, points in opened.page.evaluate(CURVES)}


def wait_for_pictures(opened: OpenedPage) -> dict[str, int]:
    """Wait until the cards in view have their pictures -> tag: width of each in pixels."""
    _wait(opened, PICTURES, "points > 0")
    return {tag: width for tag, width in opened.page.evaluate(PICTURES)}


def wait_for_distributions(opened: OpenedPage) -> dict[str, int]:
    """Wait until the cards in view have their distributions -> tag: number of steps with one."""
    _wait(opened, DISTRIBUTIONS, "points > 0")
    return {tag: steps for tag, steps in opened.page.evaluate(DISTRIBUTIONS)}


def expand(opened: OpenedPage, group: str) -> None:
    """Show the cards of a group; TensorBoard shows those of the first two."""
    opened.page.click(f"button.group-toolbar:has([title='{group}'])")


def _wait(opened: OpenedPage, cards: str, has_data: str) -> None:
    opened.page.wait_for_function(
        f"() => {{ const found = ({cards})(); return found.length && found.every(([, points]) => {has_data}); }}",
        timeout=WAIT_MS,
    )
