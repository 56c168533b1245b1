"""Two processes against one with the doubled batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


TRAIN = """
import json
import os
import sys
from pathlib import Path

import torch
from tiny import tiny_config, tiny_model
from transformers import ViTConfig, ViTForImageClassification

from binaryvit_hf.metrics import TopKAccuracy
from binaryvit_hf.trainer import DistillationTrainer, DistillationTrainingArguments

output, batch = sys.argv[1:]
torch.set_num_threads(1)
config = ViTConfig(
    image_size=(16, 32), patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3
)
torch.manual_seed(0)
teacher = ViTForImageClassification(config)
images = torch.randn(22, 3, 16, 32, generator=torch.Generator().manual_seed(1))
examples = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]


def compute_metrics(prediction):
    return {"images": len(prediction.label_ids), "labels": int(prediction.label_ids.sum())}


trainer = DistillationTrainer(
    # Inputs of full precision, or a difference in the last bit would flip signs.
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
# At the interpreter's own end threads of PyTorch now and then abort one of two processes on a busy machine.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def train(processes: int, folder: Path, batch: int) -> tuple[list[float], dict, dict[str, torch.Tensor]]:
    """Losses of all steps, metrics and final weights."""
    (folder.parent / "train.py").write_text(TRAIN)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    result = subprocess.run(
        [sys.executable, *launch, folder.parent / "train.py", folder, str(batch)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    history, metrics = json.loads((folder / "state.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return losses, metrics, load_file(folder / "latent" / "model.safetensors")


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    losses, metrics, weights = train(1, tmp_path / "one", batch=8)
    shared_losses, shared_metrics, shared_weights = train(2, tmp_path / "two", batch=4)
    assert len(losses) == 6
    assert shared_losses == pytest.approx(losses, rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared_weights[name].double(), tensor.double(), rtol=1e-6, atol=1e-8, msg=name)
    for metric in ("eval_images", "eval_labels"):
        assert shared_metrics[metric] == metrics[metric]
    assert metrics["eval_images"] == 22
