"""The golden numbers, and the weights and images of `golden/README.md`."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = list(json.loads((GOLDEN / "parameter_shapes.json").read_text()))  # of the paper
TINY = "binaryvit-tiny-patch8-224"  # ours


def generator(key: str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(key.encode()), 1])


def original_state_dict(row: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the public code in float64, under its own names."""
    shapes = json.loads((GOLDEN / "parameter_shapes.json").read_text())[row]
    return {key: golden_tensor(key, shape, expected).double() for key, shape in shapes.items()}


def golden_tensor(key: str, shape: list[int], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    if key.endswith(("running_mean", "running_var")):
        return expected[f"state.{key}"]
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("att_prob_clip"):
        return torch.tensor(0.01)
    z = torch.from_numpy(np.asarray(generator(key).standard_normal(shape), dtype=np.float32))
    if key.endswith("prelu.weight"):
        return 0.25 + 0.05 * z
    if key.endswith("alpha"):
        return 0.3 + 0.05 * z
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * z
    if z.dim() >= 2 and key.endswith("weight"):
        return 0.05 * z
    return 0.1 * z


def golden_expectations(row: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{row}.safetensors")


def golden_images() -> torch.Tensor:
    rng = generator("pixel_values")
    coarse = rng.standard_normal((2, 3, 28, 28)).astype(np.float32)
    fine = rng.standard_normal((2, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(np.kron(coarse, np.ones((8, 8), np.float32)) + np.float32(0.3) * fine).double()


def golden_teacher_logits() -> torch.Tensor:
    return torch.from_numpy(2 * generator("teacher_logits").standard_normal((2, 1000)))


def golden_soft_labels() -> torch.Tensor:
    return torch.from_numpy(generator("soft_labels").dirichlet(0.01 * np.ones(1000), size=2))
