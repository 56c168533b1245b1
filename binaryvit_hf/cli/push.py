"""`binaryvit push`: uploads a trained model to the Hub, or a page that runs it in the browser."""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.progress import Progress, write_line
from binaryvit_runtime.resources import HUB_CLIENT
from binaryvit_runtime.writing import reported_write_errors

from .card import write_card_if_possible
from .common import add_token_argument, check_model_folder, prepare_libraries


# A page needs no PyTorch.
NEEDS_PYTORCH = False
WITHOUT_PYTORCH = "push --space"
MODEL_MESSAGE, PAGE_MESSAGE = "Upload model", "Upload page"
EXAMPLE_OF_CARD = re.compile(r'pipeline\("image-classification", model="([^"]+)"')
EXAMPLE = "binaryvit push outputs/photos YOUR-NAME/photos --private\nbinaryvit push binaryvit-digits YOUR-NAME/digits --space"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="folder of a trained model; with --space also a Hub id or the name of a shipped model",
    )
    parser.add_argument("repository", metavar="REPOSITORY", help="Hub id (OWNER/NAME), created if it does not exist")
    parser.add_argument(
        "--space",
        action="store_true",
        help="upload a page that runs the packed model in the browser, as a static Space (default: upload the model)",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make a new repository private, and refuse a public one (default: your account's)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="created if it does not exist (default: main)")
    parser.add_argument(
        "--message", metavar="TEXT", help=f"message of the commit (default: {MODEL_MESSAGE}, or {PAGE_MESSAGE})"
    )
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """
    Upload a trained model to the Hub, or a page that runs it in the browser.

    A model is uploaded with its packed and latent weights, its card and image processor, and the code that loads it. Log in
    first: `hf auth login`.
    """
    if options.space:
        push_page(options)
    else:
        prepare_libraries(options.program)
        push_model(options)


def push_model(options: argparse.Namespace) -> None:
    from binaryvit_hf.card_text import read_card
    from binaryvit_hf.network.quantization_binaryvit import NOTHING_TO_PACK, QUANT_METHOD, ShippedModel, is_latent
    from binaryvit_runtime.hub import create_repository, resumable_upload, upload_folder

    from .models import load_model

    folder = Path(options.folder)
    check_model_folder(folder)
    # A model or processor that does not load is not published.
    model, _ = load_model(str(folder), str(folder), options.token)
    if model.config.model_type == QUANT_METHOD and model.config.weight_bits == 32:
        write_line(NOTHING_TO_PACK)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging) / "model"
        copy_folder(folder, staged, is_latent(model))
        with reported_write_errors(staged):
            # Also copies the modelling code.
            (ShippedModel(model) if is_latent(model) else model).save_pretrained(staged)
        readme = staged / "README.md"
        card = read_card(readme)
        # Only now: a fault of the folder or a full disk leaves no empty repository.
        repository = create_repository(options.repository, options.token, options.private)
        with resumable_upload(folder, repository, options.revision):
            if card:
                readme.write_bytes(name_repository(card, folder, repository).encode(errors="surrogateescape"))
            else:
                write_card_if_possible(staged, repository)
            message = options.message or MODEL_MESSAGE
            with Progress("Uploading"):
                address = upload_folder(staged, repository, options.token, options.revision, message)
            print(address)


def copy_folder(folder: Path, staged: Path, latent: bool) -> None:
    """
    Copy what is uploaded of a model's folder, without its weights, which are saved anew.

    Args:
        latent: whether the weights of the folder are latent, so that a folder of latent weights is saved anew, too.

    Raises:
        UserError: a file cannot be read or written.
    """
    from binaryvit_hf.network.quantization_binaryvit import LATENT
    from binaryvit_runtime.hub import NOT_UPLOADED, WEIGHTS

    not_copied = shutil.ignore_patterns(*NOT_UPLOADED, *([LATENT] if latent else []))

    def ignore(path: str, names: list[str]) -> set[str]:
        saved_anew = {name for name in names if WEIGHTS.fullmatch(name)} if Path(path) == folder else set()
        return not_copied(path, names) | saved_anew

    with reported_write_errors(staged):
        try:
            shutil.copytree(folder, staged, ignore=ignore)
        except shutil.Error as error:  # one for all files
            source, _, reason = error.args[0][0]
            reason = re.sub(r"\[Errno \d+\] ([^:]*).*", r"\1", reason)
            raise UserError(f"{source!r} cannot be copied to {str(staged)!r} for the upload: {reason}.") from error


def name_repository(card: str, folder: Path, repository: str) -> str:
    """
    A card whose examples load the model from the Hub. They name its folder as it was called when the card was written. The
    user's text stays as it is: it may name other models.
    """
    from binaryvit_hf.card_text import split_card

    ours, _ = split_card(card)
    notes = card[len(ours) :]
    for name in {str(folder), *EXAMPLE_OF_CARD.findall(ours)}:
        ours = ours.replace(f'"{name}"', f'"{repository}"')
    return ours + notes


def push_page(options: argparse.Namespace) -> None:
    try:
        from huggingface_hub.utils import disable_progress_bars

        from binaryvit_runtime.hub import create_repository, prepare_hub_client, resumable_upload, upload_folder
    except ImportError as error:
        raise UserError(f"Uploads need {HUB_CLIENT}: pip install {HUB_CLIENT}.") from error
    from binaryvit_runtime.browser.page import write_page
    from binaryvit_runtime.browser.space import check_replaceable, list_earlier_page, write_readme

    disable_progress_bars()
    prepare_hub_client()
    with tempfile.TemporaryDirectory() as staging:
        page = Path(staging) / "page"
        write_page(options.folder, page, token=options.token)  # a model that does not load is not published
        repository = create_repository(options.repository, options.token, options.private, repo_type="space")
        check_replaceable(repository, options.token)
        with resumable_upload(options.folder, repository, options.revision, repo_type="space"):
            write_readme(page, options.folder, repository, options.token)
            message = options.message or PAGE_MESSAGE
            earlier = list_earlier_page(repository, options.token, options.revision)
            with Progress("Uploading"):
                address = upload_folder(
                    page, repository, options.token, options.revision, message, repo_type="space", replaced=earlier
                )
            print(address)
