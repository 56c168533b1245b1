"""Damages of a packed model's files, and changes of its image processor, for tests that compare what is refused."""

import random

import numpy as np
from packed_model import edit_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from binaryvit_runtime.checkpoint import checksum


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


LAYER = "binaryvit.stages.0.layers.0"
WEIGHT = f"{LAYER}.mlp.fc1.linear.packed_weight"
VARIANCE = "binaryvit.norm.batch_norm.running_var"
NORM = "binaryvit.norm.floats"  # bias, running_mean, running_var and weight, of 16 channels each


def flip_bit(name):
    def change(tensors) -> None:
        tensors[name].reshape(-1)[0] ^= 1

    return change


def exchange(first, second):
    def change(tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def set_value(name, value, index=0):
    def change(tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[index] = value

    return change


def replace(name, make):
    def change(tensors) -> None:
        tensors[name] = np.ascontiguousarray(make(tensors[name]))

    return change


def remove(name):
    return lambda tensors: tensors.pop(name)


def add(name, value):
    return lambda tensors: tensors.update({name: value})


def take_apart(tensors) -> None:
    """No damage: a tensor gets an entry of its own, as one of another dtype has."""
    joined = tensors[NORM]
    tensors[NORM], tensors[VARIANCE] = np.append(joined[:32], joined[48:]), joined[32:48].astype(np.float32)


# Damages of the weights, and a word of the message, by the format of the file.
WEIGHTS = {
    "1": {
        "a flipped bit": ((flip_bit(WEIGHT), False), WEIGHT),
        "exchanged tensors": ((exchange(*(f"{LAYER}.attention.{kind}.linear.packed_weight" for kind in ("key", "value"))), False), "attention.key.linear.packed_weight"),
        "no number": ((set_value(VARIANCE, np.nan), True), VARIANCE),
        "a lost tensor": ((remove(WEIGHT), True), WEIGHT),
        "a lost count": ((remove("binaryvit.norm.batch_norm.num_batches_tracked"), True), "num_batches_tracked"),
        "another shape": ((replace(WEIGHT, lambda tensor: tensor[:, :0]), True), WEIGHT),
        "a scalar as a vector": ((replace(VARIANCE, lambda tensor: tensor[None]), True), VARIANCE),
        "bits as floats": ((replace(WEIGHT, lambda tensor: tensor.astype(np.float32)), True), WEIGHT),
        "floats as numbers": ((replace(VARIANCE, lambda tensor: tensor.astype(np.int64)), True), VARIANCE),
        "floats as bytes": ((replace(VARIANCE, lambda tensor: tensor.astype(np.uint8)), True), VARIANCE),
    },
    "2": {
        "infinity": ((set_value("classifier.bias", -np.inf), True), "classifier.bias"),
        "a lost classifier": ((remove("classifier.weight"), True), "classifier.weight"),
        "no classifier": ((lambda tensors: [tensors.pop(f"classifier.{kind}") for kind in ("weight", "bias")], True), "classifier"),
        "another classifier": ((replace("classifier.weight", lambda tensor: tensor[:2]), True), "classifier.weight"),
        "one tensor more": ((add("note", np.zeros(1, np.float32)), True), "note"),
        "a flipped bit": ((flip_bit(f"{LAYER}.bytes"), False), f"{LAYER}.bytes"),
        "exchanged tensors": ((exchange(f"{LAYER}.bytes", "binaryvit.stages.0.layers.1.bytes"), False), f"{LAYER}.bytes"),
        "no number": ((set_value(NORM, np.nan, 40), True), VARIANCE),
        "a lost tensor": ((remove(f"{LAYER}.bytes"), True), LAYER),
        "a lost count": ((remove("binaryvit.norm.bytes"), True), "num_batches_tracked"),
        "a float less": ((replace(NORM, lambda tensor: tensor[1:]), True), NORM),
        "a byte more": ((replace(f"{LAYER}.bytes", lambda tensor: np.append(tensor, tensor[:1])), True), f"{LAYER}.bytes"),
        "a matrix": ((replace(NORM, lambda tensor: tensor[None]), True), NORM),
        "bytes as floats": ((replace(f"{LAYER}.bytes", lambda tensor: tensor.astype(np.float32)), True), f"{LAYER}.bytes"),
        "floats as bytes": ((replace(NORM, lambda tensor: tensor.astype(np.uint8)), True), NORM),
        "a tensor twice": ((add(VARIANCE, np.ones(16, np.float32)), True), NORM),
        "a tensor of another shape apart": ((add(VARIANCE, np.ones(15, np.float32)), True), NORM),
    },
}  # fmt: skip


# Changes of the metadata, by the format of the file.
METADATA_OF_SHAPES = {
    "a note": {"note": "x" * 10_000},
    "no shapes": {"binaryvit_shapes": None},
    "shapes of nothing": {"binaryvit_shapes": "{}"},
    "nested shapes": {"binaryvit_shapes": "[" * 100_000},
    "the second format": {"binaryvit_format": "2"},
}
METADATA = {
    "1": METADATA_OF_SHAPES,
    "2": {
        **METADATA_OF_SHAPES,
        "no format": {"binaryvit_format": None},
        "another format": {"binaryvit_format": "3"},
        "no checksums": {"binaryvit_crc32": None},
        "wrong checksums": {"binaryvit_crc32": "0" * 8},
        "no config": {"binaryvit_config": None},
        "an empty config": {"binaryvit_config": "{}"},
        "a list": {"binaryvit_config": "[]"},
        "no JSON": {"binaryvit_config": "{"},
        "nested": {"binaryvit_config": "[" * 100_000},
        "the first format": {"binaryvit_format": "1"},
        "the first format and shapes of nothing": {"binaryvit_format": "1", "binaryvit_shapes": "{}"},
    },
}
# Format 2 has no shapes, and may have an entry for every tensor.
HARMLESS = {"1": ["a note", "the second format"], "2": list(METADATA_OF_SHAPES)}


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


PROCESSORS = [
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
    {"resample": 3.0},
    {"rescale_factor": 1e-9},
    {"rescale_factor": 1e300},
    {"rescale_factor": 1},
    {"rescale_factor": 1000},
    {"image_std": [1e-9, 1, 1]},
    {"image_mean": 1e5},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"size": {"max_height": 16, "max_width": 32}},
    {"size": {"shortest_edge": 16, "longest_edge": 40}},
    {"size": [16, 32], "do_center_crop": False},
    {"size": 32, "default_to_square": False},
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
]
JSON_TEXTS = ["", "{", "[]", "5", "null", "[" * 100_000, "{}", b"\xff\xfe", '{"a": 1e999}']


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
