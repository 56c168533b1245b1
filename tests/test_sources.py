"""Names that are no models: runs that are not finished, misspelt names, missing folders."""

import errno
import logging
import shutil
import socket
import sys
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType

import pytest
from command_line import assert_refused, refusal, run
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from binaryvit_hf import loading
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_runtime import Classifier
from binaryvit_runtime.errors import NoModelError, UserError
from binaryvit_runtime.hub import CONNECTION_TRIES, NOT_UPLOADED, is_offline, prepare_hub_client
from binaryvit_runtime.resources import HUB_CLIENT, shipped_configs, shipped_models
from binaryvit_runtime.sources import RUN_ARGUMENTS, describe_fault, fetch


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The working folder, with the output directory `out` of a run that was stopped after its checkpoint of step 12."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))
    for step in (2, 12):
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(tmp_path / "out" / "checkpoint-12")
    (tmp_path / "out" / "checkpoint-20").mkdir()  # not whole
    (tmp_path / "out" / RUN_ARGUMENTS).write_text("{}")
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch):
    """Any loading beyond the checks of the name fails the test."""

    def load(*args, **kwargs):
        pytest.fail("the Hub would be asked")

    monkeypatch.setattr(loading.PreTrainedConfig, "get_config_dict", load)


@pytest.mark.parametrize(
    "command",
    [
        ["classify", "out", "a.png"],
        ["pack", "out", "packed"],
        ["export", "out", "a.onnx"],
        ["ops", "out"],
        ["card", "out"],
        ["push", "out", "me/x"],
    ],
    ids=lambda command: command[0],
)
def test_commands_say_that_a_run_is_not_finished_and_which_checkpoint_works(command, unfinished, capsys):
    words = ["'out'", "not finished", "same training command again", "last checkpoint, 'out/checkpoint-12'"]
    assert_refused(capsys, command, *words)


@pytest.mark.parametrize("argument", ["model_name_or_path", "teacher_model_name_or_path", "init_from", "config_name"])
def test_training_says_that_a_run_is_not_finished(argument, unfinished, capsys):
    network = ["--config_name", "binaryvit-digits"] if argument.startswith("teacher") else []
    arguments = [f"--{argument}", "out", *network, "--dataset_name", "sklearn-digits", "--do_train", "--use_cpu"]
    message = refusal(capsys, *arguments, "--output_dir", "new", "--report_to", "none", "--max_steps", 1)
    assert "training is not finished" in message
    assert "'out/checkpoint-12'" in message


def test_the_checkpoint_that_the_message_names_works(unfinished, capsys):
    checkpoint = "out/checkpoint-12"
    assert "ant" in run(capsys, "classify", checkpoint, "a.png")
    run(capsys, "pack", checkpoint, "packed")
    run(capsys, "card", checkpoint)


def test_a_run_without_a_checkpoint_is_not_finished_either(tmp_path):
    (tmp_path / RUN_ARGUMENTS).write_text("{}")
    fault = describe_fault(str(tmp_path))
    assert fault == "its training is not finished: run the same training command again to resume it."
    (tmp_path / "config.json").write_text("{}")
    assert describe_fault(str(tmp_path)) is None


def test_a_folder_within_an_unfinished_run_is_a_model(unfinished):
    assert describe_fault("out", "checkpoint-12") is None
    assert describe_fault("out/checkpoint-12") is None
    assert describe_fault("out", "checkpoint-13") == "it has no folder 'checkpoint-13'."


@pytest.mark.parametrize(
    "name, words",
    [
        ("binaryvit-digit", "did you mean 'binaryvit-digits'?"),
        ("binaryvit-fashion-minst", "did you mean 'binaryvit-fashion-mnist'?"),
        (
            "photos-packed",
            "no such folder, and it is neither an id of the Hub (OWNER/NAME) nor one of binaryvit-digits",
        ),
        ("ou", "did you mean 'out'?"),
        ("outputs/photos/latent", "there is no such folder."),
        ("outputs/photos/", "there is no such folder."),
        ("outputs\\photos", "there is no such folder."),
        ("./out/checkpoint-13", "did you mean 'out/checkpoint-12'?"),
        ("/none/of/these", "there is no such folder."),
    ],
)
def test_a_name_that_cannot_be_of_the_hub_is_refused_without_asking_it(name, words, unfinished, no_hub, capsys):
    assert_refused(capsys, ["classify", name, "a.png"], f"The model {name!r} cannot be loaded: there is no", words)


def test_a_network_without_trained_weights_is_told_from_a_wrong_name(unfinished, no_hub, capsys):
    name = "binaryvit-small-patch4-224"
    assert_refused(capsys, ["classify", name, "a.png"], "without trained weights", f"`--config_name {name}`")


