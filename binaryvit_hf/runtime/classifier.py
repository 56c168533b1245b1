"""Classifies pictures with a packed model on the engine, without PyTorch: `Classifier`."""

import contextlib
import io
import itertools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from PIL import Image

from .cpus import available_cpus
from .engine.preprocessing import CHANNELS
from .errors import LoadingError, NoModelError, UnsupportedModelError, UserError, first_sentence
from .image_files import ImageFile, list_images
from .packed_model import PackedModel, as_they_are, choose_kernels, load_packed_model, local_folder
from .pixels import describe_unreadable, is_transparent, normalize_colour, open_picture, to_rgb
from .resources import shipped_models
from .sources import fetch


MAX_THREADS = 1024
MOST_LAYERS = 9  # of file objects, each of which reads from the next
LOOKAHEAD = 4  # pictures for each thread that are read ahead

Picture: TypeAlias = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
# Held while a Pillow image of the user is decoded, which changes it: other threads may have it too.
DECODING_LOCK = threading.Lock()
# For each file that threads read, by the id of its object: a lock, and how many threads have it
FILES_READ: dict[int, list] = {}
FILES_LOCK = threading.Lock()  # of the dictionary
if hasattr(os, "register_at_fork"):
    for held in (DECODING_LOCK, FILES_LOCK):
        os.register_at_fork(before=held.acquire, after_in_parent=held.release, after_in_child=held.release)
    os.register_at_fork(after_in_child=FILES_READ.clear)  # their threads are not in the child


@dataclass
class Answer:
    """The labels of one picture with their scores, best first, or the reason why there are none."""

    image: str
    labels: list[dict] | None = None
    error: str | None = None
    transparent: bool = False

    def describe(self) -> dict:
        """The answer for JSON."""
        return {"image": self.image, **({"error": self.error} if self.error else {"labels": self.labels})}


