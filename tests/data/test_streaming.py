"""Streams: every image once an epoch, the same weights after an interruption, and errors in one sentence."""

import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import ClassLabel, Dataset, Features, Image
from datasets import config as datasets_config
from processes import run_script
from safetensors.torch import load_file
from streams import add, encode, tell_numbers, write_archives, write_class_names
from tiny import tiny_config
from torch.utils.data import BatchSampler, DataLoader

from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.augmentation import AugmentationArguments, create_train_transform
from binaryvit_hf.data.decoding import CroppingDecoder
from binaryvit_hf.data.image_checks import check_images
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.data.sampling import StreamSampler
from binaryvit_hf.data.transforms import TransformedImages, collate_images
from binaryvit_hf.training.run import main
from binaryvit_runtime.errors import UserError


SHARDS = {"train": [9, 4, 11], "validation": [5, 2]}  # 24 and 7 images
STEPS = ["--max_steps=9", "--save_steps=2", "--per_device_train_batch_size=4", "--per_device_eval_batch_size=2"]
QUIET = ["--do_train", "--report_to=none", "--use_cpu", "--crop_pct=1.0", "--save_packed=False"]


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: the network is tiny, and more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache: for a downloaded dataset the number of images would be known."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def archives(tmp_path) -> Path:
    """Archives in which every image has a class of its own."""
    write_archives(tmp_path / "archives", SHARDS, num_classes=31)
    write_class_names(tmp_path / "archives", 31)
    tell_numbers(tmp_path / "archives", SHARDS)
    return tmp_path / "archives"


def stream(folder: Path, seed: int = 0, **arguments) -> TransformedImages:
    arguments = DataArguments(dataset_name=str(folder), streaming=True, **({"shuffle_buffer_size": 6} | arguments))
    images = load_images(arguments, seed, None, None)["train"]
    transform = create_train_transform(AugmentationArguments(), (16, 16), [0.5] * 3, [0.5] * 3)
    return TransformedImages(images, CroppingDecoder((16, 16), 0.08), transform, seed)


def epochs(dataset: TransformedImages, processes: int, workers: int, repeats: int = 1, number: int = 2) -> list[list]:
    """For each epoch, the batches `[labels, pixels]` of all processes in turn."""
    sampler = StreamSampler(dataset.stream, repeats, batch_size=3, num_processes=processes)
    seen = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        shards = [
            BatchSamplerShard(BatchSampler(sampler, 3, drop_last=False), processes, process)
            for process in range(processes)
        ]
        loaders = [
            DataLoader(dataset, batch_sampler=shard, num_workers=workers, collate_fn=collate_images)
            for shard in shards
        ]
        seen.append([(batch["labels"].tolist(), batch["pixel_values"]) for each in zip(*loaders) for batch in each])
    return seen


def labels(batches: list) -> list[int]:
    return [label for batch, _ in batches for label in batch]


@pytest.mark.parametrize("shards", [[24], [9, 4, 11], [1] * 24])
def test_an_epoch_shows_every_image_once_for_any_number_of_shards_processes_and_workers(tmp_path, shards):
    write_archives(tmp_path / "archives", {"train": shards, "validation": [2]}, num_classes=26)
    write_class_names(tmp_path / "archives", 26)
    tell_numbers(tmp_path / "archives", {"train": shards, "validation": [2]})
    orders = {}
    for processes, workers in ((1, 0), (1, 3), (2, 0), (2, 2)):
        first, second = map(labels, epochs(stream(tmp_path / "archives"), processes, workers))
        assert sorted(first) == sorted(second) == list(range(24))
        assert first != second
        assert orders.setdefault(processes, (first, second)) == (first, second)
    assert labels(epochs(stream(tmp_path / "archives", seed=1), 1, 0)[0]) != orders[1][0]
    batches = [sorted(orders[1][0][start : start + 6]) for start in range(0, 24, 6)]
    assert batches == [sorted(orders[2][0][start : start + 6]) for start in range(0, 24, 6)]  # both processes together


