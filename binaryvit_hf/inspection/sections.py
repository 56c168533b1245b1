"""The sections of the page: one question each, a sentence that says why it matters, a figure and its table."""

import base64
from collections.abc import Mapping, Sequence

from transformers import PreTrainedConfig

from binaryvit_runtime.errors import counted

from ..ops import readable
from ..run_history import TRAINING, UNKNOWN, find_values
from .figures import MINUS, TIMES, Cell, Raw, Series, bar, columns, curves, details, join, legend, table, tag, text
from .findings import percent, size
from .measurements import Measurements, PictureMeasurements
from .parts import HEAD, ROLES, STEM, Place
from .pictures import Pictures
from .records import RunRecords
from .signs import BINS, MOST_DISTANCE, NEAR


LEAST_SPREAD = 0.05  # a map of shares around 50 % has its strongest colours at least this far from it
OPERANDS = ("query", "key", "value")
MOST_ROWS = 40  # of a table of curves
EXACT_COSTS = {
    "quantized_weights": "Weights in bits",
    "parameters": "Parameters",
    "bops": "BOPs",
    "flops": "FLOPs",
    "ops": "OPs",
    "bit_bytes": "Bytes of bits",
    "float_bytes": "Other bytes",
}


def section(identifier: str, title: str, *content: object) -> Raw:
    return tag("section", tag("h2", title, id=identifier), *content, aria_labelledby=identifier)


def per_hundred(share: float) -> str:
    """The number of a percentage, for maps of cells."""
    return percent(share).removesuffix(" %")


def missing(sentence: str) -> Raw:
    return tag("p", sentence, class_="missing")


# ---- Network and costs ----


def network(config: PreTrainedConfig) -> Raw:
    rows = []
    for stage, (height, width) in enumerate(config.grid_sizes):
        ratio = config.sequence_reduction_ratios[stage]
        and_class = " + 1" if config.use_class_token else ""
        rows.append(
            (
                stage + 1,
                f"{height} {TIMES} {width}{and_class}",
                f"{height // ratio} {TIMES} {width // ratio}{and_class}",
                config.hidden_sizes[stage],
                config.depths[stage],
                config.num_attention_heads[stage],
                config.intermediate_sizes[stage],
            )
        )
    head = ("Stage", "Tokens", "Keys", "Channels", "Layers", "Heads", "MLP width")
    return section(
        "network",
        "The network",
        tag(
            "p",
            "From the image on the left to the labels on the right: layers are as high as their map of tokens, and wider with "
            "more channels. In the tables, 2.1 is the first layer of stage 2, and “to 2” are the patch embeddings before it.",
        ),
        pyramid(config),
        legend([("bits", f"{config.weight_bits}-bit weights"), ("floats", "full precision")]),
        table("The stages of the network", head, rows),
    )


def pyramid(config: PreTrainedConfig) -> Raw:
    """Boxes from left to right; the table of the stages says the same."""
    quantized = config.weight_bits < 32
    layer_kind = "bits" if quantized else "floats"
    between_kind = "bits" if quantized and config.binarize_patch_embeddings else "floats"
    boxes = [("floats", config.grid_sizes[0][0], 0.3)]
    widest = max(config.hidden_sizes)
    for stage, (height, _) in enumerate(config.grid_sizes):
        boxes += [(between_kind, height, 0.3)] if stage else []
        boxes += [(layer_kind, height, 0.4 + config.hidden_sizes[stage] / widest)] * config.depths[stage]
    boxes.append(("floats", 0, 0.3))
    gap, highest = 0.12, config.grid_sizes[0][0]
    scale = 100 / (sum(width for *_, width in boxes) + gap * (len(boxes) - 1))
    rects, left = [], 0.0
    for kind, height, width in boxes:
        tall = 3 + 17 * height / highest
        rects.append(
            Raw(
                f'<rect class="{kind}" x="{left:.2f}" y="{(20 - tall) / 2:.2f}" width="{width * scale:.2f}" '
                f'height="{tall:.2f}" rx="0.6"/>'
            )
        )
        left += (width + gap) * scale
    return tag("svg", *rects, class_="pyramid", viewBox="0 0 100 20", aria_hidden="true")


