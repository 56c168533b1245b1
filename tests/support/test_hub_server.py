"""The Hub of the tests answers the real client, which runs in other processes."""

import hashlib
import json
import random
from http.client import HTTPConnection
from pathlib import Path
from textwrap import dedent

import pytest
from hub_server import ALICE, client_environment
from PIL import Image


PREAMBLE = """
import json
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api = HfApi()

def show(**values):
    print(json.dumps(values))

def failure(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return type(error).__name__
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files in git and in LFS. One is empty, one has a name that URLs must quote."""
    folder = tmp_path / "folder"
    (folder / "notes").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": 8}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    (folder / "notes" / "größe 1+1.txt").write_text("klein")
    (folder / "empty.bin").touch()
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(100_000))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_client(client, home, code, *arguments, token=ALICE) -> dict:
    """
    Returns:
        The values that `code` passes to `show`, by their names.
    """
    variables = client.variables | ({"HF_TOKEN": token} if token else {})
    result = client.run("-c", PREAMBLE + dedent(code), *arguments, folder=home, variables=variables)
    assert result.returncode == 0, result.stderr
    shown = {}
    for line in result.stdout.splitlines():
        shown |= json.loads(line)
    return shown


def send(server, method, path, body=b"", **headers) -> tuple[int, bytes]:
    """Send a request that the client would not send. Returns status and content."""
    connection = HTTPConnection(server.url.removeprefix("http://"))
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_what_is_uploaded_comes_back_bit_for_bit(server, client, folder, tmp_path):
    code = """
        show(user=api.whoami()["name"], created=api.create_repo("model").repo_id)
        api.create_repo("alice/model", exist_ok=True)
        show(again=failure(api.create_repo, "alice/model"))
        show(oid=api.upload_folder(repo_id="alice/model", folder_path=sys.argv[1]).oid)
        show(snapshot=snapshot_download("alice/model"))
        info = api.model_info("alice/model")
        show(info=[info.id, info.sha, info.private], siblings=[file.rfilename for file in info.siblings])
        show(top=[entry.path for entry in api.list_repo_tree("alice/model")])
        show(notes=[entry.path for entry in api.list_repo_tree("alice/model", "notes")])
        show(asked=[entry.path for entry in api.get_paths_info("alice/model", ["notes", "config.json", "gone"])])
    """
    shown = run_client(client, tmp_path / "home", code, folder)
    assert (shown["user"], shown["created"], shown["again"]) == ("alice", "alice/model", "HfHubHTTPError")
    files = contents(folder)
    published = server.files("alice/model")
    assert contents(Path(shown["snapshot"])) == published
    assert published.pop(".gitattributes")
    assert published == files
    assert shown["info"] == ["alice/model", shown["oid"], False]
    assert set(shown["siblings"]) == {".gitattributes", *files}
    assert set(shown["top"]) == {path.split("/")[0] for path in (".gitattributes", *files)}
    assert shown["notes"] == ["notes/größe 1+1.txt"]
    assert shown["asked"] == ["notes", "config.json"]

    assert {path for path, file in server.commits("alice/model")[0].files.items() if file.is_lfs} == {
        "model.safetensors"
    }
    [upload] = [path for method, path in server.requests if method == "PUT"]
    assert upload == f"/lfs/{hashlib.sha256(files['model.safetensors']).hexdigest()}"


def test_old_files_stay_where_branch_tag_and_hash_point(server, client, tmp_path):
    code = """
        def upload(text, **keywords):
            arguments = {"path_in_repo": "a.txt", "repo_id": "alice/model", "commit_message": text}
            return api.upload_file(path_or_fileobj=text.encode(), **arguments, **keywords).oid

        api.create_repo("alice/model")
        first = upload("first")
        api.create_tag("alice/model", tag="v1")
        api.create_branch("alice/model", branch="dev/x")
        second = upload("second")
        upload("third", revision="dev/x")
        revisions = {"first": first, "v1": "v1", "second": second, "main": "main", "dev/x": "dev/x"}
        for name, revision in revisions.items():
            show(**{name: Path(hf_hub_download("alice/model", "a.txt", revision=revision)).read_text()})
        refs = api.list_repo_refs("alice/model")
        show(branches=[ref.name for ref in refs.branches], tags={ref.name: ref.target_commit for ref in refs.tags})
        show(titles=[commit.title for commit in api.list_repo_commits("alice/model", revision="dev/x")])
        show(same_tag=failure(api.create_tag, "alice/model", tag="v1"))
        show(stale_parent=failure(upload, "fourth", parent_commit=first))
    """
    shown = run_client(client, tmp_path, code)
    assert (shown["first"], shown["v1"]) == ("first", "first")
    assert (shown["second"], shown["main"]) == ("second", "second")
    assert shown["dev/x"] == "third"
    assert shown["branches"] == ["main", "dev/x"]
    assert server.commits("alice/model", shown["tags"]["v1"])[0].title == "first"
    assert shown["titles"] == ["third", "first", "initial commit"]
    assert (shown["same_tag"], shown["stale_parent"]) == ("HfHubHTTPError", "HfHubHTTPError")


