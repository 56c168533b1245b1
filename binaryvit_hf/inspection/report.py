"""The page: one HTML file without scripts, with everything in it."""

import base64
import hashlib
from pathlib import Path
from string import Template
from typing import NamedTuple

from transformers import PreTrainedConfig

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.writing import check_writable_file, write_file

from ..network.configuration_binaryvit import as_pair
from ..ops import readable
from . import sections
from .figures import TIMES, TINTS, Raw, join, tag
from .findings import describe_accuracy, find_findings, percent, size
from .measurements import Measurements
from .pictures import Pictures
from .records import RunRecords


STYLE = Path(__file__).with_name("report.css")
GENERATOR = '<meta name="generator" content="binaryvit inspect">'  # marks files that may be replaced
START_BYTES = 2000  # the mark is among them
STRONGEST_TINT = 45  # percent of colour in a cell; text stays readable on it in both themes
MARK = "M0 0h1v1H0zM1 1h2v1H1zM3 0h1v1H3zM0 2h1v2H0zM2 2h1v1H2zM3 3h1v1H3zM1 3h1v1H1z"
# Browsers refuse everything else, such as scripts and requests.
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src '{}'"


class Report(NamedTuple):
    """
    What the page shows.

    Args:
        name: of the model.
        config: of the model.
        pictures: that activations and attention were measured on, None if there were none.
        has_processor: whether the model has an image processor, which measurements on pictures need.
        latent_bytes: bytes of the files of latent weights beside a packed model, 0 if there are none.
    """

    name: str
    config: PreTrainedConfig
    measurements: Measurements
    records: RunRecords
    pictures: Pictures | None
    has_processor: bool
    latent_bytes: int = 0

    @property
    def findings(self) -> list[str]:
        return find_findings(self.measurements, self.records, self.config)


def check_replaceable(out: Path) -> None:
    """
    Raises:
        UserError: `out` cannot be written, or it exists and is no earlier report.
    """
    check_writable_file(out)
    if out.is_file() and not is_report(out):
        raise UserError(f"{str(out)!r} already exists and is no report: choose another name, or remove it.")


def is_report(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            return GENERATOR.encode() in stream.read(START_BYTES)
    except OSError:
        return False


def write_report(report: Report, out: Path) -> None:
    """
    Write the page, whole or not at all.

    Raises:
        UserError: it cannot be written, or would replace a file that is no report.
    """
    check_replaceable(out)
    write_file(out, page(report))


def page(report: Report) -> str:
    style = Template(STYLE.read_text(encoding="utf-8")).substitute(tints=tints())
    policy = POLICY.format(f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}")
    icon = f"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 4 4'%3E%3Cpath fill='%236366f1' d='{MARK}'/%3E%3C/svg%3E"
    head = join(
        [
            Raw('<meta charset="utf-8">'),
            Raw(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Raw(GENERATOR),
            Raw('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Raw('<meta name="color-scheme" content="light dark">'),
            Raw('<meta name="referrer" content="no-referrer">'),
            tag("title", f"{report.name}: report"),
            Raw(f'<link rel="icon" href="{icon}">'),
            Raw(f"<style>{style}</style>"),
        ]
    )
    on_pictures = (report.measurements.of_pictures, report.pictures, report.config, report.has_processor)
    main = tag(
        "main",
        facts(report),
        tag(
            "section",
            tag("h2", "What stands out", id="findings"),
            tag("ul", *(tag("li", sentence) for sentence in report.findings)),
            aria_labelledby="findings",
        ),
        sections.network(report.config),
        sections.cost(report.measurements),
        sections.attention(*on_pictures),
        sections.activations(*on_pictures),
        sections.weights(report.measurements, report.config),
        sections.latent(report.measurements, report.records, report.config),
        sections.learning_curves(report.records),
        sections.terms(),
    )
    body = tag("body", header(report), main)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'


def tints() -> str:
    """The colours of cells: `high-1` to `high-9` and `low-1` to `low-9`."""
    return "\n".join(
        f".{side}-{strength} {{ background: color-mix(in srgb, var(--{colour}) {STRONGEST_TINT * strength / TINTS:g}%, "
        "var(--card)); }"
        for side, colour in (("high", "bits"), ("low", "floats"))
        for strength in range(1, TINTS + 1)
    )


def header(report: Report) -> Raw:
    height, width = as_pair(report.config.image_size)
    kind = {1: "1-bit weights", 32: "32-bit weights"}.get(
        report.config.weight_bits, f"{report.config.weight_bits}-bit weights"
    )
    activations = f"{report.config.input_bits}-bit activations"
    trained = f", trained on {report.records.dataset}" if report.records.dataset else ""
    labels = list(report.config.id2label.values())
    is_named = labels[0] != "LABEL_0"  # transformers' name of a class without one
    named = f": {', '.join(map(str, labels[:10]))}{', …' if len(labels) > 10 else ''}" if is_named else ""
    mark = Raw(f'<svg class="mark" viewBox="0 0 4 4" aria-hidden="true"><path d="{MARK}"/></svg>')
    return tag(
        "header",
        mark,
        tag(
            "div",
            tag("h1", report.name),
            tag("p", f"BinaryViT, {kind}, {activations}, {height} {TIMES} {width} pixels{trained}"),
            tag("p", f"{counted(len(labels), 'class')}{named}"),
        ),
    )


def facts(report: Report) -> Raw:
    total = report.measurements.total
    accuracies, images = report.records.accuracy()
    entries = []
    if accuracies:
        name, value = next(iter(accuracies.items()))
        teacher = report.records.results.get("teacher_accuracy")
        entries.append((name.capitalize(), f"{100 * value:.2f} %", images))
        if teacher is not None:
            own = report.records.results.get("eval_accuracy")
            beside = "" if own is None else f", where this model has {100 * own:.2f} %"
            entries.append(
                ("Its teacher", f"{100 * teacher:.2f} %", f"{report.records.history.evaluation_images} images{beside}")
            )
    else:
        entries.append(("Accuracy", "unknown", "not recorded beside the model"))
    kind = "packed" if report.measurements.is_packed else "latent weights"
    stored = size(report.measurements.file_bytes) if report.measurements.file_bytes else "unknown"
    beside = f", beside {size(report.latent_bytes)} of latent weights" if report.latent_bytes else ""
    entries.append(("Checkpoint", stored, f"{kind}{beside}"))
    entries.append(
        (
            "Operations",
            f"{readable(total('ops'))} OPs",
            f"an image: {readable(total('bops'))} BOPs / 64 + {readable(total('flops'))} FLOPs",
        )
    )
    weight_bits = report.config.weight_bits
    share = percent(total("quantized_weights") / total("parameters"))
    bits = "in single bits" if weight_bits == 1 else f"of {weight_bits} bits"
    note = f"{share} {bits}" if weight_bits < 32 else "all in full precision"
    entries.append(("Parameters", readable(total("parameters")), note))
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value), tag("dd", note)) for name, value, note in entries),
        class_="facts",
    )


def accuracy_line(report: Report) -> str:
    return describe_accuracy(report.records) or "accuracy not recorded"
