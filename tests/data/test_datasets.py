"""Datasets of many forms: types of columns, relative paths, missing labels and splits, and models with other labels."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets import config as datasets_config
from PIL import Image as PILImage
from streams import encode, tell_numbers, write_archives, write_class_names
from tiny import tiny_config, tiny_model
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.augmentation import AugmentationArguments, create_train_transform
from binaryvit_hf.data.decoding import CroppingDecoder, decode_image
from binaryvit_hf.data.loading import load_images, relabel
from binaryvit_hf.data.sampling import SampleKey, create_train_sampler
from binaryvit_hf.data.transforms import TransformedImages, collate_images
from binaryvit_hf.training.arguments import ModelArguments
from binaryvit_hf.training.models import create_head
from binaryvit_hf.training.run import main
from binaryvit_runtime.errors import UserError


COLORS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def load(folder, **arguments):
    test = arguments.pop("test", False)
    return load_images(DataArguments(dataset_name=str(folder), **arguments), 0, None, None, test=test)


def write_table(folder: Path, images: pa.Array, labels: pa.Array, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    return folder


def struct(**types) -> pa.DataType:
    return pa.struct(types)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{number}.jpg" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(encode(number))
    return paths


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
        *(
            struct(bytes=pa.large_binary(), path=pa.large_string()),
            struct(bytes=pa.binary()),
            struct(path=pa.string()),
        ),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_images_are_bytes_or_paths_in_columns_of_every_type(pictures, tmp_path, kind, streaming):
    whole = {"bytes": [encode(number) for number in range(4)], "path": list(map(str, pictures))}
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        images = pa.array([dict(zip(names, row)) for row in zip(*(whole[name] for name in names))], kind)
    else:
        images = pa.array(
            whole["bytes" if "binary" in str(kind) else "path"], pa.string() if "dict" in str(kind) else kind
        )
        images = images.dictionary_encode() if "dict" in str(kind) else images
    for split in ("train", "validation"):
        write_table(tmp_path / "table", images, pa.array([0, 1, 1, 0]), split)
    write_class_names(tmp_path / "table", 2)
    train = load(tmp_path / "table", streaming=streaming)["train"]
    rows = [row for _, _, row in train.read(0)] if streaming else list(train)
    assert sorted(decode_image(row["image"]).tobytes() for row in rows) == sorted(
        PILImage.open(path).tobytes() for path in pictures
    )


@pytest.mark.parametrize(
    "kind, labels, names",
    [
        (pa.string(), ["bee", "ant", "bee"], ["ant", "bee"]),
        (pa.large_string(), ["bee", "ant", "bee"], ["ant", "bee"]),
        (pa.string_view(), ["bee", "ant", "bee"], ["ant", "bee"]),
        (pa.string(), ["2", "10", "2"], ["10", "2"]),
        (pa.int8(), [10, 2, 10], ["2", "10"]),
        (pa.uint64(), [10, 2, 10], ["2", "10"]),
        (pa.int64(), [1, -1, 0], ["-1", "0", "1"]),
        (pa.float64(), [10, 2, 10], ["2", "10"]),
        (pa.bool_(), [True, False, True], ["False", "True"]),
    ],
    ids=str,
)
def test_labels_are_names_or_whole_numbers_of_every_type(tmp_path, kind, labels, names):
    table = write_table(tmp_path / "table", pa.array([encode(0)] * 3), pa.array(labels, kind))
    write_table(table, pa.array([encode(0)] * 3), pa.array(labels, kind), "test")
    images = load(table)
    for split in ("train", "validation"):
        assert images[split].features["label"] == ClassLabel(names=names)
        assert [names[index] for index in images[split]["label"]] == list(map(str, labels))


def test_labels_with_a_fraction_are_refused(tmp_path):
    table = write_table(tmp_path / "table", pa.array([encode(0)] * 2), pa.array([0.0, 0.5]))
    with pytest.raises(UserError, match=r"column of labels contains 0.5.*--label_column_name"):
        load(table)


def test_the_only_column_of_images_is_found(tmp_path):
    picture = pa.array([{"bytes": encode(0), "path": None}] * 2, struct(bytes=pa.binary(), path=pa.string()))
    columns = {"jpeg": picture, "name": ["a", "b"], "size": [{"width": 1}] * 2, "label": ["ant", "bee"]}
    (tmp_path / "table").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), tmp_path / "table" / f"{split}.parquet")
    assert load(tmp_path / "table")["train"][0]["image"]["bytes"] == encode(0)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_paths_of_a_table_are_relative_to_it(pictures, tmp_path, suffix, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("pictures", "data/tables/pictures")
    shutil.copytree("pictures", "data/more")
    rows = [(f"pictures/{number}.jpg", "ant" if number % 2 else "bee") for number in range(3)]
    rows.append((str(tmp_path / "data/more/3.jpg"), "ant"))  # an absolute path is kept
    mark = "\t" if suffix == "tsv" else ","
    lines = [mark.join(row) for row in [("image", "label"), *rows]]
    if suffix == "jsonl":
        lines = [json.dumps({"image": image, "label": label}) for image, label in rows]
    table = Path(f"data/tables/train.{suffix}")
    table.write_text("\n".join(lines))
    images = load(table, train_val_split=1) if file else load("data", train_files=str(table.relative_to("data")))
    rows = [row for part in ("train", "validation") for row in images[part]]
    found = {row["image"]["path"]: row["label"] for row in rows}
    base = tmp_path / "data/tables/pictures"
    assert found == {str(base / f"{k}.jpg"): 1 - k % 2 for k in range(3)} | {str(tmp_path / "data/more/3.jpg"): 0}


@pytest.mark.parametrize("missing", ["", "one", "two"])
def test_a_path_that_is_relative_to_one_of_several_tables_is_refused(pictures, tmp_path, missing):
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "pictures", tmp_path / "data" / name / "pictures")
        table = tmp_path / "data" / name / f"train-{name}.csv"
        table.write_text(f"image,label\npictures/0.jpg,{name}\npictures/1.jpg,{name}\n")
    if missing:
        shutil.rmtree(tmp_path / "data" / missing / "pictures")
    with pytest.raises(UserError, match=r"'pictures/0.jpg' may be relative to .*one' or to .*two'.*absolute paths"):
        load(tmp_path / "data", train_files="*/train-*.csv")


def test_a_path_in_none_of_the_folders_is_unchanged(pictures, tmp_path):
    names = ["pictures/9.jpg", f"{9:0300d}.jpg", "https://example.org/9.jpg"]  # the second is too long for a file name
    (tmp_path / "train.csv").write_text(
        "image,label\n" + "".join(f"{name},{min(index, 1)}\n" for index, name in enumerate(names))
    )
    images = load(tmp_path / "train.csv", train_val_split=1)
    assert sorted(row["image"]["path"] for part in images.values() for row in part) == sorted(names)


def test_patterns_of_files_need_a_folder(pictures, tmp_path):
    (tmp_path / "train.csv").write_text("image,label\npictures/0.jpg,ant\npictures/1.jpg,bee\n")
    with pytest.raises(UserError, match="is a file: give its folder"):
        load(tmp_path / "train.csv", validation_files="test.csv")


@pytest.mark.parametrize("many", [False, True], ids=["dataset", "dictionary"])
def test_a_dataset_that_was_saved_to_disk_is_loaded(tmp_path, many):
    train = labelled([0, 1, 1, 0])
    (DatasetDict({"train": train, "test": train.select([1])}) if many else train).save_to_disk(tmp_path / "saved")
    images = load(tmp_path / "saved")
    assert images["train"].features["label"].names == ["ant", "bee"]
    assert len(images["validation"]) == (1 if many else 2)
    assert len(images["train"]) == (4 if many else 2)
    with pytest.raises(UserError, match="leave out --streaming"):
        load(tmp_path / "saved", streaming=True)
    with pytest.raises(UserError, match="leave out --train_files"):
        load(tmp_path / "saved", validation_files="test/*.arrow")


@pytest.mark.parametrize("format", ["torch", "numpy", "pandas"])
def test_the_format_that_a_dataset_was_saved_with_does_not_matter(tmp_path, format):
    numbers = labelled([0, 1, 1, 0]).cast_column("label", Value("int64"))
    for name, dataset in (("classes", labelled([0, 1, 1, 0])), ("numbers", numbers)):
        dataset.with_format(format).save_to_disk(tmp_path / name)
        train = load(tmp_path / name, validation_split_name="train")["train"]
        assert train["label"][:] == [0, 1, 1, 0]
        assert train[3]["image"]["bytes"] == dataset.cast_column("image", Image(decode=False))[3]["image"]["bytes"]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_split_for_evaluation_is_found_under_its_usual_names(tmp_path, name):
    split = labelled([0, 1, 1])
    saved = tmp_path / "saved"
    DatasetDict({"train": labelled([0] * 5), name: split, "test": split.select([0])}).save_to_disk(saved)
    assert len(load(saved)["validation"]) == 3
    assert len(load(saved, train_split_name=name)["validation"]) == 1  # not the images that it trains on


def test_a_dataset_without_the_usual_splits_names_the_argument_of_training_first(tmp_path):
    DatasetDict({"full": labelled([0, 1])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        UserError, match=r"split 'train' nor .*'full'.* --train_split_name, .* --validation_split_name"
    ):
        load(tmp_path / "saved")


def labelled(labels: list[int | None]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    images = [{"bytes": encode(number), "path": None} for number in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def write_splits(folder: Path, **splits: list[int | None]) -> Path:
    for split, labels in splits.items():
        labelled(labels).to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_test_split_without_labels_is_not_used_for_evaluation_by_default(tmp_path, caplog):
    folder = write_splits(tmp_path / "data", train=[0, 1] * 4, test=[-1, -1])
    images = load(folder)
    assert (len(images["train"]), len(images["validation"])) == (6, 2)
    assert "'test' has no labels" in caplog.text


@pytest.mark.parametrize(
    "splits, arguments, message",
    [
        (
            {"train": [0, 1], "test": [-1, -1]},
            {"validation_split_name": "test"},
            "\\(-1\\): 2 of 2 validation images",
        ),
        ({"train": [0, 1] * 4, "test": [-1, -1]}, {"test": True}, "Without a label.*: 2 of 2 test images"),
        ({"test": [-1, -1]}, {}, "Without a label.*: 2 of 2 validation images"),
        ({"train": [0, 1, None, 0], "test": [0, 1]}, {}, "Without a label.*: 1 of 4 train images"),
        ({"train": [0, -1, -1], "test": [0, 1]}, {}, "Without a label.*: 2 of 3 train images"),
        ({"train": [0, 1], "test": [0, -1]}, {}, "Without a label.*: 1 of 2 validation images"),
    ],
)
def test_images_without_labels_are_counted_and_refused(tmp_path, splits, arguments, message):
    with pytest.raises(UserError, match=message):
        load(write_splits(tmp_path / "data", **splits), **arguments)


def test_a_nan_label_is_a_missing_label(tmp_path):
    labels = pa.array([1, 0, float("nan")])
    with pytest.raises(UserError, match=r"Without a label.*: 1 of 3 train images"):
        load(write_table(tmp_path / "table", pa.array([encode(0)] * 3), labels))


def test_a_number_that_is_missing_in_a_table_is_a_missing_label(tmp_path):
    (tmp_path / "train.csv").write_text("image,label\na.jpg,1\nb.jpg,0\nc.jpg,\n")
    with pytest.raises(UserError, match=r"Without a label.*: 1 of 3 train images"):
        load(tmp_path / "train.csv")


def test_words_that_a_csv_reads_as_no_label_are_named(tmp_path):
    (tmp_path / "train.csv").write_text("image,label\na.jpg,None\nb.jpg,scratch\nc.jpg,NA\n")
    with pytest.raises(UserError, match=r"\(None\): 2 of 3 train images.*In a CSV file, .* NA, .*another name"):
        load(tmp_path / "train.csv")


def test_a_table_whose_name_is_a_pattern_is_read(pictures, tmp_path):
    (tmp_path / "photos [1].csv").write_text(
        "image,label\n" + "".join(f"pictures/{n}.jpg,{n % 2}\n" for n in range(4))
    )
    assert load(tmp_path / "photos [1].csv", train_val_split=2)["train"].num_rows == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_names_classes_that_have_only_numbers(tmp_path, streaming, caplog):
    named, numbered = write_splits(tmp_path / "named", train=[0, 1], test=[1, 0]), tmp_path / "numbered"
    (tmp_path / "names.txt").write_text("wasp\ncat\n", encoding="utf-8-sig")  # as Windows writes it
    for split in ("train", "test"):
        numbers = labelled([0, 1]).cast_column("label", ClassLabel(names=["0", "1"]))
        numbers.to_parquet(numbered / f"{split}.parquet")
    arguments = {"class_names": str(tmp_path / "names.txt"), "streaming": streaming, "shuffle_buffer_size": 1}
    for images in load(numbered, **arguments).values():
        assert images.features["label"].names == ["wasp", "cat"]
        rows = [row for _, _, row in images.read(0)] if streaming else list(images)
        assert [row["label"] for row in rows] == [0, 1]
    assert caplog.text == ""
    assert load(named, **arguments)["train"].features["label"].names == ["ant", "bee"]
    assert (
        "The file of 2 class names has no effect: the dataset names its 2 classes itself, 'ant' first." in caplog.text
    )


@pytest.mark.parametrize("left_out, classes", [("bus", ["bus", "train"]), ("beaker", ["test tube", "beaker"])])
def test_classes_that_are_named_like_splits_are_refused_as_a_dataset(left_out, classes, tmp_path):
    for name in classes:
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.jpg").write_bytes(encode(0))
    with pytest.raises(UserError, match=f"leaves out '{left_out}': give a folder of classes with --train_dir"):
        load(tmp_path / "photos")


@pytest.mark.parametrize(
    "names, unread",
    [
        (["train/ant", "train/bee", "test/ant", "more"], "'more'"),
        (["train/ant", "train/bee", "test/ant", "latest"], "'latest'"),
        (["bus", "car/red", "train/steam", "train/electric"], "'bus', 'car'"),
        (["trainer", "sandal"], None),
    ],
    ids=str,
)
def test_folders_of_splits_and_of_other_classes_are_datasets(names, unread, tmp_path, caplog):
    for name in names:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(encode(number))
    assert len(load(tmp_path / "photos")["train"].features["label"].names) == 2
    warned = [line for line in caplog.messages if "is read" in line]
    assert len(warned) == (unread is not None)
    assert all(f"has folders with names of splits, so no image of {unread} is read. Give" in line for line in warned)


@pytest.mark.parametrize("labels", [[-1, -1], [0, -1]], ids=["none", "some"])
def test_a_stream_without_labels_is_refused_before_training_or_while_it_is_read(tmp_path, labels):
    folder = write_splits(tmp_path / "data", train=[0, 1], validation=labels)
    validation = load(folder, streaming=True)["validation"]
    with pytest.raises(UserError, match=r"validation images has no label \(-1\); .* --validation_split_name"):
        validation.for_evaluation()
    validation.num_images = 2
    with pytest.raises(UserError, match=r"validation images has no label \(-1\)"):
        list(validation.for_evaluation().read(0))


@pytest.mark.parametrize(
    "splits, arguments, message",
    [
        (
            {"train": [0, 1]},
            {"train_split_name": "trian", "train_val_split": 0.5},
            "no split 'trian'.*--train_split_name",
        ),
        ({"train": [0, 1]}, {"label_column_name": "image"}, "'image' is .*--label_column_name"),
        ({"train": [0, 1]}, {"validation_split_name": "dev"}, "no split 'dev'; it has 'train'"),
        ({"train": [0, 1]}, {"test": True}, "no split 'test'"),
        ({"train": [0]}, {}, "No image can be held out.*has 1"),
        ({"train": [0, 1]}, {"train_val_split": 0.9}, "No image can be held out.*has 1"),
        ({"train": [0, 0, 1, 1]}, {"train_val_split": 4}, "--train_val_split is a share between 0 and 1"),
        ({"train": [0, 1]}, {"train_val_split": float("nan")}, "--train_val_split must be a finite number"),
    ],
)
def test_splits_that_are_missing_or_too_small_are_refused_in_one_sentence(tmp_path, splits, arguments, message):
    with pytest.raises(UserError, match=message):
        load(write_splits(tmp_path / "data", **splits), **arguments)


@pytest.mark.parametrize(
    "content", ["image,label\n", "", 'image,label\n"a,b\nc'], ids=["no rows", "nothing", "no table"]
)
def test_a_table_that_gives_no_images_is_refused_with_the_reason(tmp_path, content):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(UserError, match=r"train.csv' cannot be loaded: .*(no data|No columns|EOF inside)"):
        load(tmp_path / "train.csv")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of two images; each class has one colour."""
    for name, color in COLORS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            PILImage.new("RGB", (32, 16), color).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path) -> Path:
    """A model with random weights and four classes, in another order than the photos; one class has no photos."""
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "cat", 1: "dog", 2: "ant", 3: "bee"}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=[16, 32], patch_size=8, id2label=names, **fields)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def run(tmp_path: Path, *arguments) -> int:
    always = ["--output_dir", tmp_path / "out", "--report_to=none", "--use_cpu"]
    return main([str(argument) for argument in (*arguments, *always)])


