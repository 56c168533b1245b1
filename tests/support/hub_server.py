"""A Hugging Face Hub on loopback. It answers the requests of huggingface_hub from memory."""

import base64
import hashlib
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


ALICE, BOB = "token-of-alice", "token-of-bob"
LFS_SUFFIXES = (".bin", ".parquet", ".png", ".pt", ".pth", ".safetensors", ".wasm")
LFS_SIZE = 10 * 2**20
DATE = "2025-01-01T00:00:00.000Z"  # the same for everything, so that no test depends on the time

NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"
WEB = rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}"
SDKS = ("gradio", "docker", "static")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
REVISION = r"(?P<revision>[^/]+)"
# HTTP method, path and endpoint. The endpoint is a method of `_Handler` and an argument of `HubServer.fail_next`.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("GET", rf"{API}(?:/revision/{REVISION})?", "info"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/{REVISION}", "commits"),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"{API}/tag/{REVISION}", "create_tag"),
    ("GET", rf"{API}/auth-check/write", "auth_check"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
    ("POST", rf"{API}/commit/{REVISION}", "commit"),
    ("POST", rf"{WEB}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_verify"),
    ("HEAD", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)", "head"),
    ("GET", rf"{WEB}/resolve/{REVISION}/(?P<path>.+)", "download"),
]
WRITING = {"auth_check", "create_branch", "create_tag", "preupload", "commit", "lfs_batch"}


@dataclass
class Answer:
    """A response. Bytes are sent unchanged, other content as JSON."""

    content: bytes | dict | list
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An error response. The client selects its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        in_header = message.encode("ascii", "replace").decode()
        headers = {"X-Error-Message": in_header, "X-Error-Code": code, **(headers or {})}
        self.answer = Answer({"error": message}, status, headers)


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.blob_id

    @property
    def pointer(self) -> bytes:
        """The content that git stores for a file in LFS."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def blob_id(self) -> str:
        blob = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files by path; `parent` is None for the first one."""

    oid: str
    title: str
    author: str
    files: dict[str, File]
    parent: "Commit | None"

    def entries(self) -> dict[PurePosixPath, dict]:
        """Files and folders in the format of the endpoints tree and paths-info."""
        found = {}
        for name, file in sorted(self.files.items()):
            path, size = PurePosixPath(name), len(file.data)
            for folder in list(path.parents)[:-1]:
                oid = hashlib.sha1(bytes(folder)).hexdigest()  # git would hash the content of the folder
                found[folder] = {"type": "directory", "path": str(folder), "oid": oid}
            found[path] = {"type": "file", "path": name, "size": size, "oid": file.blob_id}
            if file.is_lfs:
                found[path]["lfs"] = {"oid": file.etag, "size": size, "pointerSize": len(file.pointer)}
        return found


class Repository:
    """
    Commits by hash. Branches and tags are names of hashes.

    Args:
        sdk: of a Space. A static one begins with a page of its own, as on the real Hub.
    """

    def __init__(self, kind: str, name: str, private: bool, sdk: str | None = None):
        self.kind, self.name, self.private = kind, name, private
        self.owner = name.split("/")[0]
        self.path = name if kind == "models" else f"{kind}/{name}"
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        first = {".gitattributes": attributes}
        if sdk is not None:
            settings = (
                f"title: {name.split('/')[1]}\nemoji: 🏃\ncolorFrom: red\ncolorTo: gray\nsdk: {sdk}\npinned: false\n"
            )
            first["README.md"] = f"---\n{settings}---\n"
        if sdk == "static":
            first |= {"index.html": "<p>Welcome to your static Space!</p>\n", "style.css": "p { color: gray; }\n"}
        self.commit("main", "initial commit", {path: File(text.encode(), False) for path, text in first.items()})

    def find(self, revision: str) -> Commit:
        """The commit of a branch, tag or hash."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.commits.get(self.branches.get(branch))
        # The count makes the hashes of commits with equal files differ.
        content = [len(self.commits), title, [(path, file.blob_id) for path, file in sorted(files.items())]]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, self.owner, files, parent)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Commits, newest first."""
        found = [self.find(revision)]
        while found[-1].parent:
            found.append(found[-1].parent)
        return found


