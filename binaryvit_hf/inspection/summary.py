"""The measurements as text for the terminal, on one screen."""

from binaryvit_runtime.errors import counted, one_line

from ..ops import align_columns, readable
from .findings import percent, size
from .report import Report, accuracy_line
from .sections import stage_of
from .storage import PartCost


def summarize(report: Report) -> str:
    """A line about the model, a table with a row for each stage, and the findings."""
    measurements = report.measurements
    rows: list[tuple[str, ...]] = [
        ("stage", "weights in bits", "BOPs", "FLOPs", "share of OPs", "bytes", "share of file")
    ]
    for stage in dict.fromkeys(stage_of(part.part) for part in measurements.parts):
        parts = [part for part in measurements.parts if stage_of(part.part) == stage]
        ops, stored = (sum(getattr(part, number) for part in parts) for number in ("ops", "stored_bytes"))
        share = percent(ops / measurements.total("ops"))
        rows.append((stage, *counts(parts), share, size(stored), percent(stored / measurements.all_bytes)))
    if header := measurements.header_bytes:
        rows.append(("file header", "", "", "", "", size(header), percent(header / measurements.all_bytes)))
    rows.append(("in all", *counts(measurements.parts), "", size(measurements.all_bytes), ""))
    pictures, found = report.pictures, measurements.of_pictures
    note = []
    if pictures is not None and found is not None:
        measured = ["attention"] * bool(found.attention) + ["activations"] * bool(found.inputs)
        verb = "is" if measured == ["attention"] else "are"
        if measured:
            what = " and ".join(measured).capitalize()
            note.append(f"{what} {verb} measured on {counted(found.pictures, pictures.kind)}.")
    kind = "packed" if measurements.is_packed else "latent weights"
    title = f"{report.name} ({kind}): {accuracy_line(report)}"
    return one_line_each([title, "", *align_columns(rows).splitlines(), "", *report.findings, *note])


def counts(parts: list[PartCost]) -> list[str]:
    """Quantised weights, BOPs and FLOPs of some parts."""
    names = ("quantized_weights", "bops", "flops")
    return [readable(sum(getattr(part, name) for part in parts)) for name in names]


def one_line_each(lines: list[str]) -> str:
    """Lines for a terminal. Names come from users, so control characters are escaped."""
    return "\n".join(map(one_line, lines))
