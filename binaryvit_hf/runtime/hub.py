"""The Hub: causes of its errors, uploads, and damaged files in its local cache."""

import contextlib
import errno
import functools
import hashlib
import logging
import math
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.logging import disable_propagation

from .errors import UploadError, UserError, first_sentence


# Checkpoints for resuming, hidden files, unfinished files of a run, and a pickle that may hold a token.
NOT_UPLOADED = [
    *("checkpoint-*", ".*", "_*", "training_args.bin"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),  # of a checkpoint that is uploaded as a model
]
# Weights in a folder of a model and in its folder of latent weights, with the index of files that are parts.
WEIGHTS = re.compile(r"latent/.*|(pytorch_)?model([.-][^/]*)?\.(safetensors|bin)(\.index\.json)?")
STATIC = "static"  # a Space of files that run in the browser
LOG_IN = "log in with `hf auth login`, or pass a token with access"
CAUSES = {
    GatedRepoError: "the repository is gated: ask for access on its page, then log in with `hf auth login`",
    RepositoryNotFoundError: f"the Hub has no such repository, or it is private: check the name, or {LOG_IN}",
    RevisionNotFoundError: "the repository has no such revision: check the name of the branch, tag or commit",
}
STATUSES = {
    401: f"the Hub rejects this token (401): {LOG_IN}",
    403: f"the Hub forbids it (403): {LOG_IN}",
    429: "too many requests to the Hub (429): try again later",
}
# Different versions of huggingface_hub use different libraries.
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


def explain_hub_error(error: BaseException) -> str | None:
    """
    Explain an error that comes from the Hub or from the connection to it, and say what to do. `None` for other errors.

    Also finds errors further down the chain of causes, because loaders raise their own errors instead of the client's.
    """
    chain = list_causes(error)
    return explain_answer(chain) or explain_silence(chain)


def is_offline(error: BaseException) -> bool:
    """Whether the Hub may not be asked, or does not answer."""
    chain = list_causes(error)
    return explain_answer(chain) is None and explain_silence(chain) is not None


def list_causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def explain_answer(chain: list[BaseException]) -> str | None:
    """Explain a refusal by the Hub."""
    for error in chain:
        for kind, cause in CAUSES.items():
            if isinstance(error, kind):
                return cause
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None and not isinstance(error, EntryNotFoundError):
            status = response.status_code
            if status >= 500:
                return f"the Hub has an internal error ({status}): try again later"
            return STATUSES.get(status, f"the Hub refuses it ({status}): {first_sentence(error)}")
    return None


def explain_silence(chain: list[BaseException]) -> str | None:
    """Explain that the Hub may not be asked, or does not answer."""
    for error in chain:
        if isinstance(error, UnreachableHubError):
            continue
        if isinstance(error, OfflineModeIsEnabled) or (
            is_offline_mode() and isinstance(error, LocalEntryNotFoundError)
        ):
            return "you are offline, because HF_HUB_OFFLINE is set, and it is not in the cache"
    for error in chain:
        if isinstance(error, UnreachableHubError):  # its cause follows
            continue
        library = type(error).__module__.split(".")[0]
        if library in HTTP_LIBRARIES or isinstance(error, (ConnectionError, TimeoutError)):
            return (
                f"you seem to be offline: no answer from the Hub at {constants.ENDPOINT} ({type(error).__name__}), so check "
                "the connection"
            )
    return None


def explain_error(error: Exception) -> str:
    """Explain any error in one sentence."""
    return explain_hub_error(error) or first_sentence(error)


class OneLineOfRetries(logging.Filter):
    """
    Of the two lines that huggingface_hub logs for each failed try of a request, pass one, which counts the tries. Tells
    `CONNECTION_TRIES` of the last one.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if " thrown while requesting " in message:
            return False
        if retry := re.match(r"Retrying in (\S+) \[Retry (\d+)/(\d+)\]", message):
            seconds, done, retries = retry.groups()
            record.msg = "The Hub does not answer: try %d of %d in %s."
            record.args = (int(done) + 1, int(retries) + 1, seconds.replace("s", " s"))
            CONNECTION_TRIES.is_last = done == retries
        return True


class UnreachableHubError(OfflineModeIsEnabled):
    """
    No connection to the Hub, in no try of a round. huggingface_hub treats it as its offline mode: it tries no more, and
    takes files from its cache.
    """


class ConnectionTries:
    """
    Sends the requests of huggingface_hub. Once a request had no connection in a whole round of tries, each later one is
    tried only once, until the Hub answers. A Hub that is slow gets all tries.
    """

    PAUSE = 60  # seconds without a try, after which requests are tried in rounds again

    def __init__(self):
        self.is_last = False  # whether a request without a connection is not tried again
        self.last_failure = -math.inf

    def send(self, send: Callable, *arguments, **named):
        """
        Return `send(*arguments, **named)`, the answer to a request.

        Raises:
            UnreachableHubError: the last try of a round, or a later one, has no connection.
        """
        try:
            response = send(*arguments, **named)
        except Exception as error:
            now = time.monotonic()
            self.is_last &= has_no_connection(error) and now - self.last_failure <= self.PAUSE
            self.last_failure = now
            if not self.is_last:
                raise
            raise UnreachableHubError(f"No connection to {constants.ENDPOINT}.") from error
        self.is_last = False
        return response


CONNECTION_TRIES = ConnectionTries()


def has_no_connection(error: BaseException) -> bool:
    """Whether there was no one to connect to: no name resolution, no network, or no server at the address."""
    return any(
        isinstance(link, (ConnectionRefusedError, socket.gaierror))
        or (isinstance(link, OSError) and link.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH))
        for link in list_causes(error)
    )


def create_client():
    """The HTTP client of huggingface_hub, with `CONNECTION_TRIES`."""
    client = default_client_factory()
    client.send = functools.partial(CONNECTION_TRIES.send, client.send)  # of httpx or httpx2
    return client


def prepare_hub_client() -> None:
    """Let huggingface_hub give up offline after one round of tries for all files, and log one line for each try."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(known, OneLineOfRetries) for known in logger.filters):
        logger.addFilter(OneLineOfRetries())
    disable_propagation()  # its own handler prints each line, and the one of the program would print it again
    set_client_factory(create_client)


