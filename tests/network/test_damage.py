"""Damaged and hostile files end in one sentence and exit code 2, and nothing is written."""

import json
import shutil
import zipfile

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model

from binaryvit_cli import main
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_runtime.errors import FOREIGN_LENGTH, LINE_LENGTH, first_sentence, one_line


NAN = float("nan")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folders `latent` and `packed` of one model, and a picture."""
    root = tmp_path_factory.mktemp("shelf")
    model = tiny_model(tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))
    model.save_pretrained(root / "latent")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(root / "latent")
    assert main(["pack", str(root / "latent"), str(root / "packed")]) == 0
    Image.new("RGB", (20, 20), (9, 200, 30)).save(root / "a.png")
    return root


@pytest.fixture
def latent(shelf, tmp_path):
    return shutil.copytree(shelf / "latent", tmp_path / "model")


@pytest.fixture
def packed(shelf, tmp_path):
    return shutil.copytree(shelf / "packed", tmp_path / "packed")


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_refused(capsys, arguments, *words: str) -> None:
    """One readable sentence, exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert len(printed.err) <= 2 * LINE_LENGTH
    assert printed.out == ""
    for word in words:
        assert word in printed.err


def test_a_foreign_message_is_cut_to_a_readable_printable_line():
    assert first_sentence(ValueError("\n first: \x1b[31mred\x07\u202e \nsecond")) == r"first: \x1b[31mred\x07\u202e"
    assert first_sentence(ValueError()) == "ValueError"
    assert first_sentence(KeyError("name")) == "KeyError 'name'"
    for long in ("x" * 10**6, "\x1b" * 10**6):
        sentence = first_sentence(ValueError(f"begin {long} end"))
        assert len(sentence) <= FOREIGN_LENGTH
        assert sentence.startswith("begin")
        assert sentence.endswith("end")
    assert one_line("größe 1\u2009cm\n日本") == "größe 1 cm 日本"


CONFIGS = {
    "nothing": ("", "not a valid JSON file"),
    "no JSON": ("{", "not a valid JSON file"),
    "a list": ("[]", "config.json"),
    "nested": ("[" * 100_000, "recursion"),
    "a long string": (json.dumps("x" * 10**6), "config.json"),
    "not UTF-8": (b"\xff\xfe", "not a valid JSON file"),
    "no type": ("{}", "model_type"),
    "a list for a type": ('{"model_type": ["vit"]}', "model_type"),
    "unknown type": ('{"model_type": "zzz"}', "zzz"),
    "code of its own": ('{"model_type": "zzz", "auto_map": {"AutoConfig": "code.Config"}}', "custom code"),
    "layers beyond memory": ('{"model_type": "vit", "num_hidden_layers": 1000000000}', "num_hidden_layers"),
    "labels beyond memory": ('{"model_type": "vit", "num_labels": 1000000000}', "num_labels"),
    "more labels than names": (
        '{"model_type": "vit", "num_labels": 1000000000, "id2label": {"0": "ant"}}',
        "num_labels",
    ),
    "weights beyond memory": (
        '{"model_type": "vit", "num_hidden_layers": 1000, "hidden_size": 65536, "intermediate_size": 65536}',
        "weights",
    ),
    "unknown activation": ('{"model_type": "vit", "hidden_act": "boo"}', "boo"),
    "no image": ('{"model_type": "vit", "image_size": 0}', "network"),
    "depths beyond memory": ('{"model_type": "binaryvit", "depths": [1000000000, 1, 1, 1]}', "depths"),
    "text for a number": ('{"model_type": "binaryvit", "depths": "many"}', "depths"),
}


