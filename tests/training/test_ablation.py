"""A complete ablation: its runs, its interruption, its table and its errors."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import assert_refused
from signals import HANGUP
from tiny import tiny_config
from transformers import ResNetConfig, ViTConfig

from binaryvit_cli import main
from binaryvit_hf.benchmarks import trained
from binaryvit_hf.training.ablation import runs as runs_of_ablations
from binaryvit_hf.training.ablation.results import mean_and_deviation
from binaryvit_hf.training.ablation.runs import (
    Ablation,
    check_learners,
    describe_left,
    in_use,
    is_tested,
    next_run,
    start,
    visible_gpus,
)
from binaryvit_hf.training.ablation.table import check_run, read_table
from binaryvit_hf.training.run_folder import (
    RUN_ARGUMENTS,
    TEST_PREDICTIONS,
    arguments_to_json,
    read_test_predictions,
    write_test_predictions,
)
from binaryvit_runtime.errors import UserError


ROOT = Path(__file__).parents[2]
RECIPE = {
    "dataset_name": "sklearn-digits",
    "train_val_split": 0.5,
    "test_split_name": "validation",
    "max_train_samples": 64,
    "max_eval_samples": 40,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 200,
    "report_to": "none",
    "disable_tqdm": True,
}
TABLE = {
    "title": "Digits",
    "description": "Two rows.",
    "teacher": "vit",
    "rows": {"vit": "the teacher", "binary": "1 bit"},
}


@pytest.fixture
def folder(tmp_path):
    """Recipes of one binary row and its teacher."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, content in (("table", TABLE), ("teacher", RECIPE), ("student", RECIPE)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    vit.save_pretrained(folder / "vit")
    tiny_config(image_size=16).save_pretrained(folder / "binary")
    return folder


@pytest.fixture
def timed(monkeypatch):
    """The folders that the command times. Timing them would take many seconds."""
    folders: list[dict[str, Path]] = []
    monkeypatch.setattr(trained, "time_trained", lambda given: folders.append(given) or dict.fromkeys(given, 0.00123))
    return folders


def test_ablation_trains_every_row_once_and_tabulates_what_the_runs_recorded(folder, tmp_path, capsys, timed):
    out = tmp_path / "out"
    command = ["ablation", str(folder), str(out), "--seeds", "1", "2", "--jobs", "2"]
    assert main(command) == 0, capsys.readouterr().err
    for name in ("vit", "binary-seed1"):
        labels, predicted = read_test_predictions(out / name)
        recorded = json.loads((out / name / "all_results.json").read_text())
        assert (labels == predicted).mean() == recorded["test_accuracy"]
        assert len(labels) == recorded["test_samples"]
    accuracies = {
        name: 100 * json.loads((out / name / "all_results.json").read_text())["test_accuracy"]
        for name in ("vit", "binary-seed1", "binary-seed2")
    }
    lines = (out / "results.md").read_text().splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in lines
        if "%" not in line and line.count("|") > 8
    }
    assert cells["the teacher"][2] == f"{accuracies['vit']:.2f}"
    assert cells["1 bit"][2] == mean_and_deviation([accuracies["binary-seed1"], accuracies["binary-seed2"]])
    assert cells["1 bit"][3] == "2"
    assert (out / "ablation.png").stat().st_size > 10_000
    assert (out / "ablation_ms.png").stat().st_size > 10_000
    assert cells["1 bit"][-2] == "1.23"  # ms
    assert timed == [{"vit": out / "vit", "binary": out / "binary-seed1"}]

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    (out / "results.md").unlink()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was trained again
    assert (out / "results.md").is_file()

    student = json.loads((folder / "student.json").read_text()) | {"learning_rate": 0.1}
    (folder / "student.json").write_text(json.dumps(student))
    capsys.readouterr()
    assert_refused(capsys, command, "learning_rate", "binary-seed1")


