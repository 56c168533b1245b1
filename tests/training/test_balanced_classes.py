"""`--balance_classes` helps a rare class, for a network that learns from labels and for one that learns from a teacher."""

import pytest
import torch
from command_line import refusal
from tiny import tiny_config, tiny_model
from tiny_training import tiny_teacher

from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.trainer import DistillationTrainer
from binaryvit_runtime.errors import UserError


class Shades(torch.utils.data.Dataset):
    """Noisy grey images of two classes, of which the second is a little brighter."""

    def __init__(self, counts: tuple[int, int], seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = [label for label, count in enumerate(counts) for _ in range(count)]
        brightness = 0.6 * torch.tensor(self.labels).view(-1, 1, 1, 1)
        brightness = brightness + 0.5 * torch.randn(brightness.shape, generator=generator)
        self.images = brightness + 0.5 * torch.randn(len(self.labels), 3, 16, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def recall_of_the_rare_class(model) -> float:
    images = Shades((0, 100), seed=1).images
    with torch.no_grad():
        return (model.eval()(images).logits.argmax(1) == 1).double().mean().item()


def train(folder, model, teacher=None, **arguments):
    arguments = {"max_steps": 60, "learning_rate": 0.005, "per_device_train_batch_size": 8} | arguments
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    trainer = DistillationTrainer(
        model=model,
        args=DistillationTrainingArguments(str(folder), **arguments, **quiet),
        teacher=teacher,
        train_dataset=Shades((76, 4), seed=0),
    )
    trainer.train()
    return model


def test_a_rare_class_is_found_more_often_by_the_teacher_and_by_its_student(tmp_path):
    recalls = {}
    for balance in (False, True):
        teacher = train(tmp_path, tiny_teacher(), balance_classes=balance)
        student = train(tmp_path, tiny_model(), teacher, balance_classes=balance)
        recalls[balance] = recall_of_the_rare_class(teacher), recall_of_the_rare_class(student)
    assert recalls[False] == (0, 0)
    assert recalls[True][0] > 0.6
    assert recalls[True][1] > 0.1  # after 60 steps


def test_statistics_of_batch_norm_are_of_balanced_batches_too(tmp_path):
    means = []
    for balance in (False, True):
        arguments = {"max_steps": 1, "learning_rate": 0.0, "batch_norm_reestimation_batches": 10}
        model = train(tmp_path, tiny_model(), balance_classes=balance, **arguments)
        means.append(next(tensor for name, tensor in model.state_dict().items() if name.endswith("running_mean")))
    assert not torch.allclose(*means, atol=1e-3)


def test_balancing_needs_all_labels_and_a_random_order(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path / "tiny")
    flags = ["--config_name", tmp_path / "tiny", "--dataset_name", "archives", "--streaming", "--do_train"]
    message = refusal(capsys, *flags, "--balance_classes", "--output_dir", tmp_path / "out")
    assert "--balance_classes needs all labels before training, but --streaming" in message
    arguments = DistillationTrainingArguments(
        str(tmp_path), use_cpu=True, balance_classes=True, train_sampling_strategy="sequential"
    )
    with pytest.raises(UserError, match="--train_sampling_strategy sequential is not supported"):
        arguments.check_supported()