def test_augmentation_depends_on_the_sample_key_and_not_on_workers(archives):
    alone, shared = (epochs(stream(archives), 1, workers) for workers in (0, 2))
    for ours, theirs in zip(alone, shared):
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(ours, theirs))
    seen = [dict(zip(labels(batches), torch.cat([pixels for _, pixels in batches]))) for batches in alone]
    assert not any(torch.equal(seen[0][label], seen[1][label]) for label in range(24))


def test_different_processes_get_the_repeats_of_a_streamed_image_and_the_epoch_keeps_its_length(archives):
    (batches,) = epochs(stream(archives), 2, 0, repeats=2, number=1)
    assert len(set(labels(batches))) == 12
    for first, second in zip(batches[::2], batches[1::2]):
        assert first[0] == second[0]
        assert not torch.equal(first[1], second[1])


def train(archives: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    """The weights after training on a stream."""
    tiny_config(drop_path_rate=0.5, num_labels=31).save_pretrained(output.parent / "config")
    common = ["--config_name", output.parent / "config", "--dataset_name", archives, "--output_dir", output]
    more = ["--streaming", "--shuffle_buffer_size=6", "--learning_rate=0.01", *STEPS, *QUIET, *flags]
    assert main([str(argument) for argument in (*common, *more)]) == 0
    return load_file(output / "model.safetensors")


def test_batch_norm_statistics_can_be_reestimated_from_a_stream(archives, tmp_path):
    plain = train(archives, tmp_path / "plain", "--max_steps=3")
    reestimated = train(archives, tmp_path / "reestimated", "--max_steps=3", "--batch_norm_reestimation_batches=2")
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], reestimated[name])}
    assert changed == {"running_mean", "running_var"}