def test_what_is_not_there_is_told_apart(server, client, tmp_path):
    server.publish("alice/model", {"a.txt": b"a", "b/c.txt": b"c", "b/d.txt": b"d"})
    code = """
        api.delete_file("a.txt", "alice/model")
        api.delete_folder("b", "alice/model")
        show(file=failure(hf_hub_download, "alice/model", "a.txt"))
        show(revision=failure(hf_hub_download, "alice/model", "a.txt", revision="v2"))
        show(info=failure(api.model_info, "alice/model", revision="v2"))
        show(repository=failure(hf_hub_download, "alice/none", "a.txt"), dataset=failure(api.dataset_info, "alice/model"))
        api.delete_repo("alice/model")
        show(deleted=api.repo_exists("alice/model"))
    """
    assert run_client(client, tmp_path, code) == {
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "info": "RevisionNotFoundError",
        "repository": "RepositoryNotFoundError",
        "dataset": "RepositoryNotFoundError",
        "deleted": False,
    }


def test_second_upload_of_the_same_files_makes_no_commit(server, client, folder, tmp_path):
    code = """
        api.create_repo("alice/model")
        show(oids=[api.upload_folder(repo_id="alice/model", folder_path=sys.argv[1]).oid for _ in range(2)])
    """
    [first, second] = run_client(client, tmp_path / "home", code, folder)["oids"]
    assert first == second
    assert [commit.oid for commit in server.commits("alice/model")][:-1] == [first]


def test_private_repository_is_there_for_its_owner_alone(client, tmp_path):
    code = """
        api.create_repo("alice/secret", private=True)
        api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="alice/secret")
        show(read=Path(hf_hub_download("alice/secret", "a.txt")).read_text())
        show(private=api.model_info("alice/secret").private)
        for name, token in (("bob", "token-of-bob"), ("stranger", False)):
            upload = {"path_or_fileobj": b"", "path_in_repo": "a.txt", "repo_id": "alice/secret", "token": token}
            elsewhere = {"cache_dir": sys.argv[1], "token": token}
            show(**{name: [
                failure(hf_hub_download, "alice/secret", "a.txt", **elsewhere),
                failure(snapshot_download, "alice/secret", **elsewhere),
                failure(api.model_info, "alice/secret", token=token),
                failure(api.upload_file, **upload),
            ]})
    """
    shown = run_client(client, tmp_path, code, tmp_path / "elsewhere")
    assert (shown["read"], shown["private"]) == ("secret", True)
    assert shown["bob"] == shown["stranger"] == 4 * ["RepositoryNotFoundError"]


def test_only_the_owner_writes(server, client, tmp_path):
    server.publish("alice/open", {"a.txt": b"open"})
    code = """
        for name, token in (("bob", "token-of-bob"), ("stranger", False), ("impostor", "of nobody")):
            upload = {"path_or_fileobj": b"", "path_in_repo": "a.txt", "repo_id": "alice/open", "token": token}
            show(**{name: [failure(api.upload_file, **upload), failure(api.create_repo, "alice/new", token=token)]})
        show(reading=failure(api.model_info, "alice/open", token="of nobody"))
    """
    shown = run_client(client, tmp_path, code)
    assert shown["bob"] == shown["stranger"] == shown["impostor"] == 2 * ["HfHubHTTPError"]
    assert shown["reading"] == "HfHubHTTPError"  # the real Hub refuses an unknown token even for public repositories
    assert server.files("alice/open")["a.txt"] == b"open"


def test_download_that_breaks_off_is_completed(server, client, tmp_path):
    data = random.Random(0).randbytes(24 * 2**20)  # the client keeps complete chunks of 10 MiB
    server.publish("alice/model", {"model.safetensors": data})
    server.fail_next(1, on="download", how="cut")
    shown = run_client(client, tmp_path, 'show(path=hf_hub_download("alice/model", "model.safetensors"))')
    assert Path(shown["path"]).read_bytes() == data
    download = ("GET", "/alice/model/resolve/main/model.safetensors")
    assert server.requests.count(download) == 2

    assert send(server, *download, Range="bytes=10485760-") == (206, data[10485760:])
    assert send(server, *download, Range="bytes=5-9") == (206, data[5:10])
    assert send(server, *download, Range=f"bytes={len(data)}-")[0] == 416


def test_failed_commit_leaves_all_as_it_was_and_the_next_one_completes_it(server, client, folder, tmp_path):
    server.publish("alice/model", {"config.json": b"{}"})
    before = server.files("alice/model")
    server.fail_next(1, on="commit")
    server.fail_next(1, on="commit", how="drop")
    code = """
        for name in ("status", "drop"):
            show(**{name: failure(api.upload_folder, repo_id="alice/model", folder_path=sys.argv[1])})
    """
    shown = run_client(client, tmp_path / "home", code, folder)
    assert shown == {"status": "HfHubHTTPError", "drop": "RemoteProtocolError"}
    assert server.files("alice/model") == before
    run_client(client, tmp_path / "home", 'api.upload_folder(repo_id="alice/model", folder_path=sys.argv[1])', folder)
    assert server.files("alice/model") == before | contents(folder)
    assert [method for method, _ in server.requests].count("PUT") == 1