class HubServer:
    """
    Serves at `url` within its `with` block.

    Attributes:
        users: user name of each token. Only its owner sees a private repository.
        requests: (method, path) of every request, including failed ones. Each client process also asks for
            /api/agent-harnesses once.
    """

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.requests: list[tuple[str, str]] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self._listen(port=0)
        return self

    def clear(self) -> None:
        """Forget all requests, repositories, uploads and faults."""
        for content in (self.requests, self.repositories, self.lfs_objects, self.faults):
            content.clear()

    def __exit__(self, *_) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def _listen(self, port: int) -> None:
        self._listener = _Listener(("127.0.0.1", port), _Handler)
        self._listener.hub = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections within the block. `url` stays the same."""
        self.__exit__()
        try:
            yield
        finally:
            self._listen(self._listener.server_port)

    def fail_next(self, count: int, on: str, how: int | str = 500) -> None:
        """
        Let the next `count` requests to the endpoint `on` (third column of ROUTES) fail.

        `how` is one of:

        - a status, which is sent without carrying out the request
        - "drop": the connection is closed without an answer
        - "cut": the request is carried out, and the connection is closed in the middle of the answer

        The client (huggingface_hub 2.4) retries 5 times, after 1, 2, 4, 8 and 8 seconds:

        - preupload, lfs_batch, lfs_upload, lfs_verify, tree and commits: on the statuses 408, 429, 500 and 502 to 504,
          and on broken connections
        - head: on these statuses if the file is not cached; otherwise it takes the cached file
        - download: on broken connections, one second apart

        It raises all other errors at once. 501 fails quickly everywhere.
        """
        if on not in {endpoint for _, _, endpoint in ROUTES} or not (isinstance(how, int) or how in ("drop", "cut")):
            raise ValueError(f"nothing to make fail: on={on!r}, how={how!r}")
        self.faults[on] += [how] * count

    def publish(
        self,
        repo_id: str,
        files: dict[str, bytes],
        repo_type: str = "model",
        private: bool = False,
        sdk: str | None = None,
    ) -> Commit:
        """Commit files without a client. Creates the repository if it does not exist."""
        key = (repo_type + "s", repo_id)
        repository = self.repositories.setdefault(key, Repository(*key, private, sdk))
        added = {path: File(data, _belongs_to_lfs(path, len(data))) for path, data in files.items()}
        return repository.commit("main", "published", repository.find("main").files | added)

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository, or KeyError."""
        return self.repositories[repo_type + "s", repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Contents by path. Every repository has a `.gitattributes`, as on the real Hub."""
        commit = self.repository(repo_id, repo_type).find(revision)
        return {path: file.data for path, file in commit.files.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits, newest first. The last is the "initial commit" of the Hub."""
        return self.repository(repo_id, repo_type).history(revision)


def client_environment(server: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """
    Environment of a process for which `server` is the Hub. Caches are in `home`, and settings of the user are removed.

    It needs a new process: the client reads its environment when it is imported, and the tests import it offline.
    """
    older = ("HUGGING", "TRANSFORMERS_")  # former names of variables, which are still read
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", *older))}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    # If hf_xet is installed, the client uploads to xet storage without asking whether the Hub has it.
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return environment | ({"HF_TOKEN": token} if token else {})


def read_settings(readme: str) -> dict:
    """The YAML block at the top of a README.md."""
    block = re.match(r"---\n(.*?\n)---\n", readme, re.DOTALL)
    return yaml.safe_load(block[1]) if block else {}


def check_settings(readme: str) -> list[str]:
    """What the real Hub finds wrong with the README.md of a Space."""
    settings = read_settings(readme)
    errors = [f'"{name}" is required' for name in ("emoji", "colorFrom", "colorTo", "sdk") if name not in settings]
    errors += [
        f'"{name}" must be one of {COLOURS}' for name in ("colorFrom", "colorTo") if settings.get(name) not in COLOURS
    ]
    if settings.get("sdk") not in SDKS:
        errors.append(f'"sdk" must be one of {SDKS}')
    if len(settings.get("short_description", "")) > 60:
        errors.append('"short_description" must be at most 60 characters')
    return errors


def _belongs_to_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64  # the client opens many connections at once; with the default of 5 some would wait


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection (HTTP/1.0), so that no connection outlives the server."""

    def respond(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub: HubServer = self.server.hub
        endpoint, names = self.route(url.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            faults = self.hub.faults[endpoint]
            fault = faults.pop(0) if faults else None
            if fault == "drop":
                return
            try:
                if isinstance(fault, int):
                    raise Refused(fault, "The test wanted this to fail")
                if "name" in names:
                    kind = names.pop("kind", "models")
                    names["repository"] = self.repository(kind, names.pop("name"), endpoint in WRITING)
                answer = getattr(self, endpoint)(**names)
            except Refused as refused:
                answer = refused.answer
        answer = answer if isinstance(answer, Answer) else Answer(answer)
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def log_message(self, *_) -> None:
        pass

    def route(self, path: str) -> tuple[str, dict[str, str]]:
        """The endpoint of a path, and the named parts of the path."""
        for method, pattern, endpoint in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return endpoint, {name: unquote(part) for name, part in match.groupdict().items() if part}
        return "unknown", {}

    def unknown(self) -> None:
        raise Refused(404, f"{self.command} {self.path} is not implemented in tests/hub_server.py")

    def user(self) -> str | None:
        """Name of the user who sends the request, None without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def repository(self, kind: str, name: str, to_write: bool) -> Repository:
        user = self.user()
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and user != repository.owner):
            # Over https the client takes a 401 without this code for a missing repository, but not over http.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if to_write and user != repository.owner:
            raise Refused(403 if user else 401, f"{name} belongs to {repository.owner}")
        return repository

    def own_repository(self) -> tuple[str, str]:
        """Kind and name of the repository to create or delete. Its owner must send the request."""
        user, request = self.user(), json.loads(self.body)
        owner = request.get("organization") or user
        if user is None or owner != user:
            raise Refused(403 if user else 401, f"You have no right to the namespace {owner}")
        return (request.get("type") or "model") + "s", f"{owner}/{request['name']}"

    def whoami(self) -> dict:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": token}

    def validate_yaml(self) -> Answer:
        request = json.loads(self.body)
        errors = check_settings(request["content"]) if request["repoType"] == "space" else []
        return Answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def create_repo(self) -> Answer:
        kind, name = self.own_repository()
        if kind not in ("models", "datasets", "spaces"):
            raise Refused(400, f"There are no {kind} in tests/hub_server.py")
        request = json.loads(self.body)
        if (kind == "spaces") != (request.get("sdk") in SDKS):
            raise Refused(400, f"sdk: {request.get('sdk')} is not one of {', '.join(SDKS)}")
        exists = (kind, name) in self.hub.repositories
        private = request.get("visibility") == "private"
        new = Repository(kind, name, private, request.get("sdk"))
        repository = self.hub.repositories.setdefault((kind, name), new)
        content = {"url": f"{self.hub.url}/{repository.path}"}  # the client reads it from the error, too
        return Answer(content | {"error": "You already created this repo"}, 409) if exists else Answer(content)

    def delete_repo(self) -> dict:
        if self.hub.repositories.pop(self.own_repository(), None) is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return {}

    def auth_check(self, repository: Repository) -> dict:
        return {}

    def info(self, repository: Repository, revision: str = "main") -> dict:
        commit = repository.find(revision)
        info = {"id": repository.name, "author": repository.owner, "private": repository.private, "sha": commit.oid}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        info |= {"createdAt": DATE, "lastModified": DATE}
        info |= {"siblings": [{"rfilename": path} for path in sorted(commit.files)]}
        if repository.kind == "spaces":
            readme = commit.files.get("README.md")
            settings = read_settings(readme.data.decode()) if readme else {}
            info |= {"cardData": settings, "sdk": settings.get("sdk"), "models": settings.get("models", [])}
        return info

    def tree(self, repository: Repository, revision: str, path: str = "") -> list:
        root = PurePosixPath(path)
        below = {name: entry for name, entry in repository.find(revision).entries().items() if root in name.parents}
        if path and not below:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive") == ["true"]
        return [entry for name, entry in below.items() if recursive or name.parent == root]

    def paths_info(self, repository: Repository, revision: str) -> list:
        entries = repository.find(revision).entries()
        asked = map(PurePosixPath, parse_qs(self.body.decode()).get("paths", []))
        return [entries[path] for path in asked if path in entries]

    def refs(self, repository: Repository) -> dict:
        found = {"converts": [], "pullRequests": []}
        for kind, folder, oids in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags)):
            found[kind] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in oids.items()
            ]
        return found

    def commits(self, repository: Repository, revision: str) -> list:
        same = {"message": "", "authors": [{"user": repository.owner}], "date": DATE}
        return [{"id": commit.oid, "title": commit.title, **same} for commit in repository.history(revision)]

    def create_branch(self, repository: Repository, branch: str) -> dict:
        if branch in repository.branches:
            raise Refused(409, f"Branch {branch} exists")
        repository.branches[branch] = repository.find(json.loads(self.body).get("startingPoint", "main")).oid
        return {}

    def create_tag(self, repository: Repository, revision: str) -> dict:
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise Refused(409, f"Tag {tag} exists")
        repository.tags[tag] = repository.find(revision).oid
        return {}

    def preupload(self, repository: Repository, revision: str) -> dict:
        present = repository.find(revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if _belongs_to_lfs(file["path"], file["size"]) else "regular"
            # The client compares the oid and leaves unchanged files out of the commit.
            oid = present[file["path"]].etag if file["path"] in present else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, repository: Repository) -> dict:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs_objects:
                action = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
                item["actions"] = {"upload": action, "verify": action}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> dict:
        # No token is needed: the upload URLs of the real Hub are signed.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, f"This is not the content of {oid}")
        self.hub.lfs_objects[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> dict:
        if oid not in self.hub.lfs_objects:
            raise Refused(404, f"{oid} was not uploaded")
        return {}

    def commit(self, repository: Repository, revision: str) -> dict:
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if revision not in repository.branches:
            raise Refused(400, "Commits go to branches, not to tags or old commits")
        head, answer = repository.find(revision), {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            revision, answer = (
                f"refs/pr/{number}",
                {"pullRequestUrl": f"{self.hub.url}/{repository.path}/discussions/{number}"},
            )
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise Refused(400, f"The content of {path} was not uploaded")
                files[path] = File(self.hub.lfs_objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif key == "deletedFolder":
                folder = path.rstrip("/") + "/"
                files = {name: file for name, file in files.items() if not name.startswith(folder)}
            else:
                raise Refused(400, f"There is no operation {key} in tests/hub_server.py")
        commit = repository.commit(revision, header["value"]["summary"], files)
        return answer | {"commitUrl": f"{self.hub.url}/{repository.path}/commit/{commit.oid}", "commitOid": commit.oid}

    def download(self, repository: Repository, revision: str, path: str) -> Answer:
        commit = repository.find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound", headers)
        file = commit.files[path]
        size = len(file.data)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Answer(file.data, 200, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first > last:
            raise Refused(416, "There are no such bytes", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Answer(file.data[first : last + 1], 206, headers)

    head = download
