"""`binaryvit export`: writes a model as ONNX."""

import argparse
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.progress import Progress, write_line
from binaryvit_runtime.resources import shipped_models
from binaryvit_runtime.writing import check_writable_file

from .common import add_token_argument, needs_extra


EXAMPLE = "binaryvit export binaryvit-digits digits.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="binary model: folder, Hub id or name of a shipped model")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, such as model.onnx")
    add_token_argument(parser)


def run(options: argparse.Namespace) -> None:
    """
    Write a model as an ONNX file, for other runtimes.

    They compute it in floats, more slowly than the engine. Weights are stored in int8; labels and preprocessing are in the
    file's metadata. It takes half a minute or more. Needs `pip install '.[export]'` in a clone.
    """
    if options.out.suffix != ".onnx":
        raise UserError(f"OUT must end in .onnx, not {str(options.out)!r}.")
    check_writable_file(options.out)
    with needs_extra("export", "Exports to ONNX"):
        from binaryvit_hf.onnx_export import OPSET, export_onnx
    import torch

    from binaryvit_hf.network.quantization_binaryvit import QUANT_METHOD
    from binaryvit_hf.ops import readable

    from .models import find_model, load_model

    source, config = find_model(options.model, options.token, shipped_models())
    if config.model_type != QUANT_METHOD:
        raise UserError(f"{options.model!r} is a {config.model_type!r}; only binary networks can be exported.")
    model, processor = load_model(options.model, source, options.token, dtype=torch.float32)
    if processor is None:
        note = f"{options.model!r} has no image processor, so the file does not describe the preprocessing."
        write_line(note)
    with Progress("Exporting: the network is traced and checked"):
        file = export_onnx(model, processor, options.out)
    print(f"{options.out}: {readable(file.bytes, 'B')} ({readable(file.float_bytes, 'B')} in float32), opset {OPSET}")