def test_each_run_gets_one_gpu_and_runs_at_once_get_different_ones(folder, tmp_path, monkeypatch):
    """Without names of its own a run would take all GPUs."""
    gpus = {}

    class Recorded(subprocess.Popen):
        """Instead of a training: records its GPU and writes a result."""

        def __init__(self, line, *, env, **kwargs):
            super().__init__([sys.executable, "-S", "-c", "pass"], **kwargs)
            output_dir = Path(line[line.index("--output_dir") + 1])
            gpus[output_dir.name] = env["CUDA_VISIBLE_DEVICES"]
            output_dir.mkdir()
            (output_dir / "all_results.json").write_text('{"test_accuracy": 0.5}')

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert main(["ablation", str(folder), str(tmp_path / "out"), "--seeds", "1", "2", "3", "--jobs", "2"]) == 0
    assert gpus.pop("vit") == "3"
    assert set(gpus) == {"binary-seed1", "binary-seed2", "binary-seed3"}
    assert (gpus["binary-seed1"], gpus["binary-seed2"]) == ("3", "5")


@pytest.mark.parametrize(
    "environment, count, names",
    [
        ({}, 0, []),
        ({}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,4"}, 2, ["GPU-8932f937", "4"]),
    ],
)
def test_gpus_have_the_names_that_the_command_got(environment, count, names):
    assert visible_gpus(environment, count) == names


@pytest.mark.parametrize("name", ["SIGINT", HANGUP])
def test_an_interrupted_ablation_ends_its_runs_with_a_checkpoint(folder, tmp_path, warm_python, name):
    # Minutes of training, and no more: if this test fails, its run goes on beside the others.
    (folder / "teacher.json").write_text(json.dumps(RECIPE | {"num_train_epochs": 5000, "save_strategy": "no"}))
    out = tmp_path / "out"
    ablation = warm_python.start("-m", "binaryvit_cli", "ablation", folder, out, folder=tmp_path)
    while not ablation.has_ended() and not (out / "vit" / RUN_ARGUMENTS).is_file():  # written when training begins
        time.sleep(0.1)
    time.sleep(2)
    ablation.send_signal(getattr(signal, name))
    ended = ablation.wait(timeout=60)
    assert ended.returncode == 128 + getattr(signal, name), ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(list((out / "vit").glob("checkpoint-*"))) == 1


def test_failing_run_is_named_with_its_log(folder, tmp_path, capsys):
    (folder / "teacher.json").write_text(json.dumps(RECIPE | {"image_column_name": "picture"}))
    out = tmp_path / "out"
    assert_refused(capsys, ["ablation", folder, out], "vit failed", "vit.log", code=1)
    assert "no column 'picture'" in (out / "vit.log").read_text()


def test_a_folder_without_a_table_and_zero_jobs_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert_refused(capsys, ["ablation", tmp_path, out], "no table 'table.json': it is not the folder of an ablation")
    misspelt = folder.with_name(f"{folder.name}s")
    assert_refused(capsys, ["ablation", misspelt, out], f"no folder {str(misspelt)!r}; did you mean {str(folder)!r}?")
    (folder / "broken.json").write_text("{")
    words = "has no table 'tabel.json': it has 'table.json'."
    assert_refused(capsys, ["ablation", folder, out, "--table", "tabel.json"], words)
    assert_refused(capsys, ["ablation", folder, tmp_path / "out", "--jobs", "0"], "--jobs")


def test_the_teacher_comes_first_and_the_students_seed_by_seed(folder, tmp_path):
    assert [run.name for run in Ablation(folder, tmp_path, (3, 4)).runs()] == ["vit", "binary-seed3", "binary-seed4"]


def change_table(folder: Path, name: str = "table", **changes) -> None:
    content = json.loads((folder / "table.json").read_text()) | changes
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_teacher_with_several_seeds_teaches_with_its_recipes_seed(folder, tmp_path):
    change_table(folder, rows={"vit": {"name": "the teacher", "seeds": 3}, "binary": "1 bit"})
    runs = Ablation(folder, tmp_path, (1, 2)).runs()  # the recipe's seed is 42, the script's default
    assert [path.name for path in runs] == ["vit", "binary-seed1", "vit-seed1", "binary-seed2"]
    assert runs[tmp_path / "vit"].arguments.training.seed == 42
    assert runs[tmp_path / "vit-seed1"].arguments.training.seed == 1
    assert {run.arguments.model.teacher_model_name_or_path for run in runs.values()} == {None, str(tmp_path / "vit")}


def test_a_row_of_two_stages_starts_from_the_run_of_its_first(folder, tmp_path):
    row = {
        "name": "two stages",
        "config": "binary",
        "arguments": {"learning_rate": 0.01, "num_train_epochs": 3},
        "first_stage": {"config_overrides": "weight_bits=32", "num_train_epochs": 2},
        "seeds": 1,
    }
    change_table(folder, rows={"staged": row})
    runs = Ablation(folder, tmp_path, (1, 2)).runs()
    first, second = tmp_path / "staged-first-stage-seed1", tmp_path / "staged-seed1"
    assert list(runs) == [tmp_path / "vit", first, second]
    assert [runs[path].arguments.training.num_train_epochs for path in (first, second)] == [2, 3]
    assert [runs[path].arguments.training.learning_rate for path in (first, second)] == [0.01, 0.01]
    assert runs[first].arguments.model.config_overrides == "weight_bits=32"
    assert runs[second].arguments.model.init_from == str(first)
    assert runs[second].arguments.model.config_overrides is None
    waiting = list(runs.values())
    assert next_run(waiting, []) is waiting[0]
    assert next_run(waiting[1:], [waiting[0]]) is None
    assert next_run(waiting[1:], []) is waiting[1]
    assert next_run(waiting[2:], [waiting[1]]) is None
    assert next_run(waiting[2:], []) is waiting[2]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"name": "x", "argument": {}}, ("not have the field 'argument'", "did you mean 'arguments'?")),
        ({"name": "x", "arguments": []}, ("'arguments' must be an object",)),
        ({"arguments": {}}, ("no 'name'",)),
        ({"name": "x", "seeds": 0}, ("'seeds'",)),
        ({"name": "x", "arguments": {"ema_decy": 0.9}}, ("'ema_decy'", "did you mean 'ema_decay'?")),
        ({"name": "x", "arguments": {"ema_decay": 2}}, ("--ema_decay must be above 0",)),
        ({"name": "x", "arguments": {"seed": 3}}, ("gives 'seed' to every run",)),
        ({"name": "x", "arguments": {"teacher.learning_rate": 3}}, ("gives 'teacher.learning_rate' to every run",)),
        ({"name": "x", "arguments": {"ema_decay": None}}, ("'ema_decay' is null",)),
        ({"name": "x", "compared_with": "changed"}, ("compared with itself",)),
        ({"name": "x", "compared_with": "binari"}, ("'binari', which is no row", "did you mean 'binary'?")),
        ({"name": "x", "config": "absent"}, ("no network", "absent")),
        ({"name": "x", "recipe": "absent.json"}, ("no file of arguments", "absent.json")),
        ({"name": "x", "config": "vit", "arguments": {"weight_regularization": 1}}, ("1-bit weights",)),
        ({"name": "x", "arguments": {"do_predict": False}}, ("gives 'do_predict'",)),
        (7, ("its name, or an object",)),
    ],
)
def test_a_wrong_row_is_refused_before_any_training(folder, tmp_path, capsys, row, words):
    row = {"config": "binary"} | row if isinstance(row, dict) else row
    change_table(folder, "options", rows={"binary": "1 bit", "changed": row})
    assert_refused(capsys, ["ablation", folder, tmp_path / "out", "--table", "options.json"], "'changed'", *words)
    assert not (tmp_path / "out").exists()


