"""Pictures to `pixel_values` by the engine, without PyTorch: the numbers of transformers' ViTImageProcessor."""

import ctypes
import functools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from . import library


# Names in `image_processor_type` for which AutoImageProcessor loads ViTImageProcessor, with torchvision installed.
PROCESSOR_TYPES = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil")
OWN_CODE = "image_processing_binaryvit.BinaryViTImageProcessor"  # has the outputs of ViTImageProcessor
# The fields that transformers reads, and what it takes if they are absent. `null` is not absent.
DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 2,
    "do_center_crop": None,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": None,
    "device": None,
    "auto_map": None,
}
RESIZED_SIZES = (
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
    {"height", "width"},
)
RESAMPLES = (2, 3)
MAX_SIDE = 2**24  # as in preprocess.cpp
CHANNELS = 3
STORED_CHANNELS = 4  # Pillow stores four bytes a pixel in RGB


class ImageProcessor(ctypes.Structure):
    """The struct `binaryvit_image_processor` of engine.h."""

    _fields_ = [
        *library.fields(
            ctypes.c_int32,
            "resample shortest_edge longest_edge max_height max_width height width crop_height crop_width",
        ),
        *library.fields(ctypes.c_int32, "rescale normalize"),
        ("rescale_factor", ctypes.c_double),
        *library.fields(ctypes.c_double * CHANNELS, "mean std"),
    ]


class Picture(ctypes.Structure):
    """The struct `binaryvit_picture` of engine.h."""

    _fields_ = [
        ("pixels", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        *library.fields(ctypes.c_int32, "height width pixel_bytes"),
    ]


class ArrowArray(ctypes.Structure):
    """
    The struct `ArrowArray` of Arrow's C data interface, by which Pillow 11.2 and newer show the memory of a picture.

    A picture in RGB is a list of pixels of four bytes: its only child holds the bytes.
    """


ArrowArray._fields_ = [
    *library.fields(ctypes.c_int64, "length null_count offset n_buffers n_children"),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(ArrowArray))),
    *library.fields(ctypes.c_void_p, "dictionary release private_data"),
]


@functools.cache
def load_functions() -> tuple[Any, Any]:
    """`binaryvit_preprocessed_size` and `binaryvit_pixel_values`; raises `RuntimeError` without the library."""
    loaded = library.load_library()
    if isinstance(loaded, str):
        raise RuntimeError(f"The engine cannot preprocess pictures: {loaded}.")
    processor, length = ctypes.POINTER(ImageProcessor), ctypes.POINTER(ctypes.c_int32)
    size_of, preprocess = loaded.binaryvit_preprocessed_size, loaded.binaryvit_pixel_values
    size_of.argtypes = [processor, ctypes.c_int32, ctypes.c_int32, length, length]
    preprocess.argtypes = [processor, ctypes.POINTER(Picture), ctypes.c_void_p]
    return size_of, preprocess


class Preprocessor:
    """
    Computes `pixel_values` from pictures: resizes, crops the centre, rescales and normalises.

    The numbers are those of `AutoImageProcessor` of transformers, with torchvision on the CPU, bit for bit. Several
    threads may call one object at once. They compute without Python's global lock.

    Args:
        fields: the content of preprocessor_config.json. `do_convert_rgb` is not used, because pictures are RGB.

    Raises:
        ValueError: the file asks for another processor, or for a step that is not supported. The message names the
            field.
        RuntimeError: the engine was not built, or from other sources.
    """

    def __init__(self, fields: Mapping[str, Any]):
        self.size_of, self.preprocess = load_functions()
        self.processor = read_processor(fields)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """
        Height and width of the `pixel_values` of a picture of this height and width.

        Raises:
            ValueError: the picture is empty, or one of its sides would have no pixel after resizing.
        """
        sides = ctypes.c_int32(), ctypes.c_int32()
        if self.size_of(self.processor, height, width, *sides):
            raise ValueError(f"A picture of {width} x {height} pixels cannot be resized: it is too long or empty.")
        return sides[0].value, sides[1].value

    def __call__(self, picture, output: np.ndarray | None = None) -> np.ndarray:
        """
        Computes the `pixel_values` of one picture.

        Args:
            picture: uint8 `(height, width, 3)` in RGB, or a Pillow image of mode RGB.
            output: float32 `(3, *output_size(height, width))`, contiguous: where to write. Default: a new array.

        Returns:
            `output`.

        Raises:
            ValueError: the picture or the output has another shape or dtype, or see `output_size`.
            MemoryError: memory runs out.
        """
        pixels = view_pixels(picture)
        if pixels is None:
            pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != CHANNELS:
            raise ValueError(f"A picture must be uint8 (height, width, 3) in RGB, not {pixels.dtype} {pixels.shape}.")
        height, width = pixels.shape[:2]
        shape = (CHANNELS, *self.output_size(height, width))
        if output is None:
            output = np.empty(shape, np.float32)
        elif output.shape != shape or output.dtype != np.float32 or not output.flags.carray:
            raise ValueError(
                f"The output must be contiguous float32 {shape}, not {output.dtype} {output.shape} "
                f"with strides {output.strides}."
            )
        if pixels.strides[1:] not in ((CHANNELS, 1), (STORED_CHANNELS, 1)):
            pixels = pixels.copy()  # `np.ascontiguousarray` keeps the strides of an array with sides of 1
        if self.preprocess(
            self.processor,
            Picture(pixels.ctypes.data, pixels.strides[0], height, width, pixels.strides[1]),
            output.ctypes.data,
        ):
            raise MemoryError(f"Memory ran out while a picture of {width} x {height} pixels was resized.")
        return output


