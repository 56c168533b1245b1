"""`main` refuses bad arguments, folders and configs before it writes anything. A teacher's run inherits arguments."""

import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from command_line import refusal
from PIL import Image
from tiny import tiny_config

from binaryvit_hf.training import run as script
from binaryvit_hf.training import start
from binaryvit_hf.training.arguments import ModelArguments
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.models import load_config
from binaryvit_hf.training.run_folder import RUN_ARGUMENTS, arguments_to_json, compare_with_recorded
from binaryvit_runtime.errors import UserError


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--do_trian"], "Unknown argument 'do_trian'; did you mean 'do_train'?"),
        (["--epochs", "3"], "Unknown argument 'epochs'; did you mean 'num_train_epochs'?"),
        (["--do_train", "--sign_gradient", "clipp"], "did you mean 'clip'?"),
        (["--do_train", "--report_to", "wandbb"], "did you mean 'wandb'?"),
        (["stray"], "Unknown argument 'stray'"),
        (["missing.json"], "There is no file of arguments 'missing.json'"),
        (["--num_train_epochs", "many"], "invalid float value: 'many'"),
        ([], "begin with a file of arguments, such as configs/photos.json"),
        (["--do_train"], "Give either --config_name"),
        (["--do_eval", "--config_name", "x"], "is a network without weights"),
        (["--do_train", "--config_name", "binaryvit-digits"], "No images are given"),
        (["--do_train", "--config_name", "x", "--crop_pct", "0"], "--crop_pct must be above 0 and at most 1"),
        (
            ["--do_train", "--config_name", "x", "--label_loss_weight", "2"],
            "--label_loss_weight must be 0 or more and at most 1",
        ),
        (
            ["--do_train", "--config_name", "binaryvit-digits", "--dataset_name", "no/where"],
            "--dataset_name 'no/where' cannot be loaded",
        ),
        (
            ["--do_train", "--config_name", "no-such-row", "--dataset_name", "sklearn-digits"],
            "'no-such-row' cannot be loaded",
        ),
        (
            ["--do_eval", "--model_name_or_path", "no-such", "--dataset_name", "sklearn-digits"],
            "'no-such' cannot be loaded",
        ),
        (
            ["--do_train", "--config_name", "binaryvit-digits", "--dataset_name", "sklearn-digit"],
            "cannot be loaded: did you mean 'sklearn-digits'? ",
        ),
        (
            [
                *("--do_train", "--config_name", "binaryvit-digits", "--dataset_name", "sklearn-digits"),
                *("--validation_split_name", "validatoin"),
            ],
            "has no split 'validatoin'; it has 'train', 'validation'. Name one with --validation_split_name; did you mean "
            "'validation'?",
        ),
        (["--teacher.num_train_epochs", "1"], "need a file of arguments"),
        (["--teacher", "some/model"], "name a trained teacher with --teacher_model_name_or_path"),
        (["--teacher"], "--teacher takes null"),
    ],
)
def test_bad_argument_is_one_sentence(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments, "--output_dir", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given, meant", [("phot.json", "photos.json"), ("photos.jsn.json", "photos.json")])
def test_a_misspelt_file_of_arguments_gets_a_suggestion(given, meant, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.json").write_text("{}")
    assert f"There is no file of arguments {given!r}; did you mean {meant!r}?" in refusal(capsys, given)


def test_the_configs_of_the_package_are_found_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, student = parse_runs(["configs/quickstart.json", "--use_cpu"])
    assert (teacher.model.config_name, student.model.config_name) == ("vit-digits", "binaryvit-digits")
    options = ModelArguments(config_name="configs/fashion-mnist/binaryvit")
    assert load_config(options, do_train=True).image_size == 24
    own = tmp_path / "configs" / "quickstart.json"
    own.parent.mkdir()
    own.write_text('{"config_name": "own", "do_train": true}')
    assert [run.model.config_name for run in parse_runs([str(own.relative_to(tmp_path)), "--use_cpu"])] == ["own"]


def test_uploads_use_the_token_if_they_have_none_of_their_own():
    (run,) = parse_runs(["--push_to_hub", "--token", "a"])
    assert (run.model.token, run.training.hub_token) == ("a", "a")
    (run,) = parse_runs(["--push_to_hub", "--token", "a", "--hub_token", "b"])
    assert (run.model.token, run.training.hub_token) == ("a", "b")
    (run,) = parse_runs(["--token", "a"])
    assert run.training.hub_token is None
    teacher, _ = parse_runs(["configs/quickstart.json", "--use_cpu", "--push_to_hub", "--hub_token", "b"])
    assert teacher.training.hub_token is None  # it uploads nothing


def test_training_starts_in_another_thread_than_the_main_one(monkeypatch):
    monkeypatch.setattr("binaryvit_hf.training.run.main", lambda arguments: arguments)
    with ThreadPoolExecutor(1) as thread:  # where no handler of a signal can be set
        assert thread.submit(start, ["a"]).result() == ["a"]


def test_a_missing_library_of_training_is_one_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "binaryvit_hf.training.run")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match=r"error: Training needs 'accelerate': run `pip install '.\[train\]'`"):
        start(["configs/quickstart.json"])


