"""The runtime and PyTorch refuse the same damaged files, each in one sentence that names the tensor, field or file."""

import random
import shutil

import numpy as np
import pytest
from command_line import assert_refused
from damaged_models import (
    HARMLESS,
    JSON_TEXTS,
    METADATA,
    NORM,
    PROCESSORS,
    SHARDS,
    WEIGHTS,
    damage_file,
    rewrite,
    set_value,
)
from old_layout import write_old_layout
from packed_model import edit_json, save_packed
from PIL import Image
from tiny import tiny_config
from transformers import AutoModel, pipeline

from binaryvit_cli import main
from binaryvit_cli.models import find_model, load_model
from binaryvit_runtime import Classifier, UnsupportedModelError, UserError
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.engine.preprocessing import Preprocessor
from binaryvit_runtime.errors import LINE_LENGTH, one_line
from binaryvit_runtime.resources import shipped_models


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("model"), tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))


@pytest.fixture(scope="module")
def shelves(shelf, tmp_path_factory):
    """The same model in files of each format."""
    return {"1": write_old_layout(shutil.copytree(shelf, tmp_path_factory.mktemp("old") / "model")), "2": shelf}


def copy_files(shelf, folder):
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(shelf / name, folder)
    return folder


@pytest.fixture
def folder(shelf, tmp_path):
    return copy_files(shelf, tmp_path / "model")


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


def test_the_undamaged_model_answers(folder):
    assert assert_same(folder) is True


def test_a_network_that_was_saved_without_a_classifier_is_not_called_damaged(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "backbone")
    with pytest.raises(UserError, match="was saved without a classifier, so it gives no labels"):
        Classifier.from_pretrained(tmp_path / "backbone")


@pytest.mark.parametrize("file_format, name", [(each, name) for each in WEIGHTS for name in WEIGHTS[each]])
def test_damaged_weights_are_refused_by_the_name_of_the_tensor(
    file_format, name, shelves, tmp_path, picture_file, capsys, monkeypatch
):
    folder = copy_files(shelves[file_format], tmp_path / "model")
    damage, word = WEIGHTS[file_format][name]
    rewrite(folder, *damage)
    with pytest.raises(UserError, match=word) as refusal:
        Classifier.from_pretrained(folder)
    assert not isinstance(refusal.value, UnsupportedModelError)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], word)


@pytest.mark.parametrize(
    "header, words",
    [
        (b"[]", "'model.safetensors' is damaged ("),
        (b"[" * 200_000, "'model.safetensors' is damaged ("),
        (None, "'model.safetensors' is a pointer of Git LFS, not the file: run `git lfs pull`"),
    ],
    ids=["a list", "deeply nested", "a pointer"],
)
def test_a_file_without_a_header_of_tensors_is_refused(header, words, folder, picture_file, capsys, monkeypatch):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    content = pointer if header is None else len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(content)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], words)


def test_a_number_that_no_float_holds_is_refused_by_its_field(folder):
    edit_json(folder / "preprocessor_config.json", rescale_factor=10**400)
    with pytest.raises(UnsupportedModelError, match="rescale_factor"):
        Classifier.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, folder, picture_file, capsys, monkeypatch):
    (folder / name).unlink()
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], str(folder), name)


def test_an_image_processor_of_large_images_is_refused_before_it_makes_one(folder, monkeypatch):
    edit_json(folder / "preprocessor_config.json", size={"height": 2**14, "width": 2**14}, do_center_crop=False)
    monkeypatch.delattr(Preprocessor, "__call__")
    with pytest.raises(UserError, match=r"\(3, 16384, 16384\), the network takes \(3, 16, 32\)"):
        Classifier.from_pretrained(folder)


def test_an_image_processor_that_fits_square_pictures_alone_is_refused(tmp_path, picture_file, capsys, monkeypatch):
    folder = save_packed(tmp_path, tiny_config(image_size=32))
    edit_json(folder / "preprocessor_config.json", size={"shortest_edge": 32}, do_center_crop=False)
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], "(3, 32, 48), the network takes (3, 32, 32)")


def test_variances_below_zero_are_refused_by_their_answers(folder, picture_file, capsys, monkeypatch):
    rewrite(folder, set_value(NORM, -1.0, 40), True)  # of running_var
    for engine in ("", "torch"):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        assert_refused(capsys, ["classify", folder, picture_file], str(folder), "not finite")


@pytest.mark.parametrize("file_format, name", [(each, name) for each in METADATA for name in METADATA[each]])
def test_metadata_are_read_or_refused_as_pytorch_does(file_format, name, shelves, tmp_path):
    folder = copy_files(shelves[file_format], tmp_path / "model")
    rewrite(folder, **METADATA[file_format][name])
    assert assert_same(folder) is (name in HARMLESS[file_format])


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


def sweep(shelf, folder, seeds) -> list:
    outcomes = []
    for seed in seeds:
        copy_files(shelf, folder)
        done = damage_file(folder, random.Random(seed))
        try:
            outcomes.append(assert_same(folder))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}") from error
    return outcomes


@pytest.mark.parametrize("file_format, seeds", [("1", range(20)), ("2", range(20, 50))])
def test_random_damage_is_refused_as_pytorch_refuses_it(file_format, seeds, shelves, folder):
    outcomes = sweep(shelves[file_format], folder, seeds)
    assert outcomes.count(False) > len(seeds) / 2


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["1", "2"])
def test_more_random_damage_is_refused_as_pytorch_refuses_it(file_format, shelves, folder):
    assert len(sweep(shelves[file_format], folder, range(50, 2000))) == 1950


@pytest.mark.parametrize("damage", SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_refused(damage, tmp_path):
    folder = save_packed(tmp_path, tiny_config(), max_shard_size=5_000)
    names = sorted(file.name for file in folder.glob("model-*.safetensors"))
    damage(folder, names)
    assert assert_same(folder) is False


@pytest.mark.parametrize("content", JSON_TEXTS, ids=repr)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_files_are_read_or_refused_as_transformers_does(name, content, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert assert_same(folder) is not True


@pytest.mark.parametrize(
    "changes",
    PROCESSORS,
    ids=str,
)
def test_image_processors_are_read_or_refused_as_transformers_does(changes, folder):
    edit_json(folder / "preprocessor_config.json", **changes)
    assert_same(folder)
    assert main(["classify", str(folder), str(folder)]) == 2  # no pictures in the folder
