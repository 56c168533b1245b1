"""Decoding and cropping equal torchvision's where they must, and the benchmark of the loader runs."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import set_seed

import binaryvit_cli as cli
from binaryvit_hf import host_memory
from binaryvit_hf.benchmarks import loader as benchmark_loader
from binaryvit_hf.benchmarks.photographs import draw_photograph
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.augmentation import Normalize
from binaryvit_hf.data.decoding import CroppingDecoder, decode_image, draft
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.data.transforms import add_transforms
from binaryvit_hf.network.configuration_binaryvit import BinaryViTConfig
from binaryvit_runtime.errors import UserError


def encoded(image: Image.Image, kind: str = "JPEG") -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(draw_photograph(np.random.default_rng(0)))


def crops(size: tuple[int, int], image: dict, whole: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Crops of twenty random boxes: ours, and torchvision's of the whole image, resized by Pillow."""
    reference = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)
    pairs = []
    for seed in range(20):
        set_seed(seed)
        ours = CroppingDecoder(size, 0.08)(image)
        set_seed(seed)
        pairs.append((ours.int(), v2.PILToTensor()(reference(decode_image(whole))).int()))
    return pairs


@pytest.mark.parametrize("size, kind", [((224, 224), "JPEG"), ((30, 40), "PNG")])
def test_crops_of_a_fully_decoded_image_equal_torchvisions_within_rounding(photograph, size, kind):
    for ours, theirs in crops(size, encoded(photograph, kind), encoded(photograph, kind)):
        assert ours.shape == (3, *size)
        assert (ours - theirs).abs().max() <= 2
        assert (ours - theirs).abs().double().mean() < 0.02


def test_crops_of_a_jpeg_decoded_smaller_are_close_to_those_of_the_whole_image(photograph):
    image = encoded(photograph.resize((1000, 750)))
    differences = [(ours - theirs).abs().double().mean() for ours, theirs in crops((96, 128), image, image)]
    # Values from 0 to 255 of an image that is mostly noise. Boxes rounded to pixels of the smaller image would differ by 5.
    assert max(differences) < 2.5
    assert sum(differences) / 20 < 1.5
    assert max(differences) > 0.1  # so the image was decoded smaller


def test_crops_of_a_fully_decoded_jpeg_are_exact(photograph):
    jpeg = encoded(photograph)
    png = encoded(decode_image(jpeg), "PNG")
    decoder = CroppingDecoder((188, 250), 0.08)  # just over half of the image
    for seed in range(10):
        set_seed(seed)
        ours = decoder(jpeg)
        set_seed(seed)
        assert torch.equal(ours, decoder(png))