@pytest.mark.parametrize("known", [True, False], ids=["known number", "unknown number"])
def test_a_resumed_run_on_a_stream_ends_with_the_weights_of_an_uninterrupted_one(archives, tmp_path, known, caplog):
    caplog.set_level(logging.INFO)
    if not known:
        (archives / "README.md").unlink()
    expected = train(archives, tmp_path / "out", "--dataloader_num_workers=2", "--mixup_alpha=0.8")
    assert ("24 images per epoch, in 3 shards" if known else "an unknown number of images") in caplog.text
    for last in (8, 6):  # in the middle of the second epoch, and at its beginning
        (tmp_path / "out" / "train_results.json").unlink()
        for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
            if int(checkpoint.name.removeprefix("checkpoint-")) > last:
                shutil.rmtree(checkpoint)
        weights = train(archives, tmp_path / "out", "--dataloader_num_workers=2", "--mixup_alpha=0.8")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    shutil.rmtree(tmp_path / "out")
    weights = train(archives, tmp_path / "out", "--mixup_alpha=0.8")  # without workers
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_two_processes_share_a_stream_and_evaluate_each_image_once(tmp_path, warm_python):
    archives = tmp_path / "archives"
    write_archives(archives, SHARDS, num_classes=3)
    write_class_names(archives, 3)
    tell_numbers(archives, SHARDS)
    tiny_config().save_pretrained(tmp_path / "config")
    flags = ["--config_name", tmp_path / "config", "--dataset_name", archives, *QUIET, *STEPS, "--do_eval"]
    flags += ["--output_dir", tmp_path / "out", "--streaming", "--dataloader_num_workers=2", "--max_steps=4"]
    result = run_script(warm_python, 2, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    together = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert together["epoch"] == 4 / 3  # 4 steps of 2 x 4 of the 24 images
    evaluate = ["--model_name_or_path", tmp_path / "out", "--dataset_name", archives, "--do_eval", "--use_cpu"]
    evaluate += ["--output_dir", tmp_path / "alone", "--report_to=none", "--per_device_eval_batch_size=3"]
    assert main([str(argument) for argument in evaluate]) == 0  # not streamed
    alone = json.loads((tmp_path / "alone" / "all_results.json").read_text())
    assert together["eval_samples"] == alone["eval_samples"] == 7
    assert together["eval_accuracy"] == alone["eval_accuracy"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--skip_broken_images"], ["--skip_broken_images", "--streaming"]),
        (["--train_val_split=0.5"], ["--train_val_split", "--streaming"]),
        (["--keep_images_in_memory"], ["--keep_images_in_memory", "--streaming"]),
        (["--shuffle_buffer_size=0"], ["--shuffle_buffer_size must be 1 or more"]),
        (["--max_train_samples=0"], ["--max_train_samples must be 1 or more"]),
        (["--dataset_name=sklearn-digits"], ["--streaming needs a --dataset_name"]),
        (["--validation_split_name=dev"], ["no split 'dev'", "'validation'"]),
        (["--label_column_name=json"], ["'json'", "not a column of labels"]),
        (["--class_names=nowhere.txt"], ["nowhere.txt"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_sources_that_cannot_be_streamed_are_refused_in_one_sentence(archives, tmp_path, flags, words, capfd):
    tiny_config().save_pretrained(tmp_path / "config")
    common = ["--config_name", tmp_path / "config", "--dataset_name", archives, "--output_dir", tmp_path / "out"]
    assert main([str(argument) for argument in (*common, "--streaming", *QUIET, *flags)]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert all(word in said[0] for word in words)
    assert not (tmp_path / "out").exists()


def test_a_stream_of_unknown_length_needs_max_steps_or_max_train_samples(archives, tmp_path, capfd):
    (archives / "README.md").unlink()
    tiny_config().save_pretrained(tmp_path / "config")
    common = ["--config_name", tmp_path / "config", "--dataset_name", archives, "--output_dir", tmp_path / "out"]
    common = [str(argument) for argument in (*common, "--streaming", *QUIET, "--num_train_epochs=2")]
    assert main(common) == 2
    assert "give --max_steps" in capfd.readouterr().err
    assert main([*common, "--max_train_samples=25"]) == 2
    assert "ended after 24, but it should have 25" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*common, "--max_train_samples=24"]) == 0
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["epoch"] == 2


def test_nothing_can_be_held_out_of_a_stream(tmp_path):
    write_archives(tmp_path / "archives", {"train": [4]}, num_classes=4)
    write_class_names(tmp_path / "archives", 4)
    with pytest.raises(UserError, match="no split to evaluate on"):
        stream(tmp_path / "archives")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_in_a_stream_is_named(archives, workers):
    with tarfile.open(archives / "train-0003.tar", "w") as archive:
        for number, content in ((90, encode(90)), (91, encode(91)[:-40])):
            add(archive, f"{number:04d}.jpg", content)
            add(archive, f"{number:04d}.cls", b"0")
            add(archive, f"{number:04d}.json", b"{}")
    tell_numbers(archives, {"train": [26], "validation": [7]})
    with pytest.raises(UserError, match=r"'0091.jpg' cannot be decoded .*: remove it\."):
        epochs(stream(archives), 1, workers)


def test_a_missing_image_in_a_stream_is_reported(archives):
    with tarfile.open(archives / "train-0003.tar", "w") as archive:
        add(archive, "0090.cls", b"0")
    tell_numbers(archives, {"train": [25], "validation": [7]})
    with pytest.raises(UserError, match=r"'image \d+' cannot be decoded \(there is none\): remove it\."):
        epochs(stream(archives), 1, 0)


def test_a_stream_that_ends_early_is_reported(archives):
    tell_numbers(archives, {"train": [25], "validation": [7]})
    with pytest.raises(UserError, match="ended after 24, but it should have 25"):
        epochs(stream(archives), 1, 0)


@pytest.mark.parametrize("column", ["image", "picture"])
def test_streamed_images_of_a_table_keep_their_encoding(tmp_path, column, monkeypatch):
    monkeypatch.setattr(datasets_config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    features = Features({column: Image(), "label": ClassLabel(names=["ant", "bee"])})
    for split, numbers in (("train", range(10)), ("validation", range(10, 14))):
        rows = {column: [{"bytes": encode(number), "path": f"{number}.jpg"} for number in numbers]}
        rows["label"] = [number % 2 for number in numbers]
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / f"{split}.parquet")
    images = load_images(DataArguments(dataset_name=str(tmp_path / "table"), streaming=True), 0, None, None)
    assert images["train"].features["label"].names == ["ant", "bee"]
    assert (images["train"].num_images, len(images["validation"].for_evaluation())) == (None, 4)
    read = {row["image"]["path"]: row for _, _, row in images["train"].read(0)}
    assert len(read) == 10
    for number in range(10):
        row = read[f"{number}.jpg"]
        assert (row["image"]["bytes"], row["label"]) == (encode(number), number % 2)


def write_table(folder: Path, train: int, validation: int) -> Path:
    """A table that does not state its length. The first half of each split are ants, the others bees."""
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    for split, number in (("train", train), ("validation", validation)):
        rows = {"image": [{"bytes": encode(0), "path": None}] * number}
        rows["label"] = [int(2 * index >= number) for index in range(number)]
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("most, number", [(4, 4), (6, 6), (10, 6)])
def test_at_most_so_many_images_of_a_stream_of_unknown_length_are_evaluated(tmp_path, most, number):
    table = write_table(tmp_path / "table", train=4, validation=6)
    arguments = DataArguments(dataset_name=str(table), streaming=True, max_eval_samples=most)
    validation = load_images(arguments, 0, None, None)["validation"].for_evaluation()
    assert len(validation) == len(list(validation.read(0))) == number


def test_a_part_of_a_sorted_stream_has_all_classes_or_causes_a_warning(tmp_path, caplog):
    table = str(write_table(tmp_path / "table", train=300, validation=300))
    arguments = {"dataset_name": table, "streaming": True, "max_train_samples": 120}
    for buffer_size, sorted_by_class in ((300, False), (1, True)):
        images = load_images(DataArguments(**arguments, shuffle_buffer_size=buffer_size), 0, None, None)
        rows = [row for _, row in StreamSampler(images["train"], training=True)]
        assert len(rows) == 120
        assert len({row["label"] for row in rows}) == (1 if sorted_by_class else 2)
        assert ("The first 100 training images have one class, 'ant'" in caplog.text) is sorted_by_class


@pytest.mark.parametrize("limit, part", [(20, ["All 20"]), (120, ["The first 100"]), (301, []), (None, [])])
def test_a_sorted_evaluation_stream_causes_a_warning_only_if_it_is_cut_short(tmp_path, limit, part, caplog):
    table = str(write_table(tmp_path / "table", train=300, validation=300))
    images = load_images(DataArguments(dataset_name=table, streaming=True, max_eval_samples=limit), 0, None, None)
    validation = images["validation"].for_evaluation()
    check_images({"validation": validation}, skip_broken=False, background="white", max_eval_samples=limit)
    remedy = "if the dataset is sorted by class, shuffle it, or leave out --max_eval_samples."
    warnings = [message for message in caplog.messages if "one class" in message]
    assert warnings == [f"{words} validation images have one class, 'ant': {remedy}" for words in part]


@pytest.mark.parametrize("files, warned", [("validation.parquet", False), ("ants.parquet", True)])
def test_chosen_files_of_one_class_cause_a_warning(tmp_path, files, warned, caplog):
    table = write_table(tmp_path / "table", train=4, validation=300)
    Dataset.from_parquet(str(table / "validation.parquet")).select(range(150)).to_parquet(table / "ants.parquet")
    arguments = {"train_files": "train.parquet", "validation_files": files, "streaming": True}
    images = load_images(DataArguments(dataset_name=str(table), **arguments), 0, None, None)
    check_images({"validation": images["validation"].for_evaluation()}, skip_broken=False, background="white")
    remedy = "if the dataset is sorted by class, shuffle it, or choose files of all classes."
    warning = f"All 150 validation images have one class, 'ant': {remedy}"
    assert [message for message in caplog.messages if "one class" in message] == [warning] * warned
