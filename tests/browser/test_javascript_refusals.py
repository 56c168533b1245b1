"""binaryvit.js refuses the damaged files and configs that Python's runtime refuses, in one sentence, and answers alike."""

import json
import random
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from config_changes import BOUNDS, CHANGES, LABELS, NAMES, OF_ANOTHER_TYPE, TINY, UNSUPPORTED
from damaged_models import JSON_TEXTS, METADATA, PROCESSORS, SHARDS, WEIGHTS, damage_file, rewrite, take_apart
from hypothesis import given, settings
from node import BROWSER, run_node
from old_layout import write_old_layout
from packed_model import edit_json, save_packed
from tiny import tiny_config

from binaryvit_runtime import Classifier, UnsupportedModelError, UserError
from binaryvit_runtime.architecture import Architecture, read_architecture, read_labels
from binaryvit_runtime.engine import kernels_here


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")
ANSWER, REFUSAL, UNSUPPORTED_MODEL = "answer", "refusal", "unsupported"
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
# What became of a case: whether it was refused and how, and the answer or the message.
ATTEMPT = """
async function attempt(work) {
  try {
    return { verdict: "answer", answer: await work() };
  } catch (error) {
    if (!(error instanceof binaryvit.BinaryViTError)) return { verdict: "fault", message: String(error.stack) };
    const isUnsupported = error instanceof binaryvit.UnsupportedModelError;
    return { verdict: isUnsupported ? "unsupported" : "refusal", message: error.message };
  }
}
"""
CLASSIFY = """
const engine = await WebAssembly.compile(readFileSync(wasm));
const results = [];
for (const folder of given.folders)
  results.push(
    await attempt(async () => {
      const model = await binaryvit.load(folder, { engine });
      return model.classify({ ...given.picture, data: Uint8Array.from(given.picture.data) });
    }),
  );
console.log(JSON.stringify(results));
"""
READ_CONFIGS = """
const { listTensors, readArchitecture, readLabels } = await import(given.folder + "/architecture.js");
const { parseJson } = await import(given.folder + "/json.js");
const results = [];
for (const text of given.configs)
  results.push(
    await attempt(() => {
      const config = parseJson(text);
      const architecture = readArchitecture(config);
      const fields = Object.entries(architecture.fields).map(([name, value]) => [name, value.value ?? value]);
      const tensors = Object.fromEntries(listTensors(architecture).map(({ name, shape }) => [name, shape]));
      return { fields: Object.fromEntries(fields), labels: readLabels(config), tensors, grid: architecture.gridSizes };
    }),
  );
console.log(JSON.stringify(results));
"""


def in_words_of_javascript(message: str) -> str:
    for python, javascript in (
        ("None", "null"),
        ("True", "true"),
        ("False", "false"),
        ("nan", "NaN"),
        ("inf", "Infinity"),
    ):
        message = message.replace(python, javascript)
    return message


class Cases:
    """Folders of damaged models, by name."""

    def __init__(self, root: Path):
        self.root, self.names = root, []

    def add(self, name: str, source: Path, damage=lambda folder: None) -> None:
        folder = self.root / f"case-{len(self.names)}"
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.name != "README.md":
                shutil.copyfile(file, folder / file.name)
        damage(folder)
        self.names.append(name)

    def folders(self) -> list[Path]:
        return [self.root / f"case-{number}" for number in range(len(self.names))]


def by_python(folder: Path) -> dict:
    try:
        return {"verdict": ANSWER, "answer": Classifier.from_pretrained(folder, threads=1)(PICTURE)}
    except UnsupportedModelError as error:
        return {"verdict": UNSUPPORTED_MODEL, "message": str(error)}
    except UserError as error:
        return {"verdict": REFUSAL, "message": str(error)}


def by_javascript(folders: list[Path]) -> list[dict]:
    picture = {"data": PICTURE.ravel().tolist(), "width": PICTURE.shape[1], "height": PICTURE.shape[0]}
    return run_node(ATTEMPT + CLASSIFY, {"folders": [str(folder) for folder in folders], "picture": picture})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("model"), tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))