@pytest.mark.parametrize("command", [["push", "ou", "me/x"], ["card", "ou"]])
def test_commands_that_take_only_folders_say_that_there_is_none(command, unfinished, capsys):
    assert_refused(capsys, command, "There is no folder 'ou'; did you mean 'out'?")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_is_no_model(name, unfinished, capsys):
    file = f"out/checkpoint-12/{name}"
    for command in (["classify", file, "a.png"], ["pack", file, "new"], ["card", file], ["push", file, "me/x"]):
        assert_refused(capsys, command, f"'{file}'", "is a file: name its folder, 'out/checkpoint-12'.")
    assert loading.load_config("out/checkpoint-12/config.json").model_type == "binaryvit"


@pytest.mark.parametrize(
    "command", [["classify", "empty", "a.png"], ["push", "empty", "me/x"], ["export", "empty", "a.onnx"]]
)
def test_a_folder_of_other_things_has_no_config(command, unfinished, capsys):
    (unfinished / "empty").mkdir()
    assert_refused(capsys, command, "'empty'", "it has no config.json")


def test_a_misspelt_row_is_refused_without_asking_the_hub(no_hub, capsys, tmp_path):
    assert_refused(capsys, ["ops", "vit-digit"], "did you mean 'vit-digits'?")
    arguments = ["--config_name", "binaryvit-small-patch4-22", "--do_train", "--train_dir", tmp_path / "photos"]
    assert "did you mean 'binaryvit-small-patch4-224'?" in refusal(
        capsys, *arguments, "--output_dir", tmp_path / "out"
    )


@pytest.mark.parametrize(
    "name", ["me/binaryvit-digits", "google/vit-base-patch16-224", "microsoft/resnet-50", "out/photos"]
)
def test_ids_of_the_hub_are_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_fault(name, shipped=shipped_models() | shipped_configs()) is None


def test_when_the_hub_has_no_such_model_its_local_neighbours_are_named(unfinished, capsys):
    (unfinished / "outputs").mkdir()
    (unfinished / "out").rename(unfinished / "outputs" / "photos")
    assert_refused(capsys, ["classify", "outputs/photo", "a.png"], "did you mean 'outputs/photos'?")
    assert_refused(capsys, ["classify", "outputs/digits", "a.png"], "'outputs' has 'photos'")


@pytest.mark.parametrize("name", [OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, TRAINING_ARGS_NAME, "rng_state_0.pth"])
def test_the_state_of_training_in_a_checkpoint_is_not_uploaded(name):
    assert shutil.ignore_patterns(*NOT_UPLOADED)("folder", [name, "model.safetensors"]) == {name}


def test_each_retry_of_a_request_is_one_line(monkeypatch):
    prepare_hub_client()
    prepare_hub_client()
    logger, messages = logging.getLogger("huggingface_hub.utils._http"), []
    monkeypatch.setattr(logger, "callHandlers", lambda record: messages.append(record.getMessage()))
    for number in range(1, 6):
        logger.warning(f"'[Errno 101] Network is unreachable' thrown while requesting HEAD https://x/{number}")
        logger.warning(f"Retrying in {number}s [Retry {number}/5].")
    logger.warning("Rate limited. Waiting 31.0s before retry [Retry 1/5].")
    assert messages == [
        *(f"The Hub does not answer: try {number + 1} of 6 in {number} s." for number in range(1, 6)),
        "Rate limited. Waiting 31.0s before retry [Retry 1/5].",
    ]


@pytest.mark.parametrize(
    "name, words",
    [
        ("me/binaryvit-digit", ("did you mean 'binaryvit-digits'? You are offline, because HF_HUB_OFFLINE is set",)),
        ("me/ot", ("did you mean 'out'? You are offline",)),
        ("some/thing", ("this machine has 'out', 'binaryvit-digits', 'binaryvit-fashion-mnist'; you are offline",)),
        ("me/tuned", ("did you mean 'outputs/tuned'? You are offline",)),
    ],
)
def test_without_a_connection_models_on_this_machine_come_first(name, words, unfinished, capsys):
    (unfinished / "outputs" / "tuned").mkdir(parents=True)
    if name == "me/tuned":
        (unfinished / "outputs" / "tuned" / "config.json").write_text("{}")
    assert_refused(capsys, ["classify", name, "a.png"], f"The model {name!r} cannot be loaded: ", *words)


def test_a_model_in_the_cache_is_suggested_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / "models--google--vit-base-patch16-224" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(NoModelError, match="did you mean 'google/vit-base-patch16-224'"):
        fetch(raise_offline, "google/vit-bse-patch16-224", cache_dir=str(tmp_path / "cache"))


def raise_offline(source):
    raise OfflineModeIsEnabled


FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]


def cache_snapshot(cache: Path, names: list[str]) -> Path:
    """Put these files of a shipped model into a cache of the Hub, as those of `me/photos`. Returns their folder."""
    repository = cache / "models--me--photos"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in names:
        shutil.copy(shipped_models()["binaryvit-digits"] / name, snapshot)
    return snapshot


@pytest.mark.parametrize("missing", FILES)
def test_an_incomplete_download_is_told_from_a_broken_model(missing, tmp_path):
    cache_snapshot(tmp_path, [name for name in FILES if name != missing])
    with pytest.raises(UserError, match=r"If its download is not complete, load it once online: you are offline"):
        Classifier.from_pretrained("me/photos", cache_dir=str(tmp_path))


