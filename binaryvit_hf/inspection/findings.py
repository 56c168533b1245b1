"""The facts of a network that a reader should see first, as sentences, and the formats of their numbers."""

from transformers import PreTrainedConfig

from binaryvit_runtime.errors import counted

from ..ops import readable
from .measurements import Measurements, PictureMeasurements
from .parts import HEAD, STEM
from .records import RunRecords


def percent(share: float) -> str:
    """`12.3 %`. Small parts of a whole do not become 0 or 100."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def find_findings(measurements: Measurements, records: RunRecords, config: PreTrainedConfig) -> list[str]:
    """Sentences about costs, attention, activations and latent weights, as far as they are measured."""
    findings = describe_cost(measurements, config.weight_bits)
    if measurements.of_pictures is not None:
        findings += describe_attention(measurements.of_pictures, config.input_bits)
        findings += describe_activations(measurements.of_pictures)
    return findings + describe_latent(measurements, records)


def describe_cost(measurements: Measurements, weight_bits: int) -> list[str]:
    parts, total = measurements.parts, measurements.total
    ops = total("ops")
    largest = max(parts, key=lambda part: part.ops)
    findings = [
        f"Bit operations are {percent(total('bops') / 64 / ops)} of all operations. The most expensive layer is {name_of(largest.part)}, with "
        f"{percent(largest.ops / ops)}."
    ]
    if weight_bits == 32:
        return ["The weights have 32 bits, so none is a single bit.", *findings]
    bits = "single bits" if weight_bits == 1 else f"numbers of {weight_bits} bits"
    share = percent(total("quantized_weights") / total("parameters"))
    if not measurements.is_packed:
        return [f"{share} of the parameters become {bits} in a packed checkpoint.", *findings]
    sentence = f"{share} of the parameters are {bits}"
    if measurements.file_bytes:
        sentence += f", and they take {percent(total('bit_bytes') / measurements.file_bytes)} of the file"
    return [f"{sentence}.", *findings]


def name_of(part: str) -> str:
    if part in (STEM, HEAD):
        return f"the {part}"
    return part if "." in part else f"the patch embeddings {part}"


def describe_attention(found: PictureMeasurements, input_bits: int) -> list[str]:
    heads = [
        (share, empty)
        for sparsity in found.attention.values()
        for share, empty in zip(sparsity.shares, sparsity.empty_shares)
    ]
    if not heads:
        return []
    mean = sum(share for share, _ in heads) / len(heads)
    findings = [f"The attention of a head is 0 at {percent(mean)} of its keys on average."]
    all_keys = sum(share == 0 for share, _ in heads)
    if all_keys and input_bits == 1:  # more bits have several levels above 0
        findings.append(f"Heads that have no 0 at all, and take all keys alike: {all_keys} of {len(heads)}.")
    if nothing := sum(share == 1 for share, _ in heads):
        findings.append(f"Heads that are 0 everywhere, and pass nothing on: {nothing} of {len(heads)}.")
    return findings


def describe_activations(found: PictureMeasurements) -> list[str]:
    inputs = found.inputs.values()
    channels = sum(signs.channels for signs in inputs)
    if not channels:
        return []
    constant = sum(signs.constant for signs in inputs) / channels
    pictures = counted(found.pictures, "picture")
    if constant == 0:
        return [f"Every input channel of the 1-bit layers changes its sign on {pictures}."]
    return [f"{percent(constant)} of the input channels of 1-bit layers never change their sign on {pictures}."]


def describe_latent(measurements: Measurements, records: RunRecords) -> list[str]:
    layers = measurements.latent.values()
    if not layers:
        return []
    total = sum(layer.total for layer in layers)
    near = sum(layer.near[0] for layer in layers)
    findings = [
        f"{percent(near / total)} of the weights are nearer to a change of sign than 1 % of the mean distance."
    ]
    for index, (name, rate) in enumerate(records.learning_rates.items()):
        steps = sum(layer.within_step[index] for layer in layers)
        findings.append(
            f"One step of Adam at the {name} learning rate that the run logged, {rate:.3g}, could change the signs of {steps:,} weights "
            f"({percent(steps / total)})."
        )
    if stuck := sum(layer.without_gradient for layer in layers):
        findings.append(f"{percent(stuck / total)} of the weights are so far from zero that they get no gradient.")
    return findings


def describe_accuracy(records: RunRecords) -> str | None:
    """`89.31 % top-1 accuracy (10,000 test images)`, or None if it is not recorded."""
    accuracies, images = records.accuracy()
    if not accuracies:
        return None
    name, value = next(iter(accuracies.items()))
    return f"{100 * value:.2f} % {name} ({images})"


def size(number: float) -> str:
    return readable(number, "B")
