"""Chromium without a screen, and pages that record what went wrong in them."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Error, Page, Request, sync_playwright

TIMEOUT_MS = 180_000
"""Of one action; the machine of the tests may be busy."""
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--font-render-hinting=none")
WIDTH = 1280


@dataclass
class OpenedPage:
    """A page of the browser.

    Attributes:
        page: The page, for clicks, queries and screenshots.
        hosts: The hosts that it asked for anything.
        errors: Errors of its scripts and its console.
    """

    page: Page
    hosts: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def count(self, selector: str) -> int:
        """Return the number of elements."""
        return len(self.page.query_selector_all(selector))

    def picture(self, path: Path, height: int | None = None, width: int = WIDTH) -> Path:
        """Save what is visible as a PNG, or the whole page, cut at a height."""
        path.parent.mkdir(parents=True, exist_ok=True)
        clip: Any = None if height is None else {"x": 0, "y": 0, "width": width, "height": height}
        self.page.screenshot(path=path, full_page=height is None, clip=clip, animations="disabled", timeout=TIMEOUT_MS)
        return path


class Chromium:
    """A running browser."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    @contextlib.contextmanager
    def open(
        self, address: str, scheme: str = "light", width: int = WIDTH, height: int = 900, scale: float = 1.0
    ) -> Iterator[OpenedPage]:
        """Open a page, which may ask no other host than its own for anything.

        Args:
            address: Of the page; a path is opened as file://.
            scheme: The color scheme that the user prefers.
            width: Of the window, in pixels.
            height: Of the window.
            scale: Pixels of a picture for each of the window.
        """
        url = address if "://" in address else Path(address).resolve().as_uri()
        context = self._browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, device_scale_factor=scale
        )
        context.set_default_timeout(TIMEOUT_MS)
        opened = OpenedPage(context.new_page())

        def on_request(request: Request) -> None:
            if not request.url.startswith(("data:", "blob:")):
                opened.hosts.add(urlsplit(request.url).netloc)

        def on_console(message: ConsoleMessage) -> None:
            if message.type == "error":
                opened.errors.append(message.text)

        def on_error(error: Error) -> None:
            opened.errors.append(str(error))

        opened.page.on("request", on_request)
        opened.page.on("console", on_console)
        opened.page.on("pageerror", on_error)
        try:
            opened.page.goto(url)
            yield opened
        finally:
            context.close()


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    """Start Debian's Chromium for the length of the context."""
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("chromium is not installed; run `sh tests/browser/packages.sh`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        try:
            yield Chromium(browser)
        finally:
            browser.close()