def test_misspelt_folders_and_classes_get_a_suggestion(capsys, photos, tmp_path):
    common = ["--do_train", "--config_name", "binaryvit-digits", "--output_dir", tmp_path / "out"]
    message = refusal(capsys, *common, "--train_dir", tmp_path / "photo")
    assert f"there is no folder {str(tmp_path / 'photo')!r}; did you mean {str(photos)!r}?" in message
    (tmp_path / "held-out" / "been").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "held-out" / "been" / "0.png")
    message = refusal(capsys, *common, "--train_dir", photos, "--validation_dir", tmp_path / "held-out")
    assert "has the class 'been', which --train_dir does not have; did you mean 'bee'?" in message


@pytest.mark.parametrize("flags, value", [([], True), (["true"], True), (["false"], False)])
def test_a_switch_needs_no_value_even_if_its_default_is_unknown(flags, value, tmp_path):
    (run,) = parse_runs(["--output_dir", str(tmp_path / "out"), "--disable_tqdm", *flags, "--do_train"])
    assert run.training.disable_tqdm is value
    assert run.training.do_train


def test_bf16_without_a_gpu_names_the_arguments_that_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    message = refusal(capsys, "--do_train", "--output_dir", tmp_path / "out", "--bf16")
    assert "--bf16 false" in message
    for arguments in (["--bf16", "false"], ["--bf16", "--use_cpu"]):
        parse_runs(["--do_train", "--output_dir", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["{file}", "--teacher.output_dir", "out"],
        ["{file}", "--teacher_model_name_or_path", "./out"],
        ["{file}", "--teacher", "null", "--init_from", "out"],
        ["--do_train", "--model_name_or_path", "out/"],
    ],
    ids=["teacher to train", "teacher", "first stage", "model"],
)
def test_training_does_not_overwrite_a_model_that_it_needs(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    values = {"config_name": "binaryvit-photos", "do_train": True, "teacher": {"config_name": "convnext-photos"}}
    (tmp_path / "run.json").write_text(json.dumps(values))
    given = [argument.format(file="run.json") for argument in arguments]
    message = refusal(capsys, *given, "--train_dir", "photos", "--output_dir", "out")
    assert "which training would overwrite: choose another" in message


def test_unknown_key_in_a_file_is_named(capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"learning_rat": 1}', encoding="utf-8-sig")  # as Windows writes it
    assert "did you mean 'learning_rate'" in refusal(capsys, tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"learning_rate": ')
    assert "run.json' cannot be read" in refusal(capsys, tmp_path / "run.json")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda photos: photos.rename(photos.parent / "elsewhere"), "there is no folder"),
        (lambda photos: [path.unlink() for path in photos.rglob("*.png")], "has no images in sub-folders"),
        (lambda photos: (photos / "ant").rename(photos.parent / "ant"), "The images have one class, 'bee'"),
        (lambda photos: (photos / "cow").mkdir(), "cow' has no file with an image's extension"),
    ],
)
def test_bad_folder_is_one_sentence(capsys, photos, tmp_path, spoil, message):
    spoil(photos)
    arguments = ["--do_train", "--config_name", "binaryvit-digits", "--train_dir", photos]
    assert message in refusal(capsys, *arguments, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validation_class_that_training_lacks_is_named(capsys, photos, tmp_path):
    (tmp_path / "validation" / "cow").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "validation" / "cow" / "0.png")
    arguments = ["--do_train", "--config_name", "binaryvit-digits", "--train_dir", photos]
    message = refusal(
        capsys, *arguments, "--validation_dir", tmp_path / "validation", "--output_dir", tmp_path / "out"
    )
    assert "--validation_dir has the class 'cow'" in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": [3, 4]}, "num_attention_heads=3 does not divide"),
        ({"depths": [2]}, "must have one value per stage"),
        ({"image_size": 30}, "not a multiple of patch_size"),
        ({"num_channels": 1}, "takes images of 1 channel;"),
    ],
)
def test_bad_config_is_one_sentence(capsys, photos, tmp_path, changes, message):
    fields = tiny_config().to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    arguments = ["--do_train", "--config_name", tmp_path, "--train_dir", photos, "--output_dir", tmp_path / "out"]
    assert message in refusal(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_the_teachers_run_inherits_the_file_and_shared_flags(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "config_name": "student",
                "learning_rate": 0.5,
                "num_train_epochs": 9,
                "output_dir": str(tmp_path / "out"),
                "teacher": {"config_name": "teacher", "num_train_epochs": 5, "warmup_steps": 3},
            }
        )
    )
    flags = ["--num_train_epochs", "7", "--max_train_samples=11", "--teacher.warmup_steps", "4"]
    teacher, student = parse_runs([str(tmp_path / "run.json"), *flags])
    assert student[0].config_name == "student"
    assert student[0].teacher_model_name_or_path == teacher[2].output_dir == str(tmp_path / "out-teacher")
    assert (student[2].num_train_epochs, teacher[2].num_train_epochs) == (7, 5)
    assert (student[1].max_train_samples, teacher[1].max_train_samples) == (11, 11)
    assert (student[2].warmup_steps, teacher[2].warmup_steps) == (0, 4)
    assert teacher[0].config_name == "teacher"
    assert teacher[2].learning_rate == 0.5


