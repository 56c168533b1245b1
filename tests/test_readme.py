"""README.md. `test_docs.py` runs its code, with that of all other pages."""

import re
import runpy

import pytest
from snippets import README, ROOT

from binaryvit_hf.ops import readable
from binaryvit_runtime.browser.page import ENGINE


SCRIPT = ROOT / ".ci" / "update_readme.py"
TEXT = README.read_text(encoding="utf-8")
SIZE_WITHOUT_PYTORCH = "83 MB"  # `.ci/check_package.py` measures it
MOST_LINES = 250


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_the_tables_and_the_picture_are_those_of_the_measurements(script):
    assert not script["find_stale"](), f"run `python {SCRIPT.relative_to(ROOT)}`"


def test_a_changed_figure_of_a_table_is_found(script):
    """In each table, one by one: the script would write the figure of the measurement again."""
    for page, tables in script["TABLES"].items():
        content = page.read_text(encoding="utf-8")
        for name in tables:
            [table] = script["between_marks"](name).findall(content)
            changed = content.replace(table, re.sub(r"\d(?=[^\d]*$)", "#", table))
            assert changed != content
            assert script["replace_tables"](changed, page) == content, name


def test_the_text_of_the_page_on_speed_has_no_times_or_sizes_of_its_own(script):
    text = script["SPEED"].read_text(encoding="utf-8")
    for name in script["TABLES"][script["SPEED"]]:
        text = script["between_marks"](name).sub("", text)
    assert re.findall(r"\d[\d.,]* ?(?:ms|seconds?|[kMG]?B|times|points|%)(?!\w)", text) == []


def test_a_trained_peer_is_in_the_table_with_the_bits_that_one_would_ship(script):
    peer = {"accuracy": 0.9, "accuracy_interval": [0.89, 0.91], "file_bytes": 400_000, "seconds": 1e-4}
    engines = {"outputs/a": ["onnxruntime float32", "onnxruntime int8"], "outputs/b": ["onnxruntime float32"]}
    results = [{"network": name, "engine": engine, **peer} for name in engines for engine in engines[name]]
    rows = script["trained_rows"]({"data": "fashion-mnist", "results": results})
    assert [row[0] for row in rows] == ["a, int8", "b, float32"]
    assert rows[0][2:5] == ("90.0 (89.0-91.0)", "400 kB", "0.10")


def test_times_and_sizes_in_the_text_are_those_of_the_tables(script):
    [table] = script["between_marks"]("results").findall(TEXT)
    known = set(re.findall(r"[\d.]+(?=&nbsp;[kM]B)|(?<=\| )[\d.]+(?= \|)", table + script["make_browser_table"]()))
    known |= {
        script["milliseconds"](script["measurement"](script["NETWORK"], kernels, 1)) for kernels in ("avx512", "avx2")
    }
    known |= {SIZE_WITHOUT_PYTORCH.partition(" ")[0], readable(ENGINE.stat().st_size, "B").partition(" ")[0]}
    stated = set(re.findall(r"[\d.]+(?=\s(?:ms|kB|MB)\b)", TEXT.replace(table, "")))
    ours = script["measurement"](script["NETWORK"], "avx512", 1)
    assert script["milliseconds"](ours) in stated
    assert stated - known == set()


def test_the_small_installation_is_the_one_that_is_measured():
    guide = (ROOT / "docs" / "pages" / "guides" / "runtime.md").read_text(encoding="utf-8")
    commands = re.findall(r"pip install --no-deps[^`\n]*", TEXT + guide)
    assert commands == 2 * [
        'pip install --no-deps --no-compile . "numpy>=1.26" "pillow>=11,<13" "safetensors>=0.8"'
    ]  # as .ci/check_package.py


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= MOST_LINES


def test_links_of_the_readme_lead_to_files_and_headings():
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXT)
    local = {link for pair in links for link in pair if link and not link.startswith(("http", "../../actions/"))}
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)", TEXT, re.M)
    }
    assert {link[1:] for link in local if link[0] == "#"} <= anchors
    assert [link for link in local if link[0] != "#" and not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_citation_has_the_version_of_the_package():
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "setup.cfg")]
    in_citation, in_setup = (re.findall(r"^version[ =:]+(\S+)", text, re.MULTILINE) for text in files)
    assert in_citation == in_setup


def test_continuous_integration_runs_the_tests_as_the_readme_says():
    [line] = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("command=")]
    command = line.partition("'")[2].partition("'")[0]
    assert TEXT.splitlines().count(command) == 1
