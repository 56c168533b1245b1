"""
Times of forwards in WebAssembly on one thread: our engine and onnxruntime-web, in node, which has the engine of Chromium.

Weights are random, except for the models that come with the package: the time of a forward does not depend on them.
"""

import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import binaryvit_runtime
from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.progress import Progress, with_progress
from binaryvit_runtime.resources import shipped_models

from ..ops import align_columns, readable
from .inference import check_binary_row, save_row
from .interleaved import describe_ratio, describe_seconds


DRIVER = Path(__file__).with_name("browser.mjs")
RUNTIME = Path(binaryvit_runtime.__file__).parent
MODULE, ENGINE = RUNTIME / "browser" / "binaryvit.js", RUNTIME / "engine" / "binaryvit.wasm"
PACKAGE = "onnxruntime-web"
PACKAGE_FILES = {"module": "ort.node.min.mjs", "engine": "ort-wasm-simd-threaded.wasm"}
PEERS = {"deit_small_patch16_224": True, "mobilenetv2_100": True}  # see `onnx_peers.NETWORKS`
LOADS = 3
TURN_SECONDS, WARM_UP_SECONDS = 0.1, 1.0
TABLE_HEAD = (
    *("model", "by", "image", "CPU ms, median", "10-90 %", "ms, median", "x ours"),
    *("loading, ms", "wasm", "file"),
)

logger = logging.getLogger(__name__)


def benchmark_browser(network: str, turns: int, node_modules: Path | None = None) -> dict:
    """
    Time forwards of a packed binary row of configs/, of the shipped models and of peers in onnxruntime-web.

    Args:
        network: name of the row.
        turns: timed turns of each contestant, 2 or more.
        node_modules: folder of onnxruntime-web; by default see `find_onnxruntime`.

    Returns:
        A dictionary of

        - `node`, `v8` and `onnxruntime_web`, the versions,
        - `results`, in the order of the table: `model`, `library`, `image_shape`, `cpu_seconds` of a forward,
          `cpu_seconds_10_90`, `seconds`, `seconds_10_90`, `ratio` (the CPU time divided by that of the row, `None` for
          images of another size), `loading_seconds` (compiling the engine and loading the model, in a new process, from
          files in memory), `loading_cpu_seconds`, `engine_bytes` (the .wasm) and `file_bytes`.

    Raises:
        UserError: there is no such row, node or onnxruntime-web is missing, or a contestant fails.
    """
    check_binary_row(network)
    node, onnxruntime = find_node(), find_onnxruntime(node_modules)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logger.info("preparing the models")
        contestants = create_contestants(network, folder)
        plan = {
            "module": str(MODULE),
            "engine": str(ENGINE),
            "onnxruntime": {key: str(onnxruntime / "dist" / file) for key, file in PACKAGE_FILES.items()},
            "turnSeconds": TURN_SECONDS,
            "warmUpSeconds": WARM_UP_SECONDS,
        }
        logger.info("loading each model, %s", counted(LOADS, "time"))
        rounds = [
            [drive(node, folder, plan, [contestant], turns=0)["contestants"][0] for contestant in contestants]
            for _ in with_progress(range(LOADS), "loads of each model", LOADS)
        ]
        logger.info("forwards, %s", counted(turns, "turn"))
        with Progress("forwards in node"):
            driven = drive(node, folder, plan, contestants, turns)
        results = [
            describe(contestant, measured, [loaded["loading"] for loaded in loads], plan)
            for contestant, measured, loads in zip(contestants, driven["contestants"], zip(*rounds))
        ]
    ours = results[0]
    for result in results:
        comparable = result["image_shape"] == ours["image_shape"]
        result["ratio"] = result["cpu_seconds"] / ours["cpu_seconds"] if comparable else None
    versions = {"node": driven["node"], "v8": driven["v8"], "onnxruntime_web": read_version(onnxruntime)}
    return {**versions, "results": results}


def find_node() -> str:
    """
    The program node: from PATH, or of the package playwright.

    Raises:
        UserError: there is none.
    """
    if node := shutil.which("node"):
        return node
    package = importlib.util.find_spec("playwright")
    for folder in (package and package.submodule_search_locations) or []:
        if node := shutil.which("node", path=os.path.join(folder, "driver")):
            return node
    raise UserError(
        "--browser needs node, which is not in PATH: install it, or `pip install playwright`, which has it."
    )


