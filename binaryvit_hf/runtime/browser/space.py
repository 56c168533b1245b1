"""A page as a static Space of the Hub: its README.md, and whether an existing Space may be replaced."""

import contextlib
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import find_source
from .page import PAGE, list_files


TAG = "binaryvit-page"  # marks Spaces that may be replaced
TEXT = """
This page classifies pictures with a 1-bit vision transformer. It computes in your browser and sends no picture anywhere.

It was made by `binaryvit push --space`.
"""


def write_readme(folder: Path, model: str, repo_id: str, token: str | None) -> None:
    """
    Write the README.md of a Space that has a page, with the settings of the Space.

    Args:
        folder: of the page.
        model: its model: a folder, the name of a model that comes with the package, or an id of the Hub.
        repo_id: of the Space. A public model of the same id on the Hub is linked.
        token: of the Hub.
    """
    from huggingface_hub import HfApi, SpaceCardData

    source, name = find_source(model), repo_id.split("/")[-1]
    linked = repo_id if os.path.isdir(source) else source
    settings = SpaceCardData(
        title=name,
        emoji="🔍",
        colorFrom="blue",
        colorTo="indigo",
        sdk="static",
        app_file="index.html",
        pinned=False,
        license=read_license(source, token),
        models=[linked] if HfApi(token=False).repo_exists(linked) else None,  # a public page names no private model
        tags=[TAG],
        short_description="1-bit vision transformer in your browser",
    )
    text = f"---\n{settings.to_yaml()}\n---\n\n# {name}\n{TEXT}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def read_license(source: str, token: str | None) -> Any:
    """The licence in the model card of a folder or an id of the Hub; `None` if it has none, or no card that can be read."""
    from huggingface_hub import ModelCard

    card = Path(source, "README.md") if os.path.isdir(source) else source
    try:
        return ModelCard.load(card, token=token, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # the card may be damaged in any way, and the page does not need it
        return None


def list_earlier_page(repo_id: str, token: str | None, revision: str | None) -> set[str]:
    """The files of the page that a Space has, without others that its owner has added; none without a page."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    for branch in (revision, None):  # a new branch starts from main
        with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):
            page = hf_hub_download(repo_id, PAGE, repo_type="space", revision=branch, token=token)
            return list_files(Path(page).read_text(encoding="utf-8", errors="replace"))
    return set()


def check_replaceable(repo_id: str, token: str | None) -> None:
    """
    Check that a Space of the Hub has a page of `write_readme`, or nothing since it was made.

    Raises:
        UserError: it has something else, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    from ..hub import STATIC, explain_error

    api = HfApi(token=token)
    try:
        space = api.space_info(repo_id)
        is_page = space.card_data is not None and TAG in (space.card_data.tags or [])
        is_new = len(list(api.list_repo_commits(repo_id, repo_type="space"))) == 1
    except Exception as error:
        raise UserError(f"The Space {repo_id!r} cannot be read: {explain_error(error)}.") from error
    if space.sdk != STATIC or not (is_page or is_new):
        kind = "files that this command did not upload" if space.sdk == STATIC else f"an app of the kind {space.sdk!r}"
        raise UserError(f"The Space {repo_id!r} has {kind}: choose another name, or delete the Space first.")