class Classifier:
    """
    Classifies pictures with a packed BinaryViT, as transformers' pipeline does with the same checkpoint.

    It needs numpy, Pillow and safetensors, and the compiled engine. Several threads may call one object at once, and a
    process may fork at any time. A copy, also one by pickle, loads the model again from its folder.

    ```python
    from binaryvit_runtime import Classifier

    classifier = Classifier.from_pretrained("outputs/photos")
    classifier("cat.jpg")  # [{"label": "cat", "score": 0.98}, …]
    ```
    """

    def __init__(self, name: str, folder: Path, model: PackedModel, threads: int, max_pixels: int | None):
        self.name, self.folder, self.threads, self.max_pixels = name, folder.absolute(), threads, max_pixels
        self.network, self.head, self.labels, self.to_scores = model.network, model.head, model.labels, model.to_scores
        self.preprocessor, self.background = model.preprocessor, model.background
        self.spare_images: list[np.ndarray] = []

    def __reduce__(self):
        load = partial(type(self).from_pretrained, threads=self.threads, max_pixels=self.max_pixels)
        return load, (self.folder,)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        threads: int | None = None,
        max_pixels: int | None = None,
        token: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        shipped: Iterable[str] = (),
    ) -> "Classifier":
        """
        Load a packed model with its image processor.

        Args:
            name: a folder, the name of a model that comes with the package, or an id of the Hub. The Hub needs the package
                huggingface_hub.
            threads: number of threads to use. A single picture takes at most one for each CPU, and one if the network is
                small. Default: the CPUs of this process.
            max_pixels: files of larger pictures are refused before they are decoded. Default: 134,217,728, which take more
                than 1 GB of memory.
            token, revision, cache_dir: of the Hub, as for `from_pretrained` of transformers.
            shipped: more names to suggest for a misspelt one.

        Raises:
            UnsupportedModelError: only PyTorch computes this model. The message names what is not supported.
            UserError: there is no such model, or it is damaged. The message says why.
        """
        name = os.fspath(name)
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
            raise UserError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {threads!r}.")
        if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
            raise UserError(f"max_pixels must be a whole number, 1 or more, not {max_pixels!r}.")
        kernels = choose_kernels()

        def load(source: str) -> "Classifier":
            folder = local_folder(source, token, revision, cache_dir)
            model = load_packed_model(folder, name, kernels)
            return cls(name, folder, model, threads or available_cpus(), max_pixels)

        try:
            return fetch(load, name, shipped, cache_dir)
        except NoModelError as error:
            raise UserError(f"The model {name!r} cannot be loaded: {error}") from error
        except UnsupportedModelError:
            raise
        except LoadingError as error:
            if isinstance(error.__cause__, UserError):  # its message has the model's name
                raise UserError(str(error)) from error
            raise UserError(
                f"The model {name!r} cannot be loaded ({str(error).rstrip('.')}); a model is a folder with a config.json, "
                f"an id of the Hub, or one of {', '.join(sorted({*shipped_models(), *shipped}))}."
            ) from error

    def __call__(
        self, images: Picture | Iterable[Picture], top_k: int = 5, background: str | None = "model's"
    ) -> list[dict] | list[list[dict]]:
        """
        Classify one picture, several, or a folder.

        Args:
            images: one picture, a folder, or any iterable of pictures, which is read as the answers need it. A picture is

                - the path of a file,
                - an open binary file, which stays open,
                - a Pillow image, which stays open,
                - an array, uint8, `(height, width)` in grey, `(height, width, 3)` in RGB or `(height, width, 4)` in RGBA.
            top_k: number of labels for each picture; all labels if the model has fewer.
            background: the colour to put behind transparent pixels, such as `white` or `#ffcc00`, or `None` to drop
                transparency. Default: the model's, from its training.

        Returns:
            For one picture, a list of labels with their scores, best first: `[{"label": "cat", "score": 0.98}, …]`. For
            several, a list of such lists, in their order; for a folder, in the order of its sorted files.

        Raises:
            UserError: a picture cannot be read, a folder has no pictures, or an argument is wrong. The message names the
                file, or the number of the picture, from 0.
            Exception: the iterable raised it.
        """
        single = not is_iterable_of_pictures(images)
        pictures = cast("Iterable[Picture | ImageFile]", [images] if single else images)
        if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
            single, pictures = False, list_images([str(Path(images))])[0]
        answers: list[list[dict]] = []
        for number, answer in enumerate(self.stream(pictures, top_k, background)):
            if answer.labels is None:
                error = answer.error or ""
                raise UserError(error if single or repr(answer.image) in error else f"Picture {number}: {error}")
            answers.append(answer.labels)
        return answers[0] if single else answers

    def stream(
        self, images: Iterable[Picture | ImageFile], top_k: int = 5, background: str | None = "model's"
    ) -> Iterator[Answer]:
        """
        Yield the answer to each picture, in their order. A picture that cannot be read has an answer with an `error`.

        Pictures are read ahead, `LOOKAHEAD` for each thread; all threads decode, preprocess and compute at once. The
        thread that reads the answers also reads the iterable.

        Args: see `__call__`.

        Raises:
            UserError: an argument is wrong; or, while the answers are read, the model's logits are not finite.
            Exception: while the answers are read, the iterable raised it. Answers that wait are lost.
        """
        if type(top_k) is not int or top_k < 1:
            raise UserError(f"top_k is the number of labels, 1 or more, not {top_k!r}.")
        if background == "model's":
            background = self.background
        elif background is not None:
            try:
                background = normalize_colour(background)
            except ValueError as error:
                raise UserError(f"background must be None or {error}.") from error
        if not is_iterable_of_pictures(images):
            raise UserError(f"stream takes an iterable of pictures, not a single {type(images).__name__}.")
        return self.answers(iter(images), top_k, background)

    def answers(self, iterator: Iterator[Picture | ImageFile], top_k: int, background: str | None) -> Iterator[Answer]:
        """See `stream`."""
        # With one thread, the first answer does not wait for the second picture.
        first = [] if self.threads == 1 else list(itertools.islice(iterator, 2))
        if len(first) < 2:
            for image in itertools.chain(first, iterator):
                yield self.answer(image, top_k, background, self.threads)
            return
        # Imported only here: it takes a tenth of a cold start.
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.threads) as pool:
            waiting = deque()
            try:
                for image in itertools.chain(first, iterator):
                    waiting.append(pool.submit(self.answer, image, top_k, background, 1))
                    if len(waiting) > LOOKAHEAD * self.threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @property
    def scores_are_probabilities(self) -> bool:
        """Whether scores are from 0 to 1; those of a regression are plain numbers."""
        return self.to_scores is not as_they_are

    def answer(self, image: Picture | ImageFile, top_k: int, background: str | None, threads: int) -> Answer:
        """Classify one picture on `threads` threads."""
        if isinstance(image, ImageFile):
            if image.fault is not None:
                return Answer(image.name, error=f"{image.name!r} {image.fault}.")
            image = image.name
        answer = Answer(describe_picture(image))
        try:
            picture = self.read(image, answer, background)
        except UserError as error:
            answer.error = str(error)
            return answer
        except Exception as error:  # Pillow raises anything for a damaged file
            answer.error = describe_unreadable(answer.image, error)
            return answer
        try:
            shape = (CHANNELS, *self.preprocessor.output_size(picture.height, picture.width))
            if shape != self.network.image_shape:
                raise UserError(f"its image has the shape {shape}, not {self.network.image_shape}")
            images = self.take_images()
            self.preprocessor(picture, images[0])
            logits = self.network.classify(images, *self.head, threads=threads)[0]
            self.spare_images.append(images)
        except (UserError, ValueError, MemoryError) as error:
            answer.error = f"{answer.image!r} cannot be classified: {first_sentence(error).rstrip('.')}."
            return answer
        if not np.isfinite(logits).all():
            raise UserError(
                f"The logits of the model {self.name!r} are not finite: it is damaged, or its training diverged."
            )
        scores = self.to_scores(logits)
        best = np.argsort(-scores, kind="stable")[:top_k]
        answer.labels = [{"label": self.labels[index], "score": scores[index].item()} for index in best.tolist()]
        return answer

    def take_images(self) -> np.ndarray:
        """An array for one image, `(1, channels, height, width)`. Append it to `spare_images` after use."""
        # The system zeroes the pages of a new array, which takes longer than to fill them.
        try:
            return self.spare_images.pop()
        except IndexError:
            return np.empty((1, *self.network.image_shape), np.float32)

    def read(self, image: Picture, answer: Answer, background: str | None) -> Image.Image:
        """Decode a picture to RGB. Sets `answer.transparent`."""
        if hasattr(image, "read"):
            image = copy_file(cast("BinaryIO", image))
        with contextlib.ExitStack() as stack:
            if isinstance(image, Image.Image):
                stack.enter_context(DECODING_LOCK)
                if (file := getattr(image, "fp", None)) is not None:  # it is decoded later than it was opened
                    stack.enter_context(only_reader(file))
            picture = stack.enter_context(open_input(image, self.max_pixels))
            answer.transparent = is_transparent(picture)
            return to_rgb(picture, background)


