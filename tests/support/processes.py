"""Trainings by one process, or shared by several ranks, which are forks and not started by torchrun."""

import json
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file
from warm_python import WarmPython


SUPPORT = str(Path(__file__).parent)
RUN_RANKS = """
import os
import socket

import torch


def start(rank, function, ranks):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    function()


def run_ranks(function, ranks):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torch.multiprocessing.start_processes(start, (function, ranks), nprocs=ranks, start_method="fork")


"""
# Runs the training script. Its arguments are the number of ranks, then those of the script.
SCRIPT_IN_RANKS = f"""
{RUN_RANKS}
import sys

from binaryvit_hf.training.run import main

run_ranks(lambda: sys.exit(main(sys.argv[2:])), int(sys.argv[1]))
"""
TRAIN = """
import json
import sys
from pathlib import Path

sys.path.append(sys.argv[1])
from tiny import tiny_config, tiny_model
from transformers import ViTConfig, ViTForImageClassification

from binaryvit_hf.training.metrics import TopKAccuracy
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.trainer import DistillationTrainer

output, batch, processes, options = sys.argv[2:]


def compute_metrics(prediction):
    return {"images": len(prediction.label_ids), "labels": int(prediction.label_ids.sum())}


def train():
    torch.set_num_threads(1)
    config = ViTConfig(
        image_size=(16, 32), patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    torch.manual_seed(0)
    teacher = ViTForImageClassification(config)
    images = torch.randn(22, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    examples = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    trainer = DistillationTrainer(
        # With 1-bit inputs a difference in the last bit would flip signs.
        model=tiny_model(tiny_config(input_bits=32)).double(),
        args=DistillationTrainingArguments(
            output,
            per_device_train_batch_size=int(batch),
            per_device_eval_batch_size=3,
            num_train_epochs=3,
            learning_rate=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **json.loads(options),
        ),
        teacher=teacher.double(),
        train_dataset=examples[:16],
        eval_dataset=examples,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(output, "state.json").write_text(json.dumps([trainer.state.log_history, metrics]))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    # On a busy machine threads of PyTorch sometimes abort a process while its interpreter ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if processes == "1":
    train()
run_ranks(train, int(processes))
"""


def run_script(python: WarmPython, ranks: int, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run the training script in several ranks, in `folder`."""
    return python.run("-c", SCRIPT_IN_RANKS, ranks, *arguments, folder=folder)


def train(
    python: WarmPython, processes: int, folder: Path, batch: int, **options
) -> tuple[list[float], dict, dict[str, torch.Tensor]]:
    """
    Train in one process or several, with batches of so many images in each.

    Returns:
        The losses of all steps, the metrics and the final weights.
    """
    result = python.run(
        "-c", RUN_RANKS + TRAIN, SUPPORT, folder, batch, processes, json.dumps(options), folder=folder.parent
    )
    assert result.returncode == 0, result.stderr
    history, metrics = json.loads((folder / "state.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return losses, metrics, load_file(folder / "latent" / "model.safetensors")
