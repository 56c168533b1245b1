import json
import re

import pytest
from golden_data import CONFIGS, ROWS
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import tiny_config
from transformers import AutoConfig

from binaryvit_hf import BinaryViTConfig


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": [3, 4]}, "num_attention_heads=3 does not divide hidden_sizes=8 of stage 0"),
        ({"depths": [2]}, "One value per stage: depths"),
        ({"depths": [2, 0]}, "depths must be positive"),
        ({"image_size": 30}, "image_size=30 is no multiple of patch_size=4"),
        ({"image_size": 20, "sequence_reduction_ratios": [1, 1]}, "5 tokens a side, which cannot be halved 1 times"),
        ({"sequence_reduction_ratios": [3, 1]}, "sequence_reduction_ratios=3 does not divide the 4 tokens"),
        ({"intermediate_sizes": [12, 64]}, "intermediate_sizes=12 is no multiple of hidden_sizes=8"),
        ({"hidden_sizes": [8, 12], "intermediate_sizes": [16, 60]}, "hidden_sizes=12 of stage 1 is no multiple of 8"),
        ({"weight_bits": 9}, "weight_bits is 1, 2 to 8, or 32"),
        ({"input_bits": 0}, "input_bits is 1, 2 to 8, or 32"),
        ({"avg_pool_kernel_sizes": [4]}, "the kernels must be odd"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is a probability below 1"),
        ({"use_class_token": True}, "use_class_token needs one stage"),
        ({"hidden_sizes": []}, "One value per stage"),
    ],
)
def test_config_that_describes_no_network_says_why(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        tiny_config(**changes)


@pytest.mark.parametrize("row", ROWS)
def test_row_says_every_field_and_no_other(row):
    written = json.loads((CONFIGS / row / "config.json").read_text())
    config = AutoConfig.from_pretrained(CONFIGS / row)
    assert config.num_labels == 1000
    if config.model_type == "binaryvit":
        own = set(BinaryViTConfig.__annotations__) | {"num_labels", "model_type", "architectures"}
        assert set(written) == own


def test_config_survives_saving(tmp_path):
    config = tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}, weight_bits=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert json.loads(loaded.to_json_string()) == json.loads((tmp_path / "config.json").read_text())


def test_grid_sizes_follow_image_and_patch():
    assert tiny_config(image_size=[32, 64], patch_size=[4, 8]).grid_sizes == [(8, 8), (4, 4)]
