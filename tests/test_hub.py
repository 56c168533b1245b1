"""Uploads and downloads with the real client and the Hub of `hub_server`."""

import json
import subprocess
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hub_server import ALICE, BOB
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from processes import SCRIPT_IN_RANKS
from safetensors.torch import load
from tiny import tiny_config, tiny_images, tiny_model
from transformers import ViTConfig, ViTForImageClassification
from warm_python import WITHOUT_PACKAGE

from binaryvit_cli import main as binaryvit
from binaryvit_hf import BinaryViTForImageClassification
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_runtime.hub import suggest_name
from binaryvit_runtime.pixels import write_background


ROOT = Path(__file__).parent.parent
LABELS = {0: "ant", 1: "bee", 2: "cat"}
DOWNLOAD = """
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers.utils import logging

logging.disable_progress_bar()
root, name, revision, subfolder = sys.argv[1:]
images, expected = torch.load(f"{root}/expected.pt")
trust = {"trust_remote_code": True} | ({"revision": revision} if revision else {})
assert AutoConfig.from_pretrained(name, **trust).model_type == "binaryvit"
model = AutoModelForImageClassification.from_pretrained(name, subfolder=subfolder, **trust)
assert type(model).__module__.startswith("transformers_modules.")
assert model.is_packed == (not subfolder)
backbone = AutoModel.from_pretrained(name, subfolder=subfolder, **trust)
with torch.no_grad():
    assert torch.equal(model(images).logits, expected)
    assert torch.equal(model.classifier(backbone(images).pooler_output), expected)
model.save_pretrained(f"{root}/again")
again = AutoModelForImageClassification.from_pretrained(f"{root}/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(images).logits, expected)
larger = AutoModelForImageClassification.from_pretrained(name, subfolder=subfolder, image_size=32, **trust)
squares = torch.cat((images, images), dim=2)
with torch.no_grad():
    assert torch.equal(larger(squares).logits, model(squares, interpolate_pos_encoding=True).logits)
if not subfolder:
    AutoImageProcessor.from_pretrained(name, revision=revision or None)
    pipeline("image-classification", model=name, **trust)(Image.new("L", (50, 40)))
print("all equal")
"""


@pytest.fixture
def latent(tmp_path) -> Path:
    """A model with its image processor. `expected.pt` beside it holds images and their logits."""
    model = tiny_model(tiny_config(id2label=LABELS)).eval()
    model.save_pretrained(tmp_path / "latent")
    processor = create_image_processor(model.config, crop_pct=1.0)
    write_background(processor, "#ffffff")
    processor.save_pretrained(tmp_path / "latent")
    with torch.no_grad():
        torch.save((tiny_images(), model(tiny_images()).logits), tmp_path / "expected.pt")
    return tmp_path / "latent"


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in LABELS.values():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 255, (20, 40, 3)).astype("uint8")).save(
                tmp_path / "photos" / name / f"{number}.png"
            )
    return tmp_path / "photos"


def run(client, home: Path, token: str | None, *arguments) -> subprocess.CompletedProcess:
    """Run `python *arguments` on a machine with this home and this token."""
    return client.run(*arguments, folder=home, variables=client.variables | ({"HF_TOKEN": token} if token else {}))


def download(client, home: Path, token: str | None, *arguments) -> subprocess.CompletedProcess:
    """Run `DOWNLOAD` on a machine without the package."""
    return run(client, home, token, "-c", WITHOUT_PACKAGE + DOWNLOAD, home.parent, *arguments)


def push(client, tmp_path, token, *arguments) -> subprocess.CompletedProcess:
    return run(client, tmp_path / "home", token, "-m", "binaryvit_cli", "push", *arguments)


def train(
    client, tmp_path, photos, token, *arguments, script=(ROOT / "run_image_classification.py",)
) -> subprocess.CompletedProcess:
    tiny_config().save_pretrained(tmp_path / "config")
    options = ["--do_train", "--do_eval", "--max_steps=2", "--report_to=none", "--use_cpu", "--crop_pct=1.0"]
    return run(
        client,
        tmp_path / "home",
        token,
        *script,
        *["--config_name", tmp_path / "config", "--train_dir", photos, "--output_dir", tmp_path / "run"],
        *["--push_to_hub", "--hub_model_id", "alice/photos", *options, *arguments],
    )


