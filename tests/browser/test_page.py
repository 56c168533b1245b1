"""`binaryvit page` and `binaryvit demo`: what they write and serve, and what they refuse."""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import assert_refused, run
from packed_model import save_packed
from tiny import tiny_config

from binaryvit_cli import main
from binaryvit_runtime import UserError
from binaryvit_runtime.browser import page as page_module
from binaryvit_runtime.browser.page import describe_characters, join_modules, worker_modules, write_page
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


pytest.importorskip("playwright")
if not kernels_here():
    pytest.skip("the engine was not built", allow_module_level=True)

from browsers import served


DIGITS = "binaryvit-digits"
MUSL = "Copyright © 2005-2020 Rich Felker"  # whose code is in the engine
PAGE_FILES = ("index.html", "page.css", "page.js", "worker.js")
MOST_PAGE_BYTES = 40_000  # of PAGE_FILES


def names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "digits"
    write_page(DIGITS, out)
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders `latent` and `packed` of a model."""
    return save_packed(tmp_path_factory.mktemp("models") / "tiny", tiny_config()).parent


def test_a_page_holds_the_model_the_engine_and_nothing_unused(page):
    scripts = {module.name for module in worker_modules()}
    assert names_in(page) == {
        *("index.html", "page.css", "page.js", "binaryvit.wasm", "binaryvit.d.ts", "example.png", *scripts),
        "NOTICE.txt",
        *("model/config.json", "model/preprocessor_config.json", "model/model.safetensors"),
    }
    model = shipped_models()[DIGITS]
    assert (page / "model" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_the_page_is_small_beside_model_and_engine(page):
    assert sum((page / name).stat().st_size for name in PAGE_FILES) < MOST_PAGE_BYTES


def test_a_single_file_allows_its_own_script_and_style_only(tmp_path):
    write_page(DIGITS, tmp_path / "digits.html", single_file=True)
    html = (tmp_path / "digits.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-inline" not in policy
    notice = re.findall(r"<!--(.*?)-->", html, re.DOTALL)[-1]
    assert MUSL in notice
    assert html.endswith("-->\n</body>\n</html>\n")
    assert "src=" not in html.replace("-src", "")  # nothing beside the file


def test_a_page_has_the_notices_of_its_engine(page):
    assert MUSL in (page / "NOTICE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("single_file", [False, True])
def test_an_earlier_page_is_replaced(single_file, tiny, tmp_path, capsys):
    flags = ["--single-file"] if single_file else []
    run(capsys, "page", DIGITS, tmp_path / "page", *flags)
    if not single_file:
        (tmp_path / "page" / ".DS_Store").touch()  # somebody looked at it in macOS
    assert str(tmp_path / "page") in run(capsys, "page", tiny / "packed", tmp_path / "page", *flags)
    file = tmp_path / "page" if single_file else tmp_path / "page" / "index.html"
    assert "<h1>packed</h1>" in file.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    if not single_file:
        assert "example.png" not in names_in(tmp_path / "page")


def test_other_files_are_never_replaced(tiny, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("notes")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "index.html").write_text("notes")
    run(capsys, "page", tiny / "packed", tmp_path / "page")
    (tmp_path / "page" / "more.txt").write_text("of the user")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "index.html").write_bytes(page_module.GENERATOR.encode() + b"\xff")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused = ["page", tiny / "packed"]
    assert_refused(capsys, [*refused, tmp_path / "notes.html", "--single-file"], "already exists and is no page")
    assert_refused(capsys, [*refused, tmp_path / "notes.html"], "is the name of a file: add --single-file")
    assert_refused(capsys, [*refused, tmp_path / "notes"], "has other files than a page")
    assert_refused(capsys, [*refused, tmp_path / "damaged"], "has other files than a page")
    assert_refused(capsys, [*refused, tmp_path / "page"], "has other files than a page")
    assert_refused(capsys, [*refused, tmp_path / "page", "--single-file"], "is a folder, not a file")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_is_not_named_like_a_file(tiny, tmp_path, capsys):
    assert_refused(
        capsys, ["page", tiny / "packed", tmp_path / "page.html"], "is the name of a file: add --single-file"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["is_dir", "iterdir"])
def test_a_folder_that_may_not_be_read_is_refused_in_one_sentence(method, tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "page").mkdir()
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(UserError, match=r"cannot be written: Permission denied"):
        write_page(tiny / "packed", tmp_path / "page")


def test_a_failure_leaves_the_earlier_page(tiny, tmp_path, monkeypatch):
    write_page(tiny / "packed", tmp_path / "page")
    before = {name: (tmp_path / "page" / name).read_bytes() for name in names_in(tmp_path / "page")}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module, "fill_page", fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_page(tiny / "packed", tmp_path / "page")
    assert {name: (tmp_path / "page" / name).read_bytes() for name in names_in(tmp_path / "page")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_model_of_the_hub_keeps_its_examples_and_its_kind_of_drawing(server, client, tmp_path):
    model = shipped_models()[DIGITS]
    server.publish(
        "alice/digits",
        {file.name: file.read_bytes() for file in model.iterdir() if file.is_file() and file.suffix != ".md"},
    )
    done = client.run("-m", "binaryvit_cli", "page", "alice/digits", "page", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', html)[1])
    assert data["name"] == "digits"
    assert data["drawing"] == page_module.DRAWINGS["sklearn-digits"]
    assert (tmp_path / "page" / "example.png").read_bytes() == (model / "example.png").read_bytes()
    assert "learning_curves.png" not in names_in(tmp_path / "page")


def test_models_that_are_not_packed_or_do_not_exist_are_refused(tiny, tmp_path, capsys):
    packing = ["cannot run in a browser", "its weights are not packed (`binaryvit pack` packs them)"]
    assert_refused(capsys, ["page", tiny / "latent", tmp_path / "page"], *packing)
    assert_refused(capsys, ["demo", tiny / "latent", "--no-browser"], *packing)
    assert_refused(capsys, ["page", "binaryvit-digit", tmp_path / "page"], "did you mean 'binaryvit-digits'?")
    assert not (tmp_path / "page").exists()


def test_labels_cannot_end_the_data_of_the_page(tmp_path):
    name = "</script><b>"
    data = {"name": name}
    html = page_module.fill_page(name, "", "", "", data, "")
    assert html.count("</script>") == 1
    assert "<b>" not in html
    assert json.loads(re.search(r'id="page-data">(.*?)</script>', html)[1]) == data


@pytest.mark.parametrize(
    "labels, characters",
    [
        (["0", "1", "9"], "digits"),
        (["A", "b", "ß"], "letters"),
        (["1", "a", "?"], "characters"),
        (["10", "1"], None),
        (["cat", "dog"], None),
    ],
)
def test_models_of_characters_begin_with_a_canvas(labels, characters):
    assert describe_characters(labels) == characters


def test_folders_of_photos_are_no_characters(tmp_path):
    folder = save_packed(tmp_path, tiny_config(num_labels=2, id2label={0: "0", 1: "1"}))
    shown = {}
    for name in ("dataset_name", "train_dir"):
        (folder / "run_arguments.json").write_text(json.dumps({name: "photos"}))
        write_page(folder, tmp_path / name)
        data = json.loads(re.search(r'id="page-data">(.*?)</script>', (tmp_path / name / "index.html").read_text())[1])
        shown[name] = data["characters"]
    assert shown == {"dataset_name": "digits", "train_dir": None}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_page_written_to_a_pipe_has_nothing_behind_it(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        assert run(capsys, "page", DIGITS, pipe, "--single-file") == ""
        assert read.result(30).endswith("</html>\n")


def test_joined_modules_have_neither_imports_nor_exports_nor_a_name_twice():
    script = join_modules(worker_modules())
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    assert "import.meta" not in script
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script, re.MULTILINE)
    assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize("line", ['import * as all from "./binaryvit.js";', "export default 1;", "export * from 'x';"])
def test_a_module_of_another_form_cannot_be_joined(line, tmp_path):
    (tmp_path / "other.js").write_text(line)
    with pytest.raises(ValueError, match=r"other\.js cannot be joined"):
        join_modules([tmp_path / "other.js"])


# ---- binaryvit demo ----


def test_the_server_names_types_and_shows_only_its_folder(page):
    types = {
        "": "text/html",
        "page.js": "text/javascript",
        "page.css": "text/css",
        "binaryvit.wasm": "application/wasm",
    }
    with served(page) as address:
        for name, kind in types.items():
            with urllib.request.urlopen(f"{address}/{name}") as response:
                assert response.headers.get_content_type() == kind
                assert response.headers["X-Content-Type-Options"] == "nosniff"
        for name in ("model/", "../digits/index.html/..", "..%2f..%2fetc/passwd", "%2e%2e/%2e%2e/etc/passwd", "none"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}/{name}")


def test_the_server_says_nothing_of_null_bytes_and_closed_connections(page, capfd):
    with served(page) as address:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/%00")
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
                connection.sendall(b"GET /binaryvit.wasm HTTP/1.0\r\n\r\n")
                # The connection closes with a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert capfd.readouterr().err == ""


def test_demo_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "binaryvit_cli", "demo", DIGITS, "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as demo:
        address = re.search(r"http://127\.0\.0\.1:\d+", demo.stdout.readline())[0]
        with urllib.request.urlopen(address) as response:
            assert b"<h1>binaryvit-digits</h1>" in response.read()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 0
        assert (demo.stdout.read(), demo.stderr.read()) == ("", "")


def test_demo_answers_a_browser_that_it_waits_for_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def open_and_interrupt(address):
        with urllib.request.urlopen(address, timeout=30) as response:
            assert b"<h1>binaryvit-digits</h1>" in response.read()
        opened.append((address, list(tmp_path.iterdir())))
        os.kill(os.getpid(), signal.SIGINT)

    opened = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", open_and_interrupt)
    out = run(capsys, "demo", DIGITS, "--port", "0")
    ((address, files),) = opened
    assert address in out
    assert len(files) == 1
    assert list(tmp_path.iterdir()) == []


def test_demo_that_is_interrupted_early_has_the_exit_code_of_ctrl_c(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(page_module, "write_page", interrupt)
    assert main(["demo", DIGITS, "--no-browser", "--port", "0"]) == 130


def test_demo_refuses_a_port_that_is_taken_before_it_reads_the_model(monkeypatch, capsys):
    monkeypatch.setattr(page_module, "write_page", lambda *_, **__: pytest.fail("the model is read"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["demo", DIGITS, "--no-browser", "--port", port]
        assert_refused(capsys, arguments, f"Port {port} cannot be used (address already in use)", "--port")
    assert_refused(capsys, ["demo", DIGITS, "--no-browser", "--port", "65536"], "--port must be from 0 to 65535")
