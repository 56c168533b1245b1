"""The compiled engine compared with PyTorch, step by step, and the choice between them."""

import copy
import ctypes
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import CONFIGS, ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from teams import recorded_teams
from tiny import class_token_config, one_layer_config, tiny_config, tiny_images, tiny_model
from transformers import AutoConfig

from binaryvit_hf import BinaryViTConfig, BinaryViTForImageClassification, engine
from binaryvit_hf.engine import Engine
from binaryvit_hf.network.configuration_binaryvit import as_pair
from binaryvit_hf.network.packing_binaryvit import pack_levels
from binaryvit_hf.row_kernels import library as row_library
from binaryvit_runtime.engine import fingerprint, library
from binaryvit_runtime.engine.library import count_differing_bits


ROOT = Path(__file__).parents[2]
KERNELS = engine.kernels_here()
# Versions of PyTorch round a sum near zero to different signs. One flipped bit changes a token by less than 1 %.
ROUNDING = 1e-5 if torch.__version__ >= (2, 14) else 0.01
BINARY_ROWS = [row for row in ROWS if not row.startswith("deit")]

pytestmark = pytest.mark.skipif(not KERNELS, reason=f"there is no engine: {engine.problem()}")


@pytest.fixture(autouse=True)
def no_forced_kernels(monkeypatch):
    monkeypatch.delenv("BINARYVIT_ENGINE", raising=False)


def packed(config) -> torch.nn.Module:
    model = tiny_model(config).eval()
    model.pack_weights()
    model.binaryvit.requires_grad_(False)
    return model


def engine_of(model, kernels: str) -> Engine:
    tensors = {name: t for name, t in model.binaryvit.state_dict().items() if t.dtype != torch.int64}
    return Engine(model.config, tensors, kernels)


def images_of(config, batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, config.num_channels, *as_pair(config.image_size), generator=torch.Generator().manual_seed(1)
    )