def test_named_teacher_replaces_the_one_to_train(tmp_path):
    (tmp_path / "run.json").write_text('{"config_name": "student", "teacher": {"config_name": "teacher"}}')
    runs = parse_runs([str(tmp_path / "run.json"), "--teacher_model_name_or_path", "some/teacher"])
    assert len(runs) == 1


@pytest.mark.parametrize("flags", [["--teacher", "null"], ["--teacher=None"], ["--teacher", "none", "--seed", "3"]])
def test_the_files_teacher_can_be_left_out(flags, tmp_path):
    values = {"config_name": "student", "output_dir": "out", "seed": 3, "teacher": {"config_name": "teacher"}}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (run,) = parse_runs([str(tmp_path / "run.json"), *flags])
    assert run.model.config_name == "student"
    assert run.model.teacher_model_name_or_path is None
    with pytest.raises(UserError, match="no --teacher null"):
        parse_runs([str(tmp_path / "run.json"), *flags, "--teacher.seed", "4"])


@pytest.mark.parametrize("prefix", ["", "teacher."])
def test_a_flag_that_names_a_trained_model_replaces_the_files_new_network_and_the_reverse(prefix, tmp_path):
    new = {"config_name": "new", "config_overrides": "weight_bits=32"}
    trained = {"model_name_or_path": "trained", "ignore_mismatched_sizes": True}
    for values, flags, expected in (
        (new, ["--model_name_or_path=other"], (None, None, "other", False)),
        (new, ["--model_name_or_path=other", "--ignore_mismatched_sizes"], (None, None, "other", True)),
        (new, ["--config_overrides=weight_bits=4"], ("new", "weight_bits=4", None, False)),
        (trained, ["--config_name=other"], ("other", None, None, False)),
    ):
        file = {"config_name": "student", "teacher": values} if prefix else values | {"teacher": {"config_name": "x"}}
        (tmp_path / "run.json").write_text(json.dumps(file))
        runs = parse_runs([str(tmp_path / "run.json"), *[flag.replace("--", f"--{prefix}", 1) for flag in flags]])
        changed, unchanged = (model for model, _, _ in (runs if prefix else runs[::-1]))
        names = ("config_name", "config_overrides", "model_name_or_path", "ignore_mismatched_sizes")
        assert tuple(getattr(changed, name) for name in names) == expected
        assert (unchanged.config_name, unchanged.ignore_mismatched_sizes) == ("student" if prefix else "x", False)


def test_the_student_is_checked_before_its_teacher_is_trained(capsys, photos, tmp_path):
    values = {
        "config_name": "no-such-row",
        "train_dir": str(photos),
        "do_train": True,
        "teacher": {"config_name": "vit-digits"},
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert "'no-such-row' cannot be loaded" in refusal(capsys, tmp_path / "run.json", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_argument_that_an_older_version_did_not_record_had_its_default(tmp_path):
    arguments = ["--do_train", "--config_name", "x", "--use_cpu", "--output_dir", str(tmp_path)]
    (run,) = parse_runs(arguments)
    recorded = {name: value for name, value in arguments_to_json(run).items() if name != "cutmix_alpha"}
    (tmp_path / RUN_ARGUMENTS).write_text(json.dumps(recorded))
    compare_with_recorded(tmp_path, run)
    with pytest.raises(UserError, match=r"cutmix_alpha was 0.0, not 1.0"):
        compare_with_recorded(tmp_path, *parse_runs([*arguments, "--cutmix_alpha", "1.0"]))


def test_an_interruption_is_one_sentence(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "parse_runs", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert script.main([]) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # an impatient second Ctrl-C has no stack trace
    finally:
        signal.signal(signal.SIGINT, before)
    assert "error: Interrupted. Run the same command again to resume" in capsys.readouterr().err
