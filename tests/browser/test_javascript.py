"""binaryvit.js under node: its logits are those of the engine in Python, bit for bit, and its answers Classifier's."""

import base64
import json

import numpy as np
import pytest
from node import WASM, run_node
from packed_model import edit_json, save_packed
from PIL import Image
from tiny import class_token_config, tiny_config

from binaryvit_runtime import Classifier
from binaryvit_runtime.architecture import Architecture, read_architecture, read_labels
from binaryvit_runtime.checkpoint import PREFIX, checkpoint_files, load_tensors
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.pixels import to_rgb
from binaryvit_runtime.resources import shipped_models


pytest.importorskip("wasmtime")
if not kernels_here():
    pytest.skip("the engine was not built", allow_module_level=True)

from wasm_engine import WasmEngine


LABELS = {0: "ant", 1: "bee", 2: "cat"}
TINY = {
    "two stages": lambda: tiny_config(id2label=LABELS),
    "a class token": lambda: class_token_config(id2label=LABELS),
    "float patches": lambda: tiny_config(binarize_patch_embeddings=False, problem_type="multi_label_classification"),
    "odd sizes": lambda: tiny_config(hidden_sizes=[9, 45], num_attention_heads=[3, 5], intermediate_sizes=[27, 810]),
    "one label": lambda: tiny_config(num_labels=1),
    "regression": lambda: tiny_config(problem_type="regression"),
}
SAVING = {"two stages": {"max_shard_size": 5_000}, "a class token": {"half": True}}
PICTURES = {
    "rgb": np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8),
    "rgba": np.random.default_rng(1).integers(0, 256, (64, 37, 4), np.uint8),
}
CLASSIFY = """
const answers = [];
for (const { folder, pictures } of given) {
  const model = await binaryvit.load(folder, { engine: wasm });
  for (const { pixels, width, height, options } of pictures) {
    const picture = { data: new Uint8Array(Buffer.from(pixels, "base64")), width, height };
    const values = model.preprocess(picture, options);
    const logits = model.computeLogits(values);
    answers.push({
      values: Buffer.from(values.buffer).toString("base64"),
      logits: Buffer.from(logits.buffer).toString("base64"),
      labels: await model.classify(picture, { topK: 3, ...options }),
      attention: Array.from({ length: model.numLayers }, (_, layer) => {
        const { values, ...sizes } = model.attention(picture, layer, options);
        return { ...sizes, values: Buffer.from(values.buffer).toString("base64") };
      }),
    });
  }
}
console.log(JSON.stringify(answers));
"""


def encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny = {name: save_packed(root / name, make(), **SAVING.get(name, {})) for name, make in TINY.items()}
    edit_json(tiny["odd sizes"] / "preprocessor_config.json", background="#ff8000")
    return {**tiny, **shipped_models()}


@pytest.fixture(scope="module")
def answers(folders):
    """By model, picture and background, what JavaScript computes."""
    cases, keys = [], []
    for name, folder in folders.items():
        pictures = []
        for kind, picture in PICTURES.items():
            for options in ({}, {"background": None}, {"background": "teal"}):
                height, width = picture.shape[:2]
                pictures.append({"pixels": encode(picture), "width": width, "height": height, "options": options})
                keys.append((name, kind, options.get("background", "model's")))
        cases.append({"folder": str(folder), "pictures": pictures})
    return dict(zip(keys, run_node(CLASSIFY, cases)))


@pytest.mark.parametrize("name", [*TINY, *shipped_models()])
def test_inputs_logits_attention_and_answers_are_those_of_python(name, folders, answers, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "scalar")  # which rounds as WebAssembly
    classifier = Classifier.from_pretrained(folders[name], threads=1)
    config = json.loads((folders[name] / "config.json").read_text())
    architecture, labels = read_architecture(config), read_labels(config)
    tensors = load_tensors(checkpoint_files(folders[name]), architecture, len(labels))
    engine = WasmEngine(WASM)
    model = engine.create(architecture, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
    for (of, kind, background), answer in answers.items():
        if of != name:
            continue
        colour = classifier.background if background == "model's" else background
        values = classifier.preprocessor(to_rgb(Image.fromarray(PICTURES[kind]), colour))
        np.testing.assert_array_equal(decode(answer["values"]), values.ravel())
        arguments = model, values[None], 1, 1, weight, bias, len(bias)
        logits = engine.compute("binaryvit_classify", *arguments, shape=(1, len(bias)))
        np.testing.assert_array_equal(decode(answer["logits"]), logits[0])
        check_attention(engine, model, architecture, values, answer["attention"])
        expected = classifier(PICTURES[kind], top_k=3, background=background)
        assert [each["label"] for each in answer["labels"]] == [each["label"] for each in expected]
        scores = [[each["score"] for each in labels] for labels in (answer["labels"], expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-7)


def check_attention(
    engine: WasmEngine, model: int, architecture: Architecture, image: np.ndarray, found: list
) -> None:
    stages = [stage for stage, depth in enumerate(architecture.depths) for _ in range(depth)]
    has_class_token = architecture.use_class_token
    for layer, (stage, attention) in enumerate(zip(stages, found, strict=True)):
        queries = list(architecture.grid_sizes[stage])
        keys = [side // architecture.sequence_reduction_ratios[stage] for side in queries]
        heads = architecture.num_attention_heads[stage]
        sizes = {"heads": heads, "queries": queries, "keys": keys, "hasClassToken": has_class_token}
        assert {name: attention[name] for name in sizes} == sizes
        shape = (heads, *(height * width + has_class_token for height, width in (queries, keys)))
        expected = engine.compute("binaryvit_attention", model, image, layer, shape=shape)
        np.testing.assert_array_equal(decode(attention["values"]), expected.ravel())
