"""The servers of the guide: FastAPI on uvicorn, and gunicorn, whose workers are forked after a forward. Neither has PyTorch."""

import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from snippets import snippet_with

from binaryvit_runtime import Classifier
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


REQUESTS = 200  # at once
BOUNDARY = "a1b2c3"
# gunicorn imports this module before it forks. Two threads, because a fork has only one of them.
AFTER_A_FORWARD = """
import sys
from served import application, classifier

classifier.threads = 2
classifier("photo.png")
assert "torch" not in sys.modules
"""
COMMANDS = {
    "uvicorn": ["uvicorn", "served:app", "--port", "0"],
    "gunicorn": ["gunicorn", "--preload", "--workers", "2", "--bind", "127.0.0.1:0", "after_a_forward:application"],
}
SNIPPETS = {"uvicorn": "FastAPI()", "gunicorn": "def application"}

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gunicorn needs fork"),
    pytest.mark.skipif(not kernels_here(), reason="the engine was not built"),
]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def random_png(seed: int) -> bytes:
    return png(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), np.uint8)))


PICTURES = [random_png(seed) for seed in range(10)]
BROKEN = {
    "no picture": (b"no picture", r"'picture' cannot be read as an image \(.*\)\."),
    "cut off": (PICTURES[0][:-500], r"'picture' cannot be read as an image \(.*\)\."),
    "too large": (png(Image.new("1", (9_000, 6_000))), r"'picture' is too large: .* more than 50000000; .*\."),
    "empty": (b"", r"'picture' cannot be read as an image \(.*\)\."),
    "absent": (None, r"'picture' cannot be read as an image \(.*\)\.|Send a picture in .*\."),
}


class Server:
    """A server in a process of its own, which has the folder `outputs/photos` of the guide."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        shutil.copytree(shipped_models()["binaryvit-digits"], folder / "outputs" / "photos")
        (folder / "served.py").write_text(snippet_with(SNIPPETS[name]))
        (folder / "after_a_forward.py").write_text(AFTER_A_FORWARD)
        (folder / "photo.png").write_bytes(PICTURES[0])
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *COMMANDS[name]],
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        self.port = self.wait_for_port()

    def wait_for_port(self) -> int:
        deadline = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text())) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return int(found[1])

    def upload(self, picture: bytes | None) -> tuple[int, object]:
        """Status and answer for a picture, or for a request without one."""
        body, headers = picture or b"", {}
        if self.name == "uvicorn" and picture is not None:
            field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
            body = field.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()
            headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/", body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture(scope="module", params=list(COMMANDS))
def server(request, tmp_path_factory):
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def expected() -> list:
    classifier = Classifier.from_pretrained("binaryvit-digits", threads=1)
    return [classifier(io.BytesIO(picture)) for picture in PICTURES]


def test_requests_at_once_get_the_scores_of_a_call(server, expected):
    answers: list = [None] * REQUESTS
    together = threading.Barrier(REQUESTS)

    def upload(number: int) -> None:
        together.wait()
        answers[number] = server.upload(PICTURES[number % len(PICTURES)])

    threads = [threading.Thread(target=upload, args=[number]) for number in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [(200, expected[number % len(PICTURES)]) for number in range(REQUESTS)]


@pytest.mark.parametrize("upload, sentence", BROKEN.values(), ids=BROKEN)
def test_a_broken_upload_is_refused_in_a_sentence_and_the_server_goes_on(server, expected, upload, sentence):
    status, answer = server.upload(upload)
    assert status == 400
    assert re.fullmatch(sentence, answer["detail"])
    assert server.upload(PICTURES[1]) == (200, expected[1])


def test_sigterm_ends_a_server(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(ConnectionRefusedError):
        server.upload(PICTURES[0])
