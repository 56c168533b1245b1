"""The benchmark from files to labels runs, and measures each process by itself."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from mean_network import write_mean_network
from PIL import Image

from binaryvit_hf.benchmarks import cold_start, onnx_peers, pipeline
from binaryvit_hf.benchmarks.photographs import write_photographs
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.host_memory import peak_of_process
from binaryvit_hf.network.configuration_binaryvit import BinaryViTConfig
from binaryvit_runtime.errors import UserError


needs_wait4 = pytest.mark.skipif(not hasattr(os, "wait4"), reason="Windows does not tell a process's memory")


@pytest.fixture
def quick(monkeypatch, forked_contestants):
    """Few pictures, tiny networks and short imports."""
    monkeypatch.setattr(pipeline, "PICTURES", 3)
    monkeypatch.setattr(pipeline, "PEER", "vit-digits")
    monkeypatch.setattr(onnx_peers, "export_networks", write_int8_network)
    monkeypatch.setattr(cold_start, "OURS", "import json")
    monkeypatch.setattr(cold_start, "PEER", "import ast")


def write_int8_network(folder: Path, only_int8: bool) -> list[tuple[str, str, Path]]:
    assert only_int8
    return write_mean_network(folder)


@needs_wait4
def test_files_to_labels_are_compared_with_peers_of_the_same_run(quick, capsys, caplog):
    arguments = ("--model", "binaryvit-digits", "--threads", 2, "--batch-size", 1, 2, "--steps", 2)
    measured = json.loads(run(capsys, "benchmark", "--pipeline", *arguments, "--json"))
    assert "preparing the models and 3 pictures" in caplog.text
    assert (measured["pictures"], measured["picture_bytes"]) == (3, pytest.approx(65_000, rel=0.1))
    results = {(row["model"], row["library"], row["batch_size"]): row for row in measured["results"]}
    assert list(results) == [
        ("binaryvit-digits", "binaryvit_runtime", 1),
        *(("binaryvit-digits", "transformers' pipeline", size) for size in (1, 2)),
        *(("vit-digits", "transformers' pipeline", size) for size in (1, 2)),
        ("means", "onnxruntime int8, a picture a thread", 1),
        ("means", "onnxruntime int8, threads in a batch", 8),
    ]
    for ratio, model in (("ratio_to_peer", "vit-digits"), ("ratio_to_pipeline", "binaryvit-digits")):
        best = min(results[model, "transformers' pipeline", size]["seconds"] for size in (1, 2))
        for row in results.values():
            assert row[ratio] == best / row["seconds"]
    for row in results.values():
        assert row["threads"] == 2
        assert 0 < row["seconds_10_90"][0] <= row["seconds"] <= row["seconds_10_90"][1]
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"])
    names = [process["process"] for process in measured["processes"]]
    classified, in_onnx = "binaryvit classify binaryvit-digits example.png", "means int8 in onnxruntime, with Pillow"
    assert names == [classified, in_onnx, "binaryvit --help", "import ast", "import json"]
    for process in measured["processes"]:
        assert 0 < process["cpu_seconds_10_90"][0] <= process["cpu_seconds"] <= process["cpu_seconds_10_90"][1]
        assert 2**22 < process["peak_bytes"] < 2**28
    lines = pipeline.format_pipeline(measured).splitlines()
    assert lines[0].startswith("From files to labels: 3 JPEGs of 500 x 375, ")
    assert [line.split()[0] for line in lines[2:9]] == [model for model, *_ in results]
    assert lines[-1].startswith("CPU of `import json` minus that of `import ast`: ")


@needs_wait4
def test_the_memory_of_a_process_is_its_own():
    assert peak_of_process() > 2**28, "this process has imported PyTorch"
    small, large = (
        cold_start.run_process("fill", [sys.executable, "-I", "-S", "-c", f"b' ' * 2**{power}"]) for power in (10, 26)
    )
    assert 2**22 < small[1] < 2**25
    assert large[1] - small[1] == pytest.approx(2**26, rel=0.1)


@needs_wait4
def test_a_process_that_fails_is_named_with_its_reason():
    with pytest.raises(UserError, match=r"^The process 'bad' failed: ValueError: no such thing\.$"):
        cold_start.run_process("bad", [sys.executable, "-c", "raise ValueError('no such thing')"])


def test_peers_with_pillow_see_the_pictures_of_the_image_processor(tmp_path):
    write_photographs([tmp_path / "photo.jpg"], quality=75)
    processor = create_image_processor(BinaryViTConfig(image_size=pipeline.CROP), pipeline.CROP_PCT)
    (expected,) = processor(Image.open(tmp_path / "photo.jpg"), return_tensors="np")["pixel_values"]
    difference = np.abs(pipeline.read_pixels(str(tmp_path / "photo.jpg")) - expected)
    grey_level = 1 / (255 * 0.22)
    assert difference.max() < 2 * grey_level
    assert difference.mean() < 0.05 * grey_level
