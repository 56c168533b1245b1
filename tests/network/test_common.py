"""
The properties that transformers tests in each of its vision models, for three tiny shapes and the three model classes.

The shapes are a pyramid, a DeiT-shaped network with a class token, and a pyramid of 32-bit weights and inputs, whose
patch embeddings are full-precision, too. transformers keeps
its tests out of its wheel, so this file states their properties in its own words. `test_backbone.py` has those of a backbone,
`test_packing.py` those of a quantised model, `test_modeling.py` export and what is particular to this network.

Properties that do not apply:

- Token embeddings, vocabulary, tokenizers, generation, caches, causal and padding masks: the input is an image.
- Other attention functions (sdpa, flash, flex): probabilities are quantised, so a fused softmax cannot compute them.
- Pruned heads and chunked feed forward: transformers has removed both from its models.
- Masked image modeling: there is no such head. Tied weights: there are none, which is tested.
- Initialisation with a standard deviation of 0 makes every weight 0: only embeddings follow `initializer_range`; linear layers
  begin as PyTorch's do. The test of the distribution takes its place.
- Batches are equivalent in evaluation only: in training mode, batch normalisation connects the images.
- Offloading to disk and adapters: `test_packing.py`.
"""

import copy
import inspect
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    pipeline,
)

from binaryvit_hf import (
    BinaryViTBackbone,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    BinaryViTModel,
    BinaryViTQuantizationConfig,
    engine,
)
from binaryvit_hf.data.model_inputs import create_image_processor