def cost(measurements: Measurements) -> Raw:
    parts, ops = measurements.parts, measurements.total("ops")
    header, all_bytes = measurements.header_bytes, measurements.all_bytes
    most_ops = max(part.ops for part in parts)
    most_bytes = max(header, *(part.stored_bytes for part in parts))
    rows = []
    for part in parts:
        in_bits = [("bits", part.bops / 64 / most_ops), ("floats", part.flops / most_ops)]
        in_bytes = [("bits", part.bit_bytes / most_bytes), ("floats", part.float_bytes / most_bytes)]
        rows.append(
            (
                part.part,
                bar_cell(readable(part.ops), percent(part.ops / ops), in_bits),
                bar_cell(size(part.stored_bytes), percent(part.stored_bytes / all_bytes), in_bytes),
            )
        )
    foot: list[Sequence[object]] = [("in all", readable(ops), size(all_bytes))]
    kinds = [("bits", "operations and bytes of bits"), ("floats", "in full precision")]
    if header:
        of_header = bar_cell(size(header), percent(header / all_bytes), [("rest", header / most_bytes)])
        foot.insert(0, ("file header", "", of_header))
        kinds.append(("rest", "names, shapes and checksums of the tensors"))
    exact = [(part.part, *(f"{getattr(part, name):,.0f}" for name in EXACT_COSTS)) for part in parts]
    totals = ("in all", *(f"{measurements.total(name):,.0f}" for name in EXACT_COSTS))
    what = "packed checkpoint" if measurements.is_packed else "latent checkpoint, whose weights are floats"
    return section(
        "cost",
        "What each part costs",
        tag(
            "p",
            "64 bit operations count as one operation. What is left in full precision therefore weighs more than its few "
            f"parameters suggest. Bytes are those of the {what}.",
        ),
        legend(kinds),
        table("Operations of one image, and stored bytes", ("Part", "OPs", "Bytes"), rows, foot, class_="bars"),
        details("All numbers", table("Exact numbers of every part", ("Part", *EXACT_COSTS.values()), exact, [totals])),
    )


def bar_cell(number: str, share: str, parts: Sequence[tuple[str, float]]) -> Raw:
    return join([tag("span", tag("span", share), Raw(" "), number), bar(parts)])


# ---- Attention and activations ----


def origin(pictures: Pictures, measured: int) -> Raw:
    """One sentence about the pictures of a measurement."""
    chosen = f", chosen evenly from {pictures.found:,}" if pictures.found > len(pictures.pictures) else ""
    of = {"picture": "", "example picture": " of the model", "evaluation picture": " of the run"}[pictures.kind]
    sentence = f"Measured on {counted(measured, pictures.kind)}{of}{chosen}."
    if pictures.kind == "example picture":
        return join([f"{sentence} For numbers of your data, run again with ", tag("code", "--images FOLDER"), "."])
    return text(sentence)


NO_PICTURES = (
    "Not measured: there is no picture of the model's data beside it, and random noise would say nothing about real pictures. "
    "Run again with --images FOLDER."
)
UNREADABLE_PICTURES = "Not measured: the pictures beside the model cannot be read. Run again with --images FOLDER."
NO_PROCESSOR = (
    "Not measured: the model has no image processor (preprocessor_config.json), so it is not known how its pictures are resized "
    "and normalised."
)


def why_not_measured(found: PictureMeasurements | None, has_processor: bool) -> Raw:
    if not has_processor:
        return missing(NO_PROCESSOR)
    return missing(NO_PICTURES if found is None else UNREADABLE_PICTURES)


def attention(
    found: PictureMeasurements | None, pictures: Pictures | None, config: PreTrainedConfig, has_processor: bool
) -> Raw:
    title = "How sparse attention is"
    lead = "Share of the attention probabilities that are quantised to 0, for each head. A head with 100 % passes nothing on."
    if config.input_bits == 1:
        lead += " With 1 bit, a head with 0 % takes all keys alike: neither of the two chooses between keys."
    if config.input_bits == 32:
        return section("attention", title, missing("Not measured: the attention probabilities have 32 bits."))
    if found is None or pictures is None or not found.pictures:
        return section("attention", title, tag("p", lead), why_not_measured(found, has_processor))
    heads = max(len(sparsity.shares) for sparsity in found.attention.values())
    rows = [
        (part, *pad([Cell(per_hundred(share), share) for share in sparsity.shares], heads))
        for part, sparsity in found.attention.items()
    ]
    exact = [
        (part, head + 1, sparsity.keys, f"{(1 - share) * sparsity.keys:.1f}", percent(share), percent(empty))
        for part, sparsity in found.attention.items()
        for head, (share, empty) in enumerate(zip(sparsity.shares, sparsity.empty_shares))
    ]
    names = ("Layer", "Head", "Keys", "Keys above 0 for a query", "Zeros", "Queries without a key")
    return section(
        "attention",
        title,
        tag("p", lead),
        tag("p", origin(pictures, found.pictures), class_="note"),
        table(
            "Zeros of the attention by layer and head, in %",
            ("Layer", *(f"head {head + 1}" for head in range(heads))),
            rows,
            class_="map",
        ),
        details("All numbers", table("Attention of every head", names, exact)),
    )