def test_wrong_tables_are_refused(folder, tmp_path, capsys):
    command = ["ablation", folder, tmp_path / "out"]
    assert_refused(capsys, [*command, "--table", "absent.json"], "no table 'absent.json': it has 'table.json'.")
    change_table(folder, rows={})
    assert_refused(capsys, command, "no 'rows'")
    change_table(folder, rows={"a/b": "x"})
    assert_refused(capsys, command, "'a/b'", "its key names folders")
    change_table(folder, rows={"binary": "1 bit"}, teacher="../vit")
    assert_refused(capsys, command, "The teacher of", "its key names folders")
    change_table(folder, "results", rows={"binary": "1 bit"})
    words = "results.json' would replace those of 'table.json': rename the table."
    assert_refused(capsys, [*command, "--table", "results.json"], words)
    (folder / "table.json").write_text(json.dumps(TABLE))
    change_table(folder, rows={"binary": "1 bit"}, epochs=3)
    assert_refused(capsys, command, "not have the field 'epochs'")
    staged = {"name": "x", "config": "binary", "first_stage": {"num_train_epochs": 1}}
    (folder / "table.json").write_text(json.dumps(TABLE))
    change_table(folder, rows={"binary": staged, "binary-first-stage": {"name": "y", "config": "binary"}})
    assert_refused(capsys, command, "share the folder", "binary-first-stage-seed1")
    (folder / "student.json").write_text(json.dumps(RECIPE | {"do_predict": False}))
    (folder / "table.json").write_text(json.dumps(TABLE))
    assert_refused(capsys, command, "student.json must have do_train, do_eval and do_predict")
    photos = {name: value for name, value in RECIPE.items() if name != "dataset_name"} | {"train_dir": "photos"}
    (folder / "student.json").write_text(json.dumps(photos))
    assert_refused(capsys, command, "--do_predict needs a --dataset_name")


