"""`--crop_in_batches` gives the crops of `CroppingDecoder`, with other random numbers."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from binaryvit_hf.data import batch_crops, transforms
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.batch_crops import ATTEMPTS, BatchCrops, draw_boxes
from binaryvit_hf.data.decoding import CroppingDecoder
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.data.model_inputs import ModelInput, create_image_processor
from binaryvit_hf.data.sampling import SampleKey
from binaryvit_hf.data.transforms import add_transforms
from binaryvit_hf.network.configuration_binaryvit import BinaryViTConfig
from binaryvit_runtime.errors import UserError


PIXELS = ModelInput((24, 20), mean=(0, 0, 0), std=(1 / 255,) * 3)
COUNT = 40


def keys_of(count: int) -> list[SampleKey]:
    return [SampleKey(3, index, 1) for index in range(count)]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 200, (COUNT, 28, 32, 3), dtype=np.uint8)  # no value is cut off


@pytest.mark.parametrize("min_scale", [0.08, 0.6, 1.0])
@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_a_crop_equals_that_of_a_single_image(noise, min_scale, flip_prob):
    arguments = DataArguments(random_resized_crop_min_scale=min_scale, horizontal_flip_prob=flip_prob)
    crops = BatchCrops(noise, arguments, PIXELS, seed=7)(keys_of(COUNT))
    numbers = [np.random.default_rng([7, *key]).random(1 + 4 * ATTEMPTS)[1:] for key in keys_of(COUNT)]
    boxes = zip(*draw_boxes(np.array(numbers), 28, 32, min_scale))
    decoder = CroppingDecoder((24, 20), min_scale)
    for image, crop, (top, left, height, width) in zip(noise, crops, boxes):
        alone = decoder.decode(Image.fromarray(image), int(top), int(left), int(height), int(width)).float()
        assert (
            crop - (alone.flip(-1) if flip_prob else alone)
        ).abs().max() < 1.6  # both passes of `alone` are rounded


def test_boxes_are_as_large_and_where_those_of_torchvision_are():
    decoder, count = CroppingDecoder((24, 24), 0.3), 4000
    ours = np.stack(draw_boxes(np.random.default_rng(0).random((count, 4 * ATTEMPTS)), 28, 40, 0.3))
    torch.manual_seed(0)
    drawn = [decoder.crop.make_params([torch.empty(3, 28, 40)]) for _ in range(count)]
    theirs = np.array([[box[side] for box in drawn] for side in ("top", "left", "height", "width")])
    tops, lefts, heights, widths = ours
    assert (tops >= 0).all() and (lefts >= 0).all() and (tops + heights <= 28).all() and (lefts + widths <= 40).all()
    assert np.abs(ours.mean(1) - theirs.mean(1)).max() < 0.35
    assert np.abs(ours.std(1) - theirs.std(1)).max() < 0.35


def test_without_a_box_that_fits_the_largest_in_the_middle_is_taken():
    numbers = np.full((1, 4 * ATTEMPTS), 0.999)
    assert [int(side[0]) for side in draw_boxes(numbers, 20, 90, 1.0)] == [0, 31, 20, 27]
    assert [int(side[0]) for side in draw_boxes(numbers, 24, 24, 1.0)] == [0, 0, 24, 24]


def test_an_image_depends_on_its_key_alone(noise):
    arguments = DataArguments(random_erasing_prob=0.5)
    crop = BatchCrops(noise, arguments, PIXELS, seed=7)
    torch.manual_seed(1)
    together, reverse = crop(keys_of(COUNT)), crop(keys_of(COUNT)[::-1]).flip(0)
    assert torch.equal(together, reverse)
    assert torch.equal(together[5:6], crop([SampleKey(3, 5, 1)]))
    assert not torch.equal(together[5:6], crop([SampleKey(4, 5, 1)]))
    plain = BatchCrops(noise, DataArguments(), PIXELS, seed=7)(keys_of(COUNT))
    changed = (together != plain).flatten(1).any(1)
    assert 8 < changed.sum() < 32  # half of them are erased


def test_large_images_are_cropped_a_few_at_a_time_with_the_same_values(noise, monkeypatch):
    crop = BatchCrops(noise, DataArguments(), PIXELS, seed=7)
    assert crop.images_at_once() > 512
    together, batches = crop(keys_of(COUNT)), []
    monkeypatch.setattr(batch_crops, "MOST_NUMBERS", 100_000)
    monkeypatch.setattr(crop, "crop", lambda keys, crop=crop.crop: batches.append(len(keys)) or crop(keys))
    assert torch.equal(crop(keys_of(COUNT)), together)
    assert sum(batches) == COUNT and len(batches) > 5
    monkeypatch.setattr(batch_crops, "MOST_NUMBERS", 1)
    assert crop.images_at_once() == 1


def test_channels_are_in_the_models_order(noise):
    wanted = ModelInput((24, 20), mean=(0, 0, 0), std=(1 / 255,) * 3, channels=(2, 1, 0))
    plain, reordered = (BatchCrops(noise, DataArguments(), model, 0)(keys_of(4)) for model in (PIXELS, wanted))
    assert torch.equal(reordered, plain.flip(1))


@pytest.fixture
def icons(tmp_path):
    for name, color in (("ant", "red"), ("bee", "blue")):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (30, 28), color).save(tmp_path / name / f"{number}.png")
    return tmp_path


def load(folder) -> dict:
    arguments = DataArguments(train_dir=str(folder), validation_dir=str(folder), crop_in_batches=True)
    processor = create_image_processor(BinaryViTConfig(image_size=32), crop_pct=1.0)
    return add_transforms(load_images(arguments, 0, None, None), processor, arguments, 0, keep=True)


def test_a_folder_of_icons_is_read_and_cropped(icons):
    images = load(icons)["train"]
    batch = images.__getitems__([SampleKey(0, 4, 0), 0])
    assert [example["labels"] for example in batch] == [1, 0] == [images.labels[4], images.labels[0]]
    assert batch[0]["pixel_values"].shape == (3, 32, 32)
    assert batch[0]["pixel_values"][2].min() > batch[0]["pixel_values"][0].max()  # blue
    assert torch.equal(images[0]["pixel_values"], batch[1]["pixel_values"])


def test_images_of_several_sizes_are_refused(icons):
    Image.new("RGB", (31, 28), "red").save(icons / "ant" / "9.png")
    with pytest.raises(
        UserError,
        match=r"--crop_in_batches needs images of one size, but '.*0.png' has 30 x 28 pixels and '.*9.png' has 31 x 28: ",
    ):
        load(icons)


def test_images_are_in_memory_once_and_a_spawned_worker_gets_them_once(icons):
    images = load(icons)["train"]
    assert images.crop.images is images.images.converted
    assert len(pickle.dumps(images)) < 1.5 * images.images.converted.nbytes + 3000  # what a spawned worker gets


def test_a_warning_says_that_large_images_load_faster_otherwise(icons, caplog, monkeypatch):
    load(icons)
    assert "faster" not in caplog.text
    monkeypatch.setattr(transforms, "MAX_MATRIX_SIZE", 32 * (30 + 28) - 1)
    load(icons)
    assert "crops of 32 x 32 pixels, from images of 30 x 28, are made faster without it" in caplog.text


@pytest.mark.parametrize("split, limit", [("train", "max_train_samples"), ("validation", "max_eval_samples")])
def test_too_little_memory_names_the_images_and_the_argument_that_limits_them(split, limit, icons, monkeypatch):
    free = iter([1] if split == "train" else [None, 1])
    monkeypatch.setattr(transforms, "free_memory", lambda: next(free))
    with pytest.raises(UserError, match=f"--crop_in_batches needs .* for 6 .* images, .* --{limit}"):
        load(icons)


@pytest.mark.parametrize("other", [{"rand_augment": "rand-m9"}, {"color_jitter": 0.3}])
def test_arguments_that_change_colours_are_refused(other):
    with pytest.raises(ValueError, match=f"leave it out, or --{next(iter(other))}"):
        DataArguments(crop_in_batches=True, **other)
