"""The Hub: uploads, and what is behind a failure there."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UploadError, UserError, first_sentence


# Checkpoints to resume from, hidden files, what a run has not finished, and pickles, which may hold a token.
NOT_UPLOADED = ["checkpoint-*", ".*", "_*", "training_args.bin"]
LOG_IN = "log in with `hf auth login`, or give a token that may"
CAUSES = {
    GatedRepoError: "the repository is gated: ask for access on its page, then log in with `hf auth login`",
    RepositoryNotFoundError: f"the Hub has no such repository, or it is private: check the name, or {LOG_IN}",
    RevisionNotFoundError: "the repository has no such revision: check the name of the branch, tag or commit",
    OfflineModeIsEnabled: "it is not in the cache, and HF_HUB_OFFLINE forbids to download it",
}
STATUSES = {
    401: f"the Hub does not take this token (401): {LOG_IN}",
    403: f"the Hub forbids it (403): {LOG_IN}",
    429: "the Hub takes no more requests for now (429): try again later",
}
TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")  # of the versions of huggingface_hub


def find_cause(error: BaseException) -> str | None:
    """
    What the Hub or the way to it has to do with an error, and what to do about it; `None` of other errors.

    Loaders put messages of their own before the client's, so this looks through all errors behind the last.
    """
    seen: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in seen:
        seen.append(behind)
        behind = behind.__cause__ or behind.__context__
    for error in seen:
        for kind, cause in CAUSES.items():
            if isinstance(error, kind):
                return cause
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None and not isinstance(error, EntryNotFoundError):
            status = response.status_code
            if status >= 500:
                return f"the Hub has a fault of its own ({status}): try again later"
            return STATUSES.get(status, f"the Hub refuses it ({status}): {first_sentence(error)}")
    if is_offline_mode() and any(isinstance(error, LocalEntryNotFoundError) for error in seen):
        return CAUSES[OfflineModeIsEnabled]
    for error in seen:
        if type(error).__module__.split(".")[0] in TRANSPORT or isinstance(error, (ConnectionError, TimeoutError)):
            return f"no answer from the Hub at {constants.ENDPOINT} ({type(error).__name__}): check the connection"
    return None


def explain(error: Exception) -> str:
    """The cause of a failure, of the Hub's or of another kind, in one sentence."""
    return find_cause(error) or first_sentence(error)


def create_repository(repo_id: str, token: str | None, private: bool | None) -> str:
    """
    Make the repository if it is not there, and see that it can be written to; returns its full name.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        return repo_id
    except Exception as error:  # whatever the network raised
        raise UserError(
            f"The repository {repo_id!r} cannot be made or written to on the Hub: {explain(error)}."
        ) from error


def upload_folder(folder: Path, repo_id: str, token: str | None, revision: str | None, message: str) -> str:
    """Upload a folder in one commit, so that it arrives whole or not at all; returns the address of the repository."""
    api = HfApi(token=token)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Not the client's upload_folder, which may make several commits of it.
    additions = [
        CommitOperationAdd(file.relative_to(folder).as_posix(), file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    commit = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    return commit.repo_url


@contextlib.contextmanager
def told_how_to_resume_upload(folder: Path, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """
    Raises:
        UploadError: what happens inside of this failed.
    """
    try:
        yield
    except Exception as error:  # whatever the network raised
        command = ["binaryvit", "push", str(folder), repo_id, *(["--revision", revision] if revision else [])]
        raise UploadError(
            f"The upload to {repo_id!r} failed ({explain(error)}). Everything is whole in {str(folder)!r}: run the "
            f"same command again, or `{shlex.join(command)}`, to complete it."
        ) from error
