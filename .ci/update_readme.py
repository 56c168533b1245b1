"""
Writes the table of results in README.md, the picture above it, and the tables of `docs/pages/results/speed.md` and
`docs/pages/guides/ablation.md` from measurements and configs of this repository:

    python .ci/update_readme.py            # after a new measurement, model or config
    python .ci/update_readme.py --check    # fails unless the pages and the pictures are what they give

It needs `pip install -e ".[test]"`. A page has a table between `<!-- NAME -->` and `<!-- end of NAME -->`. The measurements are
what these commands print:

    binaryvit benchmark --threads 1 2 --batch-size 1 8 --json > docs/measurements/forwards.json
    binaryvit benchmark --pipeline --steps 2 --json > docs/measurements/pipeline.json
    binaryvit benchmark --browser --json > docs/measurements/browser.json
    binaryvit compare binaryvit-digits --json > docs/measurements/compare-digits.json
    binaryvit compare binaryvit-fashion-mnist RUN... --json > docs/measurements/compare-fashion-mnist.json
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from binaryvit_hf.benchmarks.inference import PEER, PEER_ENGINE, RUNTIME
from binaryvit_hf.benchmarks.onnx_peers import FLOAT32, INT8
from binaryvit_hf.benchmarks.photographs import HEIGHT, WIDTH
from binaryvit_hf.loading import load_config
from binaryvit_hf.network.layers_binaryvit import BinaryLayer
from binaryvit_hf.ops import LayerCost, build_on_meta, count_operations, readable, total
from binaryvit_runtime.resources import shipped_configs, shipped_models


ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
README, SPEED, COMPARISON = ROOT / "README.md", PAGES / "results" / "speed.md", PAGES / "guides" / "ablation.md"
MEASUREMENTS = ROOT / "docs" / "measurements"
PICTURES = ROOT / "docs" / "pictures"
TABLE_HEAD = ("network", "trained on", "top-1, %", "file", "1 thread, ms", "2 threads, ms", "OPs")
NONE = "-"
UNIT = re.compile(r"(?<=\d) (?=[kMG])")  # a line must not break between a number and its unit
KERNELS = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON"}
DATA = {"sklearn-digits": "digits", "fashion-mnist": "Fashion-MNIST"}
NETWORK = "binaryvit-small-patch4-224"
# Networks for images of 224 x 224, in `forwards.json`: model, engine, name in the table.
FORWARDS = (
    (NETWORK, "avx512", f"**{NETWORK}**, 1 bit"),
    ("deit-small-patch16-224", "PyTorch float32", "DeiT-S, float32"),
    ("deit_small_patch16_224", INT8, "DeiT-S, int8"),
    ("resnet18", INT8, "ResNet-18, int8"),
    ("mobilenetv2_100", INT8, "MobileNetV2, int8"),
)


# ---- The table of README.md ----


def make_table() -> str:
    trained = [read(f"compare-{name}") for name in ("digits", "fashion-mnist")]
    rows = [row for measured in trained for row in trained_rows(measured)]
    for model, engine, name in FORWARDS:
        one, two = (measurement(model, engine, threads) for threads in (1, 2))
        times = (milliseconds(one), milliseconds(two))
        rows.append((name, "random weights", NONE, readable(one["file_bytes"], "B"), *times, operations(model)))
    cpus = " and ".join(dict.fromkeys(map(name_cpu, trained)))
    sentence = f"CPU of the trained networks: {cpus}; of those with random weights: {name_cpu(read('forwards'))}.\n"
    return f"{format_table(TABLE_HEAD, rows)}\n{sentence}"


def cpu_line(measured: dict) -> str:
    return f"CPU: {name_cpu(measured)}.\n"


def name_cpu(measured: dict) -> str:
    """`Intel Xeon Processor with AVX-512`."""
    return f"{measured['cpu'].replace('(R)', '')} with {KERNELS[measured['kernels']]}"


def trained_rows(measured: dict) -> list[tuple[str, ...]]:
    """The rows of a comparison."""
    return [trained_row(measured["data"], result) for result in shown_results(measured)]


def shown_results(measured: dict) -> list[dict]:
    """The results of a comparison. A network that runs in 8 bits is not shown in float32 too."""
    results = measured["results"]
    in_8_bits = {result["network"] for result in results if result["engine"] == INT8}
    return [result for result in results if result["engine"] != FLOAT32 or result["network"] not in in_8_bits]


def trained_row(data: str, result: dict) -> tuple[str, ...]:
    name, kind = Path(result["network"]).name, result["engine"].removeprefix("onnxruntime ")
    interval = "-".join(f"{100 * bound:.1f}" for bound in result["accuracy_interval"] or ())
    return (
        f"**{name}**, 1 bit" if kind == "engine" else f"{name}, {kind}",
        DATA[data],
        f"{100 * result['accuracy']:.1f}" + (f" ({interval})" if interval else ""),
        readable(result["file_bytes"], "B"),
        milliseconds(result),
        NONE,
        operations(result["network"]),
    )


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows)]
    return UNIT.sub("&nbsp;", "".join(lines))


def read(name: str) -> dict:
    return json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))


def measurement(model: str, engine: str, threads: int) -> dict:
    wanted = {"model": model, "engine": engine, "threads": threads, "batch_size": 1}
    [found] = [result for result in read("forwards")["results"] if wanted.items() <= result.items()]
    return found


def milliseconds(result: dict) -> str:
    return f"{1000 * result['seconds']:#.2g}" if result["seconds"] < 0.01 else f"{1000 * result['seconds']:.3g}"


def operations(network: str) -> str:
    """OPs of a network: as `binaryvit ops` counts them, for timm's networks the multiply-accumulates that PyTorch counts."""
    row = network.replace("_", "-")  # of a network of timm that is a row, too
    if find_config(row) is not None:
        return readable(count_cost(row).ops)
    if not timm.is_model(network):
        return NONE
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(network).eval()(torch.empty(1, 3, 224, 224))
    return readable(counter.get_total_flops() / 2)


