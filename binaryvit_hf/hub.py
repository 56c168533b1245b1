"""Uploads to the Hub: what is wrong is said before training, what fails can be done again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .errors import UploadError, UserError, first_sentence


# Names of checkpoints to resume from, hidden files, and pickles, which may hold a token.
NOT_UPLOADED = ["checkpoint-*", ".*", "training_args.bin", "__pycache__"]


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
            f"The repository {repo_id!r} cannot be made or written to on the Hub ({first_sentence(error)}): log in with "
            "`hf auth login`, or give a token that may."
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
def told_how_to_resume_upload(folder: Path, repo_id: str) -> Iterator[None]:
    """
    Raises:
        UploadError: what happens inside of this failed.
    """
    try:
        yield
    except Exception as error:  # whatever the network raised
        raise UploadError(
            f"The upload to {repo_id!r} failed ({first_sentence(error)}). Everything is whole in {str(folder)!r}: run the "
            f"same command again, or `binaryvit push {folder} {repo_id}`, to complete it."
        ) from error