def record_steps(model, images) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each step of the backbone, computed by PyTorch."""
    backbone, steps = model.binaryvit, []
    modules = [backbone.embeddings]
    for stage in backbone.stages:
        modules += [stage.patch_embeddings] if stage.patch_embeddings is not None else []
        modules += stage.layers
    for module in [*modules, backbone.norm]:
        module.register_forward_hook(lambda _, inputs, output: steps.append((inputs[0], output)))
    with torch.no_grad():
        backbone(images)
    return steps


def check_steps(model, images, threads: int = 1, tolerated: int = 0) -> None:
    """
    Compare every step of all kernels with PyTorch's, from the same inputs.

    At most `tolerated` tokens may differ by more than rounding, because rounding flipped a sign in them.
    """
    steps = record_steps(model, images)
    for kernels in KERNELS:
        folded, differing, worst = engine_of(model, kernels), 0, (0.0, "")
        for step, (inputs, expected) in enumerate(steps):
            actual = folded.run_step(step, inputs, expected.shape[1:], threads)
            errors = (actual - expected).abs() / expected.abs().max()
            differing += (errors.amax(-1) > ROUNDING).sum().item()
            image, token, channel = np.unravel_index(errors.argmax().item(), errors.shape)
            place = f"step {step}, image {image}, token {token}, channel {channel}"
            values = f"expected {expected[image, token, channel]}, actual {actual[image, token, channel]}"
            worst = max(worst, (errors.max().item(), f"{place}: {values}"))
        assert differing <= tolerated, f"{differing} tokens differ on {kernels}; the worst: {worst[1]}"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("config", [tiny_config(), class_token_config(), tiny_config(binarize_patch_embeddings=False)])
def test_every_step_equals_pytorchs_except_for_rounding(config, threads):
    check_steps(packed(config), images_of(config), threads)


@pytest.mark.parametrize("expansion", [3, 9, 18])
def test_a_wide_mlp_gathers_its_shortcuts_from_distant_channels(expansion):
    config = tiny_config(
        hidden_sizes=[288],
        depths=[1],
        num_attention_heads=[3],
        intermediate_sizes=[288 * expansion],
        sequence_reduction_ratios=[1],
    )
    check_steps(packed(config), images_of(config))


@st.composite
def configs(draw) -> BinaryViTConfig:
    """Any network of one-bit products: odd widths and heads, one token, reductions, a class token."""
    num_stages = draw(st.integers(1, 3))
    use_class_token = num_stages == 1 and draw(st.booleans())
    hidden_sizes, heads = [], []
    for _ in range(num_stages):
        heads.append(draw(st.integers(1, 4)))
        channels = math.lcm(hidden_sizes[-1] if hidden_sizes else 1, heads[-1])
        hidden_sizes.append(channels * draw(st.integers(1, max(1, 40 // channels))))
    last_side = st.integers(1, 3)
    height, width = (draw(last_side) * 2 ** (num_stages - 1) for _ in range(2))
    ratios = []
    for stage in range(num_stages):
        common = math.gcd(height >> stage, width >> stage)
        divisors = [ratio for ratio in range(1, common + 1) if common % ratio == 0]
        ratios.append(1 if use_class_token else draw(st.sampled_from(divisors)))
    patch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return BinaryViTConfig(
        image_size=(height * patch[0], width * patch[1]),
        patch_size=patch,
        num_channels=draw(st.integers(1, 4)),
        hidden_sizes=hidden_sizes,
        depths=[draw(st.integers(1, 2)) for _ in range(num_stages)],
        num_attention_heads=heads,
        intermediate_sizes=[channels * draw(st.integers(1, 5)) for channels in hidden_sizes],
        sequence_reduction_ratios=ratios,
        use_class_token=use_class_token,
        use_stem_norm=draw(st.booleans()),
        use_layer_scale=draw(st.booleans()),
        avg_pool_kernel_sizes=[] if use_class_token else draw(st.sampled_from([[], [1], [3], [3, 5], [7, 3]])),
        binarize_patch_embeddings=draw(st.booleans()),
        num_labels=3,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configs())
def test_every_step_of_any_network_equals_pytorchs(config):
    check_steps(packed(config), images_of(config, batch=1))


@pytest.mark.parametrize("row", BINARY_ROWS)
def test_every_step_of_every_row_equals_pytorchs(row):
    config = AutoConfig.from_pretrained(CONFIGS / row)
    check_steps(packed(config), images_of(config, batch=1), threads=2, tolerated=5)


def check_attentions(model, images, different: float = 0) -> None:
    """Compare the attention of every layer of all kernels; a share of `different` probabilities may differ."""
    with torch.no_grad():
        attentions = model(images, output_attentions=True).attentions
    grids = [grid for grid, depth in zip(model.config.grid_sizes, model.config.depths) for _ in range(depth)]
    assert len(grids) == len(attentions)
    for kernels in KERNELS:
        folded = engine_of(model, kernels)
        before = folded.forward(images, 1)[0]
        for layer, (expected, grid) in enumerate(zip(attentions, grids)):
            size = folded.attention_size(layer)
            assert (size.query_height, size.query_width) == grid
            class_tokens = int(model.config.use_class_token)
            assert size.key_height * size.key_width + class_tokens == size.keys == expected.shape[3]
            actual = torch.cat([folded.attention(image[None], layer) for image in images])
            assert actual.shape == expected.shape and actual.any()
            assert (actual != expected).float().mean() <= different
        assert torch.equal(folded.forward(images, 1)[0], before)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        class_token_config(),
        tiny_config(hidden_sizes=[9, 90], num_attention_heads=[3, 2], intermediate_sizes=[18, 90]),
        tiny_config(image_size=(64, 48), sequence_reduction_ratios=[2, 1]),  # more keys than bits of a word
    ],
)
def test_the_attention_of_every_layer_equals_pytorchs(config):
    check_attentions(packed(config), images_of(config))


@pytest.mark.parametrize("name", ["binaryvit-digits", "binaryvit-fashion-mnist"])
def test_the_attention_of_a_shipped_model_equals_pytorchs(name):
    model = BinaryViTForImageClassification.from_pretrained(ROOT / "model_cards" / name, dtype=torch.float32).eval()
    check_attentions(model, images_of(model.config, 4), different=2e-3)


def test_a_query_attends_to_nothing_if_the_clip_is_not_positive():
    model = packed(tiny_config())
    model.binaryvit.stages[0].layers[0].attention.probability_clip.data.neg_()
    for kernels in KERNELS:
        assert not engine_of(model, kernels).attention(tiny_images(1), 0).any()


def test_attention_of_no_layer_or_of_several_images_is_refused():
    folded = engine_of(packed(tiny_config()), KERNELS[0])
    for layer in (-1, 3):
        with pytest.raises(IndexError, match=f"has no layer {layer}; its first layer is 0"):
            folded.attention(tiny_images(1), layer)
    with pytest.raises(ValueError, match="the attention of one image, not of 2"):
        folded.attention(tiny_images(2), 0)


def count_bits(kernels: str, left: torch.Tensor, right: torch.Tensor, inputs: int) -> torch.Tensor:
    counts = count_differing_bits(kernels, *(pack_levels(levels, 1).numpy() for levels in (left, right)), inputs)
    return torch.from_numpy(counts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 1200)
    | st.sampled_from([256, 384, 1024, 2048]),  # widths of the paper's networks, which have special kernels
    st.integers(0, 2**32 - 1),
)
def test_counts_of_all_kernels_are_exact(rows, outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(0, 2, (count, inputs), generator=generator) * 2 - 1 for count in (rows, outputs))
    expected = (inputs - left @ right.T) // 2
    for kernels in KERNELS:
        assert torch.equal(count_bits(kernels, left, right, inputs), expected.int())


def test_a_row_that_differs_in_every_bit_does_not_overflow():
    ones = torch.ones(1, 4096, dtype=torch.int16)
    for kernels in KERNELS:
        assert count_bits(kernels, ones, -ones, 4096).item() == 4096


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("labels, bias", [(3, True), (1, False), (40, True)])
def test_the_classifier_is_a_linear_layer(labels, bias, threads):
    config = tiny_config(hidden_sizes=[9, 45], num_attention_heads=[3, 5], intermediate_sizes=[18, 90])
    classifier, images = torch.nn.Linear(45, labels, bias=bias), images_of(config, 4)
    weights = [weight.detach() for weight in classifier.parameters()]
    for kernels in KERNELS:
        folded = engine_of(packed(config), kernels)
        folded.limit_team(threads)
        _, pooled, _ = folded.forward(images, threads)
        torch.testing.assert_close(folded.classify(images, *weights, threads=threads), classifier(pooled).detach())


@pytest.mark.parametrize("batch, threads", [(0, 2), (1, 4), (5, 2), (3, 3), (2, 8)])
def test_outputs_do_not_depend_on_batch_size_or_threads(batch, threads):
    model = packed(tiny_config())
    for kernels in KERNELS:
        folded = engine_of(model, kernels)
        folded.limit_team(threads)  # as for a large network
        last, pooled, hidden = folded.forward(tiny_images(5)[:batch], threads, output_hidden_states=True)
        one_by_one = [folded.forward(image[None], 1, output_hidden_states=True) for image in tiny_images(5)[:batch]]
        for index, (own_last, own_pooled, own_hidden) in enumerate(one_by_one):
            assert torch.equal(last[index], own_last[0]) and torch.equal(pooled[index], own_pooled[0])
            assert all(torch.equal(state[index], own[0]) for state, own in zip(hidden, own_hidden))


def test_several_python_threads_run_one_model_at_once():
    model, images = packed(tiny_config()), tiny_images(4)
    with torch.no_grad():
        expected = model(images).logits
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(images).logits, expected):
                    wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_process_computes_on_its_own_threads():
    program = """