@functools.cache
def count_cost(network: str) -> LayerCost:
    return total(count_operations(find_config(network)))


def find_config(network: str) -> PreTrainedConfig | None:
    """The config of a shipped model or row, if `binaryvit ops` counts its operations."""
    folders = {**shipped_configs(), **shipped_models()}
    config = load_config(folders[network]) if network in folders else None
    return config if config is not None and config.model_type in ("binaryvit", "vit") else None


# ---- The table of `ablation.md` ----


def make_comparison_table() -> str:
    """The networks of Fashion-MNIST beside each other, with the epochs that they were trained for."""
    measured, rows = read("compare-fashion-mnist"), []
    for result in shown_results(measured):
        name, _, accuracy, size, time, *_ = trained_row(measured["data"], result)
        rows.append((name, f"{result['epochs']:.0f}", accuracy, size, time))
    return f"{format_table(('network', 'epochs', 'top-1, %', 'file', '1 thread, ms'), rows)}\n{cpu_line(measured)}"


# ---- The tables of `speed.md` ----


def make_forwards_table() -> str:
    """Milliseconds per image of all networks and engines, a column for each number of threads and size of batches."""
    measured = read("forwards")
    results = measured["results"]
    settings = sorted({(result["batch_size"], result["threads"]) for result in results})
    head = [count_threads(threads) + f", batches of {size}" * (size > 1) for size, threads in settings]
    rows = []
    for model, engine in dict.fromkeys((result["model"], result["engine"]) for result in results):
        found = {
            (result["batch_size"], result["threads"]): result
            for result in results
            if (result["model"], result["engine"]) == (model, engine)
        }
        times = [milliseconds_per_image(found[setting]) if setting in found else NONE for setting in settings]
        rows.append((f"`{model}`", engine, *times, readable(next(iter(found.values()))["file_bytes"], "B")))
    ratio = measurement(PEER, PEER_ENGINE, 1)["seconds"] / measurement(NETWORK, RUNTIME, 1)["seconds"]
    sentence = f"One image on one thread: `{PEER}` in float32 takes {ratio:.1f} times as long as `{NETWORK}` in the runtime.\n"
    return f"{format_table(('network', 'engine', *head, 'file'), rows)}\n{cpu_line(measured)}{sentence}"


