"""All measurements of one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from binaryvit_runtime.errors import UserError

from ..network.layers_binaryvit import BinaryLayer
from ..network.packing_binaryvit import packed_layers
from .attention import HeadSparsity
from .parts import Place, attentions, part_of, place_of, quantizable_layers
from .pictures import Pictures, read_batches
from .signs import LatentWeights, WeightSigns, count_weight_signs, counted_signs, measure_latent_weights
from .storage import PartCost, file_bytes, measure_parts


@dataclass(frozen=True)
class ActivationSigns:
    """
    Signs of 1-bit activations.

    Args:
        share: share of +1.
        constant: number of channels with the same sign at all tokens of all pictures.
        channels: number of channels.
    """

    share: float
    constant: int
    channels: int


@dataclass(frozen=True)
class PictureMeasurements:
    """
    What depends on the pictures.

    Args:
        pictures: number of pictures that were measured. Without any there are faults only.
        faults: one sentence for each picture that was left out.
        inputs: signs of the layers' inputs. Empty if activations do not have 1 bit.
        operands: signs of query, key and value in the attention products. Empty likewise.
        attention: zeros of the attention probabilities, by part. Empty if activations have 32 bits.
    """

    pictures: int
    faults: list[str]
    inputs: dict[Place, ActivationSigns]
    operands: dict[Place, ActivationSigns]
    attention: dict[str, HeadSparsity]


@dataclass(frozen=True)
class Measurements:
    """
    All measurements of one model.

    Args:
        is_packed: whether the checkpoint holds bits.
        parts: cost of every part, from input to output.
        file_bytes: bytes of the weight files; 0 if they were not found.
        weights: signs of the quantised weights. Empty if weights have 32 bits.
        latent: distances of the latent weights. Empty if there are none, or if weights do not have 1 bit.
        of_pictures: None if there were no pictures.
    """

    is_packed: bool
    parts: list[PartCost]
    file_bytes: int
    weights: dict[Place, WeightSigns]
    latent: dict[Place, LatentWeights]
    of_pictures: PictureMeasurements | None = None

    def total(self, name: str) -> float:
        """Sum over the parts of one number of `PartCost`."""
        return sum(getattr(part, name) for part in self.parts)

    @property
    def header_bytes(self) -> int:
        """Bytes of the files beside the tensors: names, shapes, checksums. 0 if the files were not found."""
        return max(self.file_bytes - sum(part.stored_bytes for part in self.parts), 0)

    @property
    def all_bytes(self) -> int:
        return self.header_bytes + sum(part.stored_bytes for part in self.parts)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    folder: Path,
    latent: PreTrainedModel | None = None,
    learning_rates: Sequence[float] = (),
    processor: BaseImageProcessor | None = None,
    pictures: Pictures | None = None,
) -> Measurements:
    """
    Measure a BinaryViT classifier.

    Args:
        model: packed or latent.
        folder: of its weight files.
        latent: the model with the latent weights of `model`; `model` itself if it is latent; None if there are none.
        learning_rates: of the latent weights' training, to count weights within one step.
        processor: of the model. Needed with pictures.
        pictures: to measure activations and attention on.

    Raises:
        UserError: none of the pictures that the user gave can be read.
    """
    layers = {place_of(name): layer for name, layer in quantizable_layers(model).items() if layer.weight_bits < 32}
    latent_layers = {} if latent is None else quantizable_layers(latent)
    return Measurements(
        is_packed=bool(packed_layers(model)),
        parts=measure_parts(model),
        file_bytes=file_bytes(folder),
        weights={place: count_weight_signs(layer) for place, layer in layers.items()},
        latent={
            place_of(name): measure_latent_weights(layer, learning_rates)
            for name, layer in latent_layers.items()
            if isinstance(layer, BinaryLayer) and layer.weight_bits == 1
        },
        of_pictures=None if pictures is None else measure_on_pictures(model, processor, pictures),
    )


def measure_on_pictures(
    model: PreTrainedModel, processor: BaseImageProcessor, pictures: Pictures
) -> PictureMeasurements:
    faults: list[str] = []
    parts = [part_of(name) for name in attentions(model)]
    count, sparsity = 0, {}
    is_quantized = model.config.input_bits < 32
    with counted_signs(model) as (inputs, operands):
        for pixel_values in read_batches(pictures.pictures, model, processor, faults):
            count += len(pixel_values)
            probabilities = model(pixel_values, output_attentions=True).attentions
            for part, of_layer in zip(parts, probabilities if is_quantized else ()):
                found = HeadSparsity.of(of_layer)
                sparsity[part] = sparsity[part] + found if part in sparsity else found
    if not count:
        if pictures.kind == "picture":
            raise UserError(f"None of the pictures can be read: {faults[0]}")
        return PictureMeasurements(0, faults, {}, {}, {})
    as_signs = {
        kind: {
            place: ActivationSigns(counter.share, counter.constant, counter.channels)
            for name, counter in counters.items()
            for place in [place_of(name if kind == "inputs" else f"{name}.linear")]
        }
        for kind, counters in (("inputs", inputs), ("operands", operands))
    }
    return PictureMeasurements(count, faults, as_signs["inputs"], as_signs["operands"], sparsity)
