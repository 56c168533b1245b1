"""The pages of both shipped models in headless browsers: pictures come in by all ways, and the answers are Classifier's."""

import base64
import json
import os
import re
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe
from browsers import BROWSERS, answers, draw, give, is_firefox, served, start_browser
from drawn_digits import DIGITS
from packed_model import save_packed
from tiny import tiny_config

from binaryvit_runtime import Classifier
from binaryvit_runtime.browser.page import write_page
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


if not kernels_here():
    pytest.skip("the engine was not built", allow_module_level=True)

MODELS = {name.removeprefix("binaryvit-"): folder for name, folder in shipped_models().items()}
PHONE, DESKTOP = {"width": 360, "height": 780}, {"width": 1200, "height": 800}
HOSTILE = ["<img src=x onerror=document.title='run'>", "</script><script>document.title='run'</script>", "$data &amp;"]


@pytest.fixture(scope="module", params=BROWSERS)
def browser(request):
    with start_browser(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with hostile labels, in several files."""
    folder = tmp_path_factory.mktemp("models")
    config = tiny_config(id2label=dict(enumerate(HOSTILE)))
    return save_packed(folder, config, max_shard_size=5_000).rename(folder / "<b>tiny<b>")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny):
    """A folder with a page of each model, as a folder and as a file."""
    folder = tmp_path_factory.mktemp("pages")
    for name, model in {**MODELS, "tiny": tiny}.items():
        write_page(model, folder / name)
        write_page(model, folder / f"{name}.html", single_file=True)
    return folder


@pytest.fixture(scope="module")
def address(pages):
    with served(pages) as found:
        yield found


@pytest.fixture
def open_page(browser):
    """Opens a page in a context of its own. After the test, no script of it may have failed."""
    contexts, errors = [], []

    def open_at(url: str, **options):
        options = {"viewport": DESKTOP, "reduced_motion": "reduce"} | options
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(20_000)
        page = contexts[-1].new_page()
        page.on("filechooser", lambda _: None)  # otherwise `expect_file_chooser` may begin to listen too late
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    if browser.browser_type.name == "firefox":  # it reports what the page's policy blocks, as it must
        errors = [error for error in errors if "blocked the loading" not in error]
    assert errors == []


def example(name: str) -> Path:
    return MODELS[name] / "example.png"


def assert_right(page, name: str, picture) -> None:
    shown, expected = answers(page), Classifier.from_pretrained(MODELS[name])(picture)
    assert [each["label"] for each in shown] == [each["label"] for each in expected]
    assert [each["score"] for each in shown] == pytest.approx([each["score"] for each in expected], abs=1e-3)
    assert page.locator("#best").inner_text() == expected[0]["label"]
    assert page.locator("#labels data").first.inner_text() == f"{100 * expected[0]['score']:.1f} %"
    assert re.fullmatch(r"(Less than 0\.1|\d+(\.\d)?) ms for this picture", page.locator("#time").inner_text())
    assert page.locator("#alert").is_hidden()


# ---- Ways in ----


def choose(page, file):
    with page.expect_file_chooser() as chooser:
        page.click("#choose")
    chooser.value.set_files(file)


def paste_with_the_button(page, file):
    if is_firefox(page):
        pytest.skip("the clipboard of headless Firefox has no pictures")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """(encoded) => {
          const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
          const picture = new Blob([bytes], { type: "image/png" });
          return navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
        }""",
        base64.b64encode(file.read_bytes()).decode(),
    )
    page.click("#paste")


WAYS = {
    "choose": choose,
    "drop": lambda page, file: give(page, "drop", file.read_bytes()),
    "paste": lambda page, file: give(page, "paste", file.read_bytes()),
    "paste with the button": paste_with_the_button,
    "example": lambda page, file: page.click("#examples button"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_picture_gets_the_answer_of_classifier(way, name, open_page, address):
    page = open_page(f"{address}/{name}/")
    WAYS[way](page, example(name))
    assert_right(page, name, example(name))
    assert page.locator("#preview").is_visible()
    assert page.locator("#seen canvas").is_visible()


@pytest.mark.parametrize("name", MODELS)
def test_a_single_file_classifies_from_the_disk(name, open_page, pages):
    page = open_page((pages / f"{name}.html").as_uri())
    page.click("#examples button")
    assert_right(page, name, example(name))


def test_a_single_file_holds_models_in_several_files(open_page, pages, tiny):
    assert len(list(tiny.glob("*.safetensors"))) > 1
    page = open_page((pages / "tiny.html").as_uri())
    give(page, "drop", example("digits").read_bytes())
    shown, expected = answers(page), Classifier.from_pretrained(tiny)(example("digits"))
    assert [each["label"] for each in shown] == [each["label"] for each in expected]


def test_the_camera_takes_a_picture_and_is_released(open_page, address):
    page = open_page(f"{address}/fashion-mnist/")
    page.click("#camera")
    page.click("#shoot")
    assert len(answers(page)) == 5
    assert page.locator("#preview").is_visible()
    assert page.evaluate("document.querySelector('#video').srcObject") is None
    page.click("#camera")
    page.wait_for_selector("#video:not([hidden])")
    page.keyboard.press("Escape")
    assert page.locator("#video").is_hidden()
    assert page.evaluate("document.activeElement.id") == "camera"


def test_a_cancelled_camera_leaves_the_picture_of_the_answer(open_page, address):
    page = open_page(f"{address}/digits/")
    page.click("#examples button")
    before = answers(page)
    page.click("#camera")
    page.click("#close-camera")
    assert page.locator("#preview").is_visible()
    assert answers(page) == before


def test_the_camera_is_released_if_it_comes_twice_or_too_late(open_page, address):
    page = open_page(f"{address}/digits/")
    page.evaluate("""() => {
      const devices = navigator.mediaDevices;
      const original = devices.getUserMedia.bind(devices);
      window.streams = [];
      devices.getUserMedia = async (wanted) => {
        window.streams.push(await original(wanted));
        return window.streams.at(-1);
      };
      document.querySelector("#camera").click();
      document.querySelector("#camera").click();
    }""")
    page.wait_for_selector("#video:not([hidden])")
    page.click("#close-camera")
    page.evaluate("document.querySelector('#camera').click()")
    give(page, "drop", example("digits").read_bytes())
    assert_right(page, "digits", example("digits"))
    released = "streams.length === 3 && streams.every((stream) => stream.getTracks()[0].readyState === 'ended')"
    for _ in range(100):
        if page.evaluate(released):
            break
        page.wait_for_timeout(50)
    assert page.evaluate(released)
    assert page.locator("#preview").is_visible()


def test_a_stroke_ends_when_the_board_is_cleared(open_page, address):
    page = open_page(f"{address}/digits/")
    page.wait_for_selector("#facts dd")
    box = page.locator("#board").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.keyboard.press("Delete")
    page.mouse.move(box["x"] + 70, box["y"] + 90)
    page.mouse.up()
    assert page.evaluate("strokes.length") == 0
    assert page.locator("#best.waiting").is_visible()


def test_nine_of_ten_drawn_digits_are_recognised(open_page, address):
    page = open_page(f"{address}/digits/")
    found = {}
    for digit, strokes in DIGITS.items():
        page.click("#clear")
        draw(page, strokes)
        page.wait_for_selector("#status:not(:empty)", state="attached")
        found[digit] = answers(page)[0]["label"]
        page.evaluate("document.querySelector('#status').textContent = ''")
    assert sum(digit == label for digit, label in found.items()) >= 9, found


def test_a_cleared_drawing_gets_no_answer(open_page, address):
    page = open_page(f"{address}/digits/")
    page.wait_for_selector("#facts dd")
    draw(page, DIGITS["0"][:1])
    answers(page)
    # The click comes while the worker computes the answer to the last stroke.
    page.evaluate("() => { changeDrawing(true); document.querySelector('#clear').click(); }")
    page.evaluate("() => call('classify', new ImageData(8, 8)).then(() => 0)")  # after the answer to the stroke
    assert page.locator("#best.waiting").is_visible()
    draw(page, DIGITS["0"])
    assert answers(page)[0]["label"] == "0"


def test_the_canvas_comes_first_where_labels_are_characters(open_page, address):
    assert open_page(f"{address}/digits/").locator("#board").is_visible()
    page = open_page(f"{address}/fashion-mnist/")
    assert page.locator("#board").is_hidden()
    page.click("#draw")
    draw(page, DIGITS["0"])
    assert len(answers(page)) == 5


@pytest.mark.parametrize("name", MODELS)
def test_attention_has_a_picture_for_each_head_of_each_layer(name, open_page, address):
    config = json.loads((MODELS[name] / "config.json").read_text())
    heads = [number for depth, number in zip(config["depths"], config["num_attention_heads"]) for _ in range(depth)]
    page = open_page(f"{address}/{name}/")
    assert page.locator("#attention").is_hidden()
    page.click("#examples button")
    page.click("summary")
    for layer, number in enumerate(heads):
        page.evaluate("document.querySelector('#heads').replaceChildren()")
        page.select_option("#layer", index=layer) if layer else page.dispatch_event("#layer", "change")
        page.wait_for_selector("#heads canvas")
        assert page.locator("#heads canvas").count() == number


def test_attention_colours_what_is_looked_at(open_page, address):
    page = open_page(f"{address}/digits/")
    page.click("#examples button")
    page.click("summary")
    page.wait_for_selector("#heads canvas")
    picture = np.asarray(Image.open(example("digits")).convert("RGB"))
    classifier = Classifier.from_pretrained(MODELS["digits"])
    values = classifier.network.attention(classifier.preprocessor(Image.fromarray(picture))[None], 0)
    parts = (np.asarray(values).reshape(64, 16) > 0).mean(0)
    shown = page.eval_on_selector(
        "#heads canvas",
        """(canvas) => [...Array(16).keys()].map((key) => {
          const [x, y] = [key % 4, Math.floor(key / 4)].map((cell) => 60 * cell + 30);
          const [red, , blue] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
          return blue - red; // the picture is grey
        })""",
    )
    assert shown == pytest.approx((255 - 124) * 0.7 * parts, abs=2)


# ---- Nothing is sent ----


@pytest.mark.parametrize("name", MODELS)
def test_the_page_asks_only_its_own_server_and_only_to_load(name, open_page, address):
    page = open_page("about:blank")
    requests = []
    page.context.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}/{name}/")
    page.wait_for_selector("#facts dd")
    assert any(url.endswith("/model/model.safetensors") for url in requests)
    assert all(url.startswith((f"{address}/{name}/", "blob:", "data:")) for url in requests)
    loaded = len(requests)
    give(page, "drop", example(name).read_bytes())
    answers(page)
    assert all(url.startswith("blob:") for url in requests[loaded:])


def test_a_loaded_page_works_without_a_connection(open_page, address):
    page = open_page(f"{address}/fashion-mnist/")
    page.wait_for_selector("#facts dd")
    page.wait_for_selector("#examples button")
    page.context.set_offline(True)
    give(page, "drop", example("digits").read_bytes())
    assert_right(page, "fashion-mnist", example("digits"))
    page.click("#examples button")
    page.wait_for_selector("#status:has-text('Ankle boot')", state="attached")
    assert_right(page, "fashion-mnist", example("fashion-mnist"))


@pytest.mark.parametrize("way", ["folder", "file"])
def test_page_and_worker_cannot_reach_another_server(way, open_page, address):
    reached = []

    class Spy(BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Spy) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            page = open_page(f"{address}/digits/" if way == "folder" else f"{address}/digits.html")
            page.wait_for_selector("#facts dd")
            request = f"fetch('http://127.0.0.1:{server.server_port}', {{ mode: 'no-cors' }})"
            blocked = f"() => {request}.then(() => 'sent', () => 'blocked')"
            assert page.evaluate(blocked) == "blocked"
            load = f"call('load', {{ files: {{ 'config.json': 'http://127.0.0.1:{server.server_port}' }} }})"
            assert "cannot be read" in page.evaluate(f"() => {load}.catch((error) => error.message)")
            assert reached == []
            page.goto(f"{address}/digits/page.js")  # without the page's policy the request arrives
            assert page.evaluate(blocked) == "sent"
        finally:
            server.shutdown()


class ForgetfulHandler(SimpleHTTPRequestHandler):
    """As `python -m http.server`: it says when a file was changed, and nothing of caches."""

    def log_message(self, *_):
        pass


def test_a_page_that_replaces_another_has_its_own_model(open_page, tmp_path):
    folder = tmp_path / "page"

    def write(name: str, age: float) -> None:
        write_page(MODELS[name], folder)
        for file in folder.rglob("*"):  # browsers take a file for fresh for a tenth of its age
            os.utime(file, 2 * (time.time() - age,))

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(ForgetfulHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            write("digits", 1e6)
            page = open_page(f"http://127.0.0.1:{server.server_port}/")
            page.click("#examples button")
            assert_right(page, "digits", example("digits"))
            write("fashion-mnist", 9e5)
            page.reload()
            page.click("#examples button")
            assert_right(page, "fashion-mnist", example("fashion-mnist"))
        finally:
            server.shutdown()


def test_the_first_of_several_dropped_pictures_is_classified(open_page, address):
    page = open_page(f"{address}/digits/")
    drop = """([text, pictures]) => {
      const data = new DataTransfer();
      data.items.add(new File([text], "notes.txt", { type: "text/plain" }));
      for (const each of pictures) {
        const bytes = Uint8Array.from(atob(each), (character) => character.charCodeAt(0));
        data.items.add(new File([bytes], "picture.png", { type: "image/png" }));
      }
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    picture = base64.b64encode(example("digits").read_bytes()).decode()
    page.evaluate(drop, ["text", [picture]])
    assert_right(page, "digits", example("digits"))
    page.evaluate(drop, ["text", [picture, picture]])
    page.wait_for_selector("#alert:not([hidden])")
    assert page.locator("#alert").inner_text() == "Only the first of 2 pictures is classified."
    assert page.locator("#best:not(.waiting)").is_visible()


def test_a_new_picture_takes_the_answer_of_the_last_one_at_once(open_page, address):
    page = open_page(f"{address}/digits/")
    page.click("#examples button")
    assert_right(page, "digits", example("digits"))
    page.evaluate(
        "() => { document.querySelector('#examples button').click(); window.shown = document.querySelector('#best').textContent; }"
    )
    assert page.evaluate("shown") == "Computing …"
    assert_right(page, "digits", example("digits"))


# ---- Errors ----


def test_a_damaged_picture_is_one_sentence_and_the_next_picture_works(open_page, address):
    page = open_page(f"{address}/digits/")
    damaged = example("digits").read_bytes()[:60]
    for kind, content, media_type in (("drop", damaged, "image/png"), ("paste", b"text", "text/plain")):
        give(page, kind, content, media_type)
        page.wait_for_selector("#alert:not([hidden])")
        assert re.fullmatch(r"The picture cannot be read[^\n]*\.", page.locator("#alert").inner_text())
        assert page.locator("#best.waiting").is_visible()
        give(page, kind, example("digits").read_bytes())
        assert_right(page, "digits", example("digits"))
    give(page, "paste", b"", "")
    assert page.locator("#alert").inner_text() == "The clipboard has no picture: copy one first."


def test_a_damaged_picture_takes_the_drawing_with_its_answer(open_page, address):
    page = open_page(f"{address}/digits/")
    draw(page, DIGITS["0"])
    answers(page)
    page.wait_for_selector("#status:not(:empty)", state="attached")
    give(page, "drop", b"text")
    page.wait_for_selector("#alert:not([hidden])")
    page.wait_for_selector("#board-hint:not([hidden])")
    assert page.locator("#seen").is_hidden()
    assert page.locator("#best.waiting").is_visible()
    assert page.locator("#status").text_content() == ""


def change_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "changed weights": (
        lambda folder: change_last_byte(folder / "model" / "model.safetensors"),
        r"The weights of 'binaryvit-digits' cannot be loaded: .*checksum.*\.",
    ),
    "no weights": (
        lambda folder: (folder / "model" / "model.safetensors").unlink(),
        r"The file '.*/model/model\.safetensors' cannot be read \(the server answers 404\): load the page again\.",
    ),
    "an engine of another browser": (
        lambda folder: (folder / "binaryvit.wasm").write_bytes(b"\0asm\2\0\0\0"),
        r"The engine cannot be compiled .*this browser has no WebAssembly SIMD\.",
    ),
    "no module": (
        lambda folder: (folder / "model.js").unlink(),
        r"The engine does not start in this browser.*: use a newer one, or load the page again\.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_page_that_cannot_load_says_why_in_one_sentence(damage, open_page, tmp_path):
    write_page(MODELS["digits"], tmp_path / "page")
    change, sentence = DAMAGES[damage]
    change(tmp_path / "page")
    with served(tmp_path / "page") as address:
        page = open_page(address)
        page.wait_for_selector("#alert:not([hidden])")
        assert re.fullmatch(sentence, page.locator("#alert").inner_text())
        give(page, "drop", example("digits").read_bytes())
        page.wait_for_timeout(50)
        assert re.fullmatch(sentence, page.locator("#alert").inner_text())


def test_a_folder_on_the_disk_says_what_to_do(open_page, pages):
    page = open_page((pages / "digits" / "index.html").as_uri())
    page.wait_for_selector("#alert:not([hidden])")
    assert "serve this folder" in page.locator("#alert").inner_text()


def test_a_browser_without_webassembly_is_told(open_page, address):
    page = open_page("about:blank")
    page.add_init_script("delete self.WebAssembly")
    page.goto(f"{address}/digits/")
    page.wait_for_selector("#alert:not([hidden])")
    assert "WebAssembly" in page.locator("#alert").inner_text()


@pytest.mark.parametrize("page_name", ["tiny/", "tiny.html"])
def test_labels_and_names_are_shown_as_text(page_name, open_page, address):
    page = open_page(f"{address}/{page_name}")
    give(page, "drop", example("digits").read_bytes())
    assert {each["label"] for each in answers(page)} == set(HOSTILE)
    assert page.locator("#best").inner_text() in HOSTILE
    assert page.locator("h1").inner_text() == page.title() == "<b>tiny<b>"
    assert page.locator("#labels img, #labels script").count() == 0


def test_scores_of_a_regression_are_numbers(open_page, tmp_path, tiny):
    write_page(save_packed(tmp_path, tiny_config(problem_type="regression")), tmp_path / "page")
    with served(tmp_path / "page") as address:
        page = open_page(address)
        give(page, "drop", example("digits").read_bytes())
        assert len(answers(page)) > 0
        assert "%" not in page.locator("#labels").inner_text()


# ---- Everybody ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("theme, size", [("light", PHONE), ("dark", DESKTOP)])
def test_axe_finds_nothing_serious(theme, size, name, open_page, address):
    page = open_page(f"{address}/{name}/", color_scheme=theme, viewport=size)
    page.wait_for_selector("#facts dd")
    assert_accessible(page)
    give(page, "drop", example(name).read_bytes())
    answers(page)
    page.click("summary")
    page.wait_for_selector("#heads canvas")
    assert_accessible(page)
    page.click("#draw")
    page.focus("#board")
    give(page, "paste", b"", "")
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def assert_accessible(page) -> None:
    found = Axe().run(page).response["violations"]
    assert [
        (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
    ] == []


def test_the_keyboard_reaches_everything_and_draws(open_page, address):
    page = open_page(f"{address}/digits/")
    page.wait_for_selector("#facts dd")
    page.wait_for_selector("#examples button")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    assert reached == ["board", "clear", "choose", "camera", "paste", "Example 1"]
    page.focus("#board")
    for key in ["ArrowUp"] * 9 + ["Space"] + ["ArrowDown"] * 18 + ["Space"]:
        page.keyboard.press(key)
    page.wait_for_selector("#status:has-text('1, ')", state="attached")  # after the answers to the unfinished stroke
    assert answers(page)[0]["label"] == "1"
    assert "1, " in page.locator("#status").inner_text()
    page.keyboard.press("Delete")
    assert page.locator("#best.waiting").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear"
    page.focus("#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(example("digits"))
    assert_right(page, "digits", example("digits"))


def test_screen_readers_hear_the_answer_once(open_page, address):
    page = open_page(f"{address}/digits/")
    page.evaluate(
        """() => {
          window.heard = [];
          const status = document.querySelector("#status");
          new MutationObserver(() => heard.push(status.textContent)).observe(status, { childList: true });
        }"""
    )
    draw(page, DIGITS["3"])
    page.wait_for_selector("#status:not(:empty)", state="attached")
    (heard,) = page.evaluate("heard")
    assert heard.startswith("3, ")


@pytest.mark.parametrize("motion, seconds", [("reduce", "0s"), ("no-preference", "0.2s")])
def test_bars_move_only_for_those_who_like_it(motion, seconds, open_page, address):
    page = open_page(f"{address}/digits/", reduced_motion=motion)
    page.wait_for_selector("#facts dd")
    if is_firefox(page) and not page.evaluate(f"matchMedia('(prefers-reduced-motion: {motion})').matches"):
        pytest.skip("this Firefox is not told the setting")
    assert page.eval_on_selector(".bar i", "bar => getComputedStyle(bar).transitionDuration") == seconds
