"""Undamaged tiny models, pictures and folders for attacks."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from harness import Said, Wrong, run
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import ViTConfig, ViTForImageClassification, pipeline

from binaryvit_cli import main
from binaryvit_cli.classification import classify_files
from binaryvit_hf.data.decoding import CroppingDecoder, decode_image
from binaryvit_hf.data.image_checks import check_images
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.data.transforms import process_image
from binaryvit_hf.loading import load_classifier, load_image_processor
from binaryvit_runtime.errors import LINE_LENGTH
from binaryvit_runtime.image_files import ImageFile
from binaryvit_runtime.pixels import describe_unreadable


LABELS = {0: "ant", 1: "bee", 2: "cat"}


def fill_shelf(root: Path) -> Path:
    """`latent` and `packed` of the same model, `photos` of its three classes, and `a.png`."""
    model = tiny_model(tiny_config(id2label=LABELS))
    model.save_pretrained(root / "latent")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(root / "latent")
    (root / "latent" / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.9, "eval_samples": 9}))
    assert main(["pack", str(root / "latent"), str(root / "packed")]) == 0
    rng = np.random.default_rng(0)
    for name in LABELS.values():
        (root / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (20, 40, 3)).astype("uint8")
            Image.fromarray(pixels).save(root / "photos" / name / f"{number}.png")
    shutil.copy(root / "photos" / "ant" / "0.png", root / "a.png")
    return root


def write_pth(folder: Path) -> dict[str, torch.Tensor]:
    """
    Write `whole.pth`, a full-precision network of the public code, and its config in `vit`.

    Returns:
        Its tensors under the names that earlier versions of transformers gave them.
    """
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = ViTForImageClassification(ViTConfig(image_size=[16, 32], patch_size=8, id2label=LABELS, **fields))
    network.config.save_pretrained(folder / "vit")
    former = {"layers.": "encoder.layer.", "attention.o_proj": "attention.output.dense"}
    former |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    former |= {f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in ("query", "key", "value")}
    tensors = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in former.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    arguments = argparse.Namespace(lr=1.0, out=Path("x"))
    torch.save({"model": tensors, "args": arguments, "epoch": 3}, folder / "whole.pth")
    return tensors


def classify(model: Path, *images: object) -> Said:
    return run(main, "classify", model, *images, "--json", "--top-k=3")


def read_scores(said: Said) -> list[list[float]]:
    """
    Scores of each classified image, largest first.

    Raises:
        Wrong: they are not probabilities.
    """
    scores = [[label["score"] for label in answer["labels"]] for answer in json.loads(said.out) if "labels" in answer]
    for some in scores:
        if not (all(0 <= score <= 1 for score in some) and abs(sum(some) - 1) < 1e-3):
            raise Wrong(f"scores {some}")
    return scores


def training_arguments(shelf: Path, out: Path) -> list[str]:
    """Arguments of a short training: four steps, with a checkpoint after every second step."""
    return [
        *["--config_name", str(shelf / "latent"), "--train_dir", str(shelf / "photos"), "--output_dir", str(out)],
        *["--do_train", "--do_eval", "--use_cpu", "--report_to=none", "--crop_pct=1.0", "--disable_tqdm=true"],
        *["--per_device_train_batch_size=4", "--max_steps=4", "--save_steps=2", "--save_strategy=steps"],
        *["--dataloader_num_workers=0"],
    ]


def assert_whole(model: Path, shelf: Path) -> None:
    """
    Raises:
        Wrong: the folder does not hold a model that classifies.
    """
    said = classify(model, shelf / "a.png")
    if said.code != 0:
        raise Wrong(f"{model.name} is not whole: {said.err}")
    read_scores(said)


def create_look(model: Path) -> Callable[[Path], str]:
    network = load_classifier(model)
    processor = load_image_processor(model, network.config)
    classifier = pipeline("image-classification", model=network, image_processor=processor)
    crop = CroppingDecoder((16, 32), 0.08)

    def look(file: Path) -> str:
        """
        Raises:
            Wrong: training, image checks and `classify` disagree on whether the file is a picture.
        """
        (answer,) = classify_files(classifier, [ImageFile(str(file))], None, 3)
        row = {"image": [{"bytes": None, "path": str(file)}], "label": [0]}
        features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["ant"])})
        refusals = {"classify": answer.error}
        for what, look_in in (
            ("checks", lambda: check_images({"train": Dataset.from_dict(row, features=features)}, skip_broken=False)),
            ("evaluation", lambda: process_image(processor, decode_image(row["image"][0]))),
            ("training", lambda: crop(row["image"][0])),
        ):
            try:
                look_in()
            except Exception as error:
                refusals[what] = describe_unreadable(str(file), error)
        for what, refusal in refusals.items():
            assert len(refusal or "") < LINE_LENGTH, (what, refusal)
        if (answer.error is None) != ("evaluation" not in refusals):
            raise Wrong(f"classify and evaluation do not agree: {refusals}")
        return "refused" if answer.error else "answered"

    return look
