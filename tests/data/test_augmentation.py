"""Augmentation of single images, mixing of batches, and the order of training images."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import set_seed

from binaryvit_hf.data.augmentation import AugmentationArguments, create_mix, create_train_transform
from binaryvit_hf.data.decoding import CroppingDecoder
from binaryvit_hf.data.known_datasets import encode_png
from binaryvit_hf.data.sampling import SampleKey, TrainSampler, seeded_rng


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PLAIN = {"random_resized_crop_min_scale": 1.0, "horizontal_flip_prob": 0.0}
IMAGES = torch.arange(5 * 3 * 8 * 8, dtype=torch.float32).view(5, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 3, 1])


def transform(seed: int = 0, **arguments) -> torch.Tensor:
    gradient = torch.arange(48 * 64 * 3, dtype=torch.uint8).view(48, 64, 3).numpy()
    arguments = AugmentationArguments(**(PLAIN | arguments))
    set_seed(seed)
    crop = CroppingDecoder((24, 32), arguments.random_resized_crop_min_scale)
    image = {"bytes": encode_png(gradient), "path": None}
    return create_train_transform(arguments, (24, 32), MEAN, STD)(crop(image))


@pytest.mark.parametrize(
    "arguments",
    [
        {"random_resized_crop_min_scale": 0.08},
        {"horizontal_flip_prob": 1.0},
        {"color_jitter": 0.4},
        {"rand_augment": "rand-m9-p1.0-mstd0.5-inc1"},
        {"random_erasing_prob": 1.0},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_each_augmentation_changes_the_image_and_repeats_with_its_seed(arguments):
    image = transform(**arguments)
    assert image.shape == (3, 24, 32)
    assert image.dtype == torch.float32
    assert not torch.equal(image, transform())
    assert torch.equal(image, transform(**arguments))


def test_rand_augment_replaces_color_jitter():
    policy = {"rand_augment": "rand-m9-mstd0.5-inc1"}
    assert torch.equal(transform(**policy), transform(**policy, color_jitter=0.9))


def test_erasing_fills_a_rectangle_with_noise_and_leaves_the_rest():
    changed = (transform(random_erasing_prob=1.0) != transform()).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert 0.01 < changed.double().mean() < 0.4


@pytest.mark.parametrize(
    "arguments",
    [
        {"rand_augment": "random-m9"},
        {"rand_augment": "rand-x9"},
        {"random_resized_crop_min_scale": 0.0},
        {"horizontal_flip_prob": 1.5},
        {"mixup_alpha": -1.0},
        {"mixup_switch_prob": 2.0},
    ],
    ids=str,
)
def test_invalid_augmentation_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AugmentationArguments(**arguments)


def test_nothing_is_mixed_unless_asked():
    assert create_mix(AugmentationArguments(), 4) is None
    images, labels = create_mix(AugmentationArguments(mixup_alpha=0.8, mixup_prob=0.0), 4)(IMAGES, LABELS)
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_labels_are_mixed_in_the_shares_of_the_images(kind):
    set_seed(0)
    images, labels = create_mix(AugmentationArguments(**{kind: 1.0}), 4)(IMAGES, LABELS)
    share = labels[0, 0].item()  # image 0 is mixed with image 4, the one before it in the circle
    assert 0 < share < 1
    expected = share * torch.eye(4)[LABELS] + (1 - share) * torch.eye(4)[LABELS.roll(1)]
    torch.testing.assert_close(labels, expected)
    if kind == "mixup_alpha":
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.roll(1, 0))
    else:
        own = (images == IMAGES).all(1)
        assert own.double().mean().item() == pytest.approx(share)
        assert torch.equal(
            images.where(~own[:, None], torch.tensor(0.0)), IMAGES.roll(1, 0).where(~own[:, None], torch.tensor(0.0))
        )


@pytest.mark.parametrize("switch, mixes_pixels", [(0.0, True), (1.0, False)])
def test_switch_chooses_between_mixup_and_cutmix(switch, mixes_pixels):
    set_seed(0)
    mix = create_mix(AugmentationArguments(mixup_alpha=1.0, cutmix_alpha=1.0, mixup_switch_prob=switch), 4)
    images, _ = mix(IMAGES, LABELS)
    assert (~torch.isin(images, IMAGES)).any().item() == mixes_pixels


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_different_processes_get_the_repeats_of_an_image_and_the_epoch_keeps_its_length(num_processes):
    sampler = TrainSampler(48, repeats=3, batch_size=4, num_processes=num_processes, seed=7)
    shards = [
        BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes, process)
        for process in range(num_processes)
    ]
    seen = [[index for batch in shard for index in batch] for shard in shards]
    together = [index for indices in seen for index in indices]
    assert len(sampler) == len(together) == 48
    assert len(set(together)) == 16
    assert all(together.count(index) == 3 for index in together)
    if num_processes == 3:
        assert all(len(set(indices)) == 16 for indices in seen)


def test_a_sample_key_names_epoch_image_and_repeat():
    sampler = TrainSampler(8, repeats=2, batch_size=4, num_processes=1, seed=7, yield_keys=True)
    sampler.set_epoch(3)
    keys = list(sampler)
    assert len(set(keys)) == 8
    assert {key.epoch for key in keys} == {3}
    plain = TrainSampler(8, repeats=2, batch_size=4, num_processes=1, seed=7)
    plain.set_epoch(3)
    assert [key.image_index for key in keys] == list(plain)


UNBALANCED = [0] * 40 + [1] * 6 + [3] * 2  # class 2 has no images


@pytest.mark.parametrize("number, repeats", [(48, 1), (48, 3)])
def test_balanced_classes_have_equal_shares_of_an_epoch_and_no_augmentation_is_shown_twice(number, repeats):
    sampler = TrainSampler(number, repeats, 4, 2, seed=7, yield_keys=True, labels=UNBALANCED)
    keys = list(sampler)
    assert len(keys) == len(set(keys)) == len(sampler) == 48
    counts = Counter(UNBALANCED[key.image_index] for key in keys)
    assert sorted(counts) == [0, 1, 3]
    assert max(counts.values()) - min(counts.values()) <= (0 if repeats == 1 else 3)
    if repeats == 1:
        shown = Counter(key.image_index for key in keys)
        assert all(shown[index] == 1 for index in shown if index < 40)
        assert {shown[index] for index in range(40, 46)} == {2, 3}  # 16 is not a multiple of 6
        assert shown[46] == shown[47] == 8


def test_each_epoch_draws_other_images_of_a_large_class():
    sampler = TrainSampler(48, 1, 4, 1, seed=7, labels=UNBALANCED)
    shown = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        shown |= set(sampler)
    assert len(shown) > 44
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_balanced_classes_differ_by_at_most_one_image(number):
    labels = [0, 0, 0, 1, 1, 2, 2][:number]
    counts = Counter(labels[index] for index in TrainSampler(number, 1, 4, 1, seed=0, labels=labels))
    assert sum(counts.values()) == number
    assert max(counts.values()) - min(counts.values()) <= 1


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_sample_key_determines_the_random_numbers_and_outer_generators_are_unchanged():
    set_seed(0)
    expected = draw(), draw()
    set_seed(0)
    before = draw()
    with seeded_rng(1, *SampleKey(2, 3, 0)):
        inside = draw()
    assert (before, draw()) == expected
    with seeded_rng(1, *SampleKey(2, 3, 0)):
        assert draw() == inside
    for other in (SampleKey(3, 3, 0), SampleKey(2, 4, 0), SampleKey(2, 3, 1)):
        with seeded_rng(1, *other):
            assert draw() != inside


def test_the_order_depends_on_the_epoch_and_on_the_seed():
    sampler = TrainSampler(30, repeats=2, batch_size=4, num_processes=2, seed=7)
    first = list(sampler)
    assert list(sampler) == first
    assert sorted(set(first)) != list(range(30))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(TrainSampler(30, 2, 4, 2, seed=8)) != list(TrainSampler(30, 2, 4, 2, seed=7))