def test_the_name_that_was_typed_is_no_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache_snapshot(tmp_path, FILES)
    with pytest.raises(UserError, match="you are offline") as refusal:
        Classifier.from_pretrained("me/photos", revision="v1", cache_dir=str(tmp_path))
    assert "did you mean" not in str(refusal.value)


def test_a_damaged_file_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    blob = cache_snapshot(tmp_path, FILES).parents[1] / "blobs" / ("b" * 40)
    blob.parent.mkdir()
    blob.touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Path, "unlink", refuse_access)
    with pytest.raises(UserError, match=f"{blob}' is damaged and cannot be replaced .Permission denied."):
        fetch(lambda source: [][0], "me/photos", cache_dir=str(tmp_path))


def refuse_access(path, **options):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("command", [["classify", "out", "a.png"], ["card", "out"]], ids=lambda command: command[0])
def test_a_folder_of_another_user_cannot_be_read(command, unfinished, monkeypatch, capsys):
    monkeypatch.setattr("binaryvit_runtime.sources.describe_unfinished_run", refuse_access)
    monkeypatch.setattr("binaryvit_cli.common.describe_unfinished_run", refuse_access)
    assert_refused(capsys, command, "'out' cannot be ", "cannot be read (Permission denied).")


def test_an_old_client_of_the_hub_is_named_for_models_of_the_hub_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = ModuleType("huggingface_hub")
    old.snapshot_download = None
    monkeypatch.delattr("binaryvit_runtime.hub")
    monkeypatch.delitem(sys.modules, "binaryvit_runtime.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", old)
    with pytest.raises(UserError, match=f"need {HUB_CLIENT}: pip install {HUB_CLIENT}"):
        Classifier.from_pretrained("me/photos")
    Path("model").mkdir()
    Path("model", "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        Classifier.from_pretrained("model")


def test_messages_and_guides_have_the_client_of_the_package():
    root, setup = Path(__file__).parents[1], ConfigParser()
    setup.read(root / "setup.cfg")
    client = HUB_CLIENT.strip("'")
    assert f"{client}," in setup["options"]["install_requires"].replace(" ", "")
    for guide in ("hub.md", "runtime.md"):
        assert f'pip install "{client}"' in (root / "docs" / "pages" / "guides" / guide).read_text()


def count_tries(error: Exception | None) -> int:
    """The tries of a request that fails with this error, by the backoff of huggingface_hub; 7 if it would try more often."""

    def answer():
        if error is not None:
            raise error

    for number in range(1, 7):
        try:
            CONNECTION_TRIES.send(answer)
            return number
        except OfflineModeIsEnabled as given_up:
            assert given_up.__cause__ is error
            return number
        except OSError:
            if number < 6:
                logging.getLogger("huggingface_hub.utils._http").warning(f"Retrying in 1s [Retry {number}/5].")
    return 7


def test_offline_all_files_together_have_one_round_of_tries(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    prepare_hub_client()
    refused, slow, unresolved = ConnectionRefusedError(), TimeoutError(), socket.gaierror(-2, "Name not known")
    assert [count_tries(error) for error in (None, refused, unresolved, refused)] == [1, 6, 1, 1]
    assert [count_tries(error) for error in (None, refused, refused)] == [1, 6, 1]
    assert [count_tries(error) for error in (slow, slow, refused, slow)] == [7, 7, 6, 7]
    assert count_tries(OSError(errno.ENETUNREACH, "Network is unreachable")) == 6
    clock[0] += CONNECTION_TRIES.PAUSE + 1
    assert [count_tries(error) for error in (refused, refused, None)] == [6, 1, 1]


def test_a_model_of_the_hub_is_tried_in_one_round_without_a_connection(monkeypatch, tmp_path):
    waits = []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CONNECTION_TRIES, "is_last", False)
    prepare_hub_client()
    for _ in range(2):
        with pytest.raises(
            NoModelError,
            match=f"^there is no such folder, and you seem to be offline: no answer from the Hub at {address} .ConnectError.,",
        ):
            loading.load_classifier("some/thing", cache_dir=str(tmp_path))
    assert len(waits) == 5


def test_a_silent_hub_is_told_from_one_that_refuses():
    assert is_offline(ConnectionError())
    assert is_offline(OfflineModeIsEnabled())
    assert not is_offline(ValueError())


@pytest.mark.parametrize(
    "command, words",
    [
        (["classify", "binaryvit-digits", "b.png"], "'b.png' does not exist (did you mean 'a.png'?)."),
        (
            ["classify", "binaryvit-digits", "http://x/a.png?b"],
            "'http://x/a.png?b' is a URL: download the picture first.",
        ),
        (["benchmark", "--model", "binaryvit-small-patch4-22"], "did you mean 'binaryvit-small-patch4-224'?"),
        (["benchmark", "--train", "--model", "binaryvit-digit"], "did you mean 'binaryvit-digits'?"),
    ],
)
def test_misspelt_files_and_rows_get_a_suggestion(command, words, unfinished, capsys):
    assert_refused(capsys, command, words)
