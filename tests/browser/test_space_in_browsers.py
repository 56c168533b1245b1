"""The page of a Space in an iframe, as the Hub shows it."""

from pathlib import Path

import pytest


pytest.importorskip("playwright")

from browsers import BROWSERS, give, served, start_browser

from binaryvit_runtime import Classifier
from binaryvit_runtime.browser.page import write_page
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


if not kernels_here():
    pytest.skip("the engine was not built", allow_module_level=True)

MODEL = shipped_models()["binaryvit-fashion-mnist"]
# As on the page of a Space.
FRAME = """<!doctype html>
<iframe src="{address}/index.html" width="1000" height="800"
  allow="camera; clipboard-read; clipboard-write; fullscreen"
  sandbox="allow-downloads allow-forms allow-modals allow-popups allow-same-origin allow-scripts"></iframe>
"""
VARIABLES = "<script>window.huggingface={variables:{}};</script>"  # the Hub adds it to the page's head


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "page"
    write_page(MODEL, folder)
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert html.count("</head>") == 1
    (folder / "index.html").write_text(html.replace("</head>", f"{VARIABLES}</head>"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", BROWSERS)
def test_the_page_classifies_in_the_iframe_of_a_space(name, folder, tmp_path):
    (expected, *_) = Classifier.from_pretrained(MODEL)(MODEL / "example.png")
    with start_browser(name) as browser, served(folder) as address, served(tmp_path) as hub:
        (tmp_path / "index.html").write_text(FRAME.format(address=address.replace("127.0.0.1", "localhost")))
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{hub}/index.html")
        frame = page.frame_locator("iframe")
        if name == "chromium":
            frame.locator("input[type=file]").first.set_input_files(MODEL / "example.png")
        else:
            frame.locator("#facts dd").first.wait_for()
            give(page.frames[1], "drop", (MODEL / "example.png").read_bytes())
        frame.locator("#best:not(.waiting)").wait_for()
        assert frame.locator("#best").inner_text() == expected["label"]
        if name == "firefox":  # it reports that the page's policy blocks the Hub's script
            errors = [error for error in errors if "blocked an inline script" not in error]
        assert errors == []