import os, torch
from tiny import tiny_config, tiny_images, tiny_model
torch.set_num_threads(2)
model = tiny_model(tiny_config()).eval(); model.pack_weights(); model.requires_grad_(False)
expected = model(tiny_images(2)).logits
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(model(tiny_images(2)).logits, expected) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    "largest, threads, batch, expected",
    [
        (1, 8, 1, []),
        (1, 8, 3, [3]),
        (1, 8, 8, [8]),
        (1, 8, 9, [8]),  # no team for the last image
        (1, 1, 9, []),
        (2, 8, 1, [2]),
        (2, 8, 3, [3]),
        (2, 8, 9, [8, 2]),
        (1000, 8, 3, [8]),
        (1000, 8, 9, [8, 8]),
    ],
)
def test_threads_compute_whole_images_and_a_team_the_rest(largest, threads, batch, expected):
    folded, images = engine_of(packed(tiny_config()), KERNELS[0]), tiny_images(batch)
    alone = folded.forward(images, 1)[1]
    folded.limit_team(largest)
    with recorded_teams() as teams:
        assert torch.equal(folded.forward(images, threads)[1], alone)
    assert teams == expected


@pytest.mark.parametrize("is_small", [True, False])
def test_one_image_takes_a_thread_for_each_cpu_and_one_in_a_small_network(is_small, monkeypatch):
    monkeypatch.setattr("binaryvit_runtime.cpus.available_cpus", lambda: 3)
    if not is_small:
        monkeypatch.setattr("binaryvit_runtime.cpus.SMALL_NETWORK", 0)
    model = packed(tiny_config()).requires_grad_(False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 50)
    with recorded_teams() as teams:
        model(tiny_images(1))
        assert teams == ([] if is_small else [3, 3])  # network and classifier
        teams.clear()
        model(tiny_images(7))
        assert teams == [7, 7]


