"""Small networks with every feature of the large ones."""

import torch

from binaryvit_hf import BinaryViTConfig, BinaryViTForImageClassification


def tiny_config(**changes) -> BinaryViTConfig:
    """Two stages, sequence reduction, several heads and a map that is not square. `changes` override fields."""
    fields = {
        "image_size": (16, 32),
        "patch_size": 4,
        "hidden_sizes": [8, 16],
        "depths": [2, 1],
        "num_attention_heads": [2, 4],
        "intermediate_sizes": [16, 64],
        "sequence_reduction_ratios": [2, 1],
        "num_labels": 3,
    }
    return BinaryViTConfig(**(fields | changes))


def one_layer_config(**changes) -> BinaryViTConfig:
    """A compiler or an export needs seconds for each kind of layer."""
    fields = {
        "hidden_sizes": [8],
        "depths": [1],
        "num_attention_heads": [2],
        "intermediate_sizes": [16],
        "sequence_reduction_ratios": [1],
        "avg_pool_kernel_sizes": [3],
    }
    return tiny_config(**(fields | changes))


def class_token_config(**changes) -> BinaryViTConfig:
    fields = {
        "depths": [2],
        "avg_pool_kernel_sizes": [],
        "use_class_token": True,
        "use_stem_norm": False,
        "use_layer_scale": False,
    }
    return one_layer_config(**(fields | changes))


def tiny_model(config=None) -> BinaryViTForImageClassification:
    """All parameters and statistics are random: with zeros and ones a test would miss errors."""
    torch.manual_seed(0)
    model = BinaryViTForImageClassification(config or tiny_config())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
            if name.endswith(("running_var", "probability_clip")):
                tensor.abs_().add_(0.05)
    return model


def tiny_images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 32, generator=torch.Generator().manual_seed(1))
