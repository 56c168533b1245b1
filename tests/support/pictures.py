"""Folders of small random pictures, one sub-folder per class."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, classes: tuple[str, ...], per_class: int) -> Path:
    """Write `per_class` pictures of 16 x 32 pixels, the size of the tiny networks, for each class. Returns the folder."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray(rng.integers(0, 255, (16, 32, 3)).astype("uint8"))
            image.save(folder / name / f"{number}.png")
    return folder
