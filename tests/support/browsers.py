"""Headless Chromium and Firefox, the system's or those of `playwright install`, driven by the PyPI package playwright."""

import base64
import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserType, Error, Frame, Page, sync_playwright

from binaryvit_runtime.browser.server import create_server


PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "firefox": ("firefox", "firefox-esr")}
BROWSERS = tuple(PROGRAMS)
# A camera with a moving test picture, which pages may use without asking.
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PREFERENCES = {"media.navigator.streams.fake": True, "media.navigator.permission.disabled": True}
GIVE_FILE = """([kind, encoded, type]) => {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  if (type) data.items.add(new File([bytes], "picture", { type }));
  const event = new Event(kind, { bubbles: true, cancelable: true });
  event[kind === "drop" ? "dataTransfer" : "clipboardData"] = data; // a ClipboardEvent of Firefox would lose the files
  document.querySelector("#stage").dispatchEvent(event);
}"""


@contextlib.contextmanager
def start_browser(name: str) -> Iterator[Browser]:
    """
    Skips the test where the browser is missing. The variable TEST_BROWSERS names those that must be there, and skips others.
    In CI this is Chromium.
    """
    chosen = os.environ.get("TEST_BROWSERS", "chromium" if os.environ.get("CI") else "").split()
    if chosen and name not in chosen:
        pytest.skip(f"TEST_BROWSERS has no {name}")
    with sync_playwright() as playwright:
        try:
            browser = launch(getattr(playwright, name))
        except Error as error:
            message = f"{name} cannot be started, try `playwright install {name}`: {error.message.splitlines()[0]}"
            pytest.fail(message) if name in chosen else pytest.skip(message)
        yield browser
        browser.close()


def launch(kind: BrowserType) -> Browser:
    """Start the system's browser; Firefox rather as Playwright has it: the system's obeys only some of its commands."""
    system = next(filter(None, map(shutil.which, PROGRAMS[kind.name])), None)
    if kind.name == "chromium":
        return kind.launch(executable_path=system, args=FLAGS)
    if system is None or Path(kind.executable_path).is_file():
        return kind.launch(firefox_user_prefs=PREFERENCES)
    browser = kind.launch(channel="moz-firefox", executable_path=system, firefox_user_prefs=PREFERENCES)
    browser.new_context().close()  # fails if this Firefox is too old for this Playwright
    return browser


def is_firefox(page: Page) -> bool:
    return page.context.browser.browser_type.name == "firefox"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder that a server serves, as `binaryvit demo` does."""
    with create_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:  # also after a skip: a closed server that still serves takes a whole core
            server.shutdown()
            thread.join()


def answers(page: Page) -> list[dict]:
    """The labels and scores that the page shows, when the answer is there."""
    page.wait_for_selector("#best:not(.waiting)")
    return page.evaluate(
        "() => [...document.querySelectorAll('#labels li')].map((item) => "
        "({ label: item.querySelector('span').textContent, score: Number(item.querySelector('data').value) }))"
    )


def give(page: Page | Frame, kind: str, content: bytes, media_type: str = "image/png") -> None:
    """Drop or paste a file on the page."""
    page.evaluate(GIVE_FILE, [kind, base64.b64encode(content).decode(), media_type])


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
