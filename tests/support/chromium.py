"""Headless Chromium, the system's or that of `playwright install`, driven by the PyPI package playwright."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from binaryvit_runtime.browser.server import create_server


INSTALL = "apt-get install chromium, or playwright install chromium"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# A camera with a moving test picture, which pages may use without asking.
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextlib.contextmanager
def start_chromium() -> Iterator[Browser]:
    """Skips the test where there is no Chromium, and fails it in CI."""
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        program = next(filter(None, map(shutil.which, PROGRAMS)), own if own.is_file() else None)
        if program is None and os.environ.get("CI"):
            pytest.fail(f"CI must have Chromium: {INSTALL}")
        if program is None:
            pytest.skip(f"there is no Chromium: {INSTALL}")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder that a server serves, as `binaryvit demo` does."""
    with create_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answers(page: Page) -> list[dict]:
    """The labels and scores that the page shows, when the answer is there."""
    page.wait_for_selector("#best:not(.waiting)")
    return page.evaluate(
        "() => [...document.querySelectorAll('#labels li')].map((item) => "
        "({ label: item.querySelector('span').textContent, score: Number(item.querySelector('data').value) }))"
    )


def draw(page: Page, strokes: list[list[tuple[float, float]]]) -> None:
    """Draw on the board with the mouse; points are parts of its sides."""
    box = page.locator("#board").bounding_box()
    for first, *others in [
        [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in s] for s in strokes
    ]:
        page.mouse.move(*first)
        page.mouse.down()
        for point in others:
            page.mouse.move(*point)
        page.mouse.up()
