"""The peers of benchmarks are what they say they are, and the benchmarks run."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from test_cli import assert_refused, run
from tiny import tiny_config, tiny_images, tiny_model

from binaryvit_hf.simulation import simulate


@pytest.mark.parametrize("changes", [{}, {"sequence_reduction_ratios": [1, 1], "use_layer_scale": False}])
def test_simulation_has_the_networks_outputs_and_gradients(changes):
    config = tiny_config(**changes)
    results = []
    for prepare in (lambda model: model, simulate):
        model = prepare(tiny_model(config).double()).train()
        logits = model(tiny_images().double()).logits
        names, parameters = zip(*model.named_parameters())
        results.append((logits, dict(zip(names, torch.autograd.grad(logits.square().sum(), parameters)))))
    torch.testing.assert_close(results[0], results[1])


def test_networks_of_more_bits_are_not_simulated():
    with pytest.raises(ValueError, match="1-bit"):
        simulate(tiny_model(tiny_config(weight_bits=2)))


def test_training_benchmark_compares_with_the_peer_of_the_same_run(capsys):
    arguments = ("benchmark", "--train", "--model", "binaryvit-digits", "--batch-size", 2, "--steps", 2)
    measured = json.loads(run(capsys, *arguments, "--json"))
    names = [result["contestant"] for result in measured["results"]]
    assert names == ["deit-small-patch16-224", "binaryvit-digits", "binaryvit-digits, simulated"]
    peer, ours, _ = measured["results"]
    assert (peer["ratio"], ours["ratio"]) == (1, ours["seconds"] / peer["seconds"])
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"])
    assert 10**8 < ours["peak_bytes"] < peer["peak_bytes"]


def test_wrong_benchmarks_are_refused(capsys):
    assert_refused(capsys, ["benchmark", "--train", "--model", "no-such-row"], "no row 'no-such-row'")
    assert_refused(capsys, ["benchmark", "--train", "--steps", 1], "2 or more")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_with_the_process():
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
    kept = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(kept.stdout) > 0.9 * 2**26
