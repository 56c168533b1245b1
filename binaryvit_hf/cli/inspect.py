"""`binaryvit inspect`: describes a binary network in numbers and on a web page."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from binaryvit_runtime.errors import UserError, first_sentence, one_line
from binaryvit_runtime.progress import Progress, write_line
from binaryvit_runtime.resources import shipped_models
from binaryvit_runtime.sources import RUN_ARGUMENTS

from .common import add_token_argument, print_error


if TYPE_CHECKING:
    from binaryvit_hf.inspection.pictures import Pictures

EVALUATION_PICTURES = 64
EXAMPLE = "binaryvit inspect binaryvit-digits --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="binary model, packed or latent: folder, Hub id or name of a shipped model"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="HTML file to write, such as report.html; an earlier report is replaced",
    )
    parser.add_argument(
        "--images",
        metavar="IMAGE",
        nargs="+",
        help="image files, folders or patterns to measure activations and attention on, at most 256 of them (default: the "
        f"model's example pictures; without any, {EVALUATION_PICTURES} images that the run in this folder was evaluated on, if "
        "they are on this machine)",
    )
    add_token_argument(parser)


def run(options: argparse.Namespace) -> int:
    """
    Describe a binary network: costs, signs, attention, latent weights and learning curves.

    A summary is printed, and --out writes a web page with figures and all numbers. Latent weights need the folder of a
    training run or a latent checkpoint. A picture of --images that cannot be read gets an error line, and the exit code is
    then 1.
    """
    from binaryvit_hf.inspection.measurements import measure
    from binaryvit_hf.inspection.pictures import Pictures, choose_given
    from binaryvit_hf.inspection.records import read_records, records_folder
    from binaryvit_hf.inspection.report import Report, check_replaceable, write_report
    from binaryvit_hf.inspection.sources import example_pictures, files_folder, load_latent
    from binaryvit_hf.inspection.storage import file_bytes
    from binaryvit_hf.inspection.summary import summarize
    from binaryvit_hf.network.quantization_binaryvit import LATENT, QUANT_METHOD
    from binaryvit_runtime.image_files import list_images

    from .models import find_model, load_model

    if options.out is not None:
        check_replaceable(options.out)
    source, config = find_model(options.model, options.token, shipped_models())
    if config.model_type != QUANT_METHOD:
        raise UserError(f"{options.model!r} is a {config.model_type!r}; only binary networks can be inspected.")
    given, notes = list_images(options.images) if options.images else ([], [])
    model, processor = load_model(options.model, source, options.token)
    if given and processor is None:
        raise UserError(f"{options.model!r} has no image processor (preprocessor_config.json), which --images needs.")
    for note in notes:
        write_line(note)
    folder = files_folder(source, options.token)
    records = read_records(folder)
    pictures: Pictures | None = None
    if given:
        pictures = choose_given(given)
    elif processor is not None:
        pictures = example_pictures(folder)
        # Arguments of a stranger's run may name any dataset, or a folder that is another one here.
        if pictures is None and os.path.isdir(source):
            pictures = evaluation_pictures(records_folder(folder))
    latent = load_latent(model, source, options.token)
    learning_rates = [*records.learning_rates.values()]
    with Progress("Measuring the network"):
        measurements = measure(model, folder, latent, learning_rates, processor, pictures)
    report = Report(
        name_of(options.model),
        config,
        measurements,
        records,
        pictures,
        processor is not None,
        file_bytes(folder / LATENT),
    )
    if options.out is not None:
        write_report(report, options.out)
    print(summarize(report))
    faults = measurements.of_pictures.faults if measurements.of_pictures else []
    for fault in faults:
        if given:
            print_error(fault)
        else:  # nobody asked for this picture
            write_line(one_line(fault))
    if options.out is not None:
        print(f"\n{options.out}: open it in a browser.")
    return 1 if given and faults else 0


def name_of(model: str) -> str:
    """The name that a report shows: that of the Hub or of the folder, and of the run's folder for one of its folders."""
    if not os.path.exists(model):
        return model
    from binaryvit_hf.inspection.records import records_folder

    folder = Path(os.path.abspath(model))
    is_part = records_folder(folder) != folder
    return f"{folder.parent.name}/{folder.name}" if is_part else folder.name


def evaluation_pictures(folder: Path) -> "Pictures | None":
    """Pictures that the run in a folder was evaluated on. None if it is no folder of a run, or they cannot be loaded."""
    from binaryvit_hf.inspection.pictures import Pictures

    if not (folder / RUN_ARGUMENTS).is_file():
        return None
    try:
        from binaryvit_hf.training.example_image import evaluation_images

        images = evaluation_images(folder, EVALUATION_PICTURES, download=False)
    except Exception as error:  # datasets fail in many ways, and a report without pictures is still a report
        write_line(one_line(f"The evaluation images of the run cannot be loaded: {first_sentence(error)}"))
        return None
    return Pictures(images, len(images), "evaluation picture")