def finish(ablation: Ablation, accuracy: float = 0.9, images: int = 400) -> None:
    """Write the files of all runs of an ablation as if they were finished, the errors of each at random."""
    for number, run in enumerate(ablation.runs().values()):
        errors = np.random.default_rng(number).random(images) > accuracy
        labels = np.arange(images) % 10
        run.folder.mkdir(parents=True, exist_ok=True)
        write_test_predictions(run.folder, labels, (labels + errors) % 10)
        results = {"test_accuracy": 1 - errors.mean(), "eval_accuracy": 0.5, "train_runtime": 60.0 * run.epochs}
        for name in ("train_results.json", "all_results.json"):
            (run.folder / name).write_text(json.dumps(results))
        (run.folder / RUN_ARGUMENTS).write_text(json.dumps(arguments_to_json(run.arguments)))
        shutil.copy(ablation.folder / run.row.config / "config.json", run.folder)


def test_tables_that_share_a_folder_share_the_runs_of_equal_rows(folder, tmp_path, capsys, timed):
    out = tmp_path / "out"
    finish(Ablation(folder, out, (1, 2)))
    change_table(folder, "options", rows={"binary": "unchanged"})
    assert main(["ablation", str(folder), str(out), "--seeds", "1", "2", "--table", "options.json"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "options.md")
    assert "| unchanged |" in (out / "options.md").read_text()
    change_table(folder, "options", rows={"binary": {"name": "x", "arguments": {"learning_rate": 0.5}}})
    command = ["ablation", folder, out, "--seeds", "1", "2", "--table", "options.json"]
    assert_refused(capsys, command, "learning_rate", "binary-seed1")


def test_a_table_of_options_is_compared_in_words_and_one_picture(folder, tmp_path, capsys, timed):
    options = {
        "slow": {"name": "half the rate", "arguments": {"learning_rate": 0.5}},
        "old": {"name": "x", "compared_with": None},
    }
    change_table(folder, "options", config="binary", compared_with="binary", rows={"binary": "unchanged", **options})
    out = tmp_path / "out"
    finish(Ablation(folder, out, (1, 2, 3), "options.json"))
    assert main(["ablation", str(folder), str(out), "--table", "options.json"]) == 0
    assert timed == []  # one network has one time
    text = (out / "options.md").read_text()
    assert text.count("compared with unchanged (") == 1
    assert "- half the rate: no difference could be shown, compared with unchanged (" in text
    assert "p is corrected for the 1 comparison of this table (Holm), intervals are not." in text
    assert "All rows are the same network" in text
    assert "OPs" not in text.replace("BOPs", "").replace("FLOPs", "")
    assert "![Differences](options.png)" in text
    assert sorted(path.name for path in out.glob("*.png")) == ["options.png"]


def test_a_teacher_need_not_be_a_row_and_its_operations_need_not_be_counted(folder, tmp_path, capsys, timed):
    ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], image_size=16).save_pretrained(folder / "resnet")
    change_table(folder, teacher="resnet", rows={"binary": "1 bit", "other": {"name": "ResNet", "config": "resnet"}})
    ablation = Ablation(folder, tmp_path / "out", (1, 2))
    finish(ablation)
    assert next(iter(ablation.runs())).name == "resnet"
    assert main(["ablation", str(folder), str(tmp_path / "out"), "--seeds", "1", "2"]) == 0
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    (head,) = [line for line in lines if line.startswith("| row |")]
    (row,) = [line for line in lines if line.startswith("| ResNet |")]
    cells = dict(zip(head.split("|"), row.split("|")))
    assert cells[" OPs "].strip() == ""
    accuracy, to_teacher = float(cells[" test top-1, % "].split()[0]), float(cells[" to the teacher "])
    (teacher,) = ablation.results()["resnet"].test
    assert to_teacher == pytest.approx(accuracy - teacher, abs=0.011)


