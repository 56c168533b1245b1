"""Two processes train as one process with the doubled batch."""

import pytest
import torch
from processes import train


def test_two_processes_train_as_one_with_the_doubled_batch_also_compiled(tmp_path, warm_python):
    losses, metrics, weights = train(warm_python, 1, tmp_path / "one", batch=8)
    assert len(losses) == 6
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        folder = tmp_path / f"two-{len(options)}"
        shared_losses, shared_metrics, shared_weights = train(warm_python, 2, folder, batch=4, **options)
        assert shared_losses == pytest.approx(losses, rel=1e-3)
        for name, tensor in weights.items():
            torch.testing.assert_close(shared_weights[name].double(), tensor.double(), rtol=1e-6, atol=1e-8, msg=name)
        for metric in ("eval_images", "eval_labels"):
            assert shared_metrics[metric] == metrics[metric]
    assert metrics["eval_images"] == 22
