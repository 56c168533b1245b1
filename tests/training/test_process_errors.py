"""Two processes: the teacher is written before any loads it, and an error of one process is shown once and ends both."""

import json
import subprocess
from pathlib import Path

import pytest
from pictures import write_pictures
from processes import RUN_RANKS
from tiny import tiny_config
from transformers import ViTConfig
from warm_python import WarmPython

from binaryvit_hf.data.sampling import TrainSampler


ROOT = Path(__file__).parents[2]
# Rank 0 saves slowly; rank 1 meets a loss that is NaN, or a broken image.
DRIVER = """
import os
import sys
import time
from pathlib import Path

from binaryvit_hf.training import run as script
from binaryvit_hf.training.trainer import DistillationTrainer

save, compute_loss, run = DistillationTrainer._save, DistillationTrainer.compute_loss, script.run


def save_slowly(self, *args, **kwargs):
    time.sleep(2)
    save(self, *args, **kwargs)


def lose(self, model, inputs, *args, **kwargs):
    loss = compute_loss(self, model, inputs, *args, **kwargs)
    fails = self.teacher is not None and model.training and self.state.global_step == 1
    return loss * float("nan") if fails else loss


def run_with_a_broken_image(*args):
    for broken in Path("broken.txt").read_text().splitlines():
        Path(broken).write_bytes(Path(broken).read_bytes()[:-30])
    return run(*args)


if os.environ["RANK"] == "0":
    DistillationTrainer._save = save_slowly
else:
    DistillationTrainer.compute_loss = lose
    script.run = run_with_a_broken_image
sys.exit(script.main(sys.argv[1:]))
"""


# torchrun starts new interpreters, which import all libraries for ten seconds.
FORKED = f"""
{RUN_RANKS}
import runpy

run_ranks(lambda: runpy.run_path("driver.py"), 2)
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_pictures(tmp_path / "photos", ("ant", "bee"), 4)


def run_two(
    python: WarmPython, folder: Path, values: dict, start: list[str], broken: str = ""
) -> subprocess.CompletedProcess:
    (folder / "driver.py").write_text(DRIVER)
    (folder / "broken.txt").write_text(broken)
    tiny_config().save_pretrained(folder / "tiny")
    common = {
        "config_name": str(folder / "tiny"),
        "train_dir": str(folder / "photos"),
        "validation_dir": str(folder / "photos"),
        "output_dir": str(folder / "out"),
        "do_train": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
    }
    (folder / "run.json").write_text(json.dumps(common | values))
    variables = python.variables | {"PYTHONPATH": str(ROOT)}
    return python.run(*start, folder / "run.json", folder=folder, variables=variables, timeout=100)


def assert_shown_once(result: subprocess.CompletedProcess, message: str, end: str) -> None:
    shown = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(shown) == 1, result.stderr
    assert shown[0].startswith(f"error: rank 1: {message}"), result.stderr
    assert end in result.stderr
    assert result.stderr.count("Traceback") <= 1, result.stderr  # of what started the ranks


def test_every_rank_loads_a_whole_teacher_and_a_nan_loss_of_one_rank_ends_both(photos, tmp_path, warm_python):
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(image_size=[16, 32], patch_size=8, **fields).save_pretrained(tmp_path / "vit")
    teacher = {"teacher": {"config_name": str(tmp_path / "vit"), "max_steps": 1}}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py"]
    result = run_two(warm_python, tmp_path, teacher, torchrun)
    assert (tmp_path / "out-teacher" / "train_results.json").is_file(), result.stderr
    assert_shown_once(result, "The loss became nan at step 2", "exitcode  : 1 ")
    assert not (tmp_path / "out" / "train_results.json").exists()


def test_an_image_that_one_rank_cannot_decode_is_named_and_ends_both(photos, tmp_path, warm_python):
    files = sorted(photos.rglob("*.png"))
    broken = files[list(TrainSampler(8, 1, 2, 2, seed=42))[2]]  # the first of the second rank
    result = run_two(warm_python, tmp_path, {}, ["-c", FORKED], str(broken))
    assert_shown_once(result, f"{str(broken)!r} cannot be decoded", "process 1 terminated with exit code 2")