@pytest.mark.parametrize("most, scale", [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (40, 8)])
def test_the_decoder_divides_by_the_largest_factor_that_leaves_the_crop_its_pixels(photograph, most, scale):
    image = Image.open(io.BytesIO(encoded(photograph)["bytes"]))
    assert draft(image, most) == scale
    assert image.size == (-(-500 // scale), -(-375 // scale))
    assert draft(Image.open(io.BytesIO(encoded(photograph, "PNG")["bytes"])), most) == 1


@pytest.mark.parametrize("mode, kind", [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")])
@pytest.mark.parametrize("side", [16, 300])
def test_images_of_every_mode_become_rgb(photograph, mode, kind, side):
    image = encoded(photograph.convert(mode), kind)
    ours = CroppingDecoder((side, side), 1.0).decode(Image.open(io.BytesIO(image["bytes"])), 0, 0, 375, 500)
    theirs = v2.PILToTensor()(decode_image(image).resize((side, side), Image.Resampling.BICUBIC))
    assert (ours.int() - theirs.int()).abs().double().mean() < 2


def test_a_missing_image_is_an_error_and_a_url_is_read(photograph, tmp_path):
    path = tmp_path / "image.png"
    photograph.save(path)
    assert decode_image({"bytes": None, "path": path.as_uri()}).tobytes() == photograph.tobytes()
    with pytest.raises(ValueError, match="there is none"):
        decode_image({"bytes": None, "path": None})
    with pytest.raises(ValueError, match="there is none"):
        decode_image(None)


def test_normalisation_equals_torchvisions():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    expected = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(pixels))
    torch.testing.assert_close(Normalize(mean, std)(pixels), expected, rtol=1e-6, atol=1e-6)
    assert pixels[0, 0, -1] == 255


def test_evaluation_sees_the_whole_image_exactly_as_the_image_processor_does(photograph, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        photograph.resize((1000, 750)).save(tmp_path / name / "0.jpg")
    arguments = DataArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path))
    processor = create_image_processor(BinaryViTConfig(image_size=32), crop_pct=0.875)
    evaluated = add_transforms(load_images(arguments, 0, None, None), processor, arguments, 0)["validation"][0]
    expected = processor(Image.open(tmp_path / "ant" / "0.jpg"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(evaluated["pixel_values"], expected)


@pytest.fixture
def large_photos(photograph, tmp_path) -> DataArguments:
    """A JPEG, one turned by EXIF, a small and a transparent picture, in two classes."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.resize((1000, 750)).save(tmp_path / "ant" / "0.jpg")
    photograph.resize((1000, 752)).save(tmp_path / "ant" / "1.jpg", exif=exif)
    photograph.resize((40, 30)).save(tmp_path / "bee" / "0.png")
    photograph.convert("LA").save(tmp_path / "bee" / "1.png")
    return DataArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path), random_resized_crop_min_scale=0.25)


def test_images_kept_in_memory_are_reduced_for_training_and_unchanged_for_evaluation(large_photos, caplog):
    processor = create_image_processor(BinaryViTConfig(image_size=32), crop_pct=0.875)
    images = load_images(large_photos, 0, None, None)
    read = add_transforms(images, processor, large_photos, 0)
    with caplog.at_level("INFO"):
        kept = add_transforms(images, processor, large_photos, 0, keep=True)
    shapes = [picture.shape for picture in kept["train"].images.converted]
    assert shapes == [(64, 85, 3), (85, 64, 3), (30, 40, 3), (64, 85, 3)]  # a quarter of the area holds 32 x 32 pixels
    assert "Keeping 8 images in memory: 0 MB." in caplog.text
    for index in range(4):
        ours, theirs = kept["validation"][index], read["validation"][index]
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert ours["labels"] == theirs["labels"]
        assert torch.equal(kept["train"][index]["pixel_values"], kept["train"][index]["pixel_values"])
    assert torch.equal(kept["train"][2]["pixel_values"], read["train"][2]["pixel_values"])  # the small one is whole
    for index in (0, 1):
        whole = decode_image(images["train"][index]["image"])
        ours = kept["train"].images.converted[index].astype(int)
        theirs = np.array(whole.resize(ours.shape[1::-1], Image.Resampling.BICUBIC))
        assert np.abs(ours - theirs).mean() < 5  # of 255; the picture is mostly noise


def test_a_broken_image_stops_before_it_is_kept(large_photos, tmp_path):
    (tmp_path / "bee" / "0.png").write_bytes((tmp_path / "bee" / "1.png").read_bytes()[:2000])
    processor = create_image_processor(BinaryViTConfig(image_size=32), crop_pct=0.875)
    with pytest.raises(UserError, match=r"bee/0.png' cannot be decoded .*--skip_broken_images"):
        add_transforms(load_images(large_photos, 0, None, None), processor, large_photos, 0, keep=True)


def test_more_images_than_the_memory_holds_are_refused_before_they_are_read(large_photos, monkeypatch):
    processor = create_image_processor(BinaryViTConfig(image_size=32), crop_pct=0.875)
    monkeypatch.setattr("binaryvit_hf.data.transforms.free_memory", lambda: 50_000)
    with pytest.raises(
        UserError, match=r"needs 0.0 GB for 4 training images, and 0.0 GB are free: give --keep_images_in_memory false"
    ):
        add_transforms(load_images(large_photos, 0, None, None), processor, large_photos, 0, keep=True)
    monkeypatch.setattr("binaryvit_hf.data.transforms.free_memory", lambda: 60_000)
    add_transforms(load_images(large_photos, 0, None, None), processor, large_photos, 0, keep=True)


def test_the_limit_of_a_container_counts_without_memory_that_the_kernel_reclaims(tmp_path):
    for name, content in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 100\ninactive_file 50\nactive_file 20\nslab_reclaimable 7\nslab_unreclaimable 3"),
    ):
        (tmp_path / name).write_text(content + "\n")
    assert host_memory.free_in_container(tmp_path) == 377
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free_in_container(tmp_path) is None
    assert host_memory.free_in_container(tmp_path / "none") is None


def test_the_loader_is_measured_beside_the_papers_public_code(monkeypatch, capsys):
    small = {"num_images": 16, "batch_size": 8, "rounds": 15}
    whole = benchmark_loader.benchmark_loader
    monkeypatch.setattr(benchmark_loader, "benchmark_loader", lambda: whole(**small))
    assert cli.main(["benchmark", "--loader", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["ratio"] == measured["ours_images_per_second"] / measured["baseline_images_per_second"]
    assert 90_000 < measured["bytes_per_image"] < 130_000
