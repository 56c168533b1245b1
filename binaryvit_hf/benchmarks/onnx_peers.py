"""Networks in onnxruntime, peers for `inference`: timm's in float32 and in 8 bits, and ours as `binaryvit export` writes it."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from binaryvit_runtime.progress import Progress

from ..loading import load_classifier
from ..network.functional_binaryvit import HAS_BYTE_PRODUCTS
from ..onnx_export import export_onnx


NETWORKS = {  # name in timm: whether it also competes in float32
    "deit_small_patch16_224": True,
    "mobilenetv2_100": False,
    "resnet18": False,
}
IMAGE_SHAPE = (3, 224, 224)
CALIBRATION_IMAGES = 4
FLOAT32, INT8 = "onnxruntime float32", "onnxruntime int8"


class CalibrationImages(CalibrationDataReader):
    """
    Batches of images for the ranges of activations.

    Args:
        batches: `pixel_values` `(batch, channels, height, width)`, float32.
    """

    def __init__(self, batches: Iterable[np.ndarray]):
        self.batches = ({"images": batch} for batch in batches)

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
    exported = []
    with hide_warnings():
        for name, in_float in networks.items():
            # Not logged: logging is off.
            with Progress(f"exporting {name} to ONNX, and quantising it to int8"):
                exported += export_network(name, in_float, folder)
    return exported


@contextlib.contextmanager
def hide_warnings() -> Iterator[None]:
    """Hide what exporters and quantisers log: they warn of almost every tensor."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def export_network(name: str, in_float: bool, folder: Path) -> list[tuple[str, str, Path]]:
    float32, int8 = (folder / f"{name}.{kind}.onnx" for kind in ("float32", "int8"))
    export_float32(timm.create_model(name), IMAGE_SHAPE, float32)
    # Weights are random, so images may be, too.
    shape = (CALIBRATION_IMAGES, 1, *IMAGE_SHAPE)
    quantize(float32, int8, np.random.default_rng(0).standard_normal(shape, np.float32))
    exported = [(name, FLOAT32, float32), (name, INT8, int8)]
    return exported if in_float else exported[1:]


def export_float32(network: nn.Module, image_shape: tuple[int, int, int], file: Path) -> None:
    """Write a network as ONNX: input `images` `(batch, *image_shape)`, any size of the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.randn(2, *image_shape),),
            file,
            input_names=["images"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def quantize(float32: Path, int8: Path, calibration: Iterable[np.ndarray]) -> None:
    """
    Write a network in 8 bits: one scale for each channel of a weight, ranges of activations from the calibration images.

    Weights have 7 bits on CPUs without byte products (VNNI).
    """
    prepared = int8.with_suffix(".prepared.onnx")
    quant_pre_process(float32, prepared, skip_symbolic_shape=True)
    # The instructions of x86 multiply unsigned activations by signed weights.
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    # Without VNNI, x86 adds two products in 16 bits. With weights of 8 bits the sum overflows, which costs points of accuracy.
    quantize_static(
        prepared, int8, CalibrationImages(calibration), per_channel=True, reduce_range=not HAS_BYTE_PRODUCTS, **types
    )
    prepared.unlink()


def export_packed(folder: Path) -> Path:
    """Export the packed model in a folder."""
    file = folder / "model.onnx"
    with Progress("exporting the packed model to ONNX"):
        export_onnx(load_classifier(folder), None, file)
    return file


def open_session(file: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A network that is ready to run on the CPU. 0 threads are one for each core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def load_onnx(file: Path, threads: int) -> Callable[[int], list]:
    session = open_session(file, threads)
    (images,) = session.get_inputs()
    generator = np.random.default_rng(0)
    create_images = functools.cache(lambda size: generator.standard_normal((size, *images.shape[1:]), np.float32))
    return lambda batch_size: session.run(None, {images.name: create_images(batch_size)})
