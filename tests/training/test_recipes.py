"""The paper's recipes: their values, learning rate schedules and stochastic depth."""

import json
import math

import pytest
import torch
from golden_data import CONFIGS
from tiny import tiny_images
from tiny_training import tiny_teacher, tiny_trainer
from transformers import ViTConfig

from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.stochastic_depth import add_drop_path


ROWS = sorted(path.parent.name for path in CONFIGS.glob("*-224*/train.json"))
STEPS = 4  # per epoch: eight images in batches of two


@pytest.mark.parametrize("row", ROWS)
def test_a_recipe_at_its_batch_size_is_the_papers(row):
    ((_, data, training),) = parse_runs([str(CONFIGS / row / "train.json"), "--use_cpu"])
    assert training.num_train_epochs == 300
    assert training.learning_rate / training.learning_rate_batch_size == 5e-4 / 512
    assert 8 * training.per_device_train_batch_size == 512
    teacher = row == "deit-small-patch16-224"
    assert training.weight_decay == (0.05 if teacher else 0)
    assert (data.rand_augment is not None, data.mixup_alpha > 0, data.random_erasing_prob > 0) == 3 * (teacher,)


def learning_rates(tmp_path, epochs: int, **arguments) -> list[float]:
    """The learning rate of every step."""
    trainer = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=epochs, learning_rate=5e-4, **arguments)
    trainer.create_optimizer_and_scheduler(STEPS * epochs)
    rates = []
    for _ in range(STEPS * epochs):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


def test_the_students_learning_rate_is_a_cosine_of_the_epoch(tmp_path):
    recipe = json.loads((CONFIGS / "binaryvit-small-patch4-224" / "train.json").read_text())
    names = ("lr_scheduler_type", "lr_scheduler_kwargs", "lr_schedule_per_epoch", "warmup_steps")
    rates = learning_rates(tmp_path, 10, **{name: recipe[name] for name in names})
    expected = [1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(STEPS)])


def test_the_teachers_learning_rate_warms_up_from_a_millionth_in_five_epochs(tmp_path):
    recipe = json.loads((CONFIGS / "deit-small-patch16-224" / "train.json").read_text())
    names = ("lr_scheduler_type", "lr_scheduler_kwargs", "lr_schedule_per_epoch", "warmup_steps")
    rates = learning_rates(tmp_path, 300, **{name: recipe[name] for name in names})[::STEPS]
    assert rates[:6] == pytest.approx([1e-6 + (5e-4 - 1e-6) * epoch / 5 for epoch in range(6)], rel=0.06)
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(5e-4)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


def test_schedule_by_epochs_needs_epochs(tmp_path):
    with pytest.raises(ValueError, match="needs --num_train_epochs"):
        tiny_trainer(tmp_path, lr_schedule_per_epoch=True, max_steps=3)
    with pytest.raises(ValueError, match="a function of the step"):
        tiny_trainer(tmp_path, max_steps=-1, lr_schedule_per_epoch=True, lr_scheduler_type="constant")


def test_drop_path_drops_whole_branches_of_the_deeper_layers_in_training_alone():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 32), patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    model = type(tiny_teacher())(config)
    names, images = set(model.state_dict()), tiny_images(64)
    with torch.no_grad():
        plain = model.eval()(images).logits
        add_drop_path(model.vit, 0.5)
        assert set(model.state_dict()) == names
        torch.testing.assert_close(model.eval()(images).logits, plain, rtol=0, atol=0)
        model.train()
        layer_inputs = torch.randn(200, 9, 8)
        torch.testing.assert_close(model.vit.layers[0](layer_inputs), model.vit.layers[0].eval()(layer_inputs))
        change = (model.vit.layers[1](layer_inputs) - layer_inputs).abs().sum((1, 2))
    assert 0.15 < (change == 0).double().mean() < 0.35  # a quarter of the images drop both branches