def refused(capfd) -> str:
    (message,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    return message


def test_holding_out_without_training_images_is_refused(photos, model, tmp_path, capfd):
    flags = ["--model_name_or_path", model, "--do_eval", "--validation_dir", photos, "--train_val_split=0.5"]
    assert run(tmp_path, *flags) == 2
    assert "--train_val_split holds out training images, and there are none" in refused(capfd)


def test_a_model_is_evaluated_by_its_own_labels(photos, model, tmp_path):
    """The loss over all photos is the mean of the losses without one class and of this class alone."""
    losses = []
    for missing in ((), ("cat",), ("ant", "bee")):
        part = shutil.copytree(photos, tmp_path / f"without-{'-'.join(missing)}")
        for name in missing:
            shutil.rmtree(part / name)
        flags = ["--do_eval", "--per_device_eval_batch_size=2", "--dataloader_drop_last", "--validation_dir", part]
        assert run(tmp_path, "--model_name_or_path", model, *flags) == 0
        results = json.loads((tmp_path / "out" / "all_results.json").read_text())
        assert "eval_top5_accuracy" not in results  # it has four classes
        losses.append((results["eval_loss"], results["eval_samples"]))
    (whole, count), (without_cat, _), (cat, _) = losses
    assert count == 6
    assert whole == pytest.approx((without_cat * 4 + cat * 2) / 6, rel=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_a_dataset_become_the_models_own(tmp_path, streaming):
    folder = write_splits(tmp_path / "data", train=[0, 1, 1], validation=[1, 0])
    images = relabel(load(folder, streaming=streaming), [4, 2], 5)
    rows = [row for _, _, row in images["validation"].read(0)] if streaming else images["validation"]
    assert [row["label"] for row in rows] == [2, 4]
    assert [row["image"]["bytes"] for row in rows] == [encode(0), encode(1)]


def test_images_of_an_unknown_class_are_refused_without_advice_to_start_a_new_head(photos, model, tmp_path, capfd):
    (photos / "cat").rename(photos / "cow")
    for flags in ([], ["--ignore_mismatched_sizes"]):
        assert run(tmp_path, "--model_name_or_path", model, "--do_eval", "--validation_dir", photos, *flags) == 2
        message = refused(capfd)
        assert "has no class 'cow'" in message
        assert "--ignore_mismatched_sizes" not in message


def test_a_head_of_random_weights_is_neither_evaluated_nor_a_teacher(photos, model, tmp_path, capfd):
    body = ViTForImageClassification.from_pretrained(model).vit
    body.config.id2label = dict(enumerate(COLORS))
    body.save_pretrained(tmp_path / "body")
    flags = ["--do_eval", "--validation_dir", photos, "--ignore_mismatched_sizes"]
    assert run(tmp_path, "--model_name_or_path", tmp_path / "body", *flags) == 2
    assert "lacks the tensor 'classifier.bias'" in refused(capfd)
    tiny_config().save_pretrained(tmp_path / "tiny")
    flags = ["--do_train", "--train_dir", photos, "--max_steps=1", "--teacher_model_name_or_path", tmp_path / "body"]
    assert run(tmp_path, "--config_name", tmp_path / "tiny", *flags) == 2
    assert "lacks the tensor 'classifier.bias'" in refused(capfd)


@pytest.mark.parametrize("names", [["ant", "bee", "cow"], ["ant", "bee", "cow", "dog"]], ids=["as many", "more"])
def test_a_new_head_is_started_for_other_labels_of_any_number(photos, tmp_path, names, capfd):
    old = tiny_model(tiny_config(num_labels=len(names), id2label=dict(enumerate(names))))
    old.save_pretrained(tmp_path / "old")
    flags = ["--do_train", "--train_dir", photos, "--max_steps=1", "--save_packed=False", "--learning_rate=0"]
    flags += ["--save_strategy=no", "--per_device_train_batch_size=2", "--model_name_or_path", tmp_path / "old"]
    assert run(tmp_path, *flags) == 2
    assert "start a new head with --ignore_mismatched_sizes" in refused(capfd)
    assert run(tmp_path, *flags, "--ignore_mismatched_sizes") == 0
    new = type(old).from_pretrained(tmp_path / "out")
    assert list(new.config.id2label.values()) == ["ant", "bee", "cat"]
    assert new.classifier.weight.shape[0] == 3
    assert not torch.equal(new.classifier.weight, old.classifier.weight[:3])
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("num_classes", [5, 6])
def test_top_five_accuracy_is_reported_for_six_classes_or_more(tmp_path, num_classes):
    for name in map(str, range(num_classes)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        PILImage.new("RGB", (32, 16), (40 * int(name), 0, 0)).save(tmp_path / "photos" / name / "0.png")
    tiny_config().save_pretrained(tmp_path / "tiny")
    common = ["--do_train", "--do_eval", "--train_dir", tmp_path / "photos", "--validation_dir", tmp_path / "photos"]
    common += ["--max_steps=1", "--config_name", tmp_path / "tiny", "--save_packed=False", "--save_strategy=no"]
    teacher = tiny_model(tiny_config(num_labels=num_classes, id2label={k: str(k) for k in range(num_classes)}))
    teacher.save_pretrained(tmp_path / "teacher")
    assert run(tmp_path, *common, "--teacher_model_name_or_path", tmp_path / "teacher") == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    told = {name for name in results if "top5" in name}
    assert told == ({"eval_top5_accuracy", "teacher_top5_accuracy"} if num_classes > 5 else set())
    assert ("top-5" in (tmp_path / "out" / "README.md").read_text()) == (num_classes > 5)


def test_the_head_is_every_tensor_whose_shape_depends_on_the_number_of_labels():
    assert create_head(ModelArguments(), tiny_config()).keys() == {"classifier.weight", "classifier.bias"}


def decoded(dataset: TransformedImages, context: str) -> list[int]:
    sampler = create_train_sampler(dataset, 1, 2, 1, seed=0)
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler,
        num_workers=1,
        collate_fn=collate_images,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    return sorted(
        label for batch in loader for label in batch["labels"].tolist() if batch["pixel_values"].isfinite().all()
    )


def transformed(arguments: DataArguments) -> TransformedImages:
    images = load_images(arguments, 0, None, None)["train"]
    transform = create_train_transform(AugmentationArguments(), (16, 16), [0.5] * 3, [0.5] * 3)
    return TransformedImages(images, CroppingDecoder((16, 16), 0.08), transform, 0)


@pytest.mark.parametrize("context, streaming", [("spawn", False), ("forkserver", True)])
def test_workers_that_are_not_forked_decode_folders_and_streams(photos, tmp_path, context, streaming):
    if not streaming:
        dataset = transformed(DataArguments(train_dir=str(photos), validation_dir=str(photos)))
        assert decoded(dataset, context) == [0, 0, 1, 1, 2, 2]
        return
    write_archives(tmp_path / "archives", {"train": [2, 3], "validation": [1]}, num_classes=6)
    write_class_names(tmp_path / "archives", 6)
    tell_numbers(tmp_path / "archives", {"train": [2, 3], "validation": [1]})
    dataset = transformed(DataArguments(dataset_name=str(tmp_path / "archives"), streaming=True))
    assert decoded(dataset, context) == [0, 1, 2, 3, 4]


def test_a_batch_has_the_images_of_single_requests_and_reads_the_table_once(tmp_path, monkeypatch):
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PILImage.effect_noise((32, 32), 80).save(tmp_path / name)
    dataset = transformed(DataArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path)))
    keys = [SampleKey(1, 3, 0), SampleKey(1, 0, 0), SampleKey(1, 3, 1)]
    single = [dataset[key] for key in keys]
    assert not torch.equal(single[0]["pixel_values"], single[2]["pixel_values"])

    readings, read = [], Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: readings.append(key) or read(self, key))
    (batch,) = DataLoader(dataset, 3, sampler=keys, collate_fn=collate_images)
    assert readings == [[3, 0, 3]]
    assert torch.equal(batch["pixel_values"], torch.stack([item["pixel_values"] for item in single]))
    assert batch["labels"].tolist() == [item["labels"] for item in single] == [1, 0, 1]