def dtypes(content: bytes) -> set[torch.dtype]:
    return {tensor.dtype for name, tensor in load(content).items() if ".layers." in name and "batches" not in name}


def assert_shipped(files: dict[str, bytes]) -> None:
    """The repository has packed weights, and latent weights in `latent/`. Both have their code."""
    assert torch.uint8 in dtypes(files["model.safetensors"])
    assert dtypes(files["latent/model.safetensors"]) == {torch.float32}
    for folder in ("", "latent/"):
        assert {f"{folder}config.json", f"{folder}modeling_binaryvit.py"} <= files.keys()
    assert not [name for name in files if "training_args" in name or "checkpoint-" in name]


def test_push_to_hub_uploads_bits_and_machines_without_the_package_load_them(
    server, client, warm_python, latent, tmp_path
):
    code = """
import sys
from transformers import AutoImageProcessor, AutoModelForImageClassification
import binaryvit_hf
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
model.push_to_hub("pyramid")
AutoImageProcessor.from_pretrained(sys.argv[1]).push_to_hub("pyramid")
from huggingface_hub import HfApi
HfApi().create_tag("alice/pyramid", tag="v1")
packed = AutoModelForImageClassification.from_pretrained(
    sys.argv[1], quantization_config=binaryvit_hf.BinaryViTQuantizationConfig()
)
packed.push_to_hub("packed-alone")
"""
    result = run(client, tmp_path / "home", ALICE, "-c", code, latent)
    assert result.returncode == 0, result.stderr
    assert_shipped(server.files("alice/pyramid"))
    assert "latent/config.json" not in server.files("alice/packed-alone")
    assert server.files("alice/packed-alone")["config.json"] == server.files("alice/pyramid")["config.json"]

    pinned = download(client, tmp_path / "other", None, "alice/pyramid", "v1", "")
    assert (pinned.stdout, pinned.stderr) == ("all equal\n", "")
    # stderr is not empty: transformers reports that it downloaded code without a pinned revision.
    newest = download(client, tmp_path / "other", None, "alice/pyramid", "", "latent")
    assert newest.stdout == "all equal\n", newest.stderr
    for subfolder in ("", "latent"):  # offline, from the cache
        cached = download(warm_python, tmp_path / "other", None, "alice/pyramid", "", subfolder)
        assert (cached.stdout, cached.stderr) == ("all equal\n", "")


def test_a_private_repository_opens_only_to_its_owner(server, client, latent, tmp_path):
    result = push(client, tmp_path, ALICE, latent, "alice/secret", "--private")
    assert result.returncode == 0, result.stderr
    assert server.repository("alice/secret").private
    for token, opens in ((ALICE, True), (BOB, False), (None, False)):
        found = download(client, tmp_path / f"home-{token}", token, "alice/secret", "main", "")
        assert (found.stdout == "all equal\n") == opens, found.stderr
        if not opens:
            assert "is not a valid model identifier" in found.stderr


def test_the_script_uploads_what_it_trained_with_a_teacher_of_the_hub(server, client, photos, tmp_path):
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    teacher = ViTForImageClassification(ViTConfig(image_size=[16, 32], patch_size=8, id2label=LABELS, **fields))
    teacher.save_pretrained(tmp_path / "teacher")
    content = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    server.publish("bob/teacher", content, private=True)

    teaching = ["--teacher_model_name_or_path", "bob/teacher", "--save_steps=1", "--hub_strategy=checkpoint"]
    refused = train(client, tmp_path, photos, ALICE, *teaching)
    assert refused.returncode == 2, refused.stderr
    assert "'bob/teacher' cannot be loaded" in refused.stderr
    server.repository("bob/teacher").private = False
    result = train(client, tmp_path, photos, ALICE, *teaching)
    assert result.returncode == 0, result.stderr

    files, run_folder = server.files("alice/photos"), tmp_path / "run"
    assert_shipped(files)
    wanted = ["model.safetensors", "config.json", "preprocessor_config.json", "README.md", "learning_curves.png"]
    for name in [*wanted, "run_arguments.json", "all_results.json", "latent/model.safetensors"]:
        assert files[name] == (run_folder / name).read_bytes(), name
    assert "last-checkpoint/optimizer.pt" in files
    card = files["README.md"].decode()
    assert "base_model: bob/teacher" in card
    results = json.loads(files["all_results.json"])
    assert results["teacher_revision"] == server.commits("bob/teacher")[0].oid
    assert 'model="alice/photos"' in card
    assert ALICE not in "".join(content.decode(errors="ignore") for content in files.values())
    in_progress = [
        commit for commit in server.commits("alice/photos") if commit.title.startswith("Training in progress")
    ]
    assert in_progress
    for commit in in_progress:
        assert_shipped(server.files("alice/photos", revision=commit.oid))