def test_rows_are_compared_with_the_run_that_taught_not_with_other_seeds_of_the_teacher(folder, tmp_path):
    change_table(folder, rows={"vit": {"name": "teacher", "seeds": 2}, "binary": "1 bit"})
    ablation = Ablation(folder, tmp_path, (1, 2))
    finish(ablation)
    ablation.write_results()
    teacher, student = ablation.results().values()
    taught, other = teacher.test
    assert abs(taught - other) > 0.1
    lines = (tmp_path / "results.md").read_text().splitlines()
    head, of_teacher, of_student = ([cell.strip() for cell in lines[number].split("|")] for number in (4, 6, 7))
    column = head.index("to the teacher")
    assert of_teacher[column] == ""
    assert float(of_student[column]) == pytest.approx(student.mean - taught, abs=0.006)


def test_a_run_without_its_answers_is_tested_again(folder, tmp_path):
    ablation = Ablation(folder, tmp_path, (1,))
    finish(ablation)
    runs = list(ablation.runs().values())
    assert all(map(is_tested, runs))
    (runs[1].folder / TEST_PREDICTIONS).unlink()
    assert list(map(is_tested, runs)) == [True, False]


def test_a_finished_run_may_be_moved_and_an_unfinished_one_may_not(folder, tmp_path):
    finish(Ablation(folder, tmp_path / "before", (1,)))
    (tmp_path / "before").rename(tmp_path / "after")
    teacher = next(iter(Ablation(folder, tmp_path / "after", (1,)).runs().values()))
    assert is_tested(teacher)
    (teacher.folder / "train_results.json").unlink()
    with pytest.raises(UserError, match="output_dir was"):
        is_tested(teacher)


def test_a_run_that_has_saved_nothing_takes_other_arguments_and_another_teacher(folder, tmp_path):
    first = Ablation(folder, tmp_path, (1,))
    finish(first)
    _, student = first.runs().values()
    shutil.rmtree(tmp_path / "vit")
    (student.folder / "train_results.json").unlink()
    (folder / "student.json").write_text(json.dumps(RECIPE | {"learning_rate": 0.1}))
    runs = list(Ablation(folder, tmp_path, (1,)).runs().values())
    with pytest.raises(UserError, match="learning_rate was"):
        is_tested(runs[1])
    with pytest.raises(UserError, match="learned from an earlier 'vit'"):
        check_learners(tmp_path, runs)
    (student.folder / "config.json").unlink()
    assert not is_tested(runs[1])
    check_learners(tmp_path, runs)


def all_tested(ablation: Ablation) -> bool:
    return all(map(is_tested, ablation.runs().values()))


def test_finished_runs_and_their_teacher_may_be_moved_together(folder, tmp_path):
    finish(Ablation(folder, tmp_path / "before", (1,)))
    (tmp_path / "before").rename(tmp_path / "after")
    assert all_tested(Ablation(folder, tmp_path / "after", (1,)))
    change_table(folder, teacher="other")
    with pytest.raises(UserError, match="teacher_model_name_or_path was"):
        is_tested(Ablation(folder, tmp_path / "after", (1,)).runs()[tmp_path / "after" / "binary-seed1"])


def test_finished_runs_of_relative_paths_are_found_from_another_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(Ablation(Path("recipes"), Path("out"), (1,)))
    monkeypatch.chdir("/")
    assert all_tested(Ablation(folder, tmp_path / "out", (1,)))


def test_a_finished_run_of_another_network_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    finish(Ablation(folder, out, (1,)))
    tiny_config(image_size=16, hidden_sizes=[16, 16]).save_pretrained(folder / "binary")
    words = ("binary-seed1' holds another model's run (its hidden_sizes is", "choose another OUT", "learned from it.")
    assert_refused(capsys, ["ablation", folder, out, "--seeds", "1"], *words)


