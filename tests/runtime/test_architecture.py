"""config.json: the runtime reads it as transformers does, and refuses what transformers refuses."""

import json
from dataclasses import fields

import pytest
import torch
from config_changes import (
    BOUNDS,
    CHANGES,
    LABELS,
    NAMES,
    OF_ANOTHER_TYPE,
    PACKED,
    TINY,
    TOO_MANY_TOKENS,
    UNSUPPORTED,
    config_json,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import class_token_config, tiny_config

from binaryvit_hf import BinaryViTConfig, BinaryViTForImageClassification
from binaryvit_hf.network import configuration_binaryvit
from binaryvit_hf.network.packing_binaryvit import expect_packed_layers
from binaryvit_hf.network.quantization_binaryvit import (
    CONFIG_FIELDS,
    BinaryViTQuantizationConfig,
    check_quantization_config,
)
from binaryvit_hf.network.quantization_binaryvit import packed_shapes as shapes_of_model
from binaryvit_runtime import architecture as runtime
from binaryvit_runtime.architecture import Architecture, read_architecture, read_labels
from binaryvit_runtime.checkpoint import PREFIX, packed_shapes
from binaryvit_runtime.errors import LoadingError, UnsupportedModelError


def by_transformers(fields: dict) -> BinaryViTConfig | None:
    """The config that transformers makes of a config.json, or `None` if it refuses."""
    fields = json.loads(json.dumps(fields))
    try:
        config = BinaryViTConfig.from_dict(fields)
        check_quantization_config(config.quantization_config)
        BinaryViTQuantizationConfig.from_dict(config.quantization_config)
    except Exception:  # the checks of a config raise errors of several kinds
        return None
    return config


def by_runtime(fields: dict) -> tuple[Architecture, list[str]] | None:
    """
    What the runtime reads from a config.json, or `None` if it refuses.

    Raises:
        UnsupportedModelError: PyTorch decides.
    """
    fields = json.loads(json.dumps(fields))
    try:
        return read_architecture(fields), read_labels(fields)
    except UnsupportedModelError:
        raise
    except LoadingError as error:
        assert len(str(error).splitlines()) == 1
        return None


def assert_same(fields: dict) -> None:
    expected = by_transformers(fields)
    try:
        actual = by_runtime(fields)
    except UnsupportedModelError:
        return
    assert (actual is None) == (expected is None)
    if actual is not None:
        architecture, labels = actual
        assert labels == [expected.id2label[index] for index in range(expected.num_labels)]
        assert architecture.grid_sizes == expected.grid_sizes
        for field in CONFIG_FIELDS:
            assert getattr(architecture, field) == getattr(expected, field), field


def test_fields_defaults_and_ranges_are_those_of_the_config():
    known = {field.name: field.default for field in fields(Architecture)}
    assert tuple(known) == CONFIG_FIELDS
    assert known == {field.name: field.default for field in fields(BinaryViTConfig) if field.name in known}
    assert runtime.RANGES == configuration_binaryvit.RANGES
    assert runtime.PER_STAGE == configuration_binaryvit.PER_STAGE_FIELDS
    assert runtime.PROBABILITIES == configuration_binaryvit.PROBABILITIES
    for bound in ("MAX_LIST_LENGTH", "MAX_LAYERS", "MAX_LABELS", "MAX_PARAMETERS", "MAX_ACTIVATIONS", "MAX_TOKENS"):
        assert getattr(runtime, bound) == getattr(configuration_binaryvit, bound)


def test_a_config_with_defaults_is_read():
    assert read_architecture(PACKED) == Architecture()
    assert read_labels(PACKED) == ["LABEL_0", "LABEL_1"]


SIZES = st.sampled_from([8, 16, 32])


@st.composite
def networks(draw) -> BinaryViTConfig:
    """Valid configs of small networks."""
    stages = draw(st.integers(1, 3))
    hidden_sizes = [8]
    for _ in range(stages - 1):
        hidden_sizes.append(hidden_sizes[-1] * draw(st.sampled_from([1, 2])))
    use_class_token = stages == 1 and draw(st.booleans())
    patch_size = draw(st.sampled_from([1, 2, (2, 1), 4]))
    height, width = configuration_binaryvit.as_pair(patch_size)
    tokens = draw(st.tuples(*[st.sampled_from([2 ** (stages + 1), 3 * 2 ** (stages + 1)])] * 2))
    return tiny_config(
        image_size=(tokens[0] * height, tokens[1] * width),
        patch_size=patch_size,
        num_channels=draw(st.sampled_from([1, 3])),
        hidden_sizes=hidden_sizes,
        depths=draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages)),
        num_attention_heads=draw(st.lists(st.sampled_from([1, 2, 8]), min_size=stages, max_size=stages)),
        intermediate_sizes=[size * draw(st.sampled_from([1, 3])) for size in hidden_sizes],
        sequence_reduction_ratios=[1 if use_class_token else draw(st.sampled_from([1, 2])) for _ in hidden_sizes],
        use_class_token=use_class_token,
        use_stem_norm=draw(st.booleans()),
        use_layer_scale=draw(st.booleans()),
        avg_pool_kernel_sizes=[] if use_class_token else draw(st.lists(st.sampled_from([1, 3, 5]), max_size=3)),
        binarize_patch_embeddings=draw(st.booleans()),
        num_labels=draw(st.integers(1, 5)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=networks())
