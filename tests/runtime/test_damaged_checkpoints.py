"""The runtime and PyTorch refuse the same damaged files, each in one sentence that names the tensor, field or file."""

import random
import shutil

import numpy as np
import pytest
from command_line import assert_refused
from packed_model import edit_json, save_packed
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import tiny_config
from transformers import pipeline

from binaryvit_cli import main
from binaryvit_cli.models import find_model, load_model
from binaryvit_runtime import Classifier, UnsupportedModelError, UserError
from binaryvit_runtime.checkpoint import checksum
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.errors import LINE_LENGTH, one_line
from binaryvit_runtime.resources import shipped_models


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("model"), tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))


@pytest.fixture
def folder(shelf, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(shelf / name, copy)
    return copy


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("photos") / "a.png"
    PICTURE.save(file)
    return file


def by_pytorch(folder) -> list[dict] | None:
    """The answer to `PICTURE`, or `None` if the model is refused."""
    try:
        source, _ = find_model(str(folder), None, shipped_models())
        model, processor = load_model(str(folder), source, None)
    except UserError:
        return None
    return (
        None
        if processor is None
        else pipeline("image-classification", model=model, image_processor=processor)(PICTURE)
    )


def by_runtime(folder) -> list[dict] | None:
    """
    The answer to `PICTURE`, or `None` if the model is refused.

    Raises:
        UnsupportedModelError: PyTorch decides.
    """
    try:
        return Classifier.from_pretrained(folder, threads=1)(PICTURE)
    except UnsupportedModelError as error:
        assert repr(str(folder)) in str(error)
        raise
    except UserError as error:
        assert repr(str(folder)) in str(error)
        assert len(one_line(str(error))) <= LINE_LENGTH
        return None


def assert_same(folder) -> bool | None:
    """Both give the same answer, or both refuse. Returns whether they answer; `None` if PyTorch decides."""
    try:
        actual = by_runtime(folder)
    except UnsupportedModelError:
        return None
    assert actual == by_pytorch(folder)
    return actual is not None


def rewrite(folder, change=lambda tensors: None, checksums=None, **changes) -> None:
    """
    Write the weights again after `change` of their tensors, with changes of the metadata.

    Args:
        checksums: whether they are made to fit the changed tensors. `True` tells only what they do not find.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="numpy") as stored:
        metadata = stored.metadata()
    change(tensors)
    if checksums:
        metadata["binaryvit_crc32"] = "".join(checksum(tensors[name]) for name in sorted(tensors))
    save_file(
        tensors, file, metadata={name: value for name, value in (metadata | changes).items() if value is not None}
    )


def test_the_undamaged_model_answers(folder):
    assert assert_same(folder) is True


WEIGHT = "binaryvit.stages.0.layers.0.mlp.fc1.linear.packed_weight"
VARIANCE = "binaryvit.norm.batch_norm.running_var"


def flip_bit(tensors) -> None:
    tensors[WEIGHT][0, 0] ^= 1


def exchange(tensors) -> None:
    first, second = (f"binaryvit.stages.0.layers.0.attention.{kind}.linear.packed_weight" for kind in ("key", "value"))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def set_value(name, value):
    def change(tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[0] = value

    return change


def replace(name, make):
    def change(tensors) -> None:
        tensors[name] = np.ascontiguousarray(make(tensors[name]))

    return change


WEIGHTS = {
    "a flipped bit": ((flip_bit, False), WEIGHT),
    "exchanged tensors": ((exchange, False), "attention.key.linear.packed_weight"),
    "no number": ((set_value(VARIANCE, np.nan), True), VARIANCE),
    "infinity": ((set_value("classifier.bias", -np.inf), True), "classifier.bias"),
    "a lost tensor": ((lambda tensors: tensors.pop(WEIGHT), True), WEIGHT),
    "a lost count": ((lambda tensors: tensors.pop("binaryvit.norm.batch_norm.num_batches_tracked"), True), "num_batches_tracked"),
    "a lost classifier": ((lambda tensors: tensors.pop("classifier.weight"), True), "classifier.weight"),
    "one tensor more": ((lambda tensors: tensors.update({"note": np.zeros(1, np.float32)}), True), "note"),
    "another shape": ((replace(WEIGHT, lambda tensor: tensor[:, :0]), True), WEIGHT),
    "a scalar as a vector": ((replace(VARIANCE, lambda tensor: tensor[None]), True), VARIANCE),
    "bits as floats": ((replace(WEIGHT, lambda tensor: tensor.astype(np.float32)), True), WEIGHT),
    "floats as numbers": ((replace(VARIANCE, lambda tensor: tensor.astype(np.int64)), True), VARIANCE),
    "floats as bytes": ((replace(VARIANCE, lambda tensor: tensor.astype(np.uint8)), True), VARIANCE),
    "another classifier": ((replace("classifier.weight", lambda tensor: tensor[:2]), True), "classifier.weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage, word", WEIGHTS.values(), ids=WEIGHTS)
def test_damaged_weights_are_refused_by_the_name_of_the_tensor(
    damage, word, folder, picture_file, capsys, monkeypatch
):
    rewrite(folder, *damage)
    with pytest.raises(UserError, match=word) as refusal:
        Classifier.from_pretrained(folder)
    assert not isinstance(refusal.value, UnsupportedModelError)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], word)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, folder, picture_file, capsys, monkeypatch):
    (folder / name).unlink()
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], str(folder), name)


def test_variances_below_zero_are_refused_by_their_answers(folder, picture_file, capsys, monkeypatch):
    rewrite(folder, set_value(VARIANCE, -1.0), True)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], str(folder), "not finite")


METADATA = {
    "no format": {"binaryvit_format": None},
    "another format": {"binaryvit_format": "2"},
    "no checksums": {"binaryvit_crc32": None},
    "wrong checksums": {"binaryvit_crc32": "0" * 8},
    "no shapes": {"binaryvit_shapes": None},
    "shapes of nothing": {"binaryvit_shapes": "{}"},
    "no config": {"binaryvit_config": None},
    "an empty config": {"binaryvit_config": "{}"},
    "a list": {"binaryvit_config": "[]"},
    "nested": {"binaryvit_shapes": "[" * 100_000},
    "no JSON": {"binaryvit_config": "{"},
    "a note": {"note": "x" * 10_000},
}


@pytest.mark.parametrize("changes", METADATA.values(), ids=METADATA)
def test_metadata_are_read_or_refused_as_pytorch_does(changes, folder):
    rewrite(folder, **changes)
    assert assert_same(folder) is ("note" in changes)


@pytest.mark.parametrize(
    "field, value",
    [("depths", [1, 1]), ("batch_norm_eps", 1e-3), ("image_size", [32, 16]), ("use_layer_scale", False)],
)
def test_a_config_of_another_model_is_refused_by_the_field(field, value, folder, picture_file, capsys, monkeypatch):
    edit_json(folder / "config.json", **{field: value})
    if field == "image_size":
        edit_json(folder / "preprocessor_config.json", size=value, crop_size=value)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], field)


def test_another_number_of_labels_than_the_classifier_has_is_refused(folder):
    edit_json(folder / "config.json", id2label={"0": "ant", "1": "bee"})
    assert assert_same(folder) is False


def damage_file(folder, choose: random.Random) -> str:
    """Flip a bit, cut a file, remove or repeat a part of it, or exchange values of a JSON file. Returns what was done."""
    name = choose.choice(["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors"])
    content = bytearray((folder / name).read_bytes())
    kind = choose.choice(["flip", "flip", "cut", "remove", "repeat", "null"])
    # Half of the damages of the weights meet their header.
    place = choose.randrange(
        min(len(content), choose.choice([len(content), 9 + int.from_bytes(content[:2], "little")]))
    )
    length = choose.randrange(1, 40)
    if kind == "flip":
        content[place] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "remove":
        del content[place : place + length]
    elif kind == "repeat":
        content[place:place] = content[place : place + length]
    else:
        content[place : place + length] = bytes(len(content[place : place + length]))
    (folder / name).write_bytes(content)
    return f"{kind} {place} {length} of {name}"


def sweep(shelf, folder, seeds) -> list:
    outcomes = []
    for seed in seeds:
        for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
            shutil.copy(shelf / name, folder)
        done = damage_file(folder, random.Random(seed))
        try:
            outcomes.append(assert_same(folder))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}") from error
    return outcomes


def test_random_damage_is_refused_as_pytorch_refuses_it(shelf, folder):
    outcomes = sweep(shelf, folder, range(40))
    assert outcomes.count(False) > 20


@pytest.mark.slow
def test_more_random_damage_is_refused_as_pytorch_refuses_it(shelf, folder):
    assert len(sweep(shelf, folder, range(40, 3000))) == 2960


SHARDS = {
    "a lost shard": lambda folder, names: (folder / names[1]).unlink(),
    "an empty shard": lambda folder, names: (folder / names[1]).write_bytes(b""),
    "shards exchanged": lambda folder, names: (folder / names[0]).rename(folder / names[1]),
    "no index": lambda folder, names: (folder / "model.safetensors.index.json").write_text("{"),
    "an index of nothing": lambda folder, names: (folder / "model.safetensors.index.json").write_text("{}"),
    "an empty index": lambda folder, names: edit_json(folder / "model.safetensors.index.json", weight_map={}),
    "an index of a list": lambda folder, names: edit_json(folder / "model.safetensors.index.json", weight_map=[1]),
    "a foreign path": lambda folder, names: edit_json(folder / "model.safetensors.index.json", weight_map={"a": "../b.safetensors"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_refused(damage, tmp_path):
    folder = save_packed(tmp_path, tiny_config(), max_shard_size=5_000)
    names = sorted(file.name for file in folder.glob("model-*.safetensors"))
    damage(folder, names)
    assert assert_same(folder) is False


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "null", "[" * 100_000, "{}", b"\xff\xfe", '{"a": 1e999}'], ids=repr
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_files_are_read_or_refused_as_transformers_does(name, content, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert assert_same(folder) is not True


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 20_000, "width": 20_000}},
        {"size": {"shortest_edge": 2**14 + 1}},
        {"crop_size": {"height": 8, "width": 8}},
        {"crop_size": None},
        {"do_center_crop": False, "crop_size": {"height": 0, "width": 5}},
        {"do_resize": False, "size": {"height": 8.5, "width": 8}},
        {"do_resize": False, "size": "large"},
        {"do_resize": False, "size": 16},
        {"pad_size": {"height": 0, "width": 5}},
        {"pad_size": {"height": 20_000, "width": 5}},
        {"pad_size": [16]},
        {"backend": "pil"},
        {"do_resize": False, "size": {"height": 10**9, "width": 1}},
        {"do_convert_rgb": "yes"},
        {"do_resize": 1},
        {"rescale_factor": 0},
        {"rescale_factor": "1"},
        {"rescale_factor": True},
        {"image_std": [0, 1, 1]},
        {"image_mean": [float("nan")] * 3},
        {"resample": 99},
        {"background": "whiteish"},
        {"background": 5},
        {"background": "#ff0000"},
        {"data_format": 5},
        {"input_data_format": "sideways"},
        {"return_tensors": "tf"},
        {"disable_grouping": "no"},
        {"image_seq_length": "long"},
        {"device": "cuda"},
        {"do_pad": True, "pad_size": {"height": 40, "width": 40}},
        {"image_processor_type": "ConvNextImageProcessor"},
        {"image_processor_type": None},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"auto_map": {}},
        {"auto_map": None},
    ],
    ids=str,
)
def test_image_processors_are_read_or_refused_as_transformers_does(changes, folder):
    edit_json(folder / "preprocessor_config.json", **changes)
    assert_same(folder)
    assert main(["classify", str(folder), str(folder)]) == 2  # no pictures in the folder