def test_a_teacher_is_not_trained_again_beside_its_students(folder, tmp_path, capsys):
    out = tmp_path / "out"
    finish(Ablation(folder, out, (1, 2)))
    shutil.rmtree(out / "vit")
    (out / "binary-seed1" / "train_results.json").unlink()  # a student that has begun learned from it, too
    out = out.rename(tmp_path / "moved")
    change_table(folder, "options", rows={"other": {"name": "another row", "config": "binary"}})
    words = "learned from an earlier 'vit', which is to be trained: remove them too, or move them elsewhere: "
    command = ["ablation", folder, out, "--table", "options.json", "--seeds", "3"]
    assert_refused(capsys, command, f"{words}'binary-seed1', 'binary-seed2'.")
    (out / "vit").mkdir()
    (out / "vit" / RUN_ARGUMENTS).write_text("{}")  # it has begun
    for student in ("binary-seed1", "binary-seed2"):
        shutil.rmtree(out / student)
    check_learners(out, list(Ablation(folder, out, (3,)).runs().values()))


def test_a_first_stage_is_not_trained_again_beside_its_second(folder, tmp_path):
    change_table(folder, rows={"staged": {"name": "x", "config": "binary", "first_stage": {"num_train_epochs": 2}}})
    ablation = Ablation(folder, tmp_path, (1,))
    finish(ablation)
    runs = list(ablation.runs().values())
    check_learners(tmp_path, runs)
    shutil.rmtree(tmp_path / "staged-first-stage-seed1")
    with pytest.raises(UserError, match=r"earlier 'staged-first-stage-seed1'.*: 'staged-seed1'\."):
        check_learners(tmp_path, runs)


def test_the_runs_and_time_that_are_left_are_told(folder, tmp_path):
    change_table(
        folder,
        rows={"binary": "1 bit", "long": {"name": "x", "config": "binary", "arguments": {"num_train_epochs": 10}}},
    )
    ablation = Ablation(folder, tmp_path, (1, 2))
    runs = list(ablation.runs().values())
    assert describe_left(ablation, runs, {}, {}, 2) == "5 of 5 runs left"
    finish(Ablation(folder, tmp_path, (1,)))
    # A minute an epoch: 1 and 10 epochs, two at a time
    assert describe_left(ablation, runs[3:], {}, {}, 2) == "2 of 5 runs left, about 6 minutes"
    assert describe_left(ablation, runs[4:], {runs[4].folder: 300.0}, {}, 2) == "1 of 5 runs left, about 5 minutes"
    slower = {run.folder: 120.0 * run.epochs for run in runs[:3]}
    assert describe_left(ablation, runs[3:], {}, slower, 2) == "2 of 5 runs left, about 11 minutes"


def test_a_row_has_a_network_of_another_folder(folder, tmp_path):
    change_table(folder, rows={"other": {"name": "another folder", "config": "../recipes/binary"}})
    run = Ablation(folder, tmp_path, (1,)).runs()[tmp_path / "other-seed1"]
    assert run.arguments.model.config_name == str(folder / "binary")
    check_run(read_table(folder), run.row, run.line)


def test_the_arguments_of_a_table_are_those_of_its_rows_but_not_of_its_teacher(folder, tmp_path):
    changed = {"name": "other", "config": "binary", "arguments": {"learning_rate": 0.5}}
    change_table(
        folder, arguments={"num_train_epochs": 4, "learning_rate": 0.25}, rows={"binary": "1 bit", "changed": changed}
    )
    teacher, first, second = (run.arguments.training for run in Ablation(folder, tmp_path, (1,)).runs().values())
    assert (first.num_train_epochs, first.learning_rate) == (4, 0.25)
    assert (second.num_train_epochs, second.learning_rate) == (4, 0.5)
    assert teacher.num_train_epochs != 4


