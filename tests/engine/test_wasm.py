"""The engine as WebAssembly, run by wasmtime, compared with the scalar kernels of this machine."""

import json
import platform
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import class_token_config, tiny_config, tiny_model

from binaryvit_hf import BinaryViTConfig
from binaryvit_runtime import engine
from binaryvit_runtime.architecture import read_architecture, read_labels
from binaryvit_runtime.checkpoint import load_tensors
from binaryvit_runtime.engine.library import Engine, count_differing_bits
from binaryvit_runtime.engine.preprocessing import Preprocessor


MODULE = Path(engine.__file__).with_name("binaryvit.wasm")
ROOT = Path(__file__).parents[2]
pytest.importorskip("wasmtime")
if not MODULE.is_file():
    pytest.skip(f"there is no {MODULE.name}", allow_module_level=True)
if not engine.kernels_here():
    pytest.skip(f"there is no engine: {engine.problem()}", allow_module_level=True)

from wasm_engine import KERNELS, WasmEngine  # noqa: E402  (imports wasmtime)


# x86's scalar kernels and WebAssembly's have no fused multiply-adds, so they round alike.
EXACT = platform.machine() in ("x86_64", "AMD64")
PREFIX = "binaryvit."


@pytest.fixture(scope="module")
def wasm() -> WasmEngine:
    return WasmEngine(MODULE)


def packed_tensors(config: BinaryViTConfig) -> dict[str, np.ndarray]:
    model = tiny_model(config).eval()
    model.pack_weights()
    tensors = model.binaryvit.state_dict().items()
    return {name: tensor.numpy() for name, tensor in tensors if tensor.dtype != torch.int64}


def random_images(config, batch: int = 2) -> np.ndarray:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return np.random.default_rng(1).normal(size=(batch, config.num_channels, height, width)).astype(np.float32)


def check_equal(actual: np.ndarray, expected: np.ndarray, flipped: float = 0) -> None:
    """`flipped`: the share of numbers that may differ where rounding differs and flips signs."""
    assert np.isfinite(actual).all()
    if EXACT:
        np.testing.assert_array_equal(actual, expected)
    else:
        assert (np.abs(actual - expected) > 1e-5 * np.abs(expected).max()).mean() <= flipped


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        class_token_config(),
        tiny_config(binarize_patch_embeddings=False),
        tiny_config(hidden_sizes=[9, 45], num_attention_heads=[3, 5], intermediate_sizes=[27, 810]),
    ],
)
def test_every_step_and_a_whole_forward_equal_the_scalar_kernels(wasm, config):
    tensors, images = packed_tensors(config), random_images(config)
    native, model = Engine(config, tensors, "scalar"), wasm.create(config, tensors)
    inputs = images
    for step, shape in enumerate(output_shapes(config)):
        expected = native.run_step(step, inputs, shape)
        check_equal(
            wasm.compute("binaryvit_run_step", model, step, inputs, 2, 1, shape=expected.shape), expected, 0.01
        )
        inputs = expected
    weight = np.random.default_rng(2).normal(size=(3, config.hidden_sizes[-1])).astype(np.float32)
    logits = wasm.compute("binaryvit_classify", model, images, 2, 1, weight, 0, 3, shape=(2, 3))
    assert np.allclose(logits, native.classify(images, weight, threads=1), rtol=1e-3 * (not EXACT), atol=0)
    wasm.call("binaryvit_free", model)


def output_shapes(config) -> list[tuple[int, int]]:
    """`(tokens, channels)` of each step's output."""
    shapes = []
    for stage, ((height, width), channels) in enumerate(zip(config.grid_sizes, config.hidden_sizes)):
        steps = config.depths[stage] + 1  # the stem or the patch embeddings, and the layers
        shapes += [(height * width + config.use_class_token, channels)] * steps
    return [*shapes, shapes[-1]]


@pytest.mark.parametrize("name", ["binaryvit-digits", "binaryvit-fashion-mnist"])
def test_a_shipped_model_gives_the_logits_of_the_scalar_kernels(wasm, name):
    folder = ROOT / "model_cards" / name
    config = json.loads((folder / "config.json").read_text())
    architecture = read_architecture(config)
    checkpoint = load_tensors([folder / "model.safetensors"], architecture, len(read_labels(config)))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in checkpoint.items() if key.startswith(PREFIX)}
    weight, bias = (checkpoint[f"classifier.{part}"] for part in ("weight", "bias"))
    images = random_images(architecture, batch=4)
    expected = Engine(architecture, tensors, "scalar").classify(images, weight, bias, threads=1)
    model = wasm.create(architecture, tensors)
    logits = wasm.compute("binaryvit_classify", model, images, 4, 1, weight, bias, len(bias), shape=expected.shape)
    if EXACT:
        np.testing.assert_array_equal(logits, expected)
    else:
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    wasm.call("binaryvit_free", model)


