"""`binaryvit card`: writes the model card of a folder."""

import argparse
from pathlib import Path

from binaryvit_runtime.errors import first_sentence, one_line
from binaryvit_runtime.progress import write_line
from binaryvit_runtime.writing import check_writable_file, is_stream

from .common import check_model_folder, needs_extra


EXAMPLE = "binaryvit card configs/binaryvit-small-patch4-224 --out card.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a trained model or of a config")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: FOLDER/README.md)")
    parser.add_argument(
        "--model-id", metavar="NAME", help="name that the card's examples load the model by (default: FOLDER)"
    )


def run(options: argparse.Namespace) -> None:
    """
    Write the model card of a folder: its results, training, size and examples.

    All of it is from the folder's files. Training writes the card already; this command writes it again. Your own text stays
    if it is below the comment at the end of the card. A README.md that is no such card becomes that text.
    """
    check_model_folder(options.folder)
    out = options.out or options.folder / "README.md"
    check_writable_file(out)
    write_card(options.folder, options.model_id or str(options.folder), out)
    if not is_stream(out):
        print(out)


def write_card(folder: Path, model_id: str, path: Path | None = None) -> None:
    with needs_extra("train", "Model cards"):
        from binaryvit_hf.training.model_card import write_model_card
    write_model_card(folder, model_id, path)


def write_card_if_possible(folder: Path, model_id: str) -> None:
    """Write the card, or print why there is none: a model without a card is still a model."""
    try:
        write_card(folder, model_id)
    except Exception as error:  # the files that the card is made from may be damaged in any way
        write_line(one_line(f"There is no model card: {first_sentence(error)}"))