def test_client_overcomes_a_passing_failure_of_an_upload(server, client, folder, tmp_path):
    server.fail_next(1, on="create_repo", how=501)
    server.fail_next(1, on="lfs_upload", how="drop")
    code = """
        show(created=failure(api.create_repo, "alice/model"))
        api.create_repo("alice/model")
        api.upload_folder(repo_id="alice/model", folder_path=sys.argv[1])
    """
    assert run_client(client, tmp_path / "home", code, folder) == {"created": "HfHubHTTPError"}
    assert [method for method, _ in server.requests].count("PUT") == 2


def test_only_what_exists_can_fail(server):
    with pytest.raises(ValueError, match="pull"):
        server.fail_next(1, on="pull")
    with pytest.raises(ValueError, match="slowly"):
        server.fail_next(1, on="commit", how="slowly")


def test_server_that_is_down_refuses_connections_and_comes_back(server, client, tmp_path):
    server.publish("alice/model", {"a.txt": b"a"})
    code = 'show(failure=failure(api.model_info, "alice/model"))'
    with server.down():
        assert run_client(client, tmp_path, code) == {"failure": "ConnectError"}
    assert run_client(client, tmp_path, code) == {"failure": None}


def test_content_that_is_not_what_its_hash_says_is_refused(server):
    server.publish("alice/model", {})
    oid = hashlib.sha256(b"content").hexdigest()
    operation = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 7}}
    lines = [{"key": "header", "value": {"summary": "a"}}, operation]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    commit = ("POST", "/api/models/alice/model/commit/main", body)
    assert send(server, "PUT", f"/lfs/{oid}", b"other")[0] == 400
    assert send(server, *commit, Authorization=f"Bearer {ALICE}")[0] == 400
    assert send(server, "PUT", f"/lfs/{oid}", b"content")[0] == 200
    assert send(server, *commit)[0] == 401
    assert send(server, *commit, Authorization=f"Bearer {ALICE}")[0] == 200
    assert server.files("alice/model")["a.bin"] == b"content"


def test_environment_holds_no_settings_of_the_user(server, tmp_path, monkeypatch):
    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HUGGING_FACE_HUB_TOKEN",
        "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_OFFLINE",
    ):
        monkeypatch.setenv(name, "1")
    environment = client_environment(server, tmp_path)
    assert {
        name: value for name, value in environment.items() if name.startswith(("HF_", "HUGG", "TRANSFORMERS"))
    } == {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    assert client_environment(server, tmp_path, ALICE) == environment | {"HF_TOKEN": ALICE}


def test_datasets_loads_a_private_folder_of_images_and_a_table(client, tmp_path):
    for name in ("ant", "bee"):
        folder = tmp_path / "pictures" / "train" / name
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (4, 4), (50 * index, len(name), 0)).save(folder / f"{index}.png")
    code = """
        from datasets import Dataset, load_dataset

        for name in ("pictures", "table"):
            api.create_repo(f"alice/{name}", repo_type="dataset", private=True)
        api.upload_folder(repo_id="alice/pictures", folder_path=sys.argv[1], repo_type="dataset")
        Dataset.from_dict({"x": [1, 2, 3]}).to_parquet(sys.argv[2])
        upload = {"repo_id": "alice/table", "repo_type": "dataset"}
        api.upload_file(path_or_fileobj=sys.argv[2], path_in_repo="data/train-00000.parquet", **upload)
        show(stranger=failure(load_dataset, "alice/pictures", token=False))
        pictures = load_dataset("alice/pictures", split="train")
        show(names=pictures.features["label"].names, labels=pictures["label"][:])
        show(pixel=pictures[1]["image"].getpixel((0, 0)))
        show(table=load_dataset("alice/table", split="train")["x"][:])
        show(streamed=[row["x"] for row in load_dataset("alice/table", split="train", streaming=True)])
    """
    assert run_client(client, tmp_path / "home", code, tmp_path / "pictures", tmp_path / "table.parquet") == {
        "stranger": "DatasetNotFoundError",
        "names": ["ant", "bee"],
        "labels": [0, 0, 1, 1],
        "pixel": [50, 3, 0],
        "table": [1, 2, 3],
        "streamed": [1, 2, 3],
    }


def test_transformers_reads_a_model_by_name_and_revision(server, client, folder, tmp_path):
    commit = server.publish("alice/model", contents(folder))
    server.publish("alice/model", {"config.json": b'{"model_type": "vit", "hidden_size": 16}'})
    code = """
        from transformers import AutoConfig

        show(new=AutoConfig.from_pretrained("alice/model").hidden_size)
        show(old=AutoConfig.from_pretrained("alice/model", revision=sys.argv[1]).hidden_size)
        show(missing=failure(AutoConfig.from_pretrained, "alice/none"))
        show(without_namespace=failure(AutoConfig.from_pretrained, "none"))
    """
    shown = run_client(client, tmp_path / "home", code, commit.oid, token=None)
    assert shown == {"new": 16, "old": 8, "missing": "OSError", "without_namespace": "OSError"}
