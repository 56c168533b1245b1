"""A small teacher, and a trainer with eight random images."""

import torch
from tiny import tiny_images, tiny_model
from transformers import ViTConfig, ViTForImageClassification

from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.trainer import DistillationTrainer


def tiny_teacher() -> ViTForImageClassification:
    torch.manual_seed(5)
    config = ViTConfig(
        image_size=(16, 32), patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    return ViTForImageClassification(config)


def tiny_trainer(tmp_path, model=None, teacher=None, **arguments) -> DistillationTrainer:
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    examples = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(tiny_images(8))]
    return DistillationTrainer(
        model=model or tiny_model(),
        args=DistillationTrainingArguments(str(tmp_path), **(defaults | arguments)),
        teacher=teacher,
        train_dataset=examples,
        eval_dataset=examples,
    )


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
# Arguments of runs that together use all optional methods: however a step is computed, each must have its effect.
METHODS = [
    {"ema_decay": 0.5, "oscillation_freezing_threshold": 0.01},
    {"sign_gradient": "tanh"},
    {"batch_norm_reestimation_batches": 2, "eval_strategy": "steps", "eval_steps": 1},
    {"weight_regularization": 0.1, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
]