@pytest.mark.parametrize("config", [tiny_config(), class_token_config()])
def test_the_attention_of_every_layer_equals_the_scalar_kernels(wasm, config):
    tensors, images = packed_tensors(config), random_images(config, batch=1)
    native, model = Engine(config, tensors, "scalar"), wasm.create(config, tensors)
    for layer in range(sum(config.depths)):
        size = native.attention_size(layer)
        fields = wasm.compute("binaryvit_find_attention_size", model, layer, shape=(7,), dtype=np.int32)
        np.testing.assert_array_equal(fields, [getattr(size, name) for name, _ in size._fields_])
        expected = native.attention(images, layer)
        actual = wasm.compute("binaryvit_attention", model, images, layer, shape=expected.shape)
        check_equal(actual, expected, 0.01)
    assert wasm.call("binaryvit_attention", model, 0, sum(config.depths), 0) == 2
    wasm.call("binaryvit_free", model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-42])
def test_pixels_that_are_nan_infinite_or_subnormal_give_the_logits_of_the_scalar_kernels(wasm, value):
    config = tiny_config()
    tensors, images = packed_tensors(config), random_images(config, batch=1)
    images[0, 1, 3, 5] = value
    weight = np.ones((3, 16), np.float32)
    expected = Engine(config, tensors, "scalar").classify(images, weight, threads=1)
    model = wasm.create(config, tensors)
    logits = wasm.compute("binaryvit_classify", model, images, 1, 1, weight, 0, 3, shape=(1, 3))
    np.testing.assert_allclose(logits, expected, rtol=1e-3 * (not EXACT), atol=0)
    wasm.call("binaryvit_free", model)


@pytest.mark.parametrize("inputs", [1, 40, 288, 1000, 1024, 4096])
def test_counts_are_exact(wasm, inputs):
    rng, row_bytes = np.random.default_rng(inputs), (inputs + 7) // 8
    left, right = (rng.integers(0, 256, (rows, row_bytes), np.uint8) for rows in (11, 37))
    left[0], right[0] = 0, 255  # a row that differs in every bit
    for bits in (left, right):
        bits[:, -1] &= 255 >> -inputs % 8
    counts = wasm.compute("binaryvit_count", KERNELS, left, 11, right, 37, inputs, shape=(11, 37), dtype=np.int32)
    assert counts[0, 0] == inputs
    np.testing.assert_array_equal(counts, count_differing_bits("scalar", left, right, inputs))


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("height, width, pixel_bytes", [(97, 60, 3), (30, 300, 4), (8, 8, 3), (1, 500, 4)])
def test_pictures_are_preprocessed_bit_for_bit(wasm, height, width, pixel_bytes, resample):
    fields = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"shortest_edge": 37},
        "do_center_crop": True,
        "crop_size": {"height": 33, "width": 45},
        "resample": resample,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    preprocessor = Preprocessor(fields)
    # Black and white make a bicubic filter overshoot.
    picture = np.random.default_rng(height).choice([0, 255, 90], (height, width, pixel_bytes)).astype(np.uint8)
    size = preprocessor.output_size(height, width)
    expected = preprocessor(picture[:, :, :3])
    np.testing.assert_array_equal(wasm.pixel_values(preprocessor.processor, picture, size), expected)


@pytest.mark.parametrize("name", ["norm.batch_norm.bias", "embeddings.projection.weight"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_tensor_is_named_and_the_instance_goes_on(wasm, name, damage):
    config = tiny_config()
    tensors = packed_tensors(config)
    damaged = dict(tensors)
    tensor = damaged.pop(name)
    if damage == "short":
        damaged[name] = tensor.ravel()[:-1]
    message = "is missing" if damage == "missing" else f"has {tensor.nbytes - 4} bytes, not {tensor.nbytes}"
    with pytest.raises(ValueError, match=f"^tensor '{name}' {message}$"):
        wasm.create(config, damaged)
    wasm.call("binaryvit_free", wasm.create(config, tensors))


def test_memory_grows_and_is_used_again_after_it_is_freed():
    wasm = WasmEngine(MODULE)
    config = tiny_config(hidden_sizes=[128, 256], intermediate_sizes=[512, 1024], image_size=(128, 128))
    tensors, images, pages = packed_tensors(config), random_images(config, batch=1), [wasm.pages()]
    for damaged in (False, True, False, True, False):
        if damaged:
            with pytest.raises(ValueError):
                wasm.create(config, {**tensors, "norm.batch_norm.bias": np.zeros(1, np.float32)})
            continue
        model = wasm.create(config, tensors)
        weight = np.ones((1, 256), np.float32)
        wasm.compute("binaryvit_classify", model, images, 1, 1, weight, 0, 1, shape=(1, 1))
        wasm.call("binaryvit_free", model)
        pages.append(wasm.pages())
    assert pages[0] < pages[1] == pages[-1]


def test_the_module_needs_nothing_from_its_host(wasm):
    assert wasm.read_text(wasm.call("binaryvit_kernels")) == "wasm"


def test_the_module_was_built_from_these_sources():
    script = runpy.run_path(str(ROOT / ".ci" / "build_wasm.py"))
    built = MODULE.read_bytes().endswith(script["custom_section"](script["fingerprint"]().encode()))
    assert built, f"{MODULE.name} is older than its sources: run `python .ci/build_wasm.py` and commit the file"
