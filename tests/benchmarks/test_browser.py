"""The benchmark in WebAssembly runs where node and onnxruntime-web are installed, and says elsewhere what to install."""

import json
import sys
from pathlib import Path

import pytest
from command_line import assert_refused, run
from mean_network import write_mean_network

from binaryvit_hf.benchmarks import browser, onnx_peers
from binaryvit_runtime.errors import UserError


@pytest.fixture
def tools() -> tuple[str, Path]:
    """The program node and the folder of onnxruntime-web."""
    try:
        return browser.find_node(), browser.find_onnxruntime(None)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def fake_package(tmp_path) -> Path:
    """A folder node_modules with the names of onnxruntime-web's files."""
    for file in browser.PACKAGE_FILES.values():
        path = tmp_path / "node_modules" / "onnxruntime-web" / "dist" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "node_modules"


def test_forwards_in_node_are_compared_with_peers_of_the_same_process(tools, monkeypatch, capsys, caplog):
    monkeypatch.setattr(onnx_peers, "export_networks", lambda folder, networks: write_mean_network(folder))
    for name, value in {"LOADS": 1, "TURN_SECONDS": 0.01, "WARM_UP_SECONDS": 0.01}.items():
        monkeypatch.setattr(browser, name, value)
    arguments = ("--model", "binaryvit-digits", "--steps", 2, "--node-modules", tools[1].parent)
    measured = json.loads(run(capsys, "benchmark", "--browser", *arguments, "--json"))
    assert "preparing the models" in caplog.text
    results = measured["results"]
    assert [(result["model"], result["library"]) for result in results] == [
        ("binaryvit-digits", "binaryvit.js"),
        ("binaryvit-fashion-mnist", "binaryvit.js"),
        ("means", "onnxruntime-web int8"),
    ]
    assert [result["image_shape"] for result in results] == [[3, 32, 32], [3, 24, 24], [3, 224, 224]]
    assert [result["ratio"] for result in results] == [1, None, None]
    for result in results:
        for name in ("cpu_seconds", "seconds"):
            assert 0 < result[f"{name}_10_90"][0] <= result[name] <= result[f"{name}_10_90"][1] < 1
        assert 0 < result["loading_seconds"] < 60
        assert 0 < result["file_bytes"] < 10**6
    ours, _, theirs = results
    assert ours["engine_bytes"] == browser.ENGINE.stat().st_size < theirs["engine_bytes"] / 10
    head, *lines = browser.format_browser(measured).splitlines()
    assert f"node {measured['node']} (V8 {measured['v8']}), onnxruntime-web {measured['onnxruntime_web']}" in head
    assert len(lines) == 1 + len(results)
    assert lines[1].split()[:5] == ["binaryvit-digits", "binaryvit.js", "32", "x", "32"]


def test_a_contestant_that_fails_is_named_with_its_reason(tools, tmp_path):
    node, onnxruntime = tools
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    plan = {"onnxruntime": {key: str(onnxruntime / "dist" / file) for key, file in browser.PACKAGE_FILES.items()}}
    contestant = {"name": "bad", "file": str(tmp_path / "bad.onnx"), "shape": [3, 8, 8]}
    with pytest.raises(UserError, match=r"^The benchmark in \S*node failed: bad: .*\.$"):
        browser.drive(node, tmp_path, plan, [contestant], turns=0)


def test_the_package_is_found_where_node_finds_it_and_in_a_given_folder(fake_package, tmp_path, monkeypatch):
    found = fake_package / "onnxruntime-web"
    assert browser.find_onnxruntime(fake_package) == found
    (tmp_path / "project" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "below")
    monkeypatch.delenv("NODE_PATH", raising=False)
    assert browser.find_onnxruntime(None) == found
    fake_package.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="npm install onnxruntime-web"):
        browser.find_onnxruntime(None)
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "elsewhere"))
    assert browser.find_onnxruntime(None) == tmp_path / "elsewhere" / "onnxruntime-web"


def test_missing_tools_are_named_with_the_command_that_installs_them(fake_package, tmp_path, monkeypatch, capsys):
    def prepare(*arguments):
        raise AssertionError("the tools are checked before the models are prepared")

    monkeypatch.setattr(browser, "create_contestants", prepare)
    command = ["benchmark", "--browser"]
    assert_refused(capsys, [*command, "--node-modules", tmp_path], str(tmp_path), "`npm install onnxruntime-web`")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "playwright", None)
    assert_refused(capsys, [*command, "--node-modules", fake_package], "needs node", "`pip install playwright`")


def test_wrong_arguments_are_refused(tmp_path, capsys):
    assert_refused(capsys, ["benchmark", "--browser", "--threads", 2], "one thread")
    assert_refused(capsys, ["benchmark", "--browser", "--batch-size", 2], "one image")
    assert_refused(capsys, ["benchmark", "--browser", "--plot", tmp_path / "latency.png"], "leave out")
    assert_refused(capsys, ["benchmark", "--browser", "--steps", 1], "2 or more")
    assert_refused(capsys, ["benchmark", "--browser", "--model", "vit-digits"], "no binary row 'vit-digits'")
    assert_refused(capsys, ["benchmark", "--node-modules", tmp_path], "needs --browser")