@example(config=tiny_config())
@example(config=class_token_config())
def test_names_shapes_and_dtypes_of_tensors_are_those_of_the_model(config):
    with torch.device("meta"):
        model = BinaryViTForImageClassification(config)
    expect_packed_layers(model)
    architecture, labels = by_runtime(config_json(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    backbone = {PREFIX + name: shape for name, shape in architecture.tensors().items()}
    heads = {"classifier.weight": (len(labels), config.hidden_sizes[-1]), "classifier.bias": (len(labels),)}
    assert backbone | heads == expected
    assert packed_shapes(architecture) == shapes_of_model(model)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=CHANGES)
def test_an_edited_config_is_read_or_refused_as_transformers_does(changes):
    assert_same(TINY | changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_another_type_is_read_or_refused_as_transformers_does(name):
    for value in OF_ANOTHER_TYPE:
        assert_same(TINY | {name: value})


@pytest.mark.parametrize(
    "changes",
    BOUNDS,
    ids=str,
)
def test_networks_at_the_bounds_are_read_or_refused_as_transformers_does(changes):
    assert_same(TINY | changes)


def test_more_tokens_than_the_engine_can_count_are_refused():
    few = {"image_size": 2**11, "sequence_reduction_ratios": [2**10, 2**9]}
    for accepts in (by_runtime, by_transformers):
        assert accepts(TINY | TOO_MANY_TOKENS | few) is not None
        assert accepts(TINY | TOO_MANY_TOKENS) is None


@pytest.mark.parametrize("changes", LABELS.values(), ids=LABELS)
def test_labels_are_those_of_transformers(changes):
    assert_same({name: value for name, value in TINY.items() if name != "label2id"} | changes)


@pytest.mark.parametrize("changes, words", UNSUPPORTED, ids=[words for _, words in UNSUPPORTED])
def test_what_only_pytorch_computes_is_refused_by_name(changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        read_architecture(TINY | changes)


def test_the_dtype_may_have_its_old_name():
    old = {name: value for name, value in TINY.items() if name != "dtype"} | {"torch_dtype": "float32"}
    assert read_architecture(old) == read_architecture(TINY)
    assert read_architecture(TINY | {"torch_dtype": "float16"}) == read_architecture(TINY)


@pytest.mark.parametrize(
    "config", [[], 5, None, "binaryvit", {}, {"model_type": 5}, {"model_type": ["binaryvit"]}], ids=str
)
def test_a_config_without_a_model_type_is_damaged(config):
    with pytest.raises(LoadingError, match="model_type"):
        read_architecture(config)
