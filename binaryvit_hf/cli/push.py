"""`binaryvit push`: uploads a trained model to the Hub, or a page that runs it in the browser."""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.progress import Progress

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
        "--private", action="store_true", default=None, help="make a new repository private (default: your account's)"
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
    from binaryvit_hf.network.quantization_binaryvit import NOTHING_TO_PACK, QUANT_METHOD, ShippedModel, is_latent
    from binaryvit_runtime.hub import NOT_UPLOADED, create_repository, resumable_upload, upload_folder

    from .models import load_model

    folder = Path(options.folder)
    check_model_folder(folder)
    # A model or processor that does not load is not published.
    model, _ = load_model(str(folder), str(folder), options.token)
    if model.config.model_type == QUANT_METHOD and model.config.weight_bits == 32:
        print(NOTHING_TO_PACK, file=sys.stderr)
    repository = create_repository(options.repository, options.token, options.private)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging) / "model"
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(*NOT_UPLOADED))
        (ShippedModel(model) if is_latent(model) else model).save_pretrained(staged)  # also copies the modelling code
        readme = staged / "README.md"
        if readme.is_file():
            text = name_repository(readme.read_text(encoding="utf-8"), folder, repository)
            readme.write_text(text, encoding="utf-8")
        else:
            write_card_if_possible(staged, repository)
        with resumable_upload(folder, repository, options.revision):
            message = options.message or MODEL_MESSAGE
            with Progress("Uploading"):
                address = upload_folder(staged, repository, options.token, options.revision, message)
            print(address)


def name_repository(card: str, folder: Path, repository: str) -> str:
    """A card whose examples load the model from the Hub. They name its folder as it was called when the card was written."""
    for name in {str(folder), *EXAMPLE_OF_CARD.findall(card)}:
        card = card.replace(f'"{name}"', f'"{repository}"')
    return card


def push_page(options: argparse.Namespace) -> None:
    try:
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise UserError("Uploads need 'huggingface_hub': pip install huggingface_hub.") from error
    from binaryvit_runtime.browser.page import write_page
    from binaryvit_runtime.browser.space import check_replaceable, write_readme
    from binaryvit_runtime.hub import create_repository, prepare_hub_client, resumable_upload, upload_folder

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
            with Progress("Uploading"):
                address = upload_folder(page, repository, options.token, options.revision, message, repo_type="space")
            print(address)