@pytest.mark.parametrize("limit", [None, "2"], ids=["as many as asked for", "fewer than asked for"])
def test_the_engine_works_on_the_threads_of_pytorch_if_it_gets_them(limit):
    if engine.openmp_of_torch() is None:
        pytest.skip("PyTorch has no OpenMP runtime here")
    program = """
import os, torch
from tiny import tiny_config, tiny_images, tiny_model
model = tiny_model(tiny_config()).eval(); model.pack_weights(); model.requires_grad_(False)
torch.set_num_threads(1)
expected = model(tiny_images(3)).logits
torch.set_num_threads(3)
torch.ones(10**7).exp_()
before = len(os.listdir("/proc/self/task"))
assert torch.equal(model(tiny_images(3)).logits, expected)
assert len(os.listdir("/proc/self/task")) == before
"""
    environment = (
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_THREAD_LIMIT": limit} if limit else {})
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-42])
def test_pixels_that_are_nan_infinite_or_subnormal_give_pytorchs_logits(value, monkeypatch):
    model, images = packed(tiny_config()), tiny_images(1)
    images[0, 1, 3, 5] = value
    with torch.no_grad():
        ours = model(images).logits
        monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
        torch.testing.assert_close(ours, model(images).logits, equal_nan=True)


# The choice between the engine and PyTorch.


def test_a_packed_model_in_evaluation_uses_the_best_kernels():
    model = packed(tiny_config())
    assert model.engine == (KERNELS[0], "the fastest kernels for this CPU") == model.binaryvit.engine
    with torch.no_grad():
        assert model(tiny_images()).logits.grad_fn is None


@pytest.mark.parametrize("kernels", [*KERNELS, "torch"])
def test_the_environment_forces_kernels(kernels, monkeypatch):
    model = packed(tiny_config())
    expected = model(tiny_images()).logits
    monkeypatch.setenv("BINARYVIT_ENGINE", kernels)
    assert model.engine == (kernels, "BINARYVIT_ENGINE says so")
    torch.testing.assert_close(model(tiny_images()).logits, expected)


def test_kernels_that_do_not_exist_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "abacus")
    with pytest.raises(ValueError, match=r"BINARYVIT_ENGINE is 'abacus', but this machine has .*scalar, torch"):
        packed(tiny_config())(tiny_images())


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model: tiny_model().eval(), "not packed"),
        (lambda model: model.to(torch.bfloat16), "is bfloat16"),
        (lambda model: model.to("meta"), "on the device meta"),
    ],
)
def test_a_model_that_the_engine_cannot_read_runs_in_pytorch_and_says_why(change, reason):
    model = change(packed(tiny_config()))
    assert model.engine.name == "torch" and reason in model.engine.reason


def test_without_the_compiled_library_pytorch_computes_and_says_so_once(monkeypatch, caplog):
    model = packed(tiny_config())
    expected = model(tiny_images()).logits
    model.refresh_engine()
    monkeypatch.setattr(library, "load_library", lambda: "it was not built")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for _ in range(2):
        torch.testing.assert_close(model(tiny_images()).logits, expected)
    assert model.engine == ("torch", "it was not built")
    assert [record.message for record in caplog.records] == [
        "Packed models run in PyTorch, not on the faster engine: it was not built."
    ]


@pytest.mark.parametrize("binding, subject", [(library, "it was"), (row_library, "they were")])
def test_a_library_of_other_sources_is_not_used(binding, subject, tmp_path, monkeypatch):
    folder = Path(binding.__file__).parent
    reason = "built from other sources: run `pip install --no-deps -e .`"
    assert fingerprint.describe_other_sources(ctypes.CDLL(None), folder) == reason  # from before its fingerprint
    assert fingerprint.describe_other_sources(ctypes.CDLL(None), tmp_path) is None  # an installed wheel has no sources
    if binding.problem() is None:
        monkeypatch.setattr(fingerprint, "SOURCES", ("*.h",))
        assert binding.load_library.__wrapped__() == f"{subject} {reason}"


