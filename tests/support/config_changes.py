"""Changes of a config.json, for tests that compare what is read and refused."""

import json
from dataclasses import fields

from hypothesis import strategies as st
from tiny import tiny_config

from binaryvit_hf import BinaryViTConfig


PACKED = {"model_type": "binaryvit", "dtype": "float32", "quantization_config": {"quant_method": "binaryvit"}}


def config_json(config: BinaryViTConfig) -> dict:
    return {**json.loads(config.to_json_string(use_diff=False)), **PACKED}


TINY = config_json(tiny_config())

NUMBERS = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2, 3, 4, 5, 8, 16, 24, 32, 64, 200, 201, 2**14, 2**14 + 1, 2**16, 2**18, 2**31, 10**30]
    ),
    st.sampled_from([0.0, 1.0, 4.0, 0.1, -0.5, 1e-6, 1e-7, 1e-31, 1e4, 1e6, 1e300, float("nan"), float("inf")]),
)
VALUES = st.one_of(
    NUMBERS,
    st.sampled_from([None, True, False, "4", "float32", [], [[]], {}, {"0": "ant"}, "many"]),
    st.lists(NUMBERS, max_size=3),
    st.lists(st.sampled_from([1, 2, 4, 8, 16, True, None, "4", [4]]), min_size=2, max_size=2),
    st.just([4] * 17),
)
NAMES = sorted(
    {
        *(field.name for field in fields(BinaryViTConfig)),
        *["num_hidden_layers", "hidden_size", "num_labels", "torch_dtype", "quantization_config", "stage_names"],
        *["output_attentions", "attn_implementation", "out_features", "out_indices", "per_layer_config"],
    }
    - {"model_type"}
)
CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=2)
OF_ANOTHER_TYPE = [None, True, False, 0, 1, 1.0, "1", 1e-5, float("nan"), [], [1], [8, 16], [8.0, 16.0], {}]
# Few channels and keys, so that no other bound refuses it.
TOO_MANY_TOKENS = {
    "image_size": 2**12,
    "patch_size": 1,
    "hidden_sizes": [1, 1],
    "num_attention_heads": [1, 1],
    "intermediate_sizes": [1, 1],
    "sequence_reduction_ratios": [2**11, 2**10],
}
BOUNDS = [
    {"image_size": 64},
    {"image_size": [64]},
    {"image_size": [64, 64, 64]},
    {"image_size": [64, 63]},
    {"patch_size": [4, 8]},
    {"image_size": 2**14, "patch_size": 1},
    TOO_MANY_TOKENS,
    {"hidden_sizes": [2**16, 2**16], "intermediate_sizes": [2**16, 2**16]},
    {"hidden_sizes": [16, 8]},
    {"hidden_sizes": [8, 12]},
    {"num_attention_heads": [3, 4]},
    {"intermediate_sizes": [12, 64]},
    {"depths": [100, 101]},
    {"depths": [1]},
    {"avg_pool_kernel_sizes": [2]},
    {"use_class_token": True},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 4},
    {"hidden_size": 16},
    {"hidden_size": 17},
    {"batch_norm_momentum": 1.5},
    {"drop_path_rate": 1},
    {
        "hidden_sizes": [],
        "depths": [],
        "num_attention_heads": [],
        "intermediate_sizes": [],
        "sequence_reduction_ratios": [],
    },
    {"num_labels": 100_000, "id2label": None, "hidden_sizes": [8, 2**16], "intermediate_sizes": [16, 2**16]},
    {"num_labels": 100_001, "id2label": None},
    {"quantization_config": {"quant_method": "binaryvit", "half": True}},
    {"quantization_config": {"quant_method": "binaryvit", "half": 1}},
    {"quantization_config": {"quant_method": "binaryvit", "bits": 4}},
    {"quantization_config": {"quant_method": "gptq"}},
]
LABELS = {
    "none": {"id2label": None},
    "a number": {"id2label": None, "num_labels": 4},
    "one": {"id2label": None, "num_labels": 1},
    "one of a single choice": {"id2label": {"0": "ant"}, "problem_type": "single_label_classification"},
    "another number": {"id2label": {"0": "ant", "1": "bee"}, "num_labels": 3},
    "no number": {"id2label": {"0": "ant", "1": "bee"}, "num_labels": None},
    "the same number": {"id2label": {"0": "ant", "1": "bee"}, "num_labels": 2},
    "duplicates": {"id2label": {"0": "ant", "1": "ant"}},
    "in another order": {"id2label": {"1": "bee", "0": "ant"}},
    "numbers": {"id2label": {"0": 7, "1": 8}},
    "truth": {"id2label": {"0": True, "1": False}},
    "null": {"id2label": {"0": None}},
    "a gap": {"id2label": {"0": "ant", "2": "bee"}},
    "leading zeros": {"id2label": {"00": "ant"}},
    "a list": {"id2label": ["ant", "bee"]},
    "empty": {"id2label": {}},
    "empty names": {"id2label": {"0": "", "1": "ü\n"}},
    "label2id of others": {"id2label": {"0": "ant"}, "label2id": {"bee": 3}},
    "label2id of text": {"label2id": {"ant": "0"}},
    "label2id of both": {"label2id": {"ant": "0", "bee": 1}},
    "label2id as a list": {"label2id": ["ant"]},
    "unknown problem": {"problem_type": "guessing"},
    "regression": {"problem_type": "regression"},
    "many labels": {"problem_type": "multi_label_classification"},
}
UNSUPPORTED = [
    ({"weight_bits": 2}, "weight_bits is 2"),
    ({"weight_bits": 1.0}, "weight_bits is 1.0"),
    ({"input_bits": 32}, "input_bits is 32"),
    ({"dtype": "float16"}, "dtype is 'float16'"),
    ({"dtype": None}, "dtype is None"),  # transformers takes the dtype of the file
    ({"dtype": None, "torch_dtype": "bfloat16"}, "dtype is 'bfloat16'"),
    ({"model_type": "vit"}, "model_type is 'vit'"),
    ({"quantization_config": None}, "not packed"),
    ({"return_dict": False}, "return_dict=False"),
    ({"output_hidden_states": True}, "output_hidden_states=True"),
    ({"output_attentions": True}, "output_attentions=True"),
    ({"attn_implementation": "eager"}, "attn_implementation='eager'"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
    ({"configuration_files": ["config.5.0.0.json"]}, "configuration_files="),
    ({"out_features": ["stem"]}, "out_features="),
    ({"problem_type": "guessing"}, "problem_type='guessing'"),
]
