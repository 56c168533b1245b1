"""
Takes the pictures of the browser page in README.md: a drawn digit and its answer, in light and in dark mode.

    python .ci/photograph_page.py    # after a change of the page; needs Chromium and `pip install -e ".[test]"`
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browsers import answers, draw, start_browser  # noqa: E402
from drawn_digits import DIGITS  # noqa: E402

from binaryvit_runtime.browser.page import write_page  # noqa: E402


DIGIT = "5"
SIZE = {"width": 880, "height": 690}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, start_browser("chromium") as browser:
        file = Path(folder, "digits.html")
        write_page("binaryvit-digits", file, single_file=True)
        for theme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=theme, reduced_motion="reduce")
            page.goto(file.as_uri())
            page.wait_for_selector("#facts dd")
            draw(page, DIGITS[DIGIT])
            assert answers(page)[0]["label"] == DIGIT
            picture = Image.open(io.BytesIO(page.screenshot()))
            # 128 colours take a third of the bytes, and letters look the same.
            picture.quantize(128).save(ROOT / "docs" / "pictures" / f"page-{theme}.png", optimize=True)


if __name__ == "__main__":
    main()
