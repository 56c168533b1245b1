"""`binaryvit classify`: prints the most likely labels of image files."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from binaryvit_runtime.errors import UnsupportedModelError, UserError, counted
from binaryvit_runtime.resources import installation, shipped_models

from .common import add_token_argument, example_picture, has_pytorch, prepare_libraries, print_error


if TYPE_CHECKING:
    from binaryvit_runtime.classifier import Answer
    from binaryvit_runtime.image_files import ImageFile

# Packed models run without PyTorch, whose import takes seconds.
NEEDS_PYTORCH = False
EXAMPLE = f"binaryvit classify binaryvit-digits {example_picture()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id or name of a shipped model")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image file, folder of images, or pattern such as 'photos/*.jpg'"
    )
    parser.add_argument(
        "--background",
        metavar="COLOUR",
        help="colour behind transparent pixels, such as white or '#ffcc00'; 'none' drops transparency (default: the "
        "model's, from its training)",
    )
    parser.add_argument(
        "--top-k", metavar="N", type=int, default=5, help="labels to print for each image (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON at the end instead of text")
    add_token_argument(parser)


def run(options: argparse.Namespace) -> int:
    """
    Print the most likely labels of pictures, with their probabilities.

    A packed model needs no PyTorch. A file that cannot be read gets an error line, and the exit code is then 1.
    """
    from binaryvit_runtime.image_files import list_images
    from binaryvit_runtime.pixels import choose_background, describe_transparent
    from binaryvit_runtime.progress import Progress, with_progress, write_line

    if options.top_k < 1:
        raise UserError(f"--top-k is the number of labels to print, 1 or more, not {options.top_k}.")
    choose_background(options.background, None)  # raises its error before the model is loaded
    files, notes = list_images(options.images)
    with Progress(f"Loading {options.model!r}"):
        classify, in_percent = load_classifier(options)
    for note in notes:
        write_line(note)
    answers = []
    background, stream = classify(files)
    # As text the answers themselves show how far it is.
    for answer in with_progress(stream, "Classifying", len(files)) if options.json else stream:
        answers.append(answer)
        if answer.error:
            print_error(answer.error)
        elif not options.json:
            print(answer.image)
            for label in answer.labels or []:
                score = f"{100 * label['score']:6.2f} %" if in_percent else f"{label['score']:9.4f}"
                print(f"  {score}  {label['label']}", flush=True)
    if options.json:
        print(json.dumps([answer.describe() for answer in answers], indent=2))
    transparent = [answer.image for answer in answers if answer.transparent]
    if transparent and background is None:
        images = counted(len(answers), "image")
        dropped = "Transparency is dropped" + (" as in training" if options.background is None else "")
        write_line(describe_transparent(len(transparent), images, transparent[0], dropped))
    return 1 if any(answer.error for answer in answers) else 0


Classify = Callable[[list["ImageFile"]], tuple[str | None, Iterator["Answer"]]]


def load_classifier(options: argparse.Namespace) -> tuple[Classify, bool]:
    """
    Load the model on the runtime, or in PyTorch if the runtime does not support it.

    Returns:
        A function of files that returns the colour behind transparent pixels and the answers, and whether scores are
        probabilities.

    Raises:
        UserError: there is no such model, it is damaged, or it needs PyTorch, which is not installed.
    """
    from binaryvit_runtime.classifier import Classifier
    from binaryvit_runtime.pixels import choose_background

    try:
        classifier = Classifier.from_pretrained(options.model, token=options.token)
    except UnsupportedModelError as error:
        if not has_pytorch():
            raise UserError(f"{error} To install it, {installation()}.") from error
        return load_in_pytorch(options)
    background = choose_background(options.background, classifier.background)
    return (
        lambda files: (background, classifier.stream(files, options.top_k, background)),
        classifier.scores_are_probabilities,
    )


def load_in_pytorch(options: argparse.Namespace) -> tuple[Classify, bool]:
    prepare_libraries(options.program)
    from transformers import pipeline

    from binaryvit_runtime.pixels import choose_background, read_background

    from .classification import classify_files
    from .models import find_model, load_model

    source, _ = find_model(options.model, options.token, shipped_models())
    model, processor = load_model(options.model, source, options.token)
    if processor is None:
        raise UserError(f"{options.model!r} has no image processor (preprocessor_config.json).")
    background = choose_background(options.background, read_background(processor))
    classifier = pipeline("image-classification", model=model, image_processor=processor)
    return (
        lambda files: (background, classify_files(classifier, files, background, options.top_k)),
        model.config.problem_type != "regression",
    )
