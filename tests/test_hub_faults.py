"""Faults of the Hub as its real client meets them, and the error messages of the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, client_environment
from PIL import Image
from tiny import tiny_config, tiny_model

from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_runtime.errors import LINE_LENGTH


ALICE, BOB = "token-of-alice", "token-of-bob"
# One process runs the Hub and all commands, so that the libraries are imported once. It skips the client's waits between
# two tries.
SCRIPT = """
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
from hub_server import HubServer

server = HubServer(users={"token-of-alice": "alice", "token-of-bob": "bob"}).__enter__()
os.environ["HF_ENDPOINT"] = server.url
time.sleep = lambda seconds: None

from binaryvit_cli import main
from binaryvit_hf.training import run as training_run


def answer(name, *arguments, run=main):
    printed, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(error):
        code = run([str(argument) for argument in arguments])
    lines = [line for line in error.getvalue().splitlines() if line]
    print(json.dumps({name: {"code": code, "errors": lines, "printed": printed.getvalue()}}), flush=True)


files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
for name in ("model", "damaged"):
    server.publish(f"bob/{name}", files)
server.publish("bob/secret", files, private=True)
server.publish("bob/broken", files | {"model.safetensors": files["model.safetensors"][:-10]})
server.publish("bob/empty", {"README.md": b"nothing"})

answer("missing", "ops", "bob/none", "--token", "token-of-alice")
answer("private", "ops", "bob/secret", "--token", "token-of-alice")
answer("bad token", "ops", "bob/model", "--token", "token-of-nobody")
answer("empty", "ops", "bob/empty")
for fault in (403, 429, 500, 501, "drop"):
    for endpoint in ("info", "head", "download"):
        server.fail_next(20, on=endpoint, how=fault)
    answer(str(fault), "ops", "bob/model")
    server.faults.clear()
with server.down():
    answer("down", "ops", "bob/model")
    answer("upload down", "push", folder, "alice/model", "--token", "token-of-alice")
server.fail_next(20, on="head", how=403)
answer("teacher", "--teacher_model_name_or_path", "bob/model", "--config_name", folder, "--dataset_name", "sklearn-digits",
    "--output_dir", folder.parent / "run", "--do_train", "--use_cpu", run=training_run.main)
server.faults.clear()

answer("no subfolder", "--model_name_or_path", "bob/model", "--subfolder", "nowhere", "--dataset_name", "sklearn-digits",
    "--output_dir", folder.parent / "run", "--do_eval", "--use_cpu", run=training_run.main)

server.fail_next(1, on="commit", how=501)
answer("upload", "push", folder, "alice/model", "--revision", "dev", "--token", "token-of-alice")
answer("not mine", "push", folder, "bob/model", "--token", "token-of-alice")
answer("nobody", "push", folder, "alice/model", "--token", "token-of-nobody")

picture = folder.parent / "a.png"
answer("fetched", "classify", "bob/damaged", picture)
cache = Path(os.environ["HF_HUB_CACHE"]) / "models--bob--damaged"
for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
    (cached,) = cache.glob(f"snapshots/*/{name}")
    for damage in (b"", cached.read_bytes()[:-7]):
        cached.resolve().write_bytes(damage)
        before = len(server.requests)
        answer(f"again {name} {len(damage) > 0}", "classify", "bob/damaged", picture)
        assert cached.read_bytes() == files[name]
answer("broken", "classify", "bob/broken", picture)
cached = next(cache.glob("snapshots/*/model.safetensors"))
cached.resolve().write_bytes(b"")
with server.down():
    answer("damaged and down", "classify", "bob/damaged", picture)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """Exit code, lines of stderr, and stdout of every command, by the name of its fault."""
    root = tmp_path_factory.mktemp("faults")
    model = tiny_model(tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))
    model.save_pretrained(root / "model")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(root / "model")
    Image.new("RGB", (32, 16), (9, 200, 30)).save(root / "a.png")
    with HubServer(users={}) as server:  # only for the variables of its environment
        environment = client_environment(server, root / "home")
    tests = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(tests / "support"), str(root / "model")]
    result = subprocess.run(
        command, env=environment, cwd=tests.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    answers = {}
    for line in result.stdout.splitlines():
        answers |= json.loads(line)
    return answers


@pytest.mark.parametrize(
    "fault, code, words",
    [
        ("missing", 2, ("'bob/none'", "no such repository", "hf auth login")),
        ("private", 2, ("'bob/secret'", "no such repository, or it is private", "hf auth login")),
        ("bad token", 2, ("401", "token", "hf auth login")),
        ("empty", 2, ("'bob/empty'", "config.json")),
        ("no subfolder", 2, ("'bob/model'", "no config.json in 'nowhere'")),
        ("403", 2, ("403", "forbids")),
        ("429", 2, ("429", "try again later")),
        ("500", 2, ("500", "try again later")),
        ("501", 2, ("501", "try again later")),
        ("drop", 2, ("no answer from the Hub at http://127.0.0.1", "connection")),
        ("down", 2, ("no answer from the Hub at http://127.0.0.1", "connection")),
        ("teacher", 2, ("--teacher_model_name_or_path 'bob/model'", "403", "forbids")),
        ("upload down", 2, ("'alice/model'", "no answer from the Hub")),
        ("not mine", 2, ("'bob/model'", "403")),
        ("nobody", 2, ("'alice/model'", "401")),
        ("upload", 1, ("501", "alice/model --revision dev`")),
        ("broken", 2, ("'bob/broken'", "damaged", "models--bob--broken")),
        ("damaged and down", 2, ("'bob/damaged'", "models--bob--damaged/blobs/", "damaged", "downloaded again")),
    ],
)
def test_a_fault_of_the_hub_is_named_with_a_remedy(answers, fault, code, words):
    assert answers[fault]["code"] == code, answers[fault]
    (line,) = [line for line in answers[fault]["errors"] if line.startswith("error: ")]
    assert len(line) <= LINE_LENGTH
    for word in words:
        assert word in line
    assert "token-of" not in line


def test_a_damaged_file_in_the_cache_is_downloaded_again(answers):
    first = answers["fetched"]
    assert first["code"] == 0
    for fault in [name for name in answers if name.startswith("again ")]:
        assert (answers[fault]["code"], answers[fault]["printed"]) == (0, first["printed"]), answers[fault]
