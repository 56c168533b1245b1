"""Folders of tar archives and of tables: their columns are found, and their classes get names."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from datasets import config as datasets_config
from PIL import Image as PILImage
from streams import add, encode, tell_numbers, write_archives, write_class_names

from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.decoding import decode_image
from binaryvit_hf.data.loading import load_images
from binaryvit_runtime.errors import UserError


SHARDS = {"train": [9, 4, 11], "validation": [2]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(folder, **arguments):
    return load_images(DataArguments(dataset_name=str(folder), **arguments), 0, None, None)


@pytest.mark.parametrize("image", ["jpg", "png", "webp"])
def test_archives_are_read_without_naming_their_columns(tmp_path, image):
    write_archives(tmp_path / "archives", SHARDS, num_classes=12, image=image)
    images = load(tmp_path / "archives")
    assert images["train"].features["label"].names == [str(label) for label in range(12)]  # sorted as numbers
    assert images["train"]["label"] == [number % 12 for number in range(24)]
    assert images["validation"]["label"] == [0, 1]  # indices of the training images' classes
    assert images["train"][7]["image"] == {"bytes": encode(7), "path": f"0007.{image}"}


@pytest.mark.parametrize("streaming", [False, True])
def test_class_names_come_from_a_file_in_the_folder_or_from_class_names(tmp_path, streaming):
    write_archives(tmp_path / "archives", SHARDS, num_classes=3)
    if streaming:
        with pytest.raises(UserError, match="--class_names"):
            load(tmp_path / "archives", streaming=True)
    write_class_names(tmp_path / "archives", 3)
    (tmp_path / "more.txt").write_text("ant\nbee\ncat\n\n")
    for file, names in (
        (None, ["class 0", "class 1", "class 2"]),
        (str(tmp_path / "more.txt"), ["ant", "bee", "cat"]),
    ):
        images = load(tmp_path / "archives", streaming=streaming, class_names=file)
        assert images["train"].features["label"].names == names


def test_patterns_choose_some_of_the_archives(tmp_path):
    write_archives(tmp_path / "archives", SHARDS, num_classes=3)
    write_class_names(tmp_path / "archives", 3)
    tell_numbers(tmp_path / "archives", SHARDS)
    patterns = {"train_files": "train-000[01].tar", "validation_files": "train-0002.tar"}
    streams = load(tmp_path / "archives", streaming=True, **patterns)
    assert streams["train"].num_images is None  # the dataset declares it for all archives together
    assert sum(1 for _ in streams["train"].read(0)) == 13
    assert len(streams["validation"].for_evaluation()) == 11
    images = load(tmp_path / "archives", **patterns)
    assert (len(images["train"]), len(images["validation"])) == (13, 11)
    with pytest.raises(UserError, match="no file in it matches 'nothing-"):
        load(tmp_path / "archives", train_files="nothing-*.tar")
    with pytest.raises(ValueError, match="are patterns of files in a dataset"):
        DataArguments(train_files="train-*.tar")


def test_a_stream_refuses_a_label_without_a_name_when_it_reads_it(tmp_path):
    write_archives(tmp_path / "archives", SHARDS, num_classes=4)
    write_class_names(tmp_path / "archives", 3)
    with pytest.raises(UserError, match="train images have the label 3, which is not one of the 3 classes"):
        load(tmp_path / "archives")
    stream = load(tmp_path / "archives", streaming=True)["train"]
    with pytest.raises(UserError, match="label 3, which is not one of the 3 classes"):
        list(stream.read(0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "columns, message",
    [
        ({"jpg": encode(0), "png": encode(0), "cls": b"1"}, "no column 'image'; it has .*'png'.*--image_column_name"),
        ({"jpg": encode(0), "json": b'{"label": 1}'}, "no column 'label'; it has .*'json'.*--label_column_name"),
        ({"txt": b"no picture", "cls": b"1"}, "no column 'image'; it has .*'txt'"),
        ({"jpg": b"1", "cls": b"one"}, "cannot be loaded"),
    ],
    ids=["two images", "no label", "no image", "no number"],
)
def test_ambiguous_columns_are_named(tmp_path, columns, message, streaming):
    import tarfile

    (tmp_path / "archives").mkdir()
    with tarfile.open(tmp_path / "archives" / "train.tar", "w") as archive:
        for number in range(3):
            for extension, content in columns.items():
                add(archive, f"{number}.{extension}", content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "archives", streaming=streaming)


def test_columns_of_cifar_are_found_and_its_two_kinds_of_classes_chosen_from(tmp_path):
    classes = {"fine_label": ["apple", "bee", "cup"], "coarse_label": ["fruit", "insects"]}
    features = {"img": Image(), **{name: ClassLabel(names=names) for name, names in classes.items()}}
    pictures = [PILImage.new("RGB", (32, 32), (60 * index, 9, 9)) for index in range(4)]
    rows = {"img": pictures, "fine_label": [0, 1, 2, 0], "coarse_label": [0, 1, 1, 0]}
    (tmp_path / "cifar").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=Features(features)).to_parquet(tmp_path / "cifar" / f"{split}.parquet")
    with pytest.raises(UserError, match=r"fine_label.*--label_column_name"):
        load(tmp_path / "cifar")
    images = load(tmp_path / "cifar", label_column_name="fine_label")
    assert images["train"].features["label"].names == classes["fine_label"]
    assert images["validation"]["label"] == rows["fine_label"]
    assert decode_image(images["train"][3]["image"]).getpixel((0, 0)) == (180, 9, 9)
