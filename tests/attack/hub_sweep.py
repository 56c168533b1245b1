"""
Faults of the Hub by seeds, in a process that is both the Hub and its client: `hub_sweep.py SHELF FOLDER SEED…`.

The client reads its environment once, when it is imported, and the other tests import it offline.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from random import Random


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent / "support", HERE.parents[1])]

from hub_server import ROUTES, HubServer  # noqa: E402


ALICE = "token-of-alice"
FAULTS = [401, 403, 404, 429, 500, 503, "drop", "cut"]
ENDPOINTS = [endpoint for _, _, endpoint in ROUTES]

server = HubServer(users={ALICE: "alice", "token-of-bob": "bob"}).__enter__()
os.environ["HF_ENDPOINT"] = server.url
time.sleep = lambda seconds: None  # the client waits between retries

from harness import Wrong, attempt, judge, run  # noqa: E402
from shelf import assert_whole, classify, read_scores  # noqa: E402

from binaryvit_cli import main  # noqa: E402
from binaryvit_runtime.browser.page import write_page  # noqa: E402


shelf, root, seeds = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
cache = Path(os.environ["HF_HUB_CACHE"])
server.publish("bob/model", {path.name: path.read_bytes() for path in (shelf / "packed").iterdir() if path.is_file()})


def make_fail(rng: Random, endpoints: list[str]) -> None:
    for _ in range(rng.choice([1, 1, 2, 3])):
        server.fail_next(rng.choice([1, 1, 2, 20]), on=rng.choice(endpoints), how=rng.choice(FAULTS))


def check(said) -> str:
    ending = judge(said)
    if "token-of" in said.err:
        raise Wrong(f"the token is told: {said}")
    return ending


def download(rng: Random, folder: Path) -> str:
    """First with faults, then without."""
    make_fail(rng, ["head", "download", "download", "info", "tree", "paths_info", "refs"])
    said = classify("bob/model", shelf / "a.png")
    server.faults.clear()
    ending = check(said)
    for answer in (said, classify("bob/model", shelf / "a.png")):
        if answer.code == 0 and read_scores(answer) != expected:
            raise Wrong(f"scores {read_scores(answer)}, not {expected}")
    if answer.code != 0:
        raise Wrong(f"without faults it fails: {answer}")
    return ending


def damage(rng: Random, folder: Path) -> str:
    """Damage a file of the cache. It is downloaded again, in some cases with faults of the Hub."""
    classify("bob/model", shelf / "a.png")
    file = rng.choice(sorted((cache / "models--bob--model").glob("snapshots/*/*")))
    blob = file.resolve()
    content = bytearray(blob.read_bytes())
    if rng.random() < 0.5 or not content:
        content = content[: rng.randrange(len(content) + 1) // 2]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    blob.write_bytes(content)
    if rng.random() < 0.3:
        make_fail(rng, ["head", "download"])
    said = classify("bob/model", shelf / "a.png")
    server.faults.clear()
    ending = check(said)
    checked = file.name != "preprocessor_config.json"  # other numbers in it are valid as well
    if ending == "answered" and checked and read_scores(said) != expected:
        raise Wrong(f"scores {read_scores(said)}, not {expected}, of the damaged {file.name}")
    return ending


UPLOADING = ["create_repo", "auth_check", "preupload", "commit", "lfs_batch", "lfs_upload", "lfs_verify", "whoami"]


def push_twice(*arguments) -> str:
    """Push with the faults that are set, then without any, which must complete it."""
    said = run(main, "push", *arguments, "--token", ALICE)
    server.faults.clear()
    ending = check(said)
    again = run(main, "push", *arguments, "--token", ALICE)
    if again.code != 0:
        raise Wrong(f"without faults it fails: {again}")
    return ending


def push(rng: Random, folder: Path) -> str:
    make_fail(rng, UPLOADING)
    ending = push_twice(shelf / rng.choice(["latent", "packed"]), "alice/model")
    for name, content in server.files("alice/model").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert_whole(folder, shelf)
    server.repositories.pop(("models", "alice/model"))
    return ending


def push_page(rng: Random, folder: Path) -> str:
    make_fail(rng, [*UPLOADING, "info", "commits", "validate_yaml"])
    ending = push_twice(shelf / "packed", "alice/page", "--space")
    write_page(shelf / "packed", folder / "page")
    files = server.files("alice/page", repo_type="space")
    for file in (folder / "page").rglob("*"):
        if file.is_file() and files.get(file.relative_to(folder / "page").as_posix()) != file.read_bytes():
            raise Wrong(f"{file.name} of the Space is another file")
    server.repositories.pop(("spaces", "alice/page"))
    return ending


def attack(rng: Random, folder: Path) -> str:
    shutil.rmtree(cache, ignore_errors=True)
    server.lfs_objects.clear()
    return rng.choice([download, damage, push, push_page])(rng, folder)


expected = read_scores(classify(shelf / "packed", shelf / "a.png"))
answer = sys.stdout
for seed in seeds:
    print(json.dumps(asdict(attempt(attack, seed, root))), file=answer, flush=True)
