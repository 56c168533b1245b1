"""The page and the text of `binaryvit inspect`, for models of every kind and with hostile names."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from command_line import assert_refused, run
from packed_model import edit_json, save_packed
from pictures import write_pictures
from tiny import class_token_config, tiny_config, tiny_model
from transformers import ViTConfig, ViTForImageClassification

from binaryvit_cli import main
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.inspection.figures import Axis, format_tick
from binaryvit_hf.inspection.findings import percent
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.ops import count_operations, readable, total
from binaryvit_runtime.resources import shipped_models


HOSTILE = ["<img src=x onerror=alert(1)>", "</style><script>alert(1)</script>", "\"' &amp; \x1b[31m"]
LOG = [
    {
        "epoch": epoch,
        "loss": 1 / epoch,
        "eval_loss": 2 / epoch,
        "eval_accuracy": epoch / 10,
        "learning_rate": 0.01 / epoch,
    }
    for epoch in range(1, 9)
]


class Parsed(HTMLParser):
    """What a page holds: its elements with their attributes, the texts of its cells, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output directory of a run: packed and latent weights, and records. The labels are hostile."""
    folder = tmp_path_factory.mktemp("outputs") / "a <b>run<b>"
    config = tiny_config(id2label=dict(enumerate(HOSTILE)))
    ShippedModel(tiny_model(config)).save_pretrained(folder)
    create_image_processor(config, crop_pct=1.0).save_pretrained(folder)
    results = {"eval_accuracy": 0.8125, "eval_samples": 1234, "eval_images": "held-out", "teacher_accuracy": 0.9}
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    arguments = {"optim": "adamw_torch", "dataset_name": "<i>flowers</i>", "teacher_model_name_or_path": "teacher"}
    (folder / "run_arguments.json").write_text(json.dumps(arguments))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "photos", ("ant", "bee"), 2)


@pytest.fixture(scope="module")
def whole(trained, photos, tmp_path_factory) -> tuple[str, str]:
    """What the report of `trained` with all its parts prints, and its page."""
    out = tmp_path_factory.mktemp("whole") / "report.html"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["inspect", str(trained), "--out", str(out), "--images", str(photos)]) == 0
    return printed.getvalue(), out.read_text(encoding="utf-8")


def report(capsys, folder, out, *arguments) -> tuple[str, Parsed]:
    printed = run(capsys, "inspect", folder, "--out", out, *arguments)
    return printed, Parsed(out.read_text(encoding="utf-8"))


def test_a_report_of_a_run_shows_everything(whole):
    printed, page = whole[0], Parsed(whole[1])
    in_all = total(count_operations(tiny_config()))
    for fact in ("81.25 %", "1,234 held-out images", readable(in_all.ops), readable(in_all.bops)):
        assert fact in page.text
    assert f"{in_all.bops:,}" in page.cells
    assert "Measured on 4 pictures." in page.text
    assert "Not measured" not in page.text
    assert "Not recorded" not in page.text
    assert "81.25 % top-1 accuracy (1,234 held-out images)" in printed
    assert "measured on 4 pictures" in printed
    assert "at the last learning rate that the run logged, 0.00125" in printed
    assert "at the highest learning rate that the run logged, 0.01" in printed
    assert "Within a step of 0.01 (highest)" in page.cells
    assert len(printed.splitlines()) <= 24
    assert max(map(len, printed.splitlines())) <= 119


def test_names_and_labels_are_text_on_the_page_and_in_the_terminal(whole):
    printed, page = whole[0], Parsed(whole[1])
    assert "a <b>run<b>" in page.text
    assert "<i>flowers</i>" in page.text
    assert HOSTILE[0] in page.text
    assert {"script", "b", "i", "img"}.isdisjoint(name for name, _ in page.elements)
    assert "\x1b" not in printed
    assert "\x1b" not in page.text


def test_a_report_needs_no_script_and_nothing_from_elsewhere(whole):
    page = Parsed(whole[1])
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in whole[1]
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy


def test_every_figure_has_a_table_or_is_one(whole):
    page = Parsed(whole[1])
    drawings = page.named("svg")
    assert all(drawing.get("aria-hidden") == "true" or drawing.get("aria-label") for drawing in drawings)
    tables = {table["aria-label"] for table in page.named("table")}
    assert len(tables) == len(page.named("table")) >= 12
    assert any("histogram" in name for name in tables)
    assert "What the run logged" in tables
    assert [f"{entry['eval_loss']:.4g}" for entry in LOG if f"{entry['eval_loss']:.4g}" not in page.cells] == []


def test_a_packed_model_without_records_says_what_is_missing(tmp_path, capsys):
    folder = save_packed(tmp_path)
    printed, page = report(capsys, folder, tmp_path / "report.html")
    assert "accuracy not recorded" in printed
    assert "this checkpoint is packed" in page.text
    assert page.text.count("no picture of the model's data") == 2
    assert "no trainer_state.json" in page.text
    assert "change of sign than" not in page.text


@pytest.mark.parametrize(
    "changes, sentences",
    [
        ({"weight_bits": 2}, ["weights have 2 bits, not 1", "become numbers of 2 bits"]),
        ({"weight_bits": 32}, ["the weights have 32 bits", "all in full precision"]),
        ({"input_bits": 4}, ["activations have 4 bits, not 1", "\nAttention is measured on 4 pictures."]),
        ({"input_bits": 32}, ["attention probabilities have 32 bits"]),
    ],
)
def test_other_bit_widths_say_what_they_do_not_have(changes, sentences, photos, tmp_path, capsys):
    config = tiny_config(**changes)
    tiny_model(config).save_pretrained(tmp_path / "model")
    create_image_processor(config, crop_pct=1.0).save_pretrained(tmp_path / "model")
    printed, page = report(capsys, tmp_path / "model", tmp_path / "report.html", "--images", photos)
    assert [sentence for sentence in sentences if sentence not in page.text + printed] == []
    assert ("measured on" in printed) == (config.input_bits < 32)


def test_a_network_with_a_class_token_counts_it(tmp_path, capsys):
    tiny_model(class_token_config()).save_pretrained(tmp_path / "model")
    _, page = report(capsys, tmp_path / "model", tmp_path / "report.html")
    assert "4 \N{MULTIPLICATION SIGN} 8 + 1" in page.cells


def test_the_latent_folder_of_a_run_has_the_records_of_the_run(trained, tmp_path, capsys):
    printed = run(capsys, "inspect", trained / "latent")
    assert printed.startswith("a <b>run<b>/latent (latent weights): ")
    assert "81.25 %" in printed
    assert "at the highest learning rate that the run logged, 0.01" in printed


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A checkpoint in a copy of the run `trained`, which was evaluated at its step."""
    shutil.copytree(trained, tmp_path / "run")
    edit_json(tmp_path / "run" / "run_arguments.json", dataset_name="sklearn-digits")
    folder = shutil.copytree(trained / "latent", tmp_path / "run" / "checkpoint-60")
    create_image_processor(tiny_config(), crop_pct=1.0).save_pretrained(folder)
    log = [{**entry, "step": 10 * entry["epoch"]} for entry in LOG[:6]]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_a_checkpoint_has_the_records_of_its_run(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint)
    printed, page = report(capsys, ".", tmp_path / "report.html")
    assert printed.startswith("run/checkpoint-60 (latent weights): 60.00 % top-1 accuracy (held-out images)")
    assert page.text.count("Measured on 64 evaluation pictures of the run.") == 2
    assert "Distillation loss" in page.text


