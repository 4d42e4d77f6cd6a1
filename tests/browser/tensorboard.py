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
  [...card.querySelectorAll('line-chart svg path')]
    .filter((path) => !path.closest('mat-icon'))
    .map((path) => (path.getAttribute('d').match(/[ML]/g) ?? []).length),
])"""
"""Of each card with curves: its tag, and the number of points of each curve."""


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
    opened.page.wait_for_function(
        f"() => {{ const found = ({CURVES})(); return found.length && "
        "found.every(([, points]) => points.some((count) => count > 1)); }",
        timeout=WAIT_MS,
    )
    return {tag: points for tag, points in opened.page.evaluate(CURVES)}
