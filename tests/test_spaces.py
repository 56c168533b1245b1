"""`binaryvit push --space` with the real client and the Hub of `hub_server`."""

import subprocess
from pathlib import Path

import pytest
from hub_server import ALICE, BOB, read_settings
from packed_model import save_packed

from binaryvit_runtime.browser.page import write_page
from binaryvit_runtime.resources import shipped_models


WITHOUT_PYTORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "transformers", "binaryvit_hf"])
from binaryvit_cli import main
sys.exit(main(sys.argv[1:]))
"""
DIGITS = "binaryvit-digits"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return save_packed(tmp_path_factory.mktemp("model"))


def push(client, tmp_path, *arguments, token: str | None = ALICE) -> subprocess.CompletedProcess:
    """Run `binaryvit push *arguments --space` on a machine with this token, without PyTorch."""
    variables = client.variables | ({"HF_TOKEN": token} if token else {})
    command = ("-c", WITHOUT_PYTORCH, "push", *arguments, "--space")
    return client.run(*command, folder=tmp_path / "home", variables=variables)


def assert_refused(result: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def page_of(model, folder: Path) -> dict[str, bytes]:
    """The files that `write_page` writes for a model."""
    write_page(model, folder)
    return contents(folder)


def settings_of(server, repo_id: str) -> dict:
    return read_settings(server.files(repo_id, repo_type="space")["README.md"].decode())


def test_a_space_has_the_page_and_the_settings_of_a_static_space(server, client, packed, tmp_path):
    result = push(client, tmp_path, packed, "pyramid")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{server.url}/spaces/alice/pyramid\n"
    download = (
        "from huggingface_hub import snapshot_download; print(snapshot_download('alice/pyramid', repo_type='space'))"
    )
    downloaded = client.run("-c", download, folder=tmp_path / "home")
    assert downloaded.returncode == 0, downloaded.stderr
    files = contents(Path(downloaded.stdout.strip()))
    page = page_of(packed, tmp_path / "page")
    assert {name: files.get(name) for name in page} == page
    assert set(files) - set(page) == {"README.md", ".gitattributes", "style.css"}  # the last two are the Hub's
    assert settings_of(server, "alice/pyramid") == {
        "title": "pyramid",
        "emoji": "🔍",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "static",
        "app_file": "index.html",
        "pinned": False,
        "tags": ["binaryvit-page"],
        "short_description": "1-bit vision transformer in your browser",
    }
    assert ALICE.encode() not in b"".join(files.values())


def test_a_later_push_replaces_the_page_and_keeps_other_files(server, client, packed, tmp_path):
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0
    assert server.commits("alice/pyramid", repo_type="space")[0].title == "Upload page"
    server.publish("alice/pyramid", {"notes.txt": b"mine"}, repo_type="space")
    assert "example.png" not in server.files("alice/pyramid", repo_type="space")
    result = push(client, tmp_path, DIGITS, "alice/pyramid", "--message", "Digits instead")
    assert result.returncode == 0, result.stderr
    files, page = server.files("alice/pyramid", repo_type="space"), page_of(DIGITS, tmp_path / "page")
    assert {name: files.get(name) for name in page} == page
    assert files["notes.txt"] == b"mine"
    assert server.commits("alice/pyramid", repo_type="space")[0].title == "Digits instead"
    assert "example.png" in files
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0
    files = server.files("alice/pyramid", repo_type="space")
    assert "example.png" not in files, "a picture of the model before"
    assert files["notes.txt"] == b"mine"


def test_a_space_of_a_shipped_model_has_its_licence(server, client, tmp_path):
    result = push(client, tmp_path, DIGITS, "alice/digits")
    assert result.returncode == 0, result.stderr
    assert read_settings((shipped_models()[DIGITS] / "README.md").read_text())["license"] == "apache-2.0"
    settings = settings_of(server, "alice/digits")
    assert settings["license"] == "apache-2.0"
    assert "models" not in settings


def test_a_space_names_the_public_model_of_its_name_or_source(server, client, packed, tmp_path):
    server.publish("alice/pyramid", contents(packed) | {"README.md": b"---\nlicense: mit\n---\nA model."})
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0
    assert settings_of(server, "alice/pyramid")["models"] == ["alice/pyramid"]
    result = push(client, tmp_path, "alice/pyramid", "bob/copy", token=BOB)
    assert result.returncode == 0, result.stderr
    settings = settings_of(server, "bob/copy")
    assert (settings["models"], settings["license"]) == (["alice/pyramid"], "mit")
    server.repository("alice/pyramid").private = True
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0
    assert "models" not in settings_of(server, "alice/pyramid")


def test_a_private_space_opens_only_to_its_owner(server, client, packed, tmp_path):
    result = push(client, tmp_path, packed, "alice/secret", "--private")
    assert result.returncode == 0, result.stderr
    assert server.repository("alice/secret", repo_type="space").private
    for token, opens in ((ALICE, True), (BOB, False), (None, False)):
        ask = f"from huggingface_hub import HfApi; print(HfApi(token={token!r}).repo_exists('alice/secret', repo_type='space'))"
        assert client.run("-c", ask, folder=tmp_path / "home").stdout == f"{opens}\n"


def test_a_public_space_is_not_taken_for_a_private_one(server, client, packed, tmp_path):
    assert push(client, tmp_path, DIGITS, "alice/pyramid").returncode == 0
    before = server.files("alice/pyramid", repo_type="space")
    assert_refused(
        push(client, tmp_path, packed, "alice/pyramid", "--private"), "'alice/pyramid' exists and is public"
    )
    assert server.files("alice/pyramid", repo_type="space") == before


def test_a_page_goes_to_a_branch(server, client, packed, tmp_path):
    result = push(client, tmp_path, packed, "alice/pyramid", "--revision", "next")
    assert result.returncode == 0, result.stderr
    assert b"Welcome" in server.files("alice/pyramid", repo_type="space")["index.html"]
    page = page_of(packed, tmp_path / "page")
    assert server.files("alice/pyramid", "next", repo_type="space")["index.html"] == page["index.html"]


@pytest.mark.parametrize(
    "endpoint, how", [("preupload", 501), ("lfs_batch", 501), ("lfs_upload", 501), ("commit", 501), ("commit", "drop")]
)
def test_an_interrupted_upload_leaves_the_space_as_it_was_and_the_same_command_completes_it(
    server, client, packed, tmp_path, endpoint, how
):
    server.fail_next(1, on=endpoint, how=how)
    failed = push(client, tmp_path, packed, "alice/pyramid", "--revision", "main")
    assert_refused(
        failed, "'alice/pyramid' failed", f"binaryvit push {packed} alice/pyramid --revision main --space", code=1
    )
    assert b"Welcome" in server.files("alice/pyramid", repo_type="space")["index.html"]
    result = push(client, tmp_path, packed, "alice/pyramid", "--revision", "main")
    assert result.returncode == 0, result.stderr
    page = page_of(packed, tmp_path / "page")
    assert page.items() <= server.files("alice/pyramid", repo_type="space").items()
    uploads = [path for method, path in server.requests if method == "PUT"]
    assert len(uploads) == len(set(uploads)) + (endpoint == "lfs_upload"), "nothing is uploaded twice"


@pytest.mark.parametrize("endpoint", ["create_repo", "auth_check", "info", "commits"])
def test_a_space_that_cannot_be_made_or_read_is_refused_in_one_sentence(server, client, packed, tmp_path, endpoint):
    server.fail_next(1, on=endpoint, how=501)
    assert_refused(push(client, tmp_path, packed, "alice/pyramid"), "Space 'alice/pyramid'", "501", "try again later")
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0


def test_a_hub_that_is_down_is_named(server, client, packed, tmp_path):
    with server.down():
        assert_refused(push(client, tmp_path, packed, "alice/pyramid"), "'alice/pyramid'", "no answer from the Hub")


@pytest.mark.parametrize("sdk, word", [("gradio", "'gradio'"), ("static", "did not upload")])
def test_a_space_with_something_else_is_refused_and_stays(server, client, packed, tmp_path, sdk, word):
    readme = f"---\ntitle: other\nemoji: 🏃\ncolorFrom: red\ncolorTo: gray\nsdk: {sdk}\n---\n".encode()
    server.publish("alice/other", {"README.md": readme, "index.html": b"other"}, repo_type="space", sdk=sdk)
    before = server.files("alice/other", repo_type="space")
    assert_refused(push(client, tmp_path, packed, "alice/other"), "'alice/other'", word, "choose another name")
    assert server.files("alice/other", repo_type="space") == before


def test_a_new_space_of_another_kind_is_refused(server, client, packed, tmp_path):
    server.publish("alice/other", {}, repo_type="space", sdk="gradio")
    assert_refused(push(client, tmp_path, packed, "alice/other"), "'gradio'")


def test_only_the_owner_pushes_to_a_space(server, client, packed, tmp_path):
    assert push(client, tmp_path, packed, "alice/pyramid").returncode == 0
    for token in (BOB, "token-of-nobody", None):
        refused = push(client, tmp_path, packed, "alice/pyramid", token=token)
        assert_refused(refused, "The Space 'alice/pyramid' cannot be created or written to", "hf auth login")


def test_what_is_no_packed_model_is_refused_before_a_space_is_made(server, client, packed, tmp_path):
    latent = packed.parent / "latent"
    assert_refused(push(client, tmp_path, latent, "alice/pyramid"), str(latent), "`binaryvit pack`")
    assert_refused(push(client, tmp_path, tmp_path / "none", "alice/pyramid"), "no such folder")
    assert_refused(push(client, tmp_path, "binaryvit-digit", "alice/pyramid"), "did you mean 'binaryvit-digits'?")
    assert_refused(push(client, tmp_path, packed, "al ice/pyr amid"), "'al ice/pyr amid'")
    assert server.repositories == {}


def test_uploads_without_the_hubs_client_say_what_to_install(warm_python, packed, tmp_path):
    code = WITHOUT_PYTORCH.replace('"torch"', '"torch", "huggingface_hub", "huggingface_hub.utils"')
    for extra in (["--space"], []):
        result = warm_python.run("-c", code, "push", packed, "alice/pyramid", *extra, folder=tmp_path / "home")
        assert_refused(result, "pip install 'huggingface_hub>=1.31'" if extra else "needs PyTorch")
