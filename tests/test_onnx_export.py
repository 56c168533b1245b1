"""ONNX files against PyTorch: logits, stored weights, preprocessing, other runtimes."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
)

from binaryvit_hf import onnx_export
from binaryvit_hf.data.known_datasets import FASHION_MNIST_FOLDER, read_idx
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.loading import load_classifier, load_image_processor
from binaryvit_hf.network import functional_binaryvit, modeling_binaryvit
from binaryvit_hf.network.packing_binaryvit import PackedLinear
from binaryvit_hf.onnx_export import describe_preprocessing, export_onnx
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.pixels import to_rgb, write_background
from binaryvit_runtime.resources import shipped_models


ONE_LAYER = {"depths": [1], "weight_bits": 4, "input_bits": 4}
NETWORKS = {  # config, and whether it is packed; tracing takes seconds a layer
    "latent pyramid, some full precision": (tiny_config(depths=[1, 1], binarize_patch_embeddings=False), False),
    "packed class token, 4 bits": (class_token_config(**ONE_LAYER), True),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """A model, its file and the sizes that the export returned."""
    config, packed = NETWORKS[request.param]
    model = tiny_model(config).eval()
    if packed:
        model.pack_weights()
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    processor = create_image_processor(config, crop_pct=1.0)
    write_background(processor, "#ffcc00")
    return model, file, export_onnx(model, processor, file)


def logits_of(file, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        *({"weight_bits": bits, "input_bits": bits} for bits in (1, 2, 4, 8)),
        *({"weight_bits": bits, "input_bits": 33 - bits} for bits in (1, 32)),
        {"avg_pool_kernel_sizes": [3, 7, 1]},
        {"avg_pool_kernel_sizes": []},
        {"use_layer_scale": False, "use_stem_norm": False},
        {"hidden_sizes": [8], "depths": [1], "num_attention_heads": [8], "intermediate_sizes": [8]}
        | {"sequence_reduction_ratios": [4], "num_labels": 1},
    ],
    ids=str,
)
def test_the_network_that_is_traced_gives_the_logits_of_the_model(changes, packed, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    model = tiny_model(tiny_config(**changes)).eval()
    if packed and model.config.weight_bits < 32:
        model.pack_weights()
    with torch.no_grad():
        expected = model(tiny_images()).logits
        torch.testing.assert_close(onnx_export.EvaluationNetwork(model)(tiny_images()), expected)


def test_onnxruntime_gives_pytorchs_logits_for_any_number_of_images(exported, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    model, file, _ = exported
    for batch in (0, 1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(logits_of(file, tiny_images(batch)), model(tiny_images(batch)).logits)


def test_openvino_gives_pytorchs_logits_for_any_number_of_images(exported, monkeypatch):
    openvino = pytest.importorskip("openvino")  # 180 MB: not among the packages that the tests install
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    model, file, _ = exported
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(file, "CPU", exact)
    for batch in (2, 5):
        with torch.no_grad():
            expected = model(tiny_images(batch)).logits
        torch.testing.assert_close(torch.from_numpy(compiled(tiny_images(batch).numpy())["logits"]), expected)


def test_every_quantised_weight_is_stored_in_int8(exported):
    model, file, sizes = exported
    graph = onnx.load(file).graph
    stored = [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.INT8]
    layers = [module for module in model.modules() if getattr(module, "weight_bits", 32) < 32]
    assert sum(levels.size for levels in stored) == sum(layer.in_features * layer.out_features for layer in layers)
    most = {4: 7, 1: 1}[model.config.weight_bits]
    assert {level for levels in stored for level in np.abs(levels).flatten()} <= set(range(most + 1))
    assert sizes.bytes == file.stat().st_size
    assert sizes.float_bytes - sizes.bytes == 3 * sum(levels.size for levels in stored)


def test_the_file_is_valid_and_has_the_names_and_the_opset_that_it_promises(exported):
    _, file, _ = exported
    proto = onnx.load(file)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version >= 18) for opset in proto.opset_import] == [("", True)]
    (images,), (logits,) = proto.graph.input, proto.graph.output
    shape = [dimension.dim_param or dimension.dim_value for dimension in images.type.tensor_type.shape.dim]
    assert (images.name, shape) == ("pixel_values", ["batch", 3, 16, 32])
    assert logits.name == "logits"
    assert b"site-packages" not in file.read_bytes()  # stack traces of this machine


PICTURE_SIZE = {"height": 16, "width": 32}
RESIZED = {"size": {"shortest_edge": 40}, "crop_size": PICTURE_SIZE}
PROCESSORS = {
    "resized and cropped": lambda: create_image_processor(tiny_config(), crop_pct=0.9),
    "resized": lambda: ViTImageProcessor(size=PICTURE_SIZE, resample=0),
    "not resized, not normalised": lambda: CLIPImageProcessor(**RESIZED, do_resize=False, do_normalize=False),
    "shortest edge": lambda: CLIPImageProcessor(**RESIZED),
    "no rescaling, one mean": lambda: ViTImageProcessor(
        size=PICTURE_SIZE, do_rescale=False, image_mean=0.5, image_std=2.0
    ),
    "BGR": lambda: MobileViTImageProcessor(**RESIZED),
}
STRANGE_PROCESSORS = {
    "padded": lambda: ViTImageProcessor(do_pad=True, pad_size={"height": 300, "width": 300}),
    "another size than it says": lambda: LevitImageProcessor(**RESIZED),
    "normalised twice": lambda: EfficientNetImageProcessor(size=PICTURE_SIZE, do_center_crop=False),
    "a share of the picture": ConvNextImageProcessor,
    "a limit of the longest edge": lambda: CLIPImageProcessor(
        size={"shortest_edge": 40, "longest_edge": 50}, crop_size=16
    ),
}


@pytest.mark.parametrize("size", [(42, 54), (9, 27)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_can_be_computed_from_the_metadata_alone(name, size):
    processor = PROCESSORS[name]()
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    picture = Image.fromarray(pixels)
    steps = {step: json.loads(value) for step, value in describe_preprocessing(processor).items()}
    ours = onnx_export.preprocess(picture, steps)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    rounding = 4 * (steps["rescale_factor"] or 1) / np.min(steps["std"] or 1)
    assert np.abs(ours - theirs).max() < rounding  # Pillow and torchvision round a pixel differently


@pytest.mark.parametrize("name", STRANGE_PROCESSORS)
def test_a_processor_that_the_metadata_cannot_describe_is_refused(name):
    with pytest.raises(UserError, match=r"ImageProcessor.* does more than the metadata of ONNX can describe"):
        describe_preprocessing(STRANGE_PROCESSORS[name]())


def test_labels_are_in_the_metadata_in_the_order_of_the_logits(exported):
    _, file, _ = exported
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(metadata["labels"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert json.loads(metadata["crop"]) == {"height": 16, "width": 32}
    assert json.loads(metadata["background"]) == "#ffcc00"


def test_the_description_says_what_the_network_is_and_how_to_prepare_its_input(exported):
    model, file, _ = exported
    bits = model.config.weight_bits
    expected = (
        f"BinaryViT, an image classifier of 3 classes with {bits}-bit weights and {bits}-bit inputs of its layers: it takes "
        "images of 16 x 32 pixels, prepared by the metadata background, channel_order, resize, resample, crop, "
        "rescale_factor, mean, std, in this order."
    )
    assert onnxruntime.InferenceSession(file).get_modelmeta().description == expected


@pytest.mark.parametrize("background", [None, "#ffcc00"])
def test_transparent_pictures_are_prepared_by_the_metadata_as_by_training(background):
    processor = create_image_processor(tiny_config(), crop_pct=1.0)
    write_background(processor, background)
    pixels = np.random.default_rng(0).integers(0, 255, (42, 54, 4), np.uint8)
    steps = {step: json.loads(value) for step, value in describe_preprocessing(processor).items()}
    ours = onnx_export.preprocess(Image.fromarray(pixels), steps)
    theirs = processor(to_rgb(Image.fromarray(pixels), background), return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - theirs).max() < 2 / 255 / min(steps["std"])


def test_a_network_larger_than_a_file_of_onnx_is_refused_before_it_is_traced(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="too large"):
        export_onnx(tiny_model(), None, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.half(), r"position_embeddings' is float16 on the device 'cpu': load .*float32"),
        (lambda model: model.to("meta"), "position_embeddings' is float32 on the device 'meta': load .*no device_map"),
        (lambda model: model.binaryvit.norm.register_forward_hook(lambda *_: None), "has hooks"),
    ],
)
def test_a_model_that_the_file_would_not_compute_is_refused(change, message, tmp_path):
    model = tiny_model()
    change(model)
    with pytest.raises(UserError, match=message):
        export_onnx(model, None, tmp_path / "model.onnx")


def test_a_file_that_the_checker_refuses_is_not_written(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise onnx.checker.ValidationError("bad")

    model = tiny_model(class_token_config())
    (tmp_path / "model.onnx").write_text("of before")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    monkeypatch.setattr(onnx_export, "trace", lambda network, shape: onnx.ModelProto())
    with pytest.raises(onnx.checker.ValidationError):
        export_onnx(model, None, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "of before"


def test_the_exported_model_is_not_changed(monkeypatch, tmp_path):
    model = tiny_model(class_token_config()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    onnx_export.EvaluationNetwork(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- 500 real images ----


@pytest.mark.parametrize("name", ["binaryvit-digits", pytest.param("binaryvit-fashion-mnist", marks=pytest.mark.slow)])
def test_a_shipped_model_classifies_500_images_like_pytorch(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    folder = shipped_models()[name]
    model, processor = load_classifier(folder), load_image_processor(folder)
    pictures = [Image.fromarray(pixels).convert("RGB") for pixels in read_pictures(name)[:500]]
    images = processor(pictures, return_tensors="pt")["pixel_values"]
    export_onnx(model, processor, tmp_path / "model.onnx")
    session = session_with_bits(tmp_path / "model.onnx")
    bits = record_bits(model, monkeypatch)

    same_bits, differences = [], []
    for batch in images.split(250):
        bits.clear()
        with torch.no_grad():
            expected = model(batch).logits
        logits, *exported_bits = map(torch.from_numpy, session.run(None, {"pixel_values": batch.numpy()}))
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        differences.append((logits - expected).abs().amax(1))
        flips = [(ours != (theirs > 0)).flatten(1).any(1) for ours, theirs in zip(bits, exported_bits, strict=True)]
        same_bits.append(~torch.stack(flips).any(0))
    same_bits, differences = torch.cat(same_bits), torch.cat(differences)
    assert same_bits.sum() >= 475
    assert differences[same_bits].max() < 1e-3


def read_pictures(name: str) -> np.ndarray:
    """Grey pictures of the kind that a shipped model classifies: `(pictures, height, width)`."""
    if name == "binaryvit-digits":
        return (load_digits().images * (255 / 16)).round().astype("uint8")
    if not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return read_idx(FASHION_MNIST_FOLDER / "t10k-images-idx3-ubyte.gz")


def record_bits(model, monkeypatch) -> list[torch.Tensor]:
    """A list to which each forward adds the bits of all activations, in order, each `(batch, ...)`."""
    bits = []

    def record_inputs(layer, inputs):
        shift = layer.shift.repeat_interleave(layer.in_features // layer.shift.shape[0])
        bits.append(inputs[0] + shift >= 0)

    def quantize_input(x, shift, *settings):
        bits.append(x + shift >= 0)
        return functional_binaryvit.quantize_input(x, shift, *settings)

    def quantize_probability(*arguments):
        quantized = functional_binaryvit.quantize_probability(*arguments)
        bits.append(quantized > 0)
        return quantized

    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_pre_hook(record_inputs)
    monkeypatch.setattr(modeling_binaryvit, "quantize_input", quantize_input)
    monkeypatch.setattr(modeling_binaryvit, "quantize_probability", quantize_probability)
    return bits


def session_with_bits(file) -> onnxruntime.InferenceSession:
    """Returns the logits, then the bits of all activations in the order of `record_bits`; a positive number is a 1."""
    proto = onnx.load(file)
    for node in proto.graph.node:
        if node.op_type in ("GreaterOrEqual", "Round"):
            kind = TensorProto.BOOL if node.op_type == "GreaterOrEqual" else TensorProto.FLOAT
            proto.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