def test_two_processes_leave_one_model_one_card_and_one_upload_and_say_everything_once(
    server, client, photos, tmp_path
):
    options = ["--hub_strategy=end", "--per_device_train_batch_size=4"]
    result = train(client, tmp_path, photos, ALICE, *options, script=["-c", SCRIPT_IN_RANKS, 2])
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Batch: 8 images (2 processes of 4, 1 accumulated)") == 1
    assert result.stdout.count("its card:") == 1
    assert "Warning" not in result.stderr
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_samples"] == 4
    assert_shipped(server.files("alice/photos"))
    assert len(server.commits("alice/photos")) == 2  # of the empty repository and of the run


def test_a_run_whose_upload_fails_is_whole_and_the_same_command_completes_it(server, client, photos, tmp_path):
    quiet = ["--hub_strategy=end"]
    server.fail_next(1, on="commit", how="drop")
    failed = train(client, tmp_path, photos, ALICE, *quiet)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert f"binaryvit push {tmp_path / 'run'} alice/photos" in failed.stderr
    assert "README.md" not in server.files("alice/photos")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()

    again = train(client, tmp_path, photos, ALICE, *quiet)
    assert again.returncode == 0, again.stderr
    assert "is trained already" in again.stderr
    files = server.files("alice/photos")
    assert_shipped(files)
    assert load(files["model.safetensors"]).keys() == load(weights).keys()
    assert all(torch.equal(tensor, load(weights)[name]) for name, tensor in load(files["model.safetensors"]).items())


def test_a_token_that_may_not_write_is_refused_before_training(server, client, photos, tmp_path):
    server.publish("alice/photos", {"config.json": b"{}"})
    for token in (BOB, None):
        refused = train(client, tmp_path, photos, token)
        assert refused.returncode == 2, refused.stderr
        assert "'alice/photos' cannot be created or written to" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def assert_keeps_background(files: dict[str, bytes]) -> None:
    assert json.loads(files["preprocessor_config.json"])["background"] == "#ffffff"
    assert "`#ffffff` behind transparent pixels" in files["README.md"].decode()


def test_push_packs_a_latent_folder_and_writes_its_card(server, client, latent, tmp_path):
    server.fail_next(1, on="commit", how=500)
    failed = push(client, tmp_path, ALICE, latent, "alice/pyramid")
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.count("\n") == 1
    before = {path.name: path.read_bytes() for path in latent.iterdir()}
    result = push(client, tmp_path, ALICE, latent, "alice/pyramid", "--revision", "next")
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in latent.iterdir()} == before
    files = server.files("alice/pyramid", revision="next")
    assert_shipped(files)
    assert "1-bit vision transformer" in files["README.md"].decode()
    assert_keeps_background(files)
    assert "model.safetensors" not in server.files("alice/pyramid")
    loaded = download(client, tmp_path / "other", None, "alice/pyramid", "next", "")
    assert (loaded.stdout, loaded.stderr) == ("all equal\n", "")


