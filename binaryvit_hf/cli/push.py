"""`binaryvit push`: uploads a trained model to the Hub."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from .card import write_card_if_possible
from .common import add_token_argument, check_model_folder


EXAMPLE = "binaryvit push outputs/quickstart me/digits --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a trained model")
    parser.add_argument("repository", metavar="REPOSITORY", help="Hub id, created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to, created if it does not exist (default main)")
    parser.add_argument("--message", default="Upload model", help="message of the commit (default: %(default)s)")
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Upload a trained model to the Hub: packed weights, latent weights (in 'latent'), card and image processor."""
    from binaryvit_hf.network.quantization_binaryvit import NOTHING_TO_PACK, QUANT_METHOD, ShippedModel, is_latent
    from binaryvit_runtime.hub import NOT_UPLOADED, create_repository, resumable_upload, upload_folder

    from .models import load_model

    folder = options.folder
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
        if readme.is_file():  # its examples name the local folder
            text = readme.read_text(encoding="utf-8").replace(f'"{folder}"', f'"{repository}"')
            readme.write_text(text, encoding="utf-8")
        else:
            write_card_if_possible(staged, repository)
        with resumable_upload(folder, repository, options.revision):
            print(upload_folder(staged, repository, options.token, options.revision, options.message))
