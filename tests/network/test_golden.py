"""Every row against values of the paper's public code, in float64, to 1e-6 relative (`tests/golden/README.md`)."""

import pytest
import torch
from golden_data import (
    CONFIGS,
    ROWS,
    golden_expectations,
    golden_images,
    golden_soft_labels,
    golden_teacher_logits,
    original_state_dict,
)
from transformers import AutoConfig, AutoModelForImageClassification

import binaryvit_hf  # noqa: F401, registers the model
from binaryvit_hf.convert import convert_name, convert_original_state_dict
from binaryvit_hf.training.losses import distillation_loss


TOLERANCE = 1e-6
# A shift before a normalisation has gradient 0; the golden files hold its rounding error.
ROUNDING = 1e-12


class Row:
    """One row, loaded once: outputs in evaluation, and losses and gradients of one step in training."""

    def __init__(self, name: str):
        self.expected = golden_expectations(name)
        self.config = AutoConfig.from_pretrained(CONFIGS / name, attn_implementation="eager")
        self.state_dict = original_state_dict(name, self.expected)
        self.model = AutoModelForImageClassification.from_config(self.config).double()
        self.model.load_state_dict(convert_original_state_dict(self.state_dict, self.config))
        with torch.no_grad():
            self.eval = self.model.eval()(golden_images(), output_hidden_states=True, output_attentions=True)
        if self.config.model_type == "vit":
            self.model.set_attn_implementation("sdpa")  # transformers' eager one takes its softmax in float32
        self.train_logits = self.model.train()(golden_images()).logits
        teacher, labels = golden_teacher_logits(), golden_soft_labels()
        self.kd_loss = distillation_loss(self.train_logits, teacher, labels, label_loss_weight=0)
        self.soft_ce_loss = distillation_loss(self.train_logits, teacher, labels, label_loss_weight=1)
        self.loss = distillation_loss(self.train_logits, teacher, labels)
        self.loss.backward()


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return Row(request.param)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    error = (actual - expected).norm().item()
    assert error <= TOLERANCE * expected.norm().item() + ROUNDING, f"{name}: {error}"


def test_logits_in_evaluation_equal_the_papers(row):
    assert_close(row.eval.logits, row.expected["eval.logits"])


def test_hidden_states_equal_the_papers(row):
    norms = torch.stack([state.norm() for state in row.eval.hidden_states])
    assert_close(norms, row.expected["eval.hidden_norms"])
    heads = torch.stack([state[:, 0, :8] for state in row.eval.hidden_states])
    assert_close(heads, row.expected["eval.hidden_heads"])


def test_sums_of_attentions_equal_the_papers(row):
    sums = torch.stack([attention.sum() for attention in row.eval.attentions])
    assert_close(sums, row.expected["eval.attention_sums"])


def test_logits_and_losses_in_training_equal_the_papers(row):
    assert_close(row.train_logits, row.expected["train.logits"])
    assert_close(row.kd_loss, row.expected["train.kd_loss"])
    assert_close(row.soft_ce_loss, row.expected["train.soft_ce_loss"])
    assert_close(row.loss, row.expected["train.loss"])


def test_the_gradient_of_every_parameter_equals_the_papers(row):
    parameters = dict(row.model.named_parameters())
    originals = [key.removeprefix("grad_norm.") for key in row.expected if key.startswith("grad_norm.")]
    assert sorted(convert_name(original, row.config) for original in originals) == sorted(parameters)
    for original in originals:
        grad = parameters[convert_name(original, row.config)].grad
        assert_close(grad.norm(), row.expected[f"grad_norm.{original}"], original)
        assert_close(grad.flatten()[:4], row.expected[f"grad_head.{original}"], original)


def test_running_statistics_after_one_step_equal_the_papers(row):
    state = row.model.state_dict()
    for key, expected in row.expected.items():
        if key.startswith("train.state_norm."):
            original = key.removeprefix("train.state_norm.")
            assert_close(state[convert_name(original, row.config)].norm(), expected, original)


def test_conversion_names_the_tensor_that_does_not_fit(row):
    some = next(key for key in row.state_dict if key.endswith("weight") and "layer.1." in key)
    lacking = {key: tensor for key, tensor in row.state_dict.items() if key != some}
    with pytest.raises(ValueError, match=f"lacks 1 tensor.*{convert_name(some, row.config)}"):
        convert_original_state_dict(lacking, row.config)
    with pytest.raises(ValueError, match=r"Unknown tensor 'vit\.encoder\.layer\.99\.norm\.weight'"):
        convert_original_state_dict(row.state_dict | {"vit.encoder.layer.99.norm.weight": torch.ones(1)}, row.config)
    with pytest.raises(ValueError, match=rf"{some}.* has shape \(7,\)"):
        convert_original_state_dict(row.state_dict | {some: torch.ones(7)}, row.config)