def pad(cells: Sequence[object], length: int) -> list[object]:
    return [*cells, *[""] * (length - len(cells))]


def activations(
    found: PictureMeasurements | None, pictures: Pictures | None, config: PreTrainedConfig, has_processor: bool
) -> Raw:
    title = "Signs of the activations"
    lead = (
        "A bit carries most information if it is +1 half of the time. A channel that never changes its sign carries none: "
        "a constant could replace it."
    )
    if config.input_bits > 1:
        return section(
            "activations", title, missing(f"Not measured: activations have {config.input_bits} bits, not 1.")
        )
    if found is None or pictures is None or not found.pictures:
        return section("activations", title, tag("p", lead), why_not_measured(found, has_processor))
    spread = max(
        LEAST_SPREAD, *(abs(signs.share - 0.5) for signs in (*found.inputs.values(), *found.operands.values()))
    )
    shares, constant = (
        {
            kind: {place: make(signs) for place, signs in places.items()}
            for kind, places in (("inputs", found.inputs), ("operands", found.operands))
        }
        for make in (
            lambda signs: Cell(per_hundred(signs.share), (signs.share - 0.5) / spread),
            lambda signs: Cell(per_hundred(signs.constant / signs.channels), signs.constant / signs.channels),
        )
    )
    caution = " One picture has few tokens, so channels may seem constant by chance." if found.pictures == 1 else ""
    return section(
        "activations",
        title,
        tag("p", lead),
        tag("p", origin(pictures, found.pictures), caution, class_="note"),
        tag("h3", "Share of +1"),
        spread_legend(spread),
        activation_map("Share of +1 of the activations, in %", shares),
        tag("h3", "Channels that never change their sign"),
        activation_map("Channels with one sign at all tokens of all pictures, in %", constant),
    )


def activation_map(caption: str, cells: Mapping[str, Mapping[Place, Cell]]) -> Raw:
    """A row for each part: inputs of its layers, then query, key and value as the attention multiplies them."""
    inputs, operands = cells["inputs"], cells["operands"]
    roles = [role for role in ROLES.values() if any(place.role == role for place in inputs)]
    parts = dict.fromkeys(place.part for place in inputs)
    rows = [
        (
            part,
            *(inputs.get(Place(part, role), "") for role in roles),
            *(operands.get(Place(part, role), "") for role in OPERANDS),
        )
        for part in parts
    ]
    groups = [("", 1), ("input of the layer", len(roles)), ("in the attention", len(OPERANDS))]
    return table(caption, ("Part", *roles, *OPERANDS), rows, groups=groups, class_="map")


def spread_legend(spread: float) -> Raw:
    return tag("p", legend_text(spread), class_="note")


def legend_text(spread: float) -> str:
    return f"The colour is strongest at {percent(0.5 - spread)} (more {MINUS}1) and {percent(0.5 + spread)} (more +1)."


# ---- Weights ----


def weights(measurements: Measurements, config: PreTrainedConfig) -> Raw:
    title = "Signs of the weights"
    if not measurements.weights:
        return section("weights", title, missing("Not measured: the weights have 32 bits, so they have no levels."))
    spread = max(LEAST_SPREAD, *(abs(signs.share - 0.5) for signs in measurements.weights.values()))
    one_bit = config.weight_bits == 1
    kind = "+1" if one_bit else "positive weights"
    cells = {
        place: Cell(per_hundred(signs.share), (signs.share - 0.5) / spread if one_bit else signs.share)
        for place, signs in measurements.weights.items()
    }
    names = ("Part", "Layer", "Weights", kind, "Share", *(() if one_bit else ("Zeros",)))
    exact = [
        (place.part, place.role, f"{signs.total:,}", f"{signs.positive:,}", percent(signs.share))
        + (() if one_bit else (percent(signs.zero / signs.total),))
        for place, signs in measurements.weights.items()
    ]
    lead = f"Share of {kind} in each layer. " + (
        "The mean of a row is subtracted before the sign is taken (not in patch embeddings), so shares near 50 % are normal. A "
        "share far from it means "
        "that a few large weights outweigh many small ones."
        if one_bit
        else f"Weights have {config.weight_bits} bits, zero included."
    )
    return section(
        "weights",
        title,
        tag("p", lead),
        spread_legend(spread) if one_bit else "",
        role_map(f"Share of {kind} of the weights, in %", cells),
        details("All numbers", table("Weights of every layer", names, exact)),
    )