def create_repository(repo_id: str, token: str | None, private: bool | None, repo_type: str = "model") -> str:
    """
    Create the repository if it does not exist, and check that it can be written to. Returns its full name.

    Args:
        repo_type: "model", or "space" for a static one.

    Raises:
        UserError: the Hub refuses, or cannot be reached, or the repository is to be private and exists as a public one.
    """
    api = HfApi(token=token)
    kind, sdk = ("Space", STATIC) if repo_type == "space" else ("repository", None)
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
        api.auth_check(created.repo_id, write=True, repo_type=repo_type)
        is_public = private and api.repo_info(created.repo_id, repo_type=repo_type).private is False
    except Exception as error:
        raise UserError(f"The {kind} {repo_id!r} cannot be created or written to: {explain_error(error)}.") from error
    if is_public:
        raise UserError(
            f"The {kind} {created.repo_id!r} exists and is public: make it private in its settings on the Hub first."
        )
    return created.repo_id


def suggest_name(folder: Path) -> str:
    """The folder's name as a name that the Hub allows for a repository."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.absolute().name)
    return re.sub(r"([.-])[.-]+", r"\1", name)[:96].strip(".-") or "model"


def upload_folder(
    folder: Path,
    repo_id: str,
    token: str | None,
    revision: str | None,
    message: str,
    repo_type: str = "model",
    replaced: Iterable[str] = (),
) -> str:
    """
    Upload a folder in one commit, so that it arrives whole or not at all. Returns the URL of the repository.

    Weights of a model that was there before are deleted: loaders would take them for the new model's.

    Args:
        replaced: other files that are deleted, too, if they are there and not in the folder.
    """
    api = HfApi(token=token)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
    # The client's upload_folder may split it into several commits.
    additions = [
        CommitOperationAdd(file.relative_to(folder).as_posix(), file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    there = set(api.list_repo_files(repo_id, revision=revision, repo_type=repo_type))
    weights = filter(WEIGHTS.fullmatch, there) if repo_type == "model" else ()
    stale = {*weights, *there.intersection(replaced)} - {addition.path_in_repo for addition in additions}
    operations = [*additions, *map(CommitOperationDelete, sorted(stale))]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, repo_type=repo_type)
    return commit.repo_url


@contextlib.contextmanager
def resumable_upload(
    model: str | Path, repo_id: str, revision: str | None = None, repo_type: str = "model"
) -> Iterator[None]:
    """
    Report any error inside of this context as a failed upload, with the command that completes it.

    Args:
        model: a folder with all files; for a Space also a name.

    Raises:
        UploadError: an error occurred inside.
    """
    try:
        yield
    except Exception as error:
        command = ["binaryvit", "push", str(model), repo_id, *(["--revision", revision] if revision else [])]
        again = f"All files are complete in {str(model)!r}: run"
        if repo_type == "space":
            command.append("--space")
            again = "Run"
        raise UploadError(
            f"The upload to {repo_id!r} failed ({explain_error(error)}). {again} the same command again, or "
            f"`{shlex.join(command)}`, to complete the upload."
        ) from error


def cache_folder(source: str, cache_dir: str | None) -> Path | None:
    """The folder of a model repository in the local cache. `None` if it is not cached, or `source` is a path."""
    name = "--".join(("models", *source.split("/")))
    folder = os.path.join(cache_dir or constants.HF_HUB_CACHE, name)
    return Path(folder) if os.path.isdir(folder) and not os.path.exists(source) else None


def cached_models(cache_dir: str | None) -> list[str]:
    """Ids of the models in the local cache."""
    folders = sorted(Path(cache_dir or constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json"))
    return list(dict.fromkeys("/".join(file.parts[-4].split("--")[1:]) for file in folders))


def damaged_blobs(source: str, cache_dir: str | None) -> list[Path]:
    """Files of a repository in the local cache whose hash (SHA-1 of git, SHA-256 of LFS) is not their name."""
    folder = cache_folder(source, cache_dir)
    return [] if folder is None else [blob for blob in folder.glob("blobs/*") if is_damaged(blob)]


def is_damaged(blob: Path) -> bool:
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name) or not os.access(blob, os.R_OK) or not blob.is_file():
        return False
    in_git = len(blob.name) == 40
    digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size) if in_git else hashlib.sha256()
    with open(blob, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() != blob.name