def is_iterable_of_pictures(images: Any) -> bool:
    is_picture = isinstance(images, (str, os.PathLike, bytes, Image.Image, np.ndarray)) or hasattr(images, "read")
    return isinstance(images, Iterable) and not is_picture


def copy_file(file: BinaryIO) -> io.BytesIO:
    """The content of a user's file object. The files of several threads, such as uploads, are then decoded at once."""
    with only_reader(file):
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            file.seek(0)
        return io.BytesIO(file.read())


@contextlib.contextmanager
def only_reader(file: BinaryIO) -> Iterator[None]:
    """Keep other threads from reading the same file. Those with another one go on: a stream may wait for its sender."""
    source = source_of(file)
    with FILES_LOCK:
        entry = FILES_READ.setdefault(id(source), [threading.Lock(), 0])
        entry[1] += 1
    try:
        with entry[0]:
            yield
    finally:
        with FILES_LOCK:
            entry[1] -= 1
            if entry[1] == 0:
                FILES_READ.pop(id(source), None)


def source_of(file: BinaryIO) -> Any:
    """What a file object reads from: the members of a tar archive are objects of their own, and seek in one file."""
    source: Any = file
    for _ in range(MOST_LAYERS):
        below = getattr(source, "raw", None) or getattr(source, "fileobj", None)
        if below is None:
            break
        source = below
    return source


def open_input(image: Picture, max_pixels: int | None) -> contextlib.AbstractContextManager[Image.Image]:
    """
    A context that closes what it opened, and leaves open what the user opened.

    Raises:
        UserError: it is no picture, a URL, or an array of another shape or dtype.
        Exception: Pillow cannot open it.
    """
    if isinstance(image, Image.Image):
        return contextlib.nullcontext(image)
    if isinstance(image, np.ndarray):
        is_grey, is_coloured = image.ndim == 2, image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not (is_grey or is_coloured) or image.size == 0:
            raise UserError(
                "An array must be uint8, (height, width) or (height, width, 3 or 4), both from 1, not "
                f"{image.dtype} {image.shape}."
            )
        return Image.fromarray(image)
    if not (isinstance(image, (str, os.PathLike)) or hasattr(image, "read")):
        kinds = "a file, an open binary file, a Pillow image or an array"
        raise UserError(f"A picture must be {kinds}, not {type(image).__name__}.")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise UserError(f"{image!r} is a URL: download the picture first.")
    return open_picture(image, max_pixels)


def describe_picture(image: Picture) -> str:
    if hasattr(image, "read"):
        return "picture"  # a server sends it to its client, to whom the type of the file object says nothing
    return str(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else f"a picture ({type(image).__name__})"
