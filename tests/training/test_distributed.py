"""Two processes train as one process with the doubled batch."""

import pytest
import torch
from processes import train


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path, warm_python):
    losses, metrics, weights = train(warm_python, 1, tmp_path / "one", batch=8)
    shared_losses, shared_metrics, shared_weights = train(warm_python, 2, tmp_path / "two", batch=4)
    assert len(losses) == 6
    assert shared_losses == pytest.approx(losses, rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared_weights[name].double(), tensor.double(), rtol=1e-6, atol=1e-8, msg=name)
    for metric in ("eval_images", "eval_labels"):
        assert shared_metrics[metric] == metrics[metric]
    assert metrics["eval_images"] == 22