@pytest.fixture(scope="module")
def outcomes(shelf, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """What Python and JavaScript say, by case."""
    root = tmp_path_factory.mktemp("cases")
    (root / "cases").mkdir()
    cases = Cases(root / "cases")
    shelves = {"1": write_old_layout(shutil.copytree(shelf, root / "old")), "2": shelf}
    half = save_packed(root / "half", half=True)
    cases.add("undamaged", shelf)
    cases.add("undamaged, format 1", shelves["1"])
    cases.add("undamaged, one tensor apart", shelf, lambda folder: rewrite(folder, take_apart, True))
    cases.add("undamaged, half precision", half)
    cases.add("undamaged, half precision, one tensor apart", half, lambda folder: rewrite(folder, take_apart, True))
    cases.add("undamaged, format 1, half precision", half, lambda folder: write_old_layout(folder, half=True))
    for number, source in shelves.items():
        for name, (damage, _) in WEIGHTS[number].items():
            cases.add(f"weights of {number}: {name}", source, lambda folder, damage=damage: rewrite(folder, *damage))
        for name, changes in METADATA[number].items():
            cases.add(
                f"metadata of {number}: {name}", source, lambda folder, changes=changes: rewrite(folder, **changes)
            )
    for changes in PROCESSORS:
        cases.add(
            f"processor: {changes}",
            shelf,
            lambda folder, changes=changes: edit_json(folder / "preprocessor_config.json", **changes),
        )
    square = save_packed(root / "square", tiny_config(image_size=32))
    edit_json(square / "preprocessor_config.json", size={"shortest_edge": 32}, do_center_crop=False)
    cases.add("processor: of square pictures alone", square)
    for changes in CONFIGS:
        cases.add(
            f"config: {changes}", shelf, lambda folder, changes=changes: edit_json(folder / "config.json", **changes)
        )
    for file in FILES:
        cases.add(f"missing: {file}", shelf, lambda folder, file=file: (folder / file).unlink())
    for file in FILES[:2]:
        for text in JSON_TEXTS:
            content = text if isinstance(text, bytes) else text.encode()
            cases.add(
                f"{file}: {content[:20]!r}",
                shelf,
                lambda folder, file=file, content=content: (folder / file).write_bytes(content),
            )
    for name, content in {"adapter_config.json": "{}", "processor_config.json": "{}"}.items():
        cases.add(
            f"more: {name}", shelf, lambda folder, name=name, content=content: (folder / name).write_text(content)
        )
    shards = save_packed(root / "shards", tiny_config(), max_shard_size=5_000)
    names = sorted(file.name for file in shards.glob("model-*.safetensors"))
    cases.add("shards: undamaged", shards)
    for name, damage in SHARDS.items():
        cases.add(f"shards: {name}", shards, lambda folder, damage=damage: damage(folder, names))
    for name, damage in HEADERS.items():
        cases.add(f"header: {name}", shelf, lambda folder, damage=damage: edit_header(folder, damage))
    for seed in range(150):
        source = shelves["1" if seed < 50 else "2"]
        cases.add(f"random: {seed}", source, lambda folder, seed=seed: damage_file(folder, random.Random(seed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BINARYVIT_ENGINE", "scalar")  # which rounds as WebAssembly
        expected = [by_python(folder) for folder in cases.folders()]
    return dict(zip(cases.names, zip(expected, by_javascript(cases.folders()))))


CONFIGS = [
    {"depths": [1, 1]},
    {"batch_norm_eps": 1e-3},
    {"image_size": [32, 16]},
    {"use_layer_scale": False},
    {"id2label": {"0": "ant", "1": "bee"}},
    {"problem_type": "regression"},
    {"problem_type": "multi_label_classification"},
    {"quantization_clip_value": 2.25},
    {"quantization_clip_value": 3},
]


def edit_header(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, body = edit(content[8:start].decode(), content[start:])
    header = header if isinstance(header, bytes) else header.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def edit_first(change):
    def edit(header: str, body: bytes):
        fields = json.loads(header)
        name = min((name for name in fields if name != "__metadata__"), key=lambda name: fields[name]["data_offsets"])
        change(fields, name)
        return json.dumps(fields), body

    return edit


def move_offsets(fields, name) -> None:
    fields[name]["data_offsets"] = [offset + 4 for offset in fields[name]["data_offsets"]]


HEADERS = {
    "spaces around": lambda header, body: (f"  {header}\n ", body),
    "a nought after": lambda header, body: (header + "\0", body),
    "no UTF-8": lambda header, body: (header.encode().replace(b"binaryvit", b"binaryv\xff", 1), body),
    "a byte more": lambda header, body: (header, body + b"\0"),
    "a byte less": lambda header, body: (header, body[:-1]),
    "a byte order mark": lambda header, body: ("\ufeff" + header, body),
    "overlapping tensors": edit_first(move_offsets),
    "an unknown dtype": edit_first(lambda fields, name: fields[name].update(dtype="F31")),
    "another dtype of this size": edit_first(lambda fields, name: fields[name].update(dtype="I32")),
    "bfloat16": edit_first(lambda fields, name: fields[name].update(dtype="BF16", shape=[2, *fields[name]["shape"]])),
    "a float as shape": edit_first(lambda fields, name: fields[name].update(shape=[1.0])),
    "a huge shape": edit_first(lambda fields, name: fields[name].update(shape=[2**63, 2**63])),
    "a huge shape of nothing": edit_first(lambda fields, name: fields[name].update(shape=[2**63, 2**63, 0])),
    "a shape below zero": edit_first(lambda fields, name: fields[name].update(shape=[-1, -1])),
    "no shape": edit_first(lambda fields, name: fields[name].pop("shape")),
    "no tensor": edit_first(lambda fields, name: fields.update({name: None})),
    "one more field": edit_first(lambda fields, name: fields[name].update(note="x")),
    "metadata of numbers": edit_first(lambda fields, name: fields["__metadata__"].update(note=1)),
    "no metadata": edit_first(lambda fields, name: fields.pop("__metadata__")),
    "NaN": edit_first(lambda fields, name: fields[name].update(note=float("nan"))),
    "half of a surrogate pair": edit_first(lambda fields, name: fields["__metadata__"].update(note="\ud800")),
    "a whole surrogate pair": edit_first(lambda fields, name: fields["__metadata__"].update(note="\U0001f600")),
    "a tensor called __proto__": edit_first(lambda fields, name: fields.update({"__proto__": fields.pop(name)})),
    "nested": lambda header, body: ("[" * 100_000, body),
    "a length beyond the file": lambda header, body: (header, body[: -len(body)]),
    "empty": lambda header, body: ("", body),
}


def test_an_undamaged_model_answers_and_damages_are_refused(outcomes):
    python = [expected["verdict"] for expected, _ in outcomes.values()]
    whole = [outcome for name, outcome in outcomes.items() if name.startswith("undamaged")]
    assert [javascript["verdict"] for _, javascript in whole] == 6 * [ANSWER]
    assert whole[0] == whole[1] == whole[2]
    assert whole[3] == whole[4] == whole[5]
    assert outcomes["shards: undamaged"][1]["verdict"] == ANSWER
    assert "(3, 32, 48)" in outcomes["processor: of square pictures alone"][1]["message"]  # of the trial picture
    assert python.count(REFUSAL) > 150
    assert python.count(UNSUPPORTED_MODEL) > 15
    assert python.count(ANSWER) > 15


def test_verdicts_and_answers_are_those_of_python(outcomes):
    wrong = {name: pair for name, pair in outcomes.items() if not are_alike(*pair)}
    assert wrong == {}


def are_alike(expected: dict, actual: dict) -> bool:
    if expected["verdict"] != actual["verdict"]:
        return False
    if actual["verdict"] != ANSWER:
        return True
    pairs = list(zip(expected["answer"], actual["answer"], strict=True))
    return all(a["label"] == b["label"] and abs(a["score"] - b["score"]) < 1e-6 for a, b in pairs)


def test_messages_are_one_sentence(outcomes):
    for name, (_, actual) in outcomes.items():
        if actual["verdict"] != ANSWER:
            message = actual["message"]
            assert len(message.splitlines()) == 1 and message.endswith(".") and len(message) < 1500, (name, message)
            assert "    at " not in message, (name, message)


@pytest.mark.parametrize("number, name", [(each, name) for each in WEIGHTS for name in WEIGHTS[each]])
def test_damaged_weights_are_refused_in_the_words_of_python(number, name, outcomes):
    expected, actual = outcomes[f"weights of {number}: {name}"]
    assert WEIGHTS[number][name][1] in actual["message"]
    assert actual["message"] == in_words_of_javascript(expected["message"])


def random_configs() -> list[dict]:
    """Configs that hypothesis draws, the same in every run."""
    found = []

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(changes=CHANGES)
    def draw(changes):
        found.append(TINY | changes)

    draw()
    return found


@pytest.fixture(scope="module")
def configs() -> list[dict]:
    without_labels = {name: value for name, value in TINY.items() if name != "label2id"}
    return [
        *(TINY | changes for changes in BOUNDS),
        *(without_labels | changes for changes in LABELS.values()),
        *(TINY | changes for changes, _ in UNSUPPORTED),
        *(TINY | {name: value} for name in NAMES for value in OF_ANOTHER_TYPE),
        *random_configs(),
    ]


def read_by_python(text: str) -> dict:
    config = json.loads(text)
    try:
        architecture = read_architecture(config)
    except UnsupportedModelError as error:
        return {"verdict": UNSUPPORTED_MODEL, "message": str(error)}
    except UserError as error:
        return {"verdict": REFUSAL, "message": str(error)}
    answer = {
        "fields": {field.name: getattr(architecture, field.name) for field in fields(Architecture)},
        "labels": read_labels(config),
        "tensors": architecture.tensors(),
        "grid": architecture.grid_sizes,
    }
    return {"verdict": ANSWER, "answer": json.loads(json.dumps(answer))}


def test_configs_are_read_and_refused_as_python_does(configs):
    texts = [json.dumps(config) for config in configs]
    actual = run_node(ATTEMPT + READ_CONFIGS, {"configs": texts, "folder": str(BROWSER)})
    expected = [read_by_python(text) for text in texts]
    verdicts = [each["verdict"] for each in expected]
    assert min(verdicts.count(verdict) for verdict in (ANSWER, REFUSAL, UNSUPPORTED_MODEL)) > 50
    for text, python, javascript in zip(texts, expected, actual):
        assert javascript["verdict"] == python["verdict"], text
        assert javascript.get("answer") == python.get("answer"), text
        if "message" in python:
            assert names_in(javascript["message"]) == names_in(python["message"]), text


def names_in(message: str) -> set[str]:
    """The fields that a message names."""
    return {word for word in NAMES if word in message.replace("=", " ").split(" not ")[0].split()}