@pytest.mark.parametrize("content, words", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("command", ["ops", "card"])
def test_every_command_that_reads_a_bad_config_refuses_it(command, content, words, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.iterdir())
    assert_refused(capsys, [command, tmp_path], words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_not_in_the_cache_is_refused_offline(capsys):
    assert_refused(capsys, ["ops", "no/model"], "'no/model'", "not in the cache", "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    "field, value", [("depths", [10**9, 1]), ("id2label", 5), ("quantization_config", 3)], ids=str
)
def test_pack_and_classify_refuse_a_bad_config(field, value, latent, shelf, tmp_path, capsys):
    edit_json(latent / "config.json", **{field: value})
    assert_refused(capsys, ["pack", latent, tmp_path / "out"], field)
    assert_refused(capsys, ["classify", latent, shelf / "a.png"], field)
    assert not (tmp_path / "out").exists()


PROCESSORS = {
    "of another model": ({"crop_size": {"height": 8, "width": 8}}, "(3, 8, 8), the network takes (3, 16, 32)"),
    "two deviations": ({"image_std": [0.5, 0.5]}, "fails"),
    "zero deviations": ({"image_std": [0.0, 0.5, 0.5]}, "image_std"),
    "black as white": ({"rescale_factor": 1e-10}, "rescale_factor"),
    "no number": ({"rescale_factor": 1e-45}, "rescale_factor"),
    "huge numbers": ({"rescale_factor": 1e30}, "rescale_factor"),
    "pictures beyond memory": ({"size": {"height": 10**9, "width": 10**9}}, "size must be from 1 to 16384"),
    "no text": ({"image_processor_type": 5}, "cannot be used"),
}


@pytest.mark.parametrize("changes, words", PROCESSORS.values(), ids=PROCESSORS)
def test_a_bad_image_processor_is_refused_before_any_image_is_read(changes, words, packed, shelf, tmp_path, capsys):
    edit_json(packed / "preprocessor_config.json", **changes)
    assert_refused(capsys, ["classify", packed, shelf / "a.png"], "preprocessor_config.json", words)
    assert_refused(capsys, ["pack", packed, tmp_path / "out"], "preprocessor_config.json", words)
    assert_refused(capsys, ["push", packed, "me/model"], "preprocessor_config.json", words)
    assert not (tmp_path / "out").exists()


def spoil(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("name", ["classifier.bias", "binaryvit.norm.batch_norm.running_var"])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, latent, shelf, tmp_path, capsys):
    spoil(latent, lambda tensors: tensors[name][:1].fill_(value))
    assert_refused(capsys, ["classify", latent, shelf / "a.png"], repr(name), "not finite")
    assert_refused(capsys, ["pack", latent, tmp_path / "out"], repr(name), "not finite")


def test_probabilities_that_are_not_finite_are_not_printed(latent, shelf, capsys):
    spoil(latent, lambda tensors: tensors["binaryvit.norm.batch_norm.running_var"].fill_(-1.0))
    assert_refused(capsys, ["classify", latent, shelf / "a.png"], str(latent), "not finite")


def test_a_missing_tensor_is_not_replaced_by_random_numbers(latent, shelf, tmp_path, capsys):
    spoil(latent, lambda tensors: tensors.pop("binaryvit.norm.batch_norm.weight"))
    for arguments in (["classify", latent, shelf / "a.png"], ["pack", latent, tmp_path / "out"]):
        assert_refused(capsys, arguments, "lacks the tensor 'binaryvit.norm.batch_norm.weight'")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_sizes": [4096, 8192], "intermediate_sizes": [4096, 8192]}, "has the shape [8"),
        ({"depths": [1, 1]}, "has no tensor 'binaryvit.stages.0.layers.1."),
        ({"depths": [3, 1]}, "lacks the tensor 'binaryvit.stages.0.layers.2."),
    ],
    ids=["wider", "fewer layers", "more layers"],
)
def test_weights_of_another_config_are_refused_by_name(changes, words, latent, shelf, tmp_path, capsys):
    edit_json(latent / "config.json", **changes)
    assert_refused(capsys, ["classify", latent, shelf / "a.png"], words)
    assert_refused(capsys, ["pack", latent, tmp_path / "out"], words)


def test_damaged_metadata_of_a_packed_file_is_refused(packed, shelf, capsys):
    file = packed / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    for name, value in [
        ("binaryvit_format", "x" * 10**6),
        ("binaryvit_config", "[]"),
        ("binaryvit_config", "[" * 100_000),
        ("binaryvit_crc32", "\x1b[31m"),
    ]:
        save_file(tensors, file, metadata={**metadata, name: value})
        assert_refused(capsys, ["classify", packed, shelf / "a.png"], "model.safetensors")


DOCUMENTS = {
    "no JSON": "{",
    "a list": "[]",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("name", ["all_results.json", "run_arguments.json", "train.json"])
def test_a_card_refuses_a_damaged_document_and_a_model_is_packed_without_a_card(
    name, content, latent, tmp_path, capsys
):
    (latent / name).write_text(content)
    assert_refused(capsys, ["card", latent], name)
    assert not (latent / "README.md").exists()
    if name != "train.json":  # pack does not copy train.json
        assert main(["pack", str(latent), str(tmp_path / "out")]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("There is no model card: ")
        assert printed.err.count("\n") == 1
        assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize(
    "results",
    [
        {"eval_accuracy": 0.9, "eval_samples": 7},  # as the example scripts of transformers write them
        {"eval_accuracy": "high", "eval_top5_accuracy": NAN, "teacher_accuracy": None, "eval_samples": [7]},
        {"test_accuracy": 0.5},
    ],
    ids=["results", "invalid results", "no known result"],
)
@pytest.mark.parametrize(
    "arguments",
    [None, {}, {"output_dir": 5, "use_cpu": "?", "train_dir": [], "license": {}}],
    ids=["no arguments", "empty arguments", "invalid arguments"],
)
def test_a_card_holds_only_recorded_and_valid_results(results, arguments, latent, tmp_path, capsys):
    (latent / "all_results.json").write_text(json.dumps(results))
    if arguments is not None:
        (latent / "run_arguments.json").write_text(json.dumps(arguments))
    assert main(["card", str(latent)]) == 0, capsys.readouterr().err
    text = (latent / "README.md").read_text()
    assert ("90.00 %" in text) == (results.get("eval_accuracy") == 0.9)
    assert "nan" not in text.lower().replace("finance", "")
    assert "model-index" not in text  # the dataset is unknown
    assert main(["pack", str(latent), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out" / "README.md").is_file()


ROW = "binaryvit-small-patch4-224"


def convert(tmp_path, *options: str) -> list:
    return ["convert", tmp_path / "file.pth", tmp_path / "out", "--config", ROW, *options]


def test_a_file_that_unpacks_to_more_than_its_size_is_not_opened(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data/1", bytes(10**7))
    assert_refused(capsys, convert(tmp_path), "file.pth", "unpack", "not opened")


class HugeBytearray:
    def __reduce__(self):
        return bytearray, (10**12,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_file_that_asks_for_memory_is_not_opened(zipped, tmp_path, capsys):
    torch.save({"model": {"a": HugeBytearray()}}, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert_refused(capsys, convert(tmp_path), "'bytearray'", "not opened")


TENSORS = {
    "numbered": {0: torch.zeros(1)},
    "sparse": {"a": torch.eye(2).to_sparse()},
    "without content": {"a": torch.zeros(2, device="meta")},
    "complex": {"a": torch.zeros(2, dtype=torch.complex64)},
    "no tensor": {"a": [1.0]},
    "a list": [torch.zeros(1)],
}


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_a_file_of_other_objects_holds_no_network(tensors, tmp_path, capsys):
    torch.save({"model": tensors}, tmp_path / "file.pth")
    assert_refused(capsys, convert(tmp_path), "file.pth", "holds no network")


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("classifier.bias", torch.zeros(1).expand(10**9), "(1000000000,)"),
        ("classifier.bias", torch.tensor(1.0), "classifier.bias"),
        ("classifier.bias", torch.zeros(1000, dtype=torch.int64), "torch.int64"),
        ("classifier.weight", torch.zeros(1).expand(10**5, 10**7), "(100000, 10000000)"),
        ("\x1b[31m" + 10**6 * "x", torch.zeros(1), r"\x1b[31m"),
    ],
    ids=["long bias", "scalar bias", "integer bias", "huge weight", "unprintable name"],
)
def test_a_tensor_of_another_shape_or_kind_is_refused_by_name(name, tensor, words, tmp_path, capsys):
    torch.save({"model": {name: tensor}}, tmp_path / "file.pth")
    assert_refused(capsys, convert(tmp_path), "does not fit the config", words)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