def find_onnxruntime(node_modules: Path | None) -> Path:
    """
    The folder of the package onnxruntime-web: in `node_modules`, or where node itself looks for it.

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    usual = [parent / "node_modules" for parent in (here, *here.parents)]
    usual += [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
    for folder in [node_modules] if node_modules else usual:
        if all((folder / PACKAGE / "dist" / file).is_file() for file in PACKAGE_FILES.values()):
            return folder / PACKAGE
    where = f"{str(node_modules)!r} does not have it" if node_modules else "it is not in node_modules or NODE_PATH"
    raise UserError(
        f"--browser compares with {PACKAGE}, but {where}: run `npm install {PACKAGE}` here, or give --node-modules."
    )


def read_version(package: Path) -> str:
    return json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]


def create_contestants(network: str, folder: Path) -> list[dict]:
    """The contestants of the driver's plan, in the order of the table. Their files are written to `folder`."""
    from .onnx_peers import IMAGE_SHAPE, export_networks

    ours = {network: save_row(network, folder / "packed", packed=True), **dict(sorted(shipped_models().items()))}
    return [
        *(
            {"name": name, "library": "binaryvit.js", "folder": str(path), "file": str(path / "model.safetensors")}
            for name, path in ours.items()
        ),
        *(
            {"name": name, "library": f"{PACKAGE} {library.split()[-1]}", "file": str(file), "shape": IMAGE_SHAPE}
            for name, library, file in export_networks(folder, networks=PEERS)
        ),
    ]


def drive(node: str, folder: Path, plan: dict, contestants: list[dict], turns: int) -> dict:
    """
    Run the driver on some contestants; its plan is written to `folder`. Returns its answer.

    Raises:
        UserError: a contestant fails.
    """
    file = folder / "plan.json"
    file.write_text(json.dumps({**plan, "contestants": contestants, "turns": turns}), encoding="utf-8")
    process = subprocess.run([node, str(DRIVER), str(file)], capture_output=True, encoding="utf-8", check=False)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"The benchmark in {node} failed: {reason.rstrip('.')}.")
    return json.loads(process.stdout)


def describe(contestant: dict, measured: dict, loads: list[list[float]], plan: dict) -> dict:
    cpu, wall = (describe_seconds(seconds, 1) for seconds in zip(*measured["turns"]))
    engine = plan["engine"] if "folder" in contestant else plan["onnxruntime"]["engine"]
    return {
        "model": contestant["name"],
        "library": contestant["library"],
        "image_shape": measured["shape"],
        "cpu_seconds": cpu["seconds"],
        "cpu_seconds_10_90": cpu["seconds_10_90"],
        "seconds": wall["seconds"],
        "seconds_10_90": wall["seconds_10_90"],
        "loading_cpu_seconds": statistics.median(seconds for seconds, _ in loads),
        "loading_seconds": statistics.median(seconds for _, seconds in loads),
        "engine_bytes": Path(engine).stat().st_size,
        "file_bytes": Path(contestant["file"]).stat().st_size,
    }


def format_browser(measured: dict) -> str:
    """The measurements of `benchmark_browser` as a table for the terminal."""
    rows = [
        (
            result["model"],
            result["library"],
            " x ".join(map(str, result["image_shape"][1:])),
            f"{1000 * result['cpu_seconds']:.2f}",
            "-".join(f"{1000 * seconds:.2f}" for seconds in result["cpu_seconds_10_90"]),
            f"{1000 * result['seconds']:.2f}",
            describe_ratio(result["ratio"]),
            f"{1000 * result['loading_seconds']:.0f}",
            readable(result["engine_bytes"], "B"),
            readable(result["file_bytes"], "B"),
        )
        for result in measured["results"]
    ]
    head = (
        f"WebAssembly on one thread of node {measured['node']} (V8 {measured['v8']}), "
        f"{PACKAGE} {measured['onnxruntime_web']}; inputs are preprocessed"
    )
    return "\n".join([head, align_columns([TABLE_HEAD, *rows])])