@pytest.mark.skipif(row_library.problem() is not None, reason="there are no row kernels")
def test_row_kernels_of_other_shared_sources_are_not_used(tmp_path, monkeypatch):
    (team,) = row_library.SHARED_SOURCES
    for changed in ("team.h", "team.cpp"):
        for name in ("team.h", "team.cpp"):
            content = team.with_name(name).read_bytes()
            (tmp_path / name).write_bytes(content + b"\n" * (name == changed))
        monkeypatch.setattr(row_library, "SHARED_SOURCES", (tmp_path / "team.cpp",))
        assert "built from other sources" in row_library.load_library.__wrapped__()


def test_other_bits_run_in_pytorch():
    model = packed(tiny_config(weight_bits=2))
    assert model.engine == ("torch", "the engine multiplies single bits, not 2 by 1")
    assert model(tiny_images()).logits.isfinite().all()


def test_changed_weights_are_seen():
    model = packed(tiny_config())
    before = model(tiny_images()).logits
    other = packed(tiny_config()).state_dict()
    other["binaryvit.norm.batch_norm.bias"] += 1
    model.load_state_dict(other)
    assert not torch.allclose(model(tiny_images()).logits, before)
    double = model.double().float()
    torch.testing.assert_close(double(tiny_images()).logits, model(tiny_images()).logits)


def test_hooks_are_called_as_long_as_they_are_registered():
    model, calls = packed(tiny_config()), []
    for count in (1, 2):
        model(tiny_images())
        handle = model.binaryvit.norm.register_forward_hook(lambda *_: calls.append(1))
        model(tiny_images())
        handle.remove()
        model(tiny_images())
        assert len(calls) == count


def test_attentions_gradients_and_hooks_come_from_pytorch(monkeypatch):
    model, images = packed(tiny_config()), tiny_images()
    expected = model(images).logits
    assert len(model(images, output_attentions=True).attentions) == 3
    assert model(images.clone().requires_grad_()).logits.grad_fn is not None
    calls = []
    handle = model.binaryvit.stages[0].layers[1].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(images).logits, expected)
    handle.remove()
    model(images)
    assert len(calls) == 1


def test_the_classifier_of_a_packed_model_is_pytorchs_to_train_watch_and_exchange():
    model, images = packed(tiny_config()), tiny_images()
    with torch.no_grad():
        expected = model(images).logits
    logits = model(images).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    calls = []
    handle = model.classifier.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(images)
        handle.remove()
        torch.testing.assert_close(model.double().float()(images).logits, expected)
        model.classifier = torch.nn.Sequential(model.classifier, torch.nn.Tanh())
        torch.testing.assert_close(model(images).logits, expected.tanh())
    assert len(calls) == 1


def test_hidden_states_equal_pytorchs(monkeypatch):
    model = packed(tiny_config())
    ours = model(tiny_images(), output_hidden_states=True)
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    theirs = model(tiny_images(), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for own, expected in zip(ours.hidden_states, theirs.hidden_states):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    "option, given", [("output_hidden_states", "hidden_states"), ("output_attentions", "attentions")]
)
def test_outputs_that_the_config_asks_for_are_returned(option, given):
    model = packed(tiny_config())
    assert given not in model(tiny_images())
    setattr(model.config, option, True)
    assert len(model(tiny_images())[given]) >= 3


def test_copies_and_pickles_of_a_model_get_their_own_engine():
    model = packed(tiny_config())
    expected = model(tiny_images()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tiny_images()).logits, expected)


def test_images_of_another_shape_are_refused_before_the_engine_sees_them():
    with pytest.raises(ValueError, match=r"takes images of .channels, height, width. \(3, 16, 32\), not \(3, 8, 8\)"):
        packed(tiny_config())(torch.zeros(1, 3, 8, 8))


def test_a_compiled_and_an_exported_model_give_the_same_logits():
    model, images = packed(one_layer_config()), tiny_images()
    with torch.no_grad():
        expected = model(images).logits
        exported = torch.export.export(
            model, (images,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
        )
        torch.testing.assert_close(exported.module()(images).logits, expected)
        torch.testing.assert_close(exported.module()(tiny_images(5)).logits, model(tiny_images(5)).logits)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(images).logits, expected)
