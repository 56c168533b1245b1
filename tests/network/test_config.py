"""Checks, saving and derived sizes of configs."""

import json
import re

import pytest
from golden_data import CONFIGS, ROWS, TINY
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import tiny_config
from transformers import AutoConfig

from binaryvit_hf import BinaryViTConfig


NAN = float("nan")


INVALID_NETWORKS = {
    "num_attention_heads=3 does not divide hidden_sizes=8 of stage 0": {"num_attention_heads": [3, 4]},
    "depths=[2] must have one value per stage": {"depths": [2]},
    "depths must be from 1 to 200, not [2, 0]": {"depths": [2, 0]},
    "image_size=30 is not a multiple of patch_size=4": {"image_size": 30},
    "5 tokens a side, which cannot be halved 1 times": {"image_size": 20, "sequence_reduction_ratios": [1, 1]},
    "sequence_reduction_ratios=3 does not divide the 4 tokens": {"sequence_reduction_ratios": [3, 1]},
    "intermediate_sizes=12 is not a multiple of hidden_sizes=8": {"intermediate_sizes": [12, 64]},
    "hidden_sizes=12 of stage 1 is not a multiple of 8": {"hidden_sizes": [8, 12], "intermediate_sizes": [16, 60]},
    "weight_bits must be from 1 to 8, or 32": {"weight_bits": 9},
    "input_bits must be from 1 to 8, or 32": {"input_bits": 0},
    "avg_pool_kernel_sizes=[4] must be odd": {"avg_pool_kernel_sizes": [4]},
    "drop_path_rate must be a probability below 1": {"drop_path_rate": 1.0},
    "use_class_token needs one stage": {"use_class_token": True},
    "must have one value per stage": {"hidden_sizes": []},
    "depths must be from 1 to 200, not [1000000000, 1]": {"depths": [10**9, 1]},
    "are 300 layers; the maximum is 200": {"depths": [150, 150]},
    "avg_pool_kernel_sizes has 100000 values; the maximum is 16": {"avg_pool_kernel_sizes": [3] * 100_000},
    "image_size must be from 1 to 16384": {"image_size": 2**30},
    "Stage 0 has 4194304 tokens an image, too many": {"image_size": 2**13},
    "The network has 1.0e+11 weights": {"hidden_sizes": [2**16, 2**16], "intermediate_sizes": [2**16, 2**16]},
    "batch_norm_eps must be from 1e-30 to 10000, not nan": {"batch_norm_eps": NAN},
    "batch_norm_eps must be from": {"batch_norm_eps": 0.0},
    "batch_norm_momentum must be from 0 to 1, not nan": {"batch_norm_momentum": NAN},
    "hidden_dropout_prob must be a probability below 1, not nan": {"hidden_dropout_prob": NAN},
    "quantization_clip_value must be from": {"quantization_clip_value": float("inf")},
    "attention_clip_init_value must be from": {"attention_clip_init_value": 0},
}


@pytest.mark.parametrize("message, changes", INVALID_NETWORKS.items(), ids=INVALID_NETWORKS)
def test_a_config_that_describes_no_network_says_why(message, changes):
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        tiny_config(**changes)


INVALID_LABELS_AND_DTYPES = {
    "num_labels must be a whole number from 1 to 100000, not 1000000000": {"num_labels": 10**9},
    "num_labels must be a whole number from 1 to 100000, not 0": {"num_labels": 0},
    "num_labels must be a whole number from 1 to 100000, not 'many'": {"num_labels": "many"},
    "id2label has 100001 labels": {"id2label": dict.fromkeys(range(10**5 + 1), "ant")},
    "The keys of id2label must be 0 to 1": {"id2label": {0: "ant", 2: "bee"}},
    "The keys of id2label must be 0 to 0": {"id2label": {"a": "ant"}},
    "Label 1 of id2label must be text": {"id2label": {0: "ant", 1: None}},
    "id2label must map numbers to labels; it is a list": {"id2label": ["ant", "bee"]},
    "dtype must be float32, bfloat16, float16 or float64, not 'float3'": {"dtype": "float3"},
    "not 'int8'": {"torch_dtype": "int8"},
}


@pytest.mark.parametrize("message, changes", INVALID_LABELS_AND_DTYPES.items(), ids=INVALID_LABELS_AND_DTYPES)
def test_labels_and_dtype_are_checked_before_transformers_uses_them(message, changes):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**changes)


@pytest.mark.parametrize("row", [*ROWS, TINY])
def test_the_config_of_a_row_sets_every_field_and_no_other(row):
    written = json.loads((CONFIGS / row / "config.json").read_text())
    config = AutoConfig.from_pretrained(CONFIGS / row)
    assert config.num_labels == 1000
    if config.model_type == "binaryvit":
        own = set(BinaryViTConfig.__annotations__) | {"num_labels", "model_type", "architectures"}
        assert set(written) == own


def test_a_config_survives_saving(tmp_path):
    config = tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}, weight_bits=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert json.loads(loaded.to_json_string()) == json.loads((tmp_path / "config.json").read_text())


def test_grid_sizes_are_image_size_over_patch_size():
    assert tiny_config(image_size=[32, 64], patch_size=[4, 8]).grid_sizes == [(8, 8), (4, 4)]