def test_push_takes_a_packed_folder_as_it_is(server, client, latent, tmp_path):
    assert binaryvit(["pack", str(latent), str(tmp_path / "packed")]) == 0
    (tmp_path / "packed" / "modeling_binaryvit.py").unlink()  # the models in the package have no code either
    (tmp_path / "packed" / "checkpoint-1").mkdir()
    (tmp_path / "packed" / "checkpoint-1" / "optimizer.pt").write_bytes(b"large")
    (tmp_path / "packed" / ".secret").write_text("hidden")
    (tmp_path / "packed" / "_unfinished_run_arguments.json").write_text("{}")
    result = push(client, tmp_path, ALICE, tmp_path / "packed", "alice/pyramid")
    assert result.returncode == 0, result.stderr
    files = server.files("alice/pyramid")
    ours, theirs = load(files["model.safetensors"]), load((tmp_path / "packed" / "model.safetensors").read_bytes())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "modeling_binaryvit.py" in files
    assert_keeps_background(files)
    assert not [
        name for name in files if "latent" in name or "checkpoint" in name or "secret" in name or name[0] == "_"
    ]
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "binaryvit"


def test_push_deletes_the_weights_of_an_earlier_model(server, client, latent, tmp_path):
    parts = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    weights = [*parts, "model.safetensors.index.json", "pytorch_model.bin", "latent/config.json"]
    others = ["model.onnx", "other/model.safetensors"]
    server.publish("alice/pyramid", dict.fromkeys([*weights, "latent/model.safetensors", *others], b"earlier"))
    assert binaryvit(["pack", str(latent), str(tmp_path / "packed")]) == 0
    result = push(client, tmp_path, ALICE, tmp_path / "packed", "alice/pyramid")
    assert result.returncode == 0, result.stderr
    files = server.files("alice/pyramid")
    assert [name for name, content in files.items() if content == b"earlier"] == others
    assert "latent/config.json" not in files
    assert len(server.commits("alice/pyramid")) == 3  # of the empty repository, the earlier model and this one


def test_an_upload_of_a_packed_model_warns_of_the_latent_weights_of_an_earlier_one(server, client, latent, tmp_path):
    code = """
import sys
from binaryvit_hf import BinaryViTForImageClassification
latent = BinaryViTForImageClassification.from_pretrained(sys.argv[1])
latent.push_to_hub("pyramid")
latent.pack_weights()
latent.push_to_hub("pyramid")
latent.push_to_hub("other")
latent.classifier.bias.data += 1  # the client does not commit files that are there
latent.push_to_hub("pyramid", create_pr=True)  # changes nothing in main, so the latent weights there are still right
"""
    result = run(client, tmp_path / "home", ALICE, "-c", code, latent)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("still has latent weights") == 1
    assert "huggingface_hub.delete_folder('latent', 'alice/pyramid')" in result.stderr
    assert server.commits("alice/pyramid", "refs/pr/1")[0].title == "Upload BinaryViTForImageClassification"


def test_push_leaves_out_the_parts_of_sharded_weights_that_it_packs(server, client, latent, tmp_path):
    model = BinaryViTForImageClassification.from_pretrained(latent)
    (latent / "model.safetensors").unlink()
    model.save_pretrained(latent, max_shard_size="5KB")
    assert (latent / "model.safetensors.index.json").exists()
    result = push(client, tmp_path, ALICE, latent, "alice/pyramid")
    assert result.returncode == 0, result.stderr
    files = server.files("alice/pyramid")
    assert_shipped(files)
    assert not [name for name in files if "index" in name or "-of-" in name]


@pytest.mark.parametrize(
    "folder, name",
    [
        ("photos", "photos"),
        ("my photos (2)", "my-photos-2"),
        ("a--b..c-.d_", "a-b.c-d_"),
        ("蚂蚁", "model"),
        ("x" * 120, "x" * 96),
    ],
)
def test_the_suggested_name_of_a_repository_is_one_that_the_hub_allows(folder, name, tmp_path):
    assert suggest_name(tmp_path / folder) == name
    validate_repo_id(name)


def test_the_tests_have_caches_of_their_own():
    for cache in (HF_HOME, HF_HUB_CACHE, matplotlib.get_cachedir()):
        assert Path(cache).is_relative_to(tempfile.gettempdir()) and "binaryvit-tests-" in cache
