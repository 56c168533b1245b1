"""Peers of benchmarks that run in onnxruntime: made of timm's networks, in float32 and quantised to 8 bits."""

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


NETWORKS = {  # names in timm, and whether they compete in float32, too
    "deit_small_patch16_224": True,
    "mobilenetv2_100": False,
    "resnet18": False,
}
IMAGE_SHAPE = (3, 224, 224)
CALIBRATION_IMAGES = 4


class RandomImages(CalibrationDataReader):
    """What activations are scaled by; of random weights, real images would tell no more."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.images = iter(generator.standard_normal((CALIBRATION_IMAGES, 1, *IMAGE_SHAPE), np.float32))

    def get_next(self) -> dict | None:
        images = next(self.images, None)
        return None if images is None else {"images": images}


def write_onnx(folder: Path) -> list[tuple[str, str, Path]]:
    """Files for `load_onnx`: name of the network, what runs it, and where it is."""
    logging.disable(logging.WARNING)  # every tensor has something to be said of
    try:
        return [file for name, in_float in NETWORKS.items() for file in write_network(name, in_float, folder)]
    finally:
        logging.disable(logging.NOTSET)


def write_network(name: str, in_float: bool, folder: Path) -> list[tuple[str, str, Path]]:
    floats, prepared, small = (folder / f"{name}.{kind}.onnx" for kind in ("float32", "prepared", "int8"))
    export(name, floats)
    quant_pre_process(floats, prepared, skip_symbolic_shape=True)
    # Unsigned activations are what the instructions of x86 multiply by signed weights.
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, small, RandomImages(), per_channel=True, **types)
    in_bytes = (name, "onnxruntime int8", small)
    return [(name, "onnxruntime float32", floats), in_bytes] if in_float else [in_bytes]


def export(name: str, file: Path) -> None:
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


def load_onnx(file: Path, threads: int) -> Callable[[int], list]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    images = generator.standard_normal((1, *IMAGE_SHAPE), np.float32)

    def compute(batch_size: int) -> list:
        nonlocal images
        if len(images) != batch_size:
            images = generator.standard_normal((batch_size, *IMAGE_SHAPE), np.float32)
        return session.run(None, {"images": images})

    return compute
