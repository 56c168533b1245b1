"""The `--background` of a training run is used wherever its model is used, and nobody has to know it."""

import json
import logging

import numpy as np
import pytest
import torch
from command_line import assert_refused, refusal, run
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import AutoImageProcessor

from binaryvit_cli import main as binaryvit
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.network.quantization_binaryvit import LATENT
from binaryvit_hf.training.run import main
from binaryvit_runtime.pixels import to_rgb


ON_WHITE = "Transparent pictures are put on #ffffff, the background of the"
DROPPED = "Transparent in places"
FLAGS = ["--max_steps=2", "--learning_rate=0.01", "--crop_pct=1.0", "--use_cpu", "--report_to=none"]
FLAGS += ["--disable_tqdm=True", "--per_device_train_batch_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    - `photos`: pictures of two classes, transparent in places.
    - `white`: a run with `--background white`, and `plain`: the same run without.
    - `tiny`: the config of both.
    """
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 100, (16, 32, 4), dtype="uint8")
            pixels[..., 3] = 255 * (pixels[..., 3] > (30 if name == "ant" else 70))
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    tiny_config().save_pretrained(folder / "tiny")
    new = ["--config_name", folder / "tiny", "--save_steps=1"]
    assert script(folder, *new, "--do_train", "--do_eval", "--background=white", "--output_dir", folder / "white") == 0
    assert script(folder, *new, "--do_train", "--do_eval", "--output_dir", folder / "plain") == 0
    return folder


def script(folder, *arguments) -> int:
    photos = ["--train_dir", folder / "photos", "--validation_dir", folder / "photos"]
    return main([str(argument) for argument in (*photos, *FLAGS, *arguments)])


def stored(folder) -> str | None:
    return json.loads((folder / "preprocessor_config.json").read_text()).get("background", "no field")


def loss_of(folder) -> float:
    return json.loads((folder / "all_results.json").read_text())["eval_loss"]


def test_the_model_and_its_checkpoints_keep_the_background(folder):
    for name in ("", LATENT, "checkpoint-1", "checkpoint-2"):
        assert stored(folder / "white" / name) == "#ffffff"
        assert stored(folder / "plain" / name) == "no field"
    contents = [json.loads((folder / name / "preprocessor_config.json").read_text()) for name in ("white", "plain")]
    assert contents[0] == contents[1] | {"background": "#ffffff"}


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_transformers_keeps_the_field_and_computes_as_without_it(folder, backend, tmp_path):
    white = AutoImageProcessor.from_pretrained(folder / "white", backend=backend)
    plain = AutoImageProcessor.from_pretrained(folder / "plain", backend=backend)
    picture = Image.open(folder / "photos" / "ant" / "0.png")
    pixels = [processor(picture, return_tensors="pt")["pixel_values"] for processor in (white, plain)]
    assert torch.equal(*pixels)
    white.save_pretrained(tmp_path)
    assert stored(tmp_path) == "#ffffff"


def test_classify_answers_as_the_evaluation_does(folder, tmp_path, capsys):
    picture = folder / "photos" / "ant" / "0.png"
    to_rgb(Image.open(picture), "white").save(tmp_path / "white.png")
    to_rgb(Image.open(picture)).save(tmp_path / "dropped.png")

    def labels(*arguments, warns: bool) -> list:
        assert binaryvit(["classify", *map(str, arguments), "--json"]) == 0
        out, err = capsys.readouterr()
        assert (DROPPED in err) == warns
        return [answer["labels"] for answer in json.loads(out)]

    ours, white = labels(folder / "white", picture, tmp_path / "white.png", warns=False)
    assert ours == white
    ours, dropped = labels(folder / "white", picture, tmp_path / "dropped.png", "--background=none", warns=True)
    assert ours == dropped != white
    ours, white = labels(folder / "plain", picture, tmp_path / "white.png", "--background=#FFF", warns=False)
    assert ours == white
    ours, dropped = labels(folder / "plain", picture, tmp_path / "dropped.png", warns=True)
    assert ours == dropped != white


def test_evaluation_uses_the_background_and_warns_of_another(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("white", f"white/{LATENT}"):
        caplog.clear()
        evaluate = ["--model_name_or_path", folder / name, "--do_eval", "--output_dir"]
        assert script(folder, *evaluate, tmp_path / name) == 0
        assert loss_of(tmp_path / name) == pytest.approx(loss_of(folder / "white"), rel=1e-5)
        assert caplog.text.count(f"{ON_WHITE} model.") == 1
        assert DROPPED not in caplog.text
        caplog.clear()
        assert script(folder, *evaluate, tmp_path / "same", "--background=white") == 0
        assert "#ffffff" not in caplog.text
    for colour, here in (("black", "puts transparent pictures on #000000"), ("none", "drops transparency")):
        caplog.clear()
        assert script(folder, *evaluate, tmp_path / colour, f"--background={colour}") == 0
        assert loss_of(tmp_path / colour) != pytest.approx(loss_of(folder / "white"), rel=1e-3)
        warning = f"This run {here}, but the model was trained with the background #ffffff."
        assert [record.message for record in caplog.records if "trained with" in record.message] == [warning]
        assert (DROPPED in caplog.text) == (colour == "none")


@pytest.mark.parametrize(
    "start, given, kept",
    [
        (["--config_name", "tiny", "--init_from", f"white/{LATENT}"], [], "#ffffff"),
        (["--model_name_or_path", "white"], [], "#ffffff"),
        (["--model_name_or_path", "white"], ["--background=#FC0"], "#ffcc00"),
        (["--model_name_or_path", "white"], ["--background=none"], "no field"),
    ],
)
def test_further_training_keeps_the_background_or_takes_another(folder, start, given, kept, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train = [*(word if word.startswith("--") else folder / word for word in start), "--do_train", "--do_eval"]
    assert script(folder, *train, *given, "--save_strategy=no", "--output_dir", tmp_path / "run") == 0
    assert stored(tmp_path / "run") == kept
    assert (f"{ON_WHITE} model." in caplog.text) == (not given)
    assert ("but the model was trained with the background #ffffff." in caplog.text) == bool(given)
    evaluate = ["--model_name_or_path", tmp_path / "run", "--do_eval", "--output_dir", tmp_path / "again"]
    assert script(folder, *evaluate) == 0
    assert loss_of(tmp_path / "again") == pytest.approx(loss_of(tmp_path / "run"), rel=1e-5)


def test_a_run_that_is_continued_with_other_arguments_keeps_the_background(folder, tmp_path):
    new = ["--config_name", folder / "tiny", "--do_train", "--output_dir", tmp_path / "run"]
    assert script(folder, *new, "--save_steps=1", "--resume_from_checkpoint", folder / "white" / "checkpoint-1") == 0
    assert stored(tmp_path / "run") == "#ffffff"


def test_a_new_student_takes_the_background_of_its_teacher(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    student = {"config_name": str(folder / "tiny"), "output_dir": str(tmp_path / "student"), "save_strategy": "no"}
    student |= {"do_train": True, "do_eval": True}
    trained = ["--teacher_model_name_or_path", folder / "white"]
    (tmp_path / "one.json").write_text(json.dumps(student))
    teacher = {"model_name_or_path": str(folder / "white"), "config_name": None}
    (tmp_path / "two.json").write_text(json.dumps(student | {"output_dir": str(tmp_path / "two"), "teacher": teacher}))
    for file, arguments, name in (("one.json", trained, "student"), ("two.json", [], "two")):
        caplog.clear()
        arguments = [
            tmp_path / file,
            "--train_dir",
            folder / "photos",
            "--validation_dir",
            folder / "photos",
            *arguments,
        ]
        assert main([str(argument) for argument in (*arguments, *FLAGS)]) == 0
        assert f"{ON_WHITE} teacher." in caplog.text
        assert DROPPED not in caplog.text
        assert stored(tmp_path / name) == "#ffffff"
    assert stored(tmp_path / "two-teacher") == "#ffffff"
    caplog.clear()
    evaluate = ["--model_name_or_path", folder / "plain", "--do_eval", *trained, "--output_dir", tmp_path / "again"]
    assert script(folder, *evaluate) == 0
    assert "This run drops transparency, but the teacher was trained with the background #ffffff." in caplog.text
    assert loss_of(tmp_path / "again") == pytest.approx(loss_of(folder / "plain"), rel=1e-5)


def test_a_finished_run_whose_version_did_not_save_the_background_saves_it(folder, tmp_path):
    run_again = [
        "--config_name",
        folder / "tiny",
        "--save_strategy=no",
        "--do_train",
        "--do_eval",
        "--background=white",
    ]
    run_again += ["--output_dir", tmp_path / "run"]
    assert script(folder, *run_again) == 0
    for name in ("", LATENT):
        (tmp_path / "run" / name / "preprocessor_config.json").write_bytes(
            (folder / "plain" / "preprocessor_config.json").read_bytes()
        )
    assert script(folder, *run_again) == 0
    assert stored(tmp_path / "run") == stored(tmp_path / "run" / LATENT) == "#ffffff"
    assert "`#ffffff`" in (tmp_path / "run" / "README.md").read_text()


def test_packed_models_and_cards_keep_the_background(folder, tmp_path, capsys):
    run(capsys, "pack", folder / "white" / LATENT, tmp_path / "packed")
    assert stored(tmp_path / "packed") == "#ffffff"
    run(capsys, "card", folder / "white", "--out", tmp_path / "white.md")
    run(capsys, "card", folder / "plain", "--out", tmp_path / "plain.md")
    use = "put the colour `#ffffff` behind transparent pixels"
    for card in (folder / "white" / "README.md", tmp_path / "packed" / "README.md", tmp_path / "white.md"):
        assert use in card.read_text()
    assert "behind transparent pixels" not in (tmp_path / "plain.md").read_text()


def test_the_card_puts_a_picture_on_the_background_as_classify_does(folder, tmp_path, capsys, monkeypatch):
    picture = folder / "photos" / "ant" / "0.png"
    (tmp_path / "image.png").write_bytes(picture.read_bytes())
    (expected,) = json.loads(run(capsys, "classify", folder / "white", picture, "--json"))
    blocks = (folder / "white" / "README.md").read_text().split("```python\n")[1:3]
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block.split("```")[0] for block in blocks)
    names: dict = {}
    exec(code.replace(", trust_remote_code=True", ""), names)
    answers = [eval(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[1] == expected["labels"] != answers[0]


@pytest.mark.parametrize("background", ["whit", ["white"]])
def test_a_damaged_background_is_named_in_one_sentence(background, folder, tmp_path, capsys):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor = create_image_processor(model.config, crop_pct=1.0)
    processor.background = background
    processor.save_pretrained(tmp_path / "model")
    fault = f"background must be an opaque colour such as white or '#ffcc00', not {background!r}."
    picture = folder / "photos" / "ant" / "0.png"
    for command in (
        ["classify", tmp_path / "model", picture],
        ["export", tmp_path / "model", tmp_path / "model.onnx"],
        ["card", tmp_path / "model"],
    ):
        assert_refused(capsys, command, "preprocessor_config.json", fault)
    photos = ["--validation_dir", folder / "photos", "--output_dir", tmp_path / "out", "--use_cpu"]
    message = refusal(capsys, "--model_name_or_path", tmp_path / "model", "--do_eval", *photos)
    assert message.endswith(fault)
    assert not (tmp_path / "out").exists()
