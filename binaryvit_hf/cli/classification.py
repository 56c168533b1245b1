"""Classify image files with transformers, in batches. At most one decoded picture is in memory at a time."""

from collections.abc import Iterable, Iterator

import torch
from PIL.Image import Image
from transformers import ImageClassificationPipeline

from binaryvit_runtime.classifier import Answer
from binaryvit_runtime.errors import UserError, first_sentence
from binaryvit_runtime.image_files import ImageFile
from binaryvit_runtime.pixels import describe_unreadable, is_transparent, open_picture, to_rgb


BATCH_SIZE = 16


def classify_files(
    classifier: ImageClassificationPipeline, files: Iterable[ImageFile], background: str | None, top_k: int
) -> Iterator[Answer]:
    """Yield the answers in the order of the files."""
    batch: list[Answer] = []
    inputs: list[dict[str, torch.Tensor]] = []
    for name, fault in files:
        answer = Answer(name, error=fault and f"{name!r} {fault}.")
        if fault is None:
            try:
                tensors = preprocess(classifier, answer, background)
            except Exception as error:  # Pillow raises anything for a damaged file
                answer.error = describe_unreadable(name, error)
            else:
                if inputs and shapes(tensors) != shapes(inputs[0]):  # the processor does not resize
                    yield from classify_batch(classifier, batch, inputs, top_k)
                    batch, inputs = [], []
                inputs.append(tensors)
        batch.append(answer)
        if len(batch) == BATCH_SIZE:
            yield from classify_batch(classifier, batch, inputs, top_k)
            batch, inputs = [], []
    yield from classify_batch(classifier, batch, inputs, top_k)


def preprocess(
    classifier: ImageClassificationPipeline, answer: Answer, background: str | None
) -> dict[str, torch.Tensor]:
    """Read the file of `answer` and return the inputs of the network. Sets `answer.transparent`."""
    # Not `classifier.preprocess`, which copies the picture twice.
    inputs = classifier.image_processor(images=read_picture(answer, background), return_tensors="pt")
    return dict(inputs.to(classifier.dtype))


def read_picture(answer: Answer, background: str | None) -> Image:
    with open_picture(answer.image) as picture:
        answer.transparent = is_transparent(picture)
        return to_rgb(picture, background)


def shapes(tensors: dict[str, torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors.values()]


def classify_batch(
    classifier: ImageClassificationPipeline, answers: list[Answer], inputs: list[dict[str, torch.Tensor]], top_k: int
) -> Iterator[Answer]:
    """
    Classify `inputs`, which belong to the answers without an error, and yield all answers with their labels.

    Raises:
        UserError: logits are not finite.
    """
    readable = [answer for answer in answers if answer.error is None]
    try:
        if inputs:
            batch = {name: torch.cat([tensors[name] for tensors in inputs]) for name in inputs[0]}
            logits = classifier.forward(batch)["logits"]
            if not logits.isfinite().all():
                name = classifier.model.name_or_path
                raise UserError(
                    f"The logits of the model {name!r} are not finite: it is damaged, or its training diverged."
                )
            for answer, row in zip(readable, logits):
                answer.labels = classifier.postprocess({"logits": row[None]}, top_k=top_k)
    except UserError:
        raise
    except Exception as error:  # layers may raise anything
        for answer in readable:
            answer.error = f"{answer.image!r} cannot be classified: the network fails ({first_sentence(error)})."
    yield from answers
