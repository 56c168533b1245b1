"""Benchmarks run, and the simulation has the outputs and gradients of the network."""

import dataclasses
import functools
import importlib.util
import json
import logging
import platform
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import assert_refused, run
from PIL import Image
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from torch._dynamo.utils import counters

from binaryvit_hf import cuda_graphs, engine, onnx_export
from binaryvit_hf.benchmarks import inference, onnx_peers, trained, training
from binaryvit_hf.benchmarks.machine import describe_machine
from binaryvit_hf.benchmarks.simulation import simulate
from binaryvit_hf.benchmarks.training import Competitor
from binaryvit_hf.compiled_layers import CACHE_VARIABLE, CompiledLayers
from binaryvit_runtime.errors import UserError


class Sums(torch.nn.Module):
    """Sums of all values of an image, positive and negative, as a convolution."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8).clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, self.weight).flatten(1)


def test_products_of_a_quantised_network_do_not_overflow_on_this_cpu(tmp_path):
    float32, int8 = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    onnx_peers.export_float32(Sums(), (3, 8, 8), float32)
    largest = np.ones((1, 3, 8, 8), np.float32)
    onnx_peers.quantize(float32, int8, [largest])
    (logits,) = onnx_peers.open_session(int8).run(None, {"images": largest})
    np.testing.assert_allclose(logits, [[192, -192]], rtol=0.02)


def test_times_name_the_kernels_that_the_engine_uses(monkeypatch):
    for kernels, variable in (("scalar", "scalar"), (None, "torch"), (engine.kernels_here()[0], "")):
        monkeypatch.setenv("BINARYVIT_ENGINE", variable)
        assert describe_machine()["kernels"] == kernels


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(sequence_reduction_ratios=[1, 1], use_layer_scale=False), class_token_config()],
    ids=["pyramid", "without reduction", "class token"],
)
def test_simulation_has_the_networks_outputs_and_gradients(config):
    results = []
    for prepare in (lambda model: model, simulate):
        model = prepare(tiny_model(config).double()).train()
        logits = model(tiny_images().double()).logits
        names, parameters = zip(*model.named_parameters())
        results.append((logits, dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters)))))
    torch.testing.assert_close(results[0], results[1])


def test_only_networks_of_1_bit_are_simulated():
    with pytest.raises(ValueError, match="1-bit"):
        simulate(tiny_model(tiny_config(weight_bits=2)))


def test_training_benchmark_compares_with_the_peer_of_the_same_run(capsys, monkeypatch, forked_contestants):
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling would take a minute
    arguments = ("benchmark", "--train", "--model", "fashion-mnist/binaryvit", "--batch-size", 2, "--steps", 2)
    measured = json.loads(run(capsys, *arguments, "--json"))
    names = [result["contestant"] for result in measured["results"]]
    assert names == ["fashion-mnist/deit", "fashion-mnist/binaryvit", "fashion-mnist/binaryvit, simulated"]
    peer, ours, _ = measured["results"]
    assert (peer["ratio"], ours["ratio"]) == (1, ours["seconds"] / peer["seconds"])
    ours["ratio"] = None  # as for images of another size
    assert training.format_steps(measured).splitlines()[-2].endswith("  -")
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"])
    assert all(result["peak_bytes"] > 10**8 and result["first_seconds"] > 0 for result in measured["results"])


def test_the_first_step_of_a_compiled_competitor_compiles_and_its_peak_is_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "CompiledLayers", functools.partial(CompiledLayers, backend="eager"))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setattr(training, "keep_freed_memory", lambda: None)
    counters.clear()
    respond = training.create_responder(Competitor("fashion-mnist/reactdeit", "compiled"), 2, "cpu", 1, str(tmp_path))
    assert respond("first") > 0
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    assert respond("step") > 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert respond("peak") > 10**8


def test_a_competitor_with_a_cuda_graph_records_in_its_first_step(monkeypatch, tmp_path):
    passes = []
    monkeypatch.setattr(cuda_graphs, "record", lambda function: lambda: passes.append(function()))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setattr(training, "keep_freed_memory", lambda: None)
    respond = training.create_responder(
        Competitor("fashion-mnist/reactdeit", "CUDA graph"), 2, "cpu", 1, str(tmp_path)
    )
    assert respond("first") > 0
    assert len(passes) == 1
    assert respond("step") > 0
    assert len(passes) == 3  # one refills the caches


def test_networks_of_other_image_sizes_have_no_ratio_to_the_peer():
    assert inference.has_images_of("fashion-mnist/binaryvit", training.peer_of("fashion-mnist/binaryvit"))
    assert inference.has_images_of("binaryvit-tiny-patch8-224", inference.PEER)
    assert not inference.has_images_of("fashion-mnist/binaryvit", inference.PEER)
    assert inference.has_images_of("resnet18", inference.PEER)  # of timm, for the same images


def test_a_row_of_an_ablation_is_compared_with_its_teacher():
    assert training.peer_of("fashion-mnist/binaryvit") == "fashion-mnist/deit"
    assert training.peer_of("binaryvit-digits") == "deit-small-patch16-224"


def test_forwards_of_all_kernels_are_compared_with_peers_of_the_same_run(
    tmp_path, monkeypatch, capsys, caplog, forked_contestants
):
    monkeypatch.setattr(inference, "PEER", "vit-digits")
    monkeypatch.setattr(onnx_peers, "NETWORKS", {"resnet10t": True})
    monkeypatch.setattr(onnx_peers, "export_onnx", write_copying_network)
    plot = tmp_path / "latency.png"
    arguments = ("--model", "binaryvit-digits", "--threads", 1, "--batch-size", 1, 2, "--steps", 2, "--plot", plot)
    measured = json.loads(run(capsys, "benchmark", *arguments, "--json"))
    assert "preparing the models" in caplog.text
    kernels = engine.kernels_here()
    assert measured["cpu"] and measured["kernels"] == kernels[0]
    competitors = [
        *(("binaryvit-digits", name) for name in ("runtime", *kernels, "PyTorch, simulated")),
        *(("vit-digits", name) for name in ("PyTorch float32", "PyTorch bfloat16", "torch.compile")),
        ("binaryvit-digits", "onnxruntime, exported"),
        *(("resnet10t", name) for name in ("onnxruntime float32", "onnxruntime int8")),
    ]
    results = measured["results"]
    assert [(row["model"], row["engine"]) for row in results] == 2 * competitors
    assert [row["batch_size"] for row in results] == [1] * len(competitors) + [2] * len(competitors)
    for row in results:
        of_peer = ("PyTorch float32", row["batch_size"])
        peer = next(other for other in results if (other["engine"], other["batch_size"]) == of_peer)
        assert row["ratio"] == peer["seconds"] / row["seconds"]
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
        assert row["seconds_10_90"][0] <= row["seconds"] <= row["seconds_10_90"][1]
    *ours, latent, floats, half, _, _, onnx_floats, onnx_bytes = [row["file_bytes"] for row in results][
        : len(competitors)
    ]
    assert set(ours) == {ours[0]}
    assert ours[0] < latent / 5
    assert floats == pytest.approx(2 * half, rel=0.05)
    assert onnx_floats == pytest.approx(4 * onnx_bytes, rel=0.05)
    assert [(first["model"], first["engine"]) for first in measured["starts"]] == competitors
    assert all(first["seconds"] > 0 for first in measured["starts"])
    assert Image.open(plot).size[0] > 1000
    printed = inference.format_forwards(measured).splitlines()
    assert len(printed) == 1 + len(results) + 1 + 1 + len(kernels)
    assert printed[1].split()[:4] == ["binaryvit-digits", "runtime", "1", "1"]


def write_copying_network(model, processor, file: Path) -> None:
    """In place of an export, which takes 10 s: a network whose output is its input."""
    shape = ["batch", *onnx_export.image_shape(model)]
    images, copies = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "copy", [images], [copies])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), file)


def load_quick(file: Path, threads: int):
    return lambda batch_size: batch_size


def load_broken(file: Path, threads: int):
    raise OSError("There is no compiler.")


def compete(*competitors: inference.Competitor) -> tuple[list[dict], list[dict]]:
    return inference.compete(list(competitors), batch_sizes=[1, 2], threads=1, turns=2)


def test_a_competitor_that_cannot_run_is_left_out_unless_it_is_the_peer(tmp_path, caplog, forked_contestants):
    (tmp_path / "file").write_bytes(b"12345")
    peer = inference.Competitor(inference.PEER, inference.PEER_ENGINE, tmp_path / "file", load_quick)
    broken = dataclasses.replace(peer, engine="torch.compile", load=load_broken)
    with caplog.at_level(logging.INFO):
        results, starts = compete(broken, peer)
    assert "left out: deit-small-patch16-224 on torch.compile failed: There is no compiler." in caplog.text
    assert [result["engine"] for result in results] == 2 * ["PyTorch float32"]
    assert [result["file_bytes"] for result in results] == [5, 5]
    assert len(starts) == 1
    with pytest.raises(UserError, match=r"on PyTorch float32 failed: There is no compiler\.$"):
        compete(dataclasses.replace(peer, load=load_broken))


def test_the_binary_rows_are_found_without_timm(monkeypatch):
    def lack_timm(*_):
        raise ImportError("TimmWrapperConfig requires the timm library")

    monkeypatch.setattr(inference.AutoConfig, "from_pretrained", lack_timm)
    inference.check_binary_row("binaryvit-digits")


@pytest.mark.parametrize("library", inference.ONNX_LIBRARIES)
def test_networks_in_onnxruntime_are_left_out_where_a_library_is_missing(library, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with caplog.at_level(logging.INFO):
        assert not inference.has_onnx_peers()
    assert "All networks in onnxruntime are left out; to measure them, run `pip install '.[benchmark]'`" in caplog.text


def test_wrong_benchmarks_are_refused(tmp_path, capsys):
    assert_refused(capsys, ["benchmark", "--train", "--model", "no-such-row"], "no binary row 'no-such-row'")
    assert_refused(capsys, ["benchmark", "--train", "--model", "digits/resnet"], "no binary row 'digits/resnet'")
    assert_refused(capsys, ["benchmark", "--train", "--steps", 1], "2 or more")
    assert_refused(capsys, ["benchmark", "--model", "no-such-row"], "no binary row 'no-such-row'")
    assert_refused(capsys, ["benchmark", "--model", "vit-digits"], "no binary row 'vit-digits'")
    assert_refused(capsys, ["benchmark", "--threads", 0], "1 or more")
    assert_refused(capsys, ["benchmark", "--plot", tmp_path / "latency.txt"], "of the kinds .png")
    assert_refused(capsys, ["benchmark", "--plot", tmp_path / "nowhere" / "latency.png"], "no folder")
    assert_refused(capsys, ["benchmark", "--train", "--threads", 1], "of forwards")
    for option in (["--model", "no-such-row"], ["--batch-size", 1], ["--threads", 1], ["--steps", 7]):
        assert_refused(capsys, ["benchmark", "--loader", *option], "leave out --model, --batch-size, --threads")
    assert_refused(capsys, ["benchmark", "--pipeline", "--model", "vit-digits"], "no binary row 'vit-digits'")
    assert_refused(capsys, ["benchmark", "--pipeline", "--plot", tmp_path / "latency.png"], "of forwards")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_with_the_process(tmp_path, warm_python):
    program = """
import torch
from binaryvit_hf.host_memory import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
assert keep_freed_memory()
before = resident()
torch.ones(2**26, dtype=torch.uint8)
print(resident() - before)
"""
    kept = warm_python.run("-c", program, folder=tmp_path)
    assert kept.returncode == 0, kept.stderr
    assert int(kept.stdout) > 0.9 * 2**26


def test_trained_models_are_timed_on_their_engines_and_broken_ones_are_left_out(tmp_path, caplog, forked_contestants):
    inference.save_row("binaryvit-digits", tmp_path / "packed", packed=True)
    inference.save_row("vit-digits", tmp_path / "teacher")
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "packed" / "config.json", tmp_path / "broken")
    folders = {name: tmp_path / name for name in ("packed", "broken", "teacher")}
    with caplog.at_level(logging.INFO):
        seconds = trained.time_trained(folders, turns=1)
    assert list(seconds) == ["packed", "teacher"]
    assert 0 < seconds["packed"] < seconds["teacher"]
    assert "left out: broken on runtime" in caplog.text
