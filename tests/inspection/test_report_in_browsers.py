"""The report of a trained network in headless browsers: both themes, a phone, and all tables open."""

import pytest


pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe
from browsers import BROWSERS, is_firefox, start_browser
from test_report import photos, trained  # noqa: F401 -- fixtures

from binaryvit_cli import main


PHONE, DESKTOP = {"width": 360, "height": 780}, {"width": 1200, "height": 800}


@pytest.fixture(scope="module", params=BROWSERS)
def browser(request):
    with start_browser(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def out(trained, photos, tmp_path_factory):  # noqa: F811 -- fixtures
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["inspect", str(trained), "--out", str(file), "--images", str(photos)]) == 0
    return file


@pytest.mark.parametrize("theme, size", [("light", PHONE), ("dark", DESKTOP)])
def test_a_report_is_accessible_and_fits_the_screen(theme, size, browser, out):
    context = browser.new_context(viewport=size, color_scheme=theme, java_script_enabled=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(out.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.locator("h2").count() == 9
    assert page.locator(".panel").count() == 2 + 4
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 15, 20)"
    is_told = not is_firefox(page) or page.evaluate(f"matchMedia('(prefers-color-scheme: {theme})').matches")
    assert dark == (theme == "dark") or not is_told  # the policy allows the style; not every Firefox is told the theme
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert problems == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    context.close()
