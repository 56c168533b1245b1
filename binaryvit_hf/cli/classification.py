"""Pictures in files to labels: a batch of tensors at a time, and never more than one picture in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL.Image import Image
from transformers import ImageClassificationPipeline

from ..data.image_files import Listed
from ..errors import UserError, first_sentence
from ..pixels import describe_unreadable, is_transparent, open_picture, to_rgb


BATCH_SIZE = 16


@dataclass
class Answer:
    """Labels with their scores of one file, or why there are none."""

    image: str
    labels: list[dict] | None = None
    error: str | None = None
    transparent: bool = False

    def describe(self) -> dict:
        return {"image": self.image, **({"error": self.error} if self.error else {"labels": self.labels})}


def classify_files(
    classifier: ImageClassificationPipeline, files: Iterable[Listed], background: str | None, top_k: int
) -> Iterator[Answer]:
    """The answers in the order of the files."""
    waiting: list[Answer] = []
    inputs: list[dict[str, torch.Tensor]] = []
    for name, fault in files:
        answer = Answer(name, error=fault and f"{name!r} {fault}.")
        if fault is None:
            try:
                tensors = preprocess(classifier, answer, background)
            except Exception as error:  # a damaged file makes Pillow raise anything
                answer.error = describe_unreadable(name, error)
            else:
                if inputs and shapes(tensors) != shapes(inputs[0]):  # of a processor that does not resize
                    yield from fill_in(classifier, waiting, inputs, top_k)
                    waiting, inputs = [], []
                inputs.append(tensors)
        waiting.append(answer)
        if len(waiting) == BATCH_SIZE:
            yield from fill_in(classifier, waiting, inputs, top_k)
            waiting, inputs = [], []
    yield from fill_in(classifier, waiting, inputs, top_k)


def preprocess(
    classifier: ImageClassificationPipeline, answer: Answer, background: str | None
) -> dict[str, torch.Tensor]:
    """The inputs of the network, and in `answer` whether the picture is transparent. The picture is let go."""
    # `classifier.preprocess` does the same, and copies the picture twice before.
    inputs = classifier.image_processor(images=read(answer, background), return_tensors="pt")
    return dict(inputs.to(classifier.dtype))


def read(answer: Answer, background: str | None) -> Image:
    with open_picture(answer.image) as picture:
        answer.transparent = is_transparent(picture)
        return to_rgb(picture, background)


def shapes(tensors: dict[str, torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors.values()]


def fill_in(
    classifier: ImageClassificationPipeline, answers: list[Answer], inputs: list[dict[str, torch.Tensor]], top_k: int
) -> Iterator[Answer]:
    """
    The answers, those without an error with the labels of `inputs`, in their order.

    Raises:
        UserError: the network's answers are no numbers.
    """
    readable = [answer for answer in answers if answer.error is None]
    try:
        for answer, labels in zip(readable, compute_labels(classifier, inputs, top_k)):
            answer.labels = labels
    except UserError:
        raise
    except Exception as error:  # a network raises whatever its layers raise
        for answer in readable:
            answer.error = f"{answer.image!r} cannot be classified: the network fails ({first_sentence(error)})."
    yield from answers


def compute_labels(
    classifier: ImageClassificationPipeline, inputs: list[dict[str, torch.Tensor]], top_k: int
) -> list[list[dict]]:
    if not inputs:
        return []
    batch = {name: torch.cat([tensors[name] for tensors in inputs]) for name in inputs[0]}
    logits = classifier.forward(batch)["logits"]
    if not logits.isfinite().all():
        name = classifier.model.name_or_path
        raise UserError(f"The model {name!r} answers with numbers that are not finite: it is damaged, or diverged.")
    return [classifier.postprocess({"logits": row[None]}, top_k=top_k) for row in logits]