SHAPES = {
    "pyramid": lambda: tiny_config(depths=[1, 1]),
    "class token": class_token_config,
    "32 bits": lambda: tiny_config(depths=[1, 1], weight_bits=32, input_bits=32, binarize_patch_embeddings=False),
}
CLASSES = {
    "model": BinaryViTModel,
    "classifier": BinaryViTForImageClassification,
    "backbone": BinaryViTBackbone,
}
WAYS = ["latent", "packed", *(["engine"] if engine.kernels_here() else [])]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names before 5.24
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """A saved classifier, whose parameters and statistics are all random, with its image processor."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(SHAPES[request.param]())
    model.save_pretrained(folder)
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return {name: model_class.from_pretrained(folder) for name, model_class in CLASSES.items()}


@pytest.fixture(params=CLASSES)
def model(request, loaded):
    return copy.deepcopy(loaded[request.param])


@pytest.fixture
def classifier(loaded):
    return copy.deepcopy(loaded["classifier"])


@pytest.fixture(params=WAYS)
def packable(request, monkeypatch):
    """A function that loads a pyramid of a class: latent, or packed, in PyTorch or on the engine."""
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch" if request.param != "engine" else engine.kernels_here()[0])
    packing = {} if request.param == "latent" else {"quantization_config": BinaryViTQuantizationConfig()}

    def load(model_class, folder, **arguments):
        return model_class.from_pretrained(folder, **packing, **arguments)

    return load


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid")
    tiny_model(SHAPES["pyramid"]()).save_pretrained(folder)
    return folder


def flat(outputs) -> list[torch.Tensor]:
    """All tensors in an output of a model, in order."""
    if torch.is_tensor(outputs):
        return [outputs]
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [tensor for value in values for tensor in flat(value)]


def assert_same_outputs(ours, theirs) -> None:
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


def run(model, images=None, **arguments):
    with torch.no_grad():
        return model(tiny_images() if images is None else images, **arguments)


def loss_of(outputs, device: str = "cpu") -> torch.Tensor:
    """A loss that depends on every value of the outputs, each with a weight of its own."""
    return sum((x * torch.linspace(-1, 1, x.numel(), device=device).view(x.shape)).sum() for x in flat(outputs))


# ---- Saving and loading ----


def test_a_saved_model_loads_with_the_same_tensors_and_outputs(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in LOADING_INFO)
    assert not loaded.training
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert_same_outputs(run(loaded), run(model))


def test_a_model_in_shards_loads_with_the_same_outputs(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_outputs(run(type(model).from_pretrained(tmp_path)), run(model))


def test_copies_pickles_and_saved_objects_of_a_model_give_the_same_outputs(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    state = type(model)(model.config).eval()
    state.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), state]
    for other in copies:
        assert_same_outputs(run(other), run(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_model_loads_with_a_device_map(classifier, folder, device_map):
    loaded = BinaryViTForImageClassification.from_pretrained(folder, device_map=device_map)
    assert_same_outputs(run(loaded), run(classifier))


def test_a_model_loads_and_is_saved_in_the_dtype_that_is_asked_for(model, folder, tmp_path):
    loaded = type(model).from_pretrained(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {loaded.dtype} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.int64,  # num_batches_tracked
    }
    assert type(model).from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_a_base_model_loads_from_a_classifier_and_a_classifier_from_a_base_model(classifier, folder, tmp_path):
    base, info = BinaryViTModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in LOADING_INFO)
    assert_same_outputs(run(base), run(classifier.base_model))
    base.save_pretrained(tmp_path)
    again, info = BinaryViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert_same_outputs(run(again.base_model), run(base))


def test_the_base_model_is_what_stands_below_a_head(classifier, folder):
    assert classifier.base_model is classifier.binaryvit
    for model_class in (BinaryViTModel, BinaryViTBackbone):
        model = model_class.from_pretrained(folder)
        assert model.base_model is model


def test_a_classifier_of_another_size_is_refused_or_begins_with_random_weights(classifier, folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=7)
    loaded = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert run(loaded).logits.shape == (2, 7)
    assert loaded.num_labels == loaded.config.num_labels == loaded.classifier.out_features == 7
    assert loaded.classifier.weight.abs().sum() > 0
    assert_same_outputs(run(loaded.base_model), run(classifier.base_model))


# ---- Initialisation ----


def test_missing_weights_are_initialised_as_in_a_seeded_new_model(classifier, tmp_path):
    # Built without random numbers, as from_pretrained builds, so that both draw the same ones after the seed.
    with torch.device("meta"):
        fresh = BinaryViTForImageClassification(copy.deepcopy(classifier.config))
    fresh.to_empty(device="cpu")
    torch.manual_seed(3)
    fresh.init_weights()
    classifier.config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(3)
    loaded = BinaryViTForImageClassification.from_pretrained(tmp_path)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_missing_weight_does_not_change_the_others(folder, tmp_path):
    BinaryViTForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = BinaryViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight"}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


def test_initialisation_after_the_meta_device_fills_every_tensor_as_construction_does(model):
    torch.manual_seed(0)
    built = type(model)(copy.deepcopy(model.config))
    with torch.device("meta"):
        late = type(model)(copy.deepcopy(model.config))
    assert all(tensor.is_meta for tensor in late.state_dict().values())
    late.to_empty(device="cpu")
    for tensor in late.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    late.init_weights()
    for (name, ours), theirs in zip(late.state_dict().items(), built.state_dict().values(), strict=True):
        assert ours.isfinite().all(), name
        if theirs.unique().numel() == 1:  # a constant
            assert torch.equal(ours, theirs), name
        elif ours.numel() > 50:
            # Five standard errors, of a normal distribution; those of a uniform one are smaller.
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=5 / ours.numel() ** 0.5, atol=0, msg=name)
            assert ours.mean().abs() < 5 * ours.std() / ours.numel() ** 0.5, name


def test_weights_are_not_tied_and_every_tensor_is_a_parameter_or_a_buffer(model):
    tensors = [*model.parameters(), *model.buffers()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert set(model.state_dict()) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    registered = {id(tensor) for tensor in tensors}
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if torch.is_tensor(value) and id(value) not in registered]
        assert not loose, (name, loose)


# ---- Outputs ----


def test_the_first_argument_is_the_images(model):
    assert list(inspect.signature(model.forward).parameters)[:1] == ["pixel_values"] == [model.main_input_name]
    assert_same_outputs(run(model), model(pixel_values=tiny_images()))


def test_two_forwards_are_bit_identical(model):
    assert_same_outputs(run(model, output_hidden_states=True), run(model, output_hidden_states=True))


def test_images_of_a_batch_are_independent(model):
    model.double()  # in float32, sums depend on the batch size in the last bit, which can flip a sign
    images = tiny_images(5).double()
    together = flat(run(model, images, output_hidden_states=True))
    for index, image in enumerate(images):
        for tensor, alone in zip(together, flat(run(model, image[None], output_hidden_states=True)), strict=True):
            torch.testing.assert_close(tensor[index], alone[0], rtol=1e-10, atol=1e-10)


def test_an_empty_batch_gives_empty_outputs(pyramid, packable):
    for model_class in CLASSES.values():
        model = packable(model_class, pyramid)
        outputs, ones = (run(model, tiny_images()[:batch], output_hidden_states=True) for batch in (0, 1))
        for empty, one in zip(flat(outputs), flat(ones), strict=True):
            assert empty.shape == (0, *one.shape[1:])


def test_hidden_states_are_the_input_of_every_layer_and_the_last_output(classifier):
    config, images = classifier.config, tiny_images()
    outputs = run(classifier, output_hidden_states=True)
    grids = [grid for grid, depth in zip(config.grid_sizes, config.depths) for _ in range(depth)]
    channels = [size for size, depth in zip(config.hidden_sizes, config.depths) for _ in range(depth)]
    grids, channels = [*grids, grids[-1]], [*channels, channels[-1]]
    assert len(outputs.hidden_states) == len(outputs.reshaped_hidden_states) == config.num_hidden_layers + 1
    for tokens, token_map, (height, width), depth in zip(
        outputs.hidden_states, outputs.reshaped_hidden_states, grids, channels
    ):
        assert tokens.shape == (2, height * width + config.use_class_token, depth)
        assert token_map.shape == (2, depth, height, width)
        assert torch.equal(token_map.flatten(2).transpose(1, 2), tokens[:, config.use_class_token :])
    layers = [layer for stage in classifier.binaryvit.stages for layer in stage.layers]
    assert torch.equal(layers[-1](outputs.hidden_states[-2], grids[-1]), outputs.hidden_states[-1])
    last = run(classifier.binaryvit).last_hidden_state
    assert torch.equal(classifier.binaryvit.norm(outputs.hidden_states[-1]), last)
    assert torch.equal(classifier.binaryvit.embeddings(images, grids[0]), outputs.hidden_states[0])


def test_attentions_are_the_probabilities_of_every_layer(classifier):
    config = classifier.config
    attentions = run(classifier, output_attentions=True).attentions
    layers = [layer for stage in classifier.binaryvit.stages for layer in stage.layers]
    stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
    for attention, layer, stage in zip(attentions, layers, stages, strict=True):
        tokens = int(np.prod(config.grid_sizes[stage])) + config.use_class_token
        keys = tokens // config.sequence_reduction_ratios[stage] ** 2
        assert attention.shape == (2, config.num_attention_heads[stage], tokens, keys)
        if config.input_bits == 1:
            assert set(attention.unique().tolist()) <= {0.0, layer.attention.probability_clip.item()}
        else:
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_outputs_are_given_for_the_flag_of_a_call_and_for_that_of_the_config(model):
    plain = run(model)
    assert "hidden_states" not in plain and "attentions" not in plain and "reshaped_hidden_states" not in plain
    asked = run(model, output_hidden_states=True, output_attentions=True)
    names = ["hidden_states", "attentions", *(["reshaped_hidden_states"] if "feature_maps" not in plain else [])]
    assert list(asked) == [*plain, *names]
    model.config.output_hidden_states = model.config.output_attentions = True
    assert_same_outputs(run(model), asked)
    assert list(run(model, output_hidden_states=False, output_attentions=False)) == list(plain)


@pytest.mark.parametrize("model_class", CLASSES.values(), ids=CLASSES)
def test_tuples_have_the_tensors_of_the_objects(pyramid, packable, model_class):
    model, as_tuple = packable(model_class, pyramid), packable(model_class, pyramid, return_dict=False)
    for arguments in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        expected = run(model, **arguments)
        for outputs in (run(as_tuple, **arguments), run(model, return_dict=False, **arguments)):
            assert type(outputs) is tuple
            assert [type(value) for value in outputs] == [type(value) for value in expected.to_tuple()]
            assert_same_outputs(outputs, expected)
        assert list(run(as_tuple, return_dict=True, **arguments)) == list(expected)


def test_a_model_without_pooling_layer_has_no_pooled_output(pyramid, packable):
    pooled, plain = packable(BinaryViTModel, pyramid), packable(BinaryViTModel, pyramid, add_pooling_layer=False)
    assert run(plain).pooler_output is None
    assert torch.equal(run(plain).last_hidden_state, run(pooled).last_hidden_state)
    assert len(run(plain, return_dict=False)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_are_part_of_the_graph_of_every_output(model, training):
    model.train(training)
    outputs = model(tiny_images(), output_hidden_states=True, output_attentions=True)
    kept = [*outputs.hidden_states[:1], outputs.attentions[0]]
    if isinstance(model, BinaryViTBackbone):  # its hidden states are maps, which are views beside the stream of tokens
        kept = kept[1:]
    for tensor in kept:
        tensor.retain_grad()
    loss_of([outputs[0]]).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


def test_a_loss_on_attentions_reaches_query_and_key(classifier):
    classifier.train()
    loss_of(classifier(tiny_images(), output_attentions=True).attentions[:1]).backward()
    attention = classifier.binaryvit.stages[0].layers[0].attention
    for projection in (attention.query, attention.key):
        assert projection.linear.weight.grad.abs().sum() > 0
    assert attention.value.linear.weight.grad is None or not attention.value.linear.weight.grad.any()


# ---- Training ----


def test_every_parameter_gets_a_gradient(model):
    loss_of(model.train()(tiny_images())).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not without


def test_a_training_step_needs_no_value_and_no_tensor_of_another_device(model):
    # On the meta device, where such an operation fails as it would wait or fail on a GPU.
    model.to("meta").train()
    for arguments in ({}, {"output_hidden_states": True, "output_attentions": True}):
        model.zero_grad()
        loss_of(model(tiny_images().to("meta"), **arguments), "meta").backward()
        assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(model):
    plain, checkpointed = copy.deepcopy(model).double().train(), copy.deepcopy(model).double().train()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for each in (plain, checkpointed):
        loss_of(each(tiny_images().double())).backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers()):
        assert torch.equal(ours, theirs), name
    checkpointed.gradient_checkpointing_disable()
    assert not checkpointed.is_gradient_checkpointing


def test_checkpointed_layers_give_hidden_states_and_attentions(classifier):
    expected = classifier.train()(tiny_images(), output_hidden_states=True, output_attentions=True)
    classifier.gradient_checkpointing_enable()
    outputs = classifier(tiny_images(), output_hidden_states=True, output_attentions=True)
    assert_same_outputs(outputs, expected)
    loss_of(outputs.attentions).backward()
    assert classifier.binaryvit.stages[0].layers[0].attention.key.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_runs_and_learns_in_half_precision(model, dtype):
    tensors = flat(run(copy.deepcopy(model).to(dtype), tiny_images().to(dtype), output_hidden_states=True))
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert all(tensor.isfinite().all() for tensor in tensors)
    with torch.autocast("cpu", dtype):
        loss_of(model.train()(tiny_images())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


PROBLEMS = {
    "single_label_classification": (3, torch.tensor([0, 2]), torch.nn.functional.cross_entropy),
    "multi_label_classification": (
        3,
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        torch.nn.functional.binary_cross_entropy_with_logits,
    ),
    "regression": (1, torch.tensor([0.5, -1.0]), lambda x, y: torch.nn.functional.mse_loss(x.squeeze(), y)),
}


@pytest.mark.parametrize("problem_type", PROBLEMS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "guessed"])
@pytest.mark.filterwarnings("error:Using a target size")
def test_the_loss_is_that_of_the_problem(problem_type, named):
    config, (num_labels, labels, loss) = tiny_config(), PROBLEMS[problem_type]
    config.num_labels, config.problem_type = num_labels, problem_type if named else None
    model = BinaryViTForImageClassification(config)
    outputs = model.eval()(tiny_images(), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    outputs.loss.backward()
    assert model.config.problem_type == problem_type


# ---- Parts ----


def test_the_input_embeddings_are_the_projection_of_patches(model):
    embeddings = model.get_input_embeddings()
    assert embeddings is model.base_model.embeddings.projection
    other = copy.deepcopy(embeddings)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert model.get_output_embeddings() is None


def test_inputs_of_frozen_embeddings_can_require_gradients(model):
    model.base_model.embeddings.requires_grad_(False)
    model.enable_input_require_grads()
    loss_of(model.train()(tiny_images())).backward()
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("shape", ["pyramid", "class token"])  # tracing takes seconds
def test_a_model_compiles_as_one_graph(shape):
    model = tiny_model(SHAPES[shape]()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled).logits, run(model).logits)


# ---- The classes of transformers ----


def test_auto_classes_know_every_class(folder, monkeypatch):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(AutoConfig.for_model("binaryvit")) is BinaryViTConfig
    expected = {
        AutoModel: BinaryViTModel,
        AutoModelForImageClassification: BinaryViTForImageClassification,
        AutoBackbone: BinaryViTBackbone,
    }
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *_: True)  # AutoBackbone asks it also for folders
    for auto_class, model_class in expected.items():
        assert type(auto_class.from_pretrained(folder)) is model_class
        with torch.device("meta"):
            assert type(auto_class.from_config(config)) is model_class


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_take_one_picture_and_batches_of_pictures(folder, task):
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 40, 3), np.uint8)) for i in range(3)]
    pipe = pipeline(task, model=str(folder))
    alone = [pipe(picture) for picture in pictures]
    for together in (pipe(pictures), pipe(pictures, batch_size=2)):
        assert len(together) == 3
        if task == "image-feature-extraction":
            assert np.array(alone[0]).shape[-1] == pipe.model.config.hidden_size
            np.testing.assert_allclose(np.array(together), np.array(alone), atol=1e-4)
        else:
            assert [[answer["label"] for answer in answers] for answers in together] == [
                [answer["label"] for answer in answers] for answers in alone
            ]
            assert sum(answer["score"] for answer in alone[0]) == pytest.approx(1)


def test_a_text_decoder_takes_the_model_as_encoder(pyramid):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 1}
    decoder = GPT2LMHeadModel(GPT2Config(add_cross_attention=True, **sizes))
    model = VisionEncoderDecoderModel(encoder=BinaryViTModel.from_pretrained(pyramid), decoder=decoder).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 1
    model(pixel_values=tiny_images(), labels=torch.full((2, 4), 3)).loss.backward()
    assert model.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


# ---- The config ----


def test_a_config_has_the_common_properties_and_refuses_what_contradicts_it():
    config = tiny_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 3, [2, 4])
    config.hidden_size, config.num_hidden_layers = 16, 3  # as some programs write back what they have read
    with pytest.raises(ValueError, match="change hidden_sizes"):
        config.hidden_size = 8
    with pytest.raises(ValueError, match="change depths"):
        tiny_config(num_hidden_layers=2)
    assert {"hidden_size", "num_hidden_layers", "stage_names"}.isdisjoint(config.to_dict())


def test_a_config_is_the_same_after_json_a_dictionary_a_folder_a_copy_and_a_pickle(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    (tmp_path / "file.json").write_text(config.to_json_string(use_diff=False))
    extra = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
    others = {
        "from_dict": BinaryViTConfig.from_dict(config.to_dict()),
        "keywords": BinaryViTConfig(**config.to_dict(), **extra, stage_names=config.stage_names),
        "folder": BinaryViTConfig.from_pretrained(tmp_path),
        "JSON": BinaryViTConfig.from_json_file(tmp_path / "file.json"),
        "copy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    volatile = {"_name_or_path", "transformers_version"}
    expected = {name: value for name, value in json.loads(config.to_json_string()).items() if name not in volatile}
    for way, other in others.items():
        ours = {name: value for name, value in json.loads(other.to_json_string()).items() if name not in volatile}
        assert ours == expected, way


def test_a_config_takes_the_common_arguments_at_loading(folder):
    config = AutoConfig.from_pretrained(
        folder,
        num_labels=5,
        output_hidden_states=True,
        output_attentions=True,
        return_dict=False,
        dtype=torch.bfloat16,
    )
    given = config.num_labels, config.output_hidden_states, config.output_attentions, config.return_dict, config.dtype
    assert given == (5, True, True, False, torch.bfloat16)
    assert BinaryViTConfig().num_labels == 2
