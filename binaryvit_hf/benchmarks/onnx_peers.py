"""Networks in onnxruntime, peers for `inference`: timm's in float32 and in 8 bits, and ours as `binaryvit export` writes it."""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from binaryvit_runtime.progress import Progress

from ..loading import load_classifier
from ..onnx_export import export_onnx


NETWORKS = {  # name in timm: whether it also competes in float32
    "deit_small_patch16_224": True,
    "mobilenetv2_100": False,
    "resnet18": False,
}
IMAGE_SHAPE = (3, 224, 224)
CALIBRATION_IMAGES = 4


class RandomImages(CalibrationDataReader):
    """Calibration images for the scales of activations. Weights are random, so images may be, too."""

    def __init__(self):
        generator = np.random.default_rng(0)
        images = generator.standard_normal((CALIBRATION_IMAGES, 1, *IMAGE_SHAPE), np.float32)
        self.batches = iter([{"images": image} for image in images])

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def export_networks(
    folder: Path, only_int8: bool = False, networks: dict[str, bool] | None = None
) -> list[tuple[str, str, Path]]:
    """
    Export all networks, or those that compete only in int8.

    Args:
        networks: by default `NETWORKS`.

    Returns:
        The first arguments of a `Competitor`: name of the network, engine, file.
    """
    networks = NETWORKS if networks is None else networks
    networks = {name: in_float for name, in_float in networks.items() if not (only_int8 and in_float)}
    logging.disable(logging.WARNING)  # the exporters warn for almost every tensor
    try:
        exported = []
        for name, in_float in networks.items():
            # Not logged: logging is off.
            with Progress(f"exporting {name} to ONNX, and quantising it to int8"):
                exported += export_network(name, in_float, folder)
        return exported
    finally:
        logging.disable(logging.NOTSET)


def export_network(name: str, in_float: bool, folder: Path) -> list[tuple[str, str, Path]]:
    float32, prepared, int8 = (folder / f"{name}.{kind}.onnx" for kind in ("float32", "prepared", "int8"))
    export_float32(name, float32)
    quant_pre_process(float32, prepared, skip_symbolic_shape=True)
    # The instructions of x86 multiply unsigned activations by signed weights.
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, int8, RandomImages(), per_channel=True, **types)
    exported = [(name, "onnxruntime float32", float32), (name, "onnxruntime int8", int8)]
    return exported if in_float else exported[1:]


def export_float32(name: str, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            timm.create_model(name).eval(),
            (torch.randn(2, *IMAGE_SHAPE),),
            file,
            input_names=["images"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def export_packed(folder: Path) -> Path:
    """Export the packed model in a folder."""
    file = folder / "model.onnx"
    with Progress("exporting the packed model to ONNX"):
        export_onnx(load_classifier(folder), None, file)
    return file


def load_onnx(file: Path, threads: int) -> Callable[[int], list]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    generator = np.random.default_rng(0)
    create_images = functools.cache(lambda size: generator.standard_normal((size, *images.shape[1:]), np.float32))
    return lambda batch_size: session.run(None, {images.name: create_images(batch_size)})