def test_a_link_to_a_checkpoint_has_its_accuracy(checkpoint, tmp_path, capsys):
    edit_json(checkpoint.parent / "all_results.json", eval_accuracy=0.9)
    try:
        (tmp_path / "best").symlink_to(checkpoint, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert "60.00 % top-1 accuracy (held-out images)" in run(capsys, "inspect", tmp_path / "best")


@pytest.mark.parametrize(
    "changes, step", [({}, 50), ({"ema_decay": 0.999}, 60), ({"batch_norm_reestimation_batches": 9}, 60)]
)
def test_an_accuracy_of_other_weights_is_not_that_of_a_checkpoint(changes, step, checkpoint, capsys):
    edit_json(checkpoint.parent / "run_arguments.json", **changes)
    edit_json(checkpoint / "trainer_state.json", log_history=[{"epoch": 6, "eval_accuracy": 0.6, "step": step}])
    assert "accuracy not recorded" in run(capsys, "inspect", checkpoint)


def test_a_run_of_one_epoch_has_points(trained, photos, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": LOG[:1]}))
    edit_json(tmp_path / "run" / "all_results.json", epoch=1, eval_accuracy=0.1, eval_loss=2)
    _, page = report(capsys, tmp_path / "run", tmp_path / "report.html", "--images", photos)
    assert len(page.named("circle")) == 4
    assert not page.named("polyline")


def test_the_table_of_a_run_that_logs_by_steps_has_its_evaluations(trained, photos, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    log = [{"epoch": step / 100, "loss": 1.0} for step in range(1, 3001)]
    log += [{"epoch": epoch, "eval_accuracy": epoch / 1000} for epoch in range(1, 31)]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    _, page = report(capsys, tmp_path / "run", tmp_path / "report.html", "--images", photos)
    assert "40 of 3,000 points that the run logged" in page.text
    assert [epoch for epoch in range(1, 31) if f"{epoch / 10:.4g}" not in page.cells] == []


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_shipped_model_is_reported_with_its_example(name, tmp_path, capsys):
    printed, page = report(capsys, name, tmp_path / "report.html")
    file = shipped_models()[name] / "model.safetensors"
    assert readable(file.stat().st_size, "B") in page.cells
    assert readable(file.stat().st_size, "B") in printed
    assert "1 example picture of the model" in page.text
    assert len(page.named("img")) == (not (file.parent / "trainer_state.json").is_file())
    assert len(printed.splitlines()) <= 24


def test_a_run_is_measured_on_its_evaluation_images(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    edit_json(tmp_path / "run" / "run_arguments.json", dataset_name="sklearn-digits")
    _, page = report(capsys, tmp_path / "run", tmp_path / "report.html")
    assert page.text.count("Measured on 64 evaluation pictures of the run.") == 2


def test_images_that_the_run_left_out_are_not_measured(trained, photos, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    held_out = shutil.copytree(photos, tmp_path / "held-out")
    (held_out / "ant" / "0.png").write_bytes(b"no picture")
    folders = {"train_dir": str(photos), "validation_dir": str(held_out), "skip_broken_images": True}
    edit_json(tmp_path / "run" / "run_arguments.json", dataset_name=None, **folders)
    _, page = report(capsys, tmp_path / "run", tmp_path / "report.html")
    assert page.text.count("evaluation pictures of the run.") == 2


def test_a_report_without_the_runs_dataset_says_so(trained, tmp_path, capsys):
    assert main(["inspect", str(trained), "--out", str(tmp_path / "report.html")]) == 0
    assert "The evaluation images of the run cannot be loaded: " in capsys.readouterr().err
    assert "no picture of the model's data" in (tmp_path / "report.html").read_text(encoding="utf-8").replace(
        "&#x27;", "'"
    )


def test_inspecting_downloads_no_images(trained, server, client, photos, tmp_path):
    """A model of the Hub may name any dataset. That of a local run is measured if this machine has it."""
    edit_json(shutil.copytree(trained, tmp_path / "run") / "run_arguments.json", dataset_name="alice/photos")
    edit_json(shutil.copytree(trained, tmp_path / "of the hub") / "run_arguments.json", dataset_name="sklearn-digits")
    for kind, folder in (("model", tmp_path / "of the hub"), ("dataset", photos)):
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        server.publish(f"alice/{folder.name if kind == 'dataset' else 'model'}", files, kind)

    def inspect(model) -> subprocess.CompletedProcess:
        done = client.run("-m", "binaryvit_cli", "inspect", model, folder=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        return done

    assert "measured on" not in inspect("alice/model").stdout
    server.requests.clear()
    done = inspect(tmp_path / "run")
    assert "cannot be loaded: their dataset is not in the cache of this machine." in done.stderr
    assert server.requests == []
    load = "import datasets; datasets.load_dataset('alice/photos')"
    assert client.run("-c", load, folder=tmp_path / "home").returncode == 0
    assert re.search(r"measured on \d+ evaluation picture", inspect(tmp_path / "run").stdout)


def test_a_broken_example_picture_leaves_a_report_without_pictures(tmp_path, capsys):
    folder = save_packed(tmp_path)
    (folder / "example.png").write_bytes(b"no picture")
    assert main(["inspect", str(folder), "--out", str(tmp_path / "report.html")]) == 0
    assert re.fullmatch(r".*example\.png' cannot be read .*\n", capsys.readouterr().err)
    assert (tmp_path / "report.html").read_text().count("the pictures beside the model cannot be read") == 2


def test_a_model_without_an_image_processor_says_so(tmp_path, capsys):
    folder = save_packed(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    _, page = report(capsys, folder, tmp_path / "report.html")
    assert page.text.count("the model has no image processor") == 2
    assert "--images" not in page.text


# ---- Wrong input ----


def test_wrong_input_is_one_sentence(photos, tmp_path, capsys):
    folder = save_packed(tmp_path)
    ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "vit"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    assert_refused(capsys, ["inspect", tmp_path / "vit"], "is a 'vit'; only binary networks")
    assert_refused(
        capsys, ["inspect", tmp_path / "missing", "--images", tmp_path / "none.png"], "missing", "no such folder"
    )
    assert_refused(
        capsys, ["inspect", folder, "--images", tmp_path / "empty"], "has no files with an image's extension"
    )
    assert_refused(capsys, ["inspect", folder, "--images", tmp_path / "none.png"], "does not exist")
    assert_refused(
        capsys, ["inspect", folder, "--images", tmp_path / "notes.html"], "None of the pictures can be read"
    )
    assert_refused(capsys, ["inspect", folder, "--out", tmp_path / "empty"], "is a folder, not a file")
    assert_refused(capsys, ["inspect", folder, "--out", tmp_path / "no" / "a.html"], "there is no folder")
    assert_refused(capsys, ["inspect", folder, "--out", tmp_path / "notes.html"], "already exists and is no report")
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    edit_json(folder / "config.json", depths=[-1, 1])
    assert_refused(capsys, ["inspect", folder], "depths")


def test_images_need_an_image_processor(photos, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    assert_refused(capsys, ["inspect", tmp_path / "model", "--images", photos], "has no image processor")


def test_damaged_records_are_named(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "trainer_state.json").write_text("{")
    assert_refused(capsys, ["inspect", tmp_path / "run"], "trainer_state.json", "is damaged")


def test_a_picture_that_cannot_be_read_is_an_error_and_the_others_count(trained, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code = main(["inspect", str(trained), "--images", str(photos), str(tmp_path / "broken.png")])
    printed = capsys.readouterr()
    assert code == 1
    assert re.fullmatch(r"error: .*broken\.png' cannot be read as an image .*\n", printed.err.splitlines(True)[-1])
    assert "measured on 4 pictures" in printed.out


def test_an_earlier_report_is_replaced_whole(whole, trained, photos, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text(whole[1] + "<p>the end of a longer page</p>", encoding="utf-8")
    report(capsys, trained, out, "--images", photos)
    assert out.read_text(encoding="utf-8") == whole[1]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ---- Numbers and axes ----


@pytest.mark.parametrize(
    "share, text", [(0, "0.0 %"), (1e-5, "< 0.1 %"), (0.5, "50.0 %"), (0.99999, "> 99.9 %"), (1, "100.0 %")]
)
def test_small_parts_do_not_become_nothing_or_all(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0.5], [0], [-3, 2], [1e-9, 2e-9], [1, 1 + 1e-15], [-1e29, 1e29], [5e-324, 1e-320], [95.1, 95.2]],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_an_axis_has_round_ticks_between_its_ends(values, logarithmic):
    axis = Axis.of(values, 0, 100, logarithmic and min(values) > 0)
    assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert all(-1e-6 <= axis.place(tick) <= 100 + 1e-6 for tick in ticks)
    assert len({format_tick(tick) for tick in ticks}) == len(ticks) or max(values) - min(values) < 1e-6