def role_map(caption: str, cells: Mapping[Place, Cell]) -> Raw:
    roles = [role for role in ROLES.values() if any(place.role == role for place in cells)]
    parts = dict.fromkeys(place.part for place in cells)
    rows = [(part, *(cells.get(Place(part, role), "") for role in roles)) for part in parts]
    return table(caption, ("Part", *roles), rows, class_="map")


def latent(measurements: Measurements, records: RunRecords, config: PreTrainedConfig) -> Raw:
    title = "How near latent weights are to a change of sign"
    if config.weight_bits > 1:
        return section("latent", title, missing(f"Not measured: weights have {config.weight_bits} bits, not 1."))
    if not measurements.latent:
        return section(
            "latent",
            title,
            missing(
                "Not measured: this checkpoint is packed. It holds only the signs, not how near they are to a change. Inspect "
                "the folder “latent” of the training run, or one of its checkpoints."
            ),
        )
    stages = dict.fromkeys(place.part for place in measurements.latent)
    of_stage = {stage: [layer for place, layer in measurements.latent.items() if stage_of(place.part) == stage]
                for stage in dict.fromkeys(map(stage_of, stages))}  # fmt: skip
    shares = {
        stage: [
            sum(counts) / sum(layer.total for layer in layers)
            for counts in zip(*(layer.histogram for layer in layers))
        ]
        for stage, layers in of_stage.items()
    }
    middle = {BINS // 2 - 1, BINS // 2}
    panels = [
        columns(
            f"Stage {stage}",
            f"Histogram of the latent weights of stage {stage}, in percent of the weights, by distance from zero",
            [100 * share for share in heights],
            (-MOST_DISTANCE, MOST_DISTANCE),
            middle,
        )
        for stage, heights in shares.items()
    ]
    most = max(layer.near[1] / layer.total for layer in measurements.latent.values())
    cells = {
        place: Cell(per_hundred(layer.near[1] / layer.total), layer.near[1] / layer.total / most if most else 0.0)
        for place, layer in measurements.latent.items()
    }
    steps = [f"Within a step of {rate:.3g} ({name})" for name, rate in records.learning_rates.items()]
    names = ("Part", "Layer", "Weights", *(f"Nearer than {part:g}" for part in NEAR), *steps, "Without gradient")
    exact = [
        (
            *(place.part, place.role, f"{layer.total:,}"),
            *(f"{number:,}" for number in (*layer.near, *layer.within_step, layer.without_gradient)),
        )
        for place, layer in measurements.latent.items()
    ]
    bins = [
        (
            f"{2 * MOST_DISTANCE * start / BINS - MOST_DISTANCE:+.1f} to {2 * MOST_DISTANCE * (start + 5) / BINS - MOST_DISTANCE:+.1f}",
            *(percent(sum(heights[start : start + 5])) for heights in shares.values()),
        )
        for start in range(0, BINS, 5)
    ]
    return section(
        "latent",
        title,
        tag(
            "p",
            "A sign changes where its latent weight crosses zero. Weights near zero may change their sign back and forth, which "
            "makes training noisy; freezing them or a smaller learning rate may help. A normal distribution has 6.4 % nearer "
            "than a tenth of the mean distance.",
        ),
        legend([("bits", "share of the weights, in %"), ("warning", "nearer than a tenth of the mean distance")]),
        tag("div", *panels, class_="panels"),
        tag("h3", "Weights nearer than a tenth of the mean distance of their row"),
        role_map("Share of such weights in each layer, in %", cells),
        details(
            "All numbers",
            table("Latent weights near zero; distances are parts of the mean distance of a row", names, exact),
            table(
                "The histograms: share of the weights by distance; the outer rows hold all that is further out",
                ("Distance", *(f"stage {stage}" for stage in shares)),
                bins,
            ),
        ),
    )


def stage_of(part: str) -> str:
    """`2` for the layer `2.1` and the patch embeddings `to 2`."""
    return part.removeprefix("to ").partition(".")[0] if part not in (STEM, HEAD) else part


# ---- Learning curves ----


def learning_curves(records: RunRecords) -> Raw:
    title = "Learning curves"
    history, kind = records.history, records.history.evaluation_images
    if kind == TRAINING:
        kind = UNKNOWN  # the training loss has a name of its own
    loss = find_values(history, "loss") or find_values(history, "train_loss")
    metrics = {
        "training loss": loss,
        f"{kind} loss": find_values(history, "eval_loss"),
        f"{kind} accuracy": [(epoch, 100 * value) for epoch, value in find_values(history, "eval_accuracy")],
        "learning rate": find_values(history, "learning_rate"),
    }
    # The results at the end of a run are one point; they are no curve.
    if history.is_logged and any(metrics.values()):
        return section("curves", title, *drawn_curves(metrics, kind, history.is_distilled))
    if records.curves_picture is not None:
        source = f"data:image/png;base64,{base64.b64encode(records.curves_picture).decode()}"
        return section(
            "curves",
            title,
            tag("p", "The run's own drawing. Its numbers (trainer_state.json) are not beside the model."),
            Raw(f'<img src="{source}" alt="Learning curves of the run: loss and accuracy over the epochs">'),
        )
    return section("curves", title, missing("Not recorded: the model has no trainer_state.json beside it."))


def drawn_curves(metrics: Mapping[str, list[tuple[float, float]]], kind: str, is_distilled: bool) -> list[Raw]:
    training, evaluated = metrics["training loss"], Series(f"{kind} images", metrics[f"{kind} loss"], "second")
    panels = []
    if is_distilled:
        panels.append(("Distillation loss", "cross-entropy with the teacher", [Series("training images", training)]))
        panels.append(("Label loss", "cross-entropy with the labels", [evaluated]))
    else:
        both = [Series("training images", training), evaluated]
        panels.append(("Label loss", "cross-entropy with the labels", both))
    panels.append(("Top-1 accuracy, %", "%", [evaluated._replace(points=metrics[f"{kind} accuracy"])]))
    panels.append(("Learning rate", "of the weights", [Series("learning rate", metrics["learning rate"])]))
    figures = []
    for name, unit, series in panels:
        if shown := [each for each in series if each.points]:
            figures.append(curves(name, unit, shown))
    named = {name: dict(points) for name, points in metrics.items() if points}
    epochs = sorted({epoch for points in named.values() for epoch in points})
    # Evaluations first: a run that logs by steps has many points without one.
    evaluations = (f"{kind} loss", f"{kind} accuracy")
    with_evaluation = sorted({epoch for name in evaluations for epoch, _ in metrics[name]})
    chosen = choose_rows(with_evaluation, MOST_ROWS)
    others = sorted(set(epochs) - set(with_evaluation))
    chosen = sorted([*chosen, *choose_rows(others, MOST_ROWS - len(chosen))])
    rows = [
        (f"{epoch:g}", *(f"{points[epoch]:.4g}" if epoch in points else "" for points in named.values()))
        for epoch in chosen
    ]
    caption = (
        f"{len(rows)} of {len(epochs):,} points that the run logged"
        if len(rows) < len(epochs)
        else "What the run logged"
    )
    return [
        tag(
            "p",
            "Accuracy that still rises at the end asks for more epochs. An evaluation curve that jumps is often due to signs that flip "
            "back and forth.",
        ),
        tag("div", *figures, class_="panels"),
        details("All numbers", table(caption, ("Epoch", *named), rows)),
    ]


def choose_rows(epochs: Sequence[float], most: int) -> list[float]:
    """At most `most` epochs, evenly spaced, with the last one, which is the result."""
    if len(epochs) <= most:
        return list(epochs)
    return [epochs[(index + 1) * len(epochs) // most - 1] for index in range(most)]


# ---- Terms ----


def terms() -> Raw:
    entries = {
        "BOPs": "Bit operations: multiply-accumulates times the bits of both operands (DoReFa-Net). "
        "Normalisation, activation functions, softmax, pooling and additions are not counted.",
        "FLOPs": "Multiply-accumulates with an operand in full precision.",
        "OPs": "FLOPs + BOPs / 64 (ReActNet). “binaryvit ops” prints the same sums by kind of layer.",
        "Bytes": "Stored bytes of the tensors, and the size of the checkpoint's files. The file header is the difference.",
        "Zeros of the attention": "Probabilities that round to 0 on the learned step of their layer (BiT).",
        "Distance": f"Of a latent weight from the value where its sign changes: |w {MINUS} mean of the row|, because rows are centred "
        "(BiBERT); |w| in patch embeddings.",
        "Without gradient": "Latent weights whose distance is above 1, where the gradient of the sign is 0.",
    }
    return section(
        "terms",
        "Terms",
        tag("dl", *(join([tag("dt", name), tag("dd", meaning)]) for name, meaning in entries.items()), class_="terms"),
    )