def make_pipeline_table() -> str:
    """Milliseconds from a file to its labels."""
    measured = read("pipeline")
    [threads] = {result["threads"] for result in measured["results"]}
    sentence = (
        f"{measured['pictures']} JPEGs of {WIDTH} x {HEIGHT} and {readable(measured['picture_bytes'], 'B')}, "
        f"{count_threads(threads)}. {cpu_line(measured)}"
    )
    rows = [
        (
            f"`{result['model']}`",
            result["library"],
            str(result["batch_size"]),
            milliseconds_per_image(result | {"batch_size": 1}),  # the seconds are those of a picture
        )
        for result in measured["results"]
    ]
    return f"{sentence}\n{format_table(('network', 'by', 'pictures in a batch', 'ms per picture'), rows)}"


def make_processes_table() -> str:
    """CPU time and peak memory of whole processes."""
    measured = read("pipeline")
    rows = [
        (process["process"], f"{process['cpu_seconds']:.2f}", readable(process["peak_bytes"], "B"))
        for process in measured["processes"]
    ]
    return f"{format_table(('process', 'CPU seconds', 'peak memory'), rows)}\n{cpu_line(measured)}"


def make_browser_table() -> str:
    """CPU time of a forward in WebAssembly, and the time of loading."""
    measured = read("browser")
    versions = f"node {measured['node']}, beside onnxruntime-web {measured['onnxruntime_web']}"
    sentence = f"One thread of {versions}. {cpu_line(measured)}"
    rows = [
        (
            f"`{result['model']}`",
            result["library"],
            " x ".join(map(str, result["image_shape"][1:])),
            milliseconds(result | {"seconds": result["cpu_seconds"]}),
            f"{1000 * result['loading_seconds']:.0f}",
            *(readable(result[f"{kind}_bytes"], "B") for kind in ("engine", "file")),
        )
        for result in measured["results"]
    ]
    head = ("network", "by", "image", "CPU ms per image", "loading, ms", "engine", "file")
    return f"{sentence}\n{format_table(head, rows)}"


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def milliseconds_per_image(result: dict) -> str:
    milliseconds = 1000 * result["seconds"] / result["batch_size"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


# ---- The picture ----

THEMES = {
    "light": {"text": "#1f2328", "soft": "#59636e", "line": "#d1d9e0", "bit": "#0969da", "float": "#818b98"},
    "dark": {"text": "#f0f6fc", "soft": "#9198a1", "line": "#3d444d", "bit": "#4493f8", "float": "#656c76"},
}
PICTURE_WIDTH, PICTURE_HEIGHT = 960, 330
SIGNS = (0b1011001110001011, 0b1110001010001101)  # of inputs and weights in the example of a product


def draw(theme: str) -> str:
    colours = THEMES[theme]
    parts = [*draw_product(), *draw_shares(), *draw_bars(), f'<path class="line" d="M470 20V{PICTURE_HEIGHT - 20}"/>']
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH} {PICTURE_HEIGHT}" role="img">
<title>What is binary, how small and how fast</title>
<style>
text {{ font: 14px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {colours["text"]} }}
.head {{ font-size: 17px; font-weight: 600 }}
.soft {{ fill: {colours["soft"]} }}
.small {{ font-size: 12px }}
.strong {{ font-weight: 600 }}
.end {{ text-anchor: end }}
.bit {{ fill: {colours["bit"]}; stroke: {colours["bit"]} }}
.float {{ fill: {colours["float"]} }}
.empty {{ fill: none; stroke: {colours["soft"]} }}
.line {{ fill: none; stroke: {colours["line"]} }}
</style>
{body}
</svg>
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def bar(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" rx="2" class="{kind}"/>'


def draw_product() -> list[str]:
    """A product of 16 signs: exclusive or, and a count."""
    inputs, weights = SIGNS
    differing = inputs ^ weights
    parts = [text(20, 36, "What is binary", "head")]
    for y, name, bits in ((60, "16 inputs", inputs), (84, "16 weights", weights), (118, "XOR", differing)):
        parts.append(text(20, y + 13, name, "soft"))
        for index in range(16):
            kind = "bit" if bits >> (15 - index) & 1 else "empty"
            parts.append(f'<rect x="{110 + 20 * index}" y="{y}" width="16" height="16" rx="3" class="{kind}"/>')
    count = differing.bit_count()
    parts.append('<path class="line" d="M110 109H426"/>')
    parts.append(text(20, 160, "Inputs and weights are +1 or -1, a bit each.", "soft"))
    parts.append(text(20, 180, f"Dot product = 16 - 2 · popcount = 16 - 2 · {count} = {16 - 2 * count}"))
    return parts


@functools.cache
def draw_shares() -> list[str]:
    """Bars of the shares of bits among the multiply-accumulates and the weights of binaryvit-small."""
    cost = count_cost(NETWORK)
    layers = [module for module in build_on_meta(find_config(NETWORK)).modules() if isinstance(module, BinaryLayer)]
    weights = sum(layer.weight.numel() for layer in layers if layer.weight_bits == layer.input_bits == 1)
    shares = {
        "of the multiply-accumulates take two bits": cost.bops / (cost.bops + cost.flops),
        "of the parameters are 1-bit weights": weights / cost.parameters,
    }
    parts = [text(20, 218, "In binaryvit-small:", "soft")]
    for y, (name, share) in zip((230, 278), shares.items()):
        parts += [bar(20, y, 406 * share, "bit"), bar(20 + 406 * share, y, 406 * (1 - share), "float")]
        parts.append(text(20, y + 34, f"{100 * share:.1f} % {name}", "small"))
    return parts


def draw_bars() -> list[str]:
    """For each network a bar of the size of its file and one of its time."""
    parts = [text(490, 36, "How small, how fast", "head")]
    parts += [text(620, 62, "file", "soft small"), text(785, 62, "one image, one thread", "soft small")]
    measured = [(name, measurement(model, engine, 1)) for model, engine, name in FORWARDS]
    most_bytes = max(result["file_bytes"] for _, result in measured)
    most_seconds = max(result["seconds"] for _, result in measured)
    for index, (name, result) in enumerate(measured):
        y = 76 + 44 * index
        kind, strong = ("bit", " strong") if result["model"] == NETWORK else ("float", "")
        label, _, bits = name.replace("**", "").replace("-patch4-224", "").partition(", ")
        parts += [text(490, y + 12, label, strong), text(490, y + 28, bits, "soft small")]
        for x, share, words in (
            (620, result["file_bytes"] / most_bytes, readable(result["file_bytes"], "B")),
            (785, result["seconds"] / most_seconds, f"{milliseconds(result)} ms"),
        ):
            parts += [bar(x, y + 2, 85 * share, kind), text(x + 85 * share + 6, y + 16, words, strong)]
    parts.append(
        text(490, 312, f"Images of 224 x 224, all in one run. CPU: {name_cpu(read('forwards'))}", "soft small")
    )
    return parts


# ---- Files ----


# The tables of each page, by the name in their marks.
TABLES = {
    README: {"results": make_table},
    COMPARISON: {"comparison": make_comparison_table},
    SPEED: {
        "forwards": make_forwards_table,
        "pipeline": make_pipeline_table,
        "processes": make_processes_table,
        "browser": make_browser_table,
    },
}


def make_files() -> dict[Path, str]:
    """The files of the repository that this script writes, with their contents."""
    pages = {page: replace_tables(page.read_text(encoding="utf-8"), page) for page in TABLES}
    return pages | {PICTURES / f"overview-{theme}.svg": draw(theme) for theme in THEMES}


def replace_tables(content: str, page: Path) -> str:
    """The content of a page with the tables that the measurements give."""
    for name, make in TABLES[page].items():
        parts = between_marks(name).split(content)
        assert len(parts) == 2, f"{page.name} has not one table between <!-- {name} --> and <!-- end of {name} -->"
        content = make().join(parts)
    return content


def between_marks(name: str) -> re.Pattern:
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)


def find_stale() -> dict[Path, str]:
    """The files that would change, with their new contents."""
    files = make_files().items()
    return {file: new for file, new in files if not file.is_file() or file.read_text(encoding="utf-8") != new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    check = parser.parse_args().check
    stale = find_stale()
    if check and stale:
        names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
        sys.exit(f"Older than the measurements: {names}. Run `python .ci/update_readme.py`.")
    for file, content in stale.items():
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