def view_pixels(picture) -> np.ndarray | None:
    """
    The memory of a JPEG that Pillow opened, uint8 `(height, width, 3)`. `np.asarray` would copy it, under Python's lock.

    Returns:
        `None` for any other picture, for one in several blocks of memory (above 16 MB), and before Pillow 11.2.
    """
    # Pillow 12 crashes where it shares an image without pixels, or one from `Image.fromarrow`. A JPEG is neither.
    if not (isinstance(picture, JpegImageFile) and picture.mode == "RGB" and hasattr(picture, "__arrow_c_array__")):
        return None
    try:
        _, capsule = picture.__arrow_c_array__()
    except ValueError:  # several blocks
        return None
    array = ArrowArray.from_address(capsule_pointer()(capsule, b"arrow_array"))
    width, height = picture.size
    number = width * height * STORED_CHANNELS
    if (array.length, array.offset, array.n_children) != (width * height, 0, 1):
        return None
    child = array.children[0].contents
    if (child.length, child.offset, child.n_buffers) != (number, 0, 2):
        return None
    memory = (ctypes.c_uint8 * number).from_address(child.buffers[1])
    memory.owner = capsule
    return np.frombuffer(memory, np.uint8).reshape(height, width, STORED_CHANNELS)[:, :, :CHANNELS]


@functools.cache
def capsule_pointer() -> Any:
    """`PyCapsule_GetPointer` of Python's C interface."""
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return function


def read_processor(fields: Mapping[str, Any]) -> ImageProcessor:
    """The steps of a preprocessor_config.json; raises `ValueError` for what is not supported."""
    kind = fields.get("image_processor_type")
    if kind not in PROCESSOR_TYPES:
        raise unsupported("image_processor_type", kind, "ViTImageProcessor")
    values = {**DEFAULTS, **fields}
    for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "default_to_square"):
        if not (values[name] is None or isinstance(values[name], bool)):
            raise unsupported(name, values[name], "true or false")
    for name, allowed in (("do_pad", (None, False)), ("device", (None, "cpu"))):
        if values[name] not in allowed:
            raise unsupported(name, values[name], "none")
    auto_map = values["auto_map"] or {}
    code = auto_map.get("AutoImageProcessor") if isinstance(auto_map, dict) else auto_map
    if code is not None and not (isinstance(code, str) and code.split("--")[-1] == OWN_CODE):
        raise unsupported("auto_map", auto_map, "none")
    if not (values["do_rescale"] or values["do_normalize"]):
        raise ValueError("do_rescale and do_normalize are both false: the network takes no 8-bit numbers.")
    processor = ImageProcessor(rescale_factor=1)
    if values["do_resize"]:
        read_resizing(values, processor)
    if values["do_center_crop"]:
        crop = sides_of("crop_size", values["crop_size"], square=True)
        if crop.keys() != {"height", "width"}:
            raise unsupported("crop_size", values["crop_size"], "height and width, from 1")
        processor.crop_height, processor.crop_width = crop["height"], crop["width"]
    processor.rescale, processor.normalize = bool(values["do_rescale"]), bool(values["do_normalize"])
    if values["do_rescale"]:
        processor.rescale_factor = number_of("rescale_factor", values["rescale_factor"], zero=False)
    if values["do_normalize"]:
        processor.mean[:] = numbers_of("image_mean", values["image_mean"], zero=True)
        processor.std[:] = numbers_of("image_std", values["image_std"], zero=False)
    return processor


def read_resizing(values: Mapping[str, Any], processor: ImageProcessor) -> None:
    resample = values["resample"]
    if type(resample) is not int or resample not in RESAMPLES:
        raise unsupported("resample", resample, "2 (bilinear) or 3 (bicubic)")
    processor.resample = resample
    sides = sides_of("size", values["size"], square=bool(values["default_to_square"]))
    if sides.keys() not in RESIZED_SIZES:
        raise unsupported("size", values["size"], "shortest_edge, max_height and max_width, or height and width")
    for name, length in sides.items():
        setattr(processor, name, length)


def sides_of(name: str, value, square: bool) -> dict[str, int]:
    """A size as names and numbers of pixels. One number is a square, or the shortest edge."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping):
        raise unsupported(name, value, "numbers of pixels by name")
    sides = {side: length for side, length in value.items() if length is not None}
    for length in sides.values():
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_SIDE:
            raise unsupported(name, value, f"numbers of pixels from 1 to {MAX_SIDE}")
    return sides


def numbers_of(name: str, value, zero: bool) -> list[float]:
    """One number for each channel, from one or from three."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) not in (1, CHANNELS):
        raise unsupported(name, value, "three numbers")
    return [number_of(name, item, zero) for item in items] * (CHANNELS // len(items))


def number_of(name: str, value, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise unsupported(name, value, "finite numbers")
    if value == 0 and not zero:
        raise unsupported(name, value, "numbers other than 0")
    return float(value)


def unsupported(name: str, value, supported: str) -> ValueError:
    return ValueError(f"{name} is {value!r}, which is not supported without transformers; supported: {supported}.")
