"""Model cards and shipped models agree with the recorded results."""

import json

import pytest
import torch
from datasets import Dataset
from golden_data import CONFIGS, ROWS, TINY
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from binaryvit_cli import main
from binaryvit_hf.card_text import NOTES
from binaryvit_hf.data.decoding import decode_image
from binaryvit_hf.data.known_datasets import FASHION_MNIST_FOLDER, load_digits_splits, load_fashion_mnist_splits
from binaryvit_hf.ops import count_operations, readable, total
from binaryvit_hf.training.command_line import parse, parse_runs
from binaryvit_hf.training.model_card import chosen_arguments, write_model_card
from binaryvit_hf.training.run_folder import arguments_to_json


CARDS = CONFIGS.parent / "model_cards"
DIGITS = CARDS / "binaryvit-digits"
FASHION = CARDS / "binaryvit-fashion-mnist"
EXAMPLES = {DIGITS: "0", FASHION: "Ankle boot"}
needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


@pytest.mark.parametrize("row", [*ROWS, TINY])
def test_the_card_of_a_row_is_up_to_date_with_the_template(row, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["card", f"configs/{row}", "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == (CARDS / f"{row}.md").read_text()


@pytest.mark.parametrize("row", [*ROWS, TINY])
def test_the_card_of_a_row_says_that_it_has_no_trained_weights_and_what_it_costs(row):
    card = ModelCard.load(CARDS / f"{row}.md")
    assert "**A configuration with a recipe, without trained weights.**" in card.text
    config = AutoConfig.from_pretrained(CONFIGS / row)
    assert f"{readable(total(count_operations(config)).ops)} OPs" in card.text
    assert card.data.eval_results is None
    assert card.data.base_model == ("facebook/deit-small-patch16-224" if row != "deit-small-patch16-224" else None)
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda folder: folder.name)
def test_the_card_of_a_shipped_model_is_up_to_date_with_its_text(model, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["card", f"model_cards/{model.name}", "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == (model / "README.md").read_text()


def test_text_below_the_last_line_of_a_card_stays_when_it_is_written_again(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "card.md"
    tiny_config().save_pretrained(folder)
    write_model_card(folder, "model")
    assert NOTES not in (folder / "README.md").read_text()  # of a config
    (folder / "run_arguments.json").write_text('{"dataset_name": "photos"}')
    write_model_card(folder, "model")
    card = (folder / "README.md").read_text()
    assert card.endswith(f"\n{NOTES}\n")
    notes = "## Notes\n\n{{ seeds }} and \u00e9\n---\nthree seeds"
    (folder / "README.md").write_bytes((f"{card}\n\n{notes}\n\n").replace("\n", "\r\n").encode())
    for path in (None, None, other):
        write_model_card(folder, "model", path)
        assert (path or folder / "README.md").read_text(encoding="utf-8") == f"{card}\n{notes}\n"
    other.write_text(f"{NOTES}\nits own")
    write_model_card(folder, "model", other)
    assert other.read_text() == f"{card}\nits own\n"
    other.write_bytes(f"{NOTES}\n".encode() + b"caf\xe9")  # no UTF-8
    write_model_card(folder, "model", other)
    assert other.read_bytes() == card.encode() + b"\ncaf\xe9\n"


def test_a_readme_that_is_no_card_becomes_the_text_below_the_card(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Three classes of insects\n\nPhotographed in May.\n")
    for _ in range(2):
        assert main(["card", str(tmp_path)]) == 0
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("---\n")
        assert card.endswith(f"\n{NOTES}\n\n# Three classes of insects\n\nPhotographed in May.\n")
        assert card.count("insects") == 1


@pytest.mark.parametrize("row", sorted(path.parent.name for path in CONFIGS.glob("*/train.json")))
def test_the_recipe_of_a_row_parses_and_saves_packed(row):
    ((model_arguments, _, training_arguments),) = parse_runs([str(CONFIGS / row / "train.json"), "--use_cpu"])
    assert model_arguments.config_name == row
    assert training_arguments.save_packed


def processed_for(folder, splits: list[Dataset]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of the splits, processed for the model in `folder`, and their labels."""
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = [decode_image(image) for split in splits for image in split["image"]]
    labels = [label for split in splits for label in split["label"]]
    return processor(pixels, return_tensors="pt")["pixel_values"], torch.tensor(labels)


def digits(*names: str) -> tuple[torch.Tensor, torch.Tensor]:
    splits = load_digits_splits()
    return processed_for(DIGITS, [splits[name] for name in names])


@pytest.mark.parametrize(
    "given, length", [({}, {"num_train_epochs": 3.0}), ({"max_steps": 7, "num_train_epochs": 5}, {"max_steps": 7})]
)
def test_the_card_lists_the_length_batch_and_learning_rate_of_a_run_also_by_default(given, length):
    run = parse({"output_dir": "out", "use_cpu": True} | given, [])
    chosen = chosen_arguments(arguments_to_json(run))
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 5e-05}
    assert chosen == defaults | length


def test_the_card_lists_only_what_the_user_set_also_for_runs_of_earlier_versions():
    run = arguments_to_json(parse({"output_dir": "out", "use_cpu": True, "warmup_steps": 3}, []))
    earlier = run | {"logging_nan_inf_filter": True}
    assert chosen_arguments(earlier) == chosen_arguments(run)
    assert chosen_arguments(run)["warmup_steps"] == 3


def test_a_folder_of_pictures_that_another_machine_lacks_is_no_dataset_of_the_hub(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "all_results.json").write_text('{"train_samples": 9, "eval_samples": 30, "eval_accuracy": 0.4}')
    for argument, datasets in (("train_dir", None), ("dataset_name", ["photos"])):
        (tmp_path / "run_arguments.json").write_text(json.dumps({argument: "photos"}))
        write_model_card(tmp_path, "me/photos")
        card = ModelCard.load(tmp_path / "README.md").data
        assert card.datasets == datasets
        assert {result.dataset_type for result in card.eval_results} == {"photos" if datasets else "local"}


def test_the_card_says_that_a_network_cannot_be_told_from_guessing(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "run_arguments.json").write_text(json.dumps({"train_dir": "photos"}))
    results = {"train_samples": 9, "eval_samples": 30, "eval_images": "held-out", "skipped_images": 1}
    results |= {"eval_accuracy": 0.4, "eval_accuracy_low": 0.25, "eval_accuracy_high": 0.58}
    texts = {}
    for share in (0.25, 0.24):
        (tmp_path / "all_results.json").write_text(json.dumps(results | {"eval_guessing_accuracy": share}))
        write_model_card(tmp_path, "me/photos")
        texts[share] = " ".join((tmp_path / "README.md").read_text().split())
    assert "**On the held-out images the network cannot be told from guessing:**" in texts[0.25]
    assert "every image is right for 25.00 % of them" in texts[0.25]
    assert "guessing" not in texts[0.24]
    assert "On 30 held-out images (1 more was left out: broken, or too large):" in texts[0.24]


def test_the_card_of_a_packed_checkpoint_tells_of_its_own_step(tmp_path):
    run = tmp_path / "run"
    model = tiny_model(tiny_config())
    evaluations = [
        {"step": step, "epoch": step, "eval_accuracy": accuracy} for step, accuracy in ((1, 0.25), (2, 0.5))
    ]
    for folder, logged in ((run / "latent", []), (run / "checkpoint-1", evaluations[:1])):
        model.save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
    (run / "trainer_state.json").write_text(json.dumps({"log_history": evaluations}))
    (run / "run_arguments.json").write_text(json.dumps({"train_dir": "photos"}))
    (run / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.5, "train_samples": 9}))
    (run / "_training_images.json").write_text("{}")
    Image.new("RGB", (1, 1)).save(run / "learning_curves.png")
    cards = {}
    for part in ("checkpoint-1", "latent"):
        assert main(["pack", str(run / part), str(tmp_path / part)]) == 0
        cards[part] = (tmp_path / part / "README.md").read_text()
    assert "| top-1 accuracy | 25.00 % |" in cards["checkpoint-1"]
    assert "50.00 %" not in cards["checkpoint-1"]
    assert "Trained on photos, 3 classes" in cards["checkpoint-1"]
    assert "learning_curves.png" not in cards["checkpoint-1"]
    assert "| top-1 accuracy | 50.00 % |" in cards["latent"]
    assert "Trained on photos, 9 images of 3 classes" in cards["latent"]
    assert (tmp_path / "latent" / "_training_images.json").is_file(), "compare tells by it which images were learned"


@pytest.mark.parametrize("bits, words", [(1, "one bit"), (4, "4 bits")])
def test_the_card_tells_how_many_bits_a_weight_has(bits, words, tmp_path):
    tiny_model(tiny_config(weight_bits=bits)).save_pretrained(tmp_path / "latent")
    assert main(["pack", str(tmp_path / "latent"), str(tmp_path / "packed")]) == 0
    card = (tmp_path / "packed" / "README.md").read_text()
    assert f"| packed, {words} per weight, on disk |" in card
    assert ("A 1-bit vision transformer" in card) == ("- 1-bit\n" in card) == (bits == 1)


def predict(folder, images) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(batch).logits.argmax(1) for batch in images.split(500)])


def check_card(folder, metric: str, images, labels) -> None:
    """Check that the model reaches the accuracy of its card, and that the card has the run's results."""
    accuracy = (predict(folder, images) == labels).double().mean().item()
    card = ModelCard.load(folder / "README.md")
    claimed = {result.metric_name: result.metric_value for result in card.data.eval_results}
    # On another CPU a sign may flip and decide an image.
    assert accuracy == pytest.approx(claimed["top-1 accuracy"], abs=max(2 / len(labels), 0.001))
    recorded = json.loads((folder / "all_results.json").read_text())
    assert claimed["top-1 accuracy"] == recorded[metric]
    assert f"{100 * recorded['teacher_accuracy']:.2f} %" in card.text
    assert readable((folder / "model.safetensors").stat().st_size, "B") in card.text


def test_the_digits_model_is_as_good_as_its_card_says():
    check_card(DIGITS, "eval_accuracy", *digits("validation"))


@needs_fashion_mnist
def test_the_fashion_model_is_as_good_on_the_test_images_as_its_card_says(clothes):
    check_card(FASHION, "test_accuracy", *clothes)


@pytest.fixture(scope="module")
def clothes() -> tuple[torch.Tensor, torch.Tensor]:
    return processed_for(FASHION, [load_fashion_mnist_splits()["test"]])


def check_engine(folder, images, labels, monkeypatch) -> None:
    ours = predict(folder, images)
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    theirs = predict(folder, images)
    assert (ours == theirs).double().mean() >= 0.999
    assert abs((ours == labels).double().mean() - (theirs == labels).double().mean()) <= 0.001


def test_the_engine_predicts_like_pytorch_on_digits(monkeypatch):
    check_engine(DIGITS, *digits("train", "validation"), monkeypatch)


@needs_fashion_mnist
def test_the_engine_predicts_like_pytorch_on_clothes(clothes, monkeypatch):
    check_engine(FASHION, *(values[:2000] for values in clothes), monkeypatch)


def test_half_precision_keeps_the_accuracy(tmp_path):
    images, labels = digits("train", "validation")  # a single held-out image would be 0.28 points
    assert main(["pack", str(DIGITS), str(tmp_path / "half"), "--half"]) == 0
    full, half = predict(DIGITS, images), predict(tmp_path / "half", images)
    assert (full != half).double().mean() <= 0.005
    assert abs((full == labels).double().mean() - (half == labels).double().mean()) <= 0.001


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_a_shipped_model_classifies_its_example_by_name_from_anywhere(folder, tmp_path, warm_python):
    command = ["-m", "binaryvit_cli", "classify", folder.name, folder / "example.png", "--json"]
    result = warm_python.run(*command, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)
    assert answer["labels"][0]["label"] == EXAMPLES[folder]
    assert answer["labels"][0]["score"] > 0.9
