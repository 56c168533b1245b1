"""Datasets that need no download: the digits of scikit-learn, and Fashion-MNIST if Debian's package is installed."""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


DIGITS = "sklearn-digits"
FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_HUB_ID = "zalandoresearch/fashion_mnist"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
KNOWN_DATASETS = {
    DIGITS: "the 1,797 digits that scikit-learn ships",
    FASHION_MNIST: "Debian's dataset-fashion-mnist if it is installed, else the Hub's",
}
FASHION_MNIST_CLASSES = (  # as in the Hub's copy
    *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load_known_splits(name: str) -> dict[str, Dataset] | None:
    """The splits of `sklearn-digits` or an installed `fashion-mnist`; `None` for other names."""
    if name == DIGITS:
        return load_digits_splits()
    return load_fashion_mnist_splits() if name == FASHION_MNIST and FASHION_MNIST_FOLDER.is_dir() else None


def load_digits_splits() -> dict[str, Dataset]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, white on black. Every fifth is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    held_out = np.arange(len(pixels)) % 5 == 0
    names = [str(name) for name in range(10)]
    return {
        "train": encode_images(pixels[~held_out], digits.target[~held_out], names),
        "validation": encode_images(pixels[held_out], digits.target[held_out], names),
    }


def load_fashion_mnist_splits(folder: Path = FASHION_MNIST_FOLDER) -> dict[str, Dataset]:
    """
    Fashion-MNIST (Xiao et al., 2017): 60,000 training and 10,000 test pictures of clothes, 28 x 28 pixels, white on black.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    return {
        split: encode_images(
            read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
            read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
            FASHION_MNIST_CLASSES,
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format: two zeros, type, number of dimensions, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def encode_images(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    """Grey pictures `(images, height, width)` as a dataset of PNG files and labels."""
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(names))})
    images = [{"bytes": encode_png(picture), "path": None} for picture in pixels]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
