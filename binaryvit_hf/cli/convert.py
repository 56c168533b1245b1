"""`binaryvit convert`: converts a checkpoint of the paper's public code to a model of transformers."""

import argparse
from pathlib import Path

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.progress import Progress
from binaryvit_runtime.resources import shipped_configs
from binaryvit_runtime.writing import new_folder


EXAMPLE = "binaryvit convert checkpoint.pth binaryvit-small --config binaryvit-small-patch4-224"
SIZE_OF_THE_PAPER = "-small-patch"  # in the names of its rows
TEACHER_ROW = "deit-small-patch16-224"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a .pth file of the paper's public code")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    rows = [row for row in sorted(shipped_configs()) if SIZE_OF_THE_PAPER in row]
    parser.add_argument(
        "--config", metavar="ROW", help=f"the checkpoint's network: {', '.join(rows)}, or a path (no default)"
    )
    parser.add_argument(
        "--teacher", action="store_true", help=f"the file holds a DeiT teacher; same as --config {TEACHER_ROW}"
    )


def run(options: argparse.Namespace) -> None:
    """
    Convert a checkpoint of the paper's public code to a model of transformers, and print the new name of every tensor.

    The file must be a .pth that the public code wrote. OUT then loads with `binaryvit pack`, `classify` and `from_pretrained`.
    """
    from binaryvit_hf.convert import convert_name, convert_original_state_dict, count_labels, load_original_checkpoint
    from binaryvit_hf.data.model_inputs import create_image_processor
    from binaryvit_hf.loading import build_classifier, check_finite
    from binaryvit_hf.ops import CONFIG_CLASSES, readable

    from .models import find_model

    if not options.config and not options.teacher:
        raise UserError(
            f"Name the network: --config with one of {', '.join(sorted(shipped_configs()))}; or --teacher."
        )
    if options.config and options.teacher:
        raise UserError(f"Give --config or --teacher, not both: --teacher is the same as --config {TEACHER_ROW}.")
    with new_folder(options.out) as folder:
        _, config = find_model(options.config or TEACHER_ROW, None, shipped_configs())
        with Progress(f"Reading {str(options.checkpoint)!r}"):
            state_dict = load_original_checkpoint(options.checkpoint)
        if config.model_type not in CONFIG_CLASSES:
            raise UserError(
                f"--config {options.config!r} is a {config.model_type!r}, which the public code does not train."
            )
        config.num_labels = count_labels(state_dict, otherwise=config.num_labels)
        try:
            converted = convert_original_state_dict(state_dict, config)
            model = build_classifier(config)
            model.load_state_dict(converted)
            check_finite(model)
        except ValueError as error:
            raise UserError(f"{str(options.checkpoint)!r} does not fit the config: {error}") from error
        with Progress("Writing the model"):
            model.save_pretrained(folder)
        create_image_processor(config, crop_pct=0.875).save_pretrained(folder)
    for name, tensor in state_dict.items():
        print(f"{name} -> {convert_name(name, config)} {list(tensor.shape)}")
    print(f"{options.out}: {counted(len(converted), 'tensor')}, {readable(model.num_parameters())} parameters")
