"""`binaryvit pack`: packs latent weights into a checkpoint of single bits."""

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.progress import Progress
from binaryvit_runtime.resources import shipped_models
from binaryvit_runtime.sources import RUN_ARGUMENTS
from binaryvit_runtime.writing import new_folder

from .card import write_card_if_possible
from .common import add_token_argument


if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE = "binaryvit pack binaryvit-digits digits-half --half"
PICTURES = ("learning_curves.png", "confusion_matrix.png")  # of the end of a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder, Hub id or name of a shipped model, with latent or packed weights"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--half",
        action="store_true",
        help="store float tensors in half precision if their values fit it (default: float32)",
    )
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """
    Make a model smaller: write its binary weights with 1 bit each, or with as many bits as its config says.

    Training writes a packed model already. This command packs latent float weights (the folder latent of a run), or packs
    a model again with --half. The outputs of a 1-bit model stay the same; with --half they change slightly.
    """
    from binaryvit_hf.network.quantization_binaryvit import QUANT_METHOD, BinaryViTQuantizationConfig
    from binaryvit_hf.ops import readable

    from .models import find_model, load_model

    with new_folder(options.out) as folder:
        source, config = find_model(options.model, options.token, shipped_models())
        if config.model_type != QUANT_METHOD:
            raise UserError(f"{options.model!r} is a {config.model_type!r}; only binary networks can be packed.")
        latent = getattr(config, "quantization_config", None) is None
        packing = {"quantization_config": BinaryViTQuantizationConfig()} if latent else {}
        model, processor = load_model(options.model, source, options.token, **packing)
        model.config.quantization_config.half = options.half
        with Progress("Writing the packed weights"):
            model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        copy_run_files(source, folder)
        write_card_if_possible(folder, str(options.out))
    print(f"{options.out}: {readable(sum(file.stat().st_size for file in options.out.glob('*.safetensors')), 'B')}")
    if options.half:
        print(describe_half(model))


def describe_half(model: "PreTrainedModel") -> str:
    """Which float tensors of a model `--half` has left as they were."""
    from binaryvit_hf.network.quantization_binaryvit import in_half

    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    kind = str(model.dtype).removeprefix("torch.")
    if model.dtype.itemsize == 2:
        return f"The float tensors stay in {kind}, which takes no more bytes than half precision."
    wide = [name for name, tensor in floats.items() if not in_half(name, tensor)]
    summary = (
        f"Out of the range of half precision, so in {kind}: {len(wide)} of {counted(len(floats), 'float tensor')}"
    )
    return "\n  ".join([f"{summary}:", *wide]) if wide else f"{summary}."


def copy_run_files(source: str, folder: Path) -> None:
    """
    Copy the records of a local training run, from which the model card is made. Those of a checkpoint end with its step.
    """
    from binaryvit_hf.inspection.records import find_checkpoint, read_records, records_folder
    from binaryvit_hf.run_history import ALL_RESULTS, EVALUATION_IMAGES, TRAINER_STATE, TRAINING_IMAGES

    run_folder, checkpoint = records_folder(Path(source)), find_checkpoint(Path(source))
    files = [run_folder / RUN_ARGUMENTS, (checkpoint or run_folder) / TRAINER_STATE]
    if checkpoint is None:
        files += [run_folder / name for name in (*PICTURES, ALL_RESULTS, TRAINING_IMAGES)]
    else:
        records = read_records(checkpoint)
        results = records.results | {EVALUATION_IMAGES: records.history.evaluation_images}
        (folder / ALL_RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for file in files:
        if file.is_file():
            shutil.copy(file, folder)