def test_a_table_of_one_seed_says_so_and_has_no_empty_columns(folder, tmp_path):
    out = tmp_path / "out"
    change_table(folder, rows={"vit": "the teacher", "binary": "1 - |w|"})
    finish(Ablation(folder, out, (1, 2)))
    Ablation(folder, out, (1,)).write_results()
    text = (out / "results.md").read_text()
    assert "\n\nOne seed of each row, 2 runs in all: no intervals and no tests.\n" in text
    (head,) = [line for line in text.splitlines() if line.startswith("| row |")]
    assert not {"95 % interval", "p", "ms"} & {cell.strip() for cell in head.split("|")}
    assert "difference, points" in head
    assert "\n| 1 - \\|w\\| | " in text
    Ablation(folder, out, (1, 2)).write_results({"binary": 0.001}, "a CPU")
    text = (out / "results.md").read_text()
    assert "Mean and standard deviation over the seeds, 3 runs in all." in text
    assert "CPU: a CPU." in text


def test_rows_of_one_network_have_no_overrides_in_their_recipes(folder):
    change_table(folder, config="binary", rows={"a": "a", "b": {"name": "b", "recipe": "wide.json"}})
    for overrides, is_one in (({}, True), ({"config_overrides": "weight_bits=32"}, False)):
        (folder / "wide.json").write_text(json.dumps(RECIPE | overrides))
        assert read_table(folder).has_one_network is is_one


def test_a_place_that_cannot_be_written_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert_refused(capsys, ["ablation", folder, tmp_path / "out"], "is a file, not a folder")
    assert_refused(capsys, ["ablation", folder, tmp_path / "out" / "runs"], "out' is a file")


def test_runs_share_the_cpus_that_they_may_use(folder, tmp_path, monkeypatch):
    """The last run alone has all of them. OMP_NUM_THREADS is kept."""
    threads = []

    class Recorded(subprocess.Popen):
        def __init__(self, line, *, env, **kwargs):
            super().__init__([sys.executable, "-S", "-c", "pass"], **kwargs)
            output_dir = Path(line[line.index("--output_dir") + 1])
            threads.append((output_dir.name, env["OMP_NUM_THREADS"]))
            output_dir.mkdir()
            (output_dir / "all_results.json").write_text('{"test_accuracy": 0.5}')

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(runs_of_ablations, "available_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert main(["ablation", str(folder), str(tmp_path / "out"), "--seeds", "1", "2", "3", "--jobs", "2"]) == 0
    assert [number for _, number in threads] == ["8", "4", "4", "8"]
    threads.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["ablation", str(folder), str(tmp_path / "again"), "--seeds", "1", "--jobs", "2"]) == 0
    assert [number for _, number in threads] == ["3", "3"]


def test_two_ablations_do_not_train_in_one_folder(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with in_use(tmp_path / "out"):
        assert_refused(capsys, ["ablation", folder, tmp_path / "out"], "Another ablation trains in")


def test_a_folder_is_in_use_until_the_last_run_of_a_killed_ablation_ends(folder, tmp_path, monkeypatch):
    out, sleeper = tmp_path / "out", tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    run = next(iter(Ablation(folder, out, (1,)).runs().values()))
    with in_use(out) as locks:
        process = start(run, 1, None, locks)
    try:
        with pytest.raises(UserError, match="has left runs that do"), in_use(out):
            pass
    finally:
        process.kill()
        process.wait()
    with in_use(out):
        pass


@pytest.mark.parametrize(
    "table",
    ["fashion-mnist/table.json", "fashion-mnist/recipes.json", "fashion-mnist/shapes.json", "digits/table.json"],
)
def test_the_tables_of_the_repository_have_runs_without_a_fault(table, tmp_path):
    folder, name = table.split("/")
    ablation = Ablation(ROOT / "configs" / folder, tmp_path, (1,), name)
    for run in ablation.runs().values():
        check_run(ablation.table, run.row, run.line)


def test_training_options_have_equal_epochs(tmp_path):
    ablation = Ablation(ROOT / "configs" / "fashion-mnist", tmp_path, (1,), "recipes.json")
    epochs = dict.fromkeys(ablation.table.rows, 0.0)
    for run in ablation.runs().values():
        if run.row.key in epochs:
            epochs[run.row.key] += run.epochs
    assert len(epochs) > 15
    assert len(set(epochs.values())) == 1


def test_the_command_restores_the_handlers_of_signals(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert_refused(capsys, ["ablation", tmp_path, tmp_path / "out"], "table.json")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
