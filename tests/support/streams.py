"""Small datasets as archives. No two images are equal."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encode(number: int, kind: str = "JPEG") -> bytes:
    """An encoded image of 24 x 40 pixels. `number` is its random seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 10, 3)).astype("uint8").repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_archives(folder: Path, shards: dict[str, list[int]], num_classes: int, image: str = "jpg") -> None:
    """Write a WebDataset. `shards` holds the sizes of the archives; image k of all has the class k % num_classes."""
    folder.mkdir()
    number = 0
    for split, sizes in shards.items():
        for shard, size in enumerate(sizes):
            with tarfile.open(folder / f"{split}-{shard:04d}.tar", "w") as archive:
                for _ in range(size):
                    add(archive, f"{number:04d}.{image}", encode(number))
                    add(archive, f"{number:04d}.cls", str(number % num_classes).encode())
                    add(archive, f"{number:04d}.json", b'{"seen": true}')
                    number += 1


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_class_names(folder: Path, num_classes: int) -> None:
    (folder / "classnames.txt").write_text("".join(f"class {label}\n" for label in range(num_classes)))


def tell_numbers(folder: Path, shards: dict[str, list[int]]) -> None:
    """Write the README.md that states the number of images of each split."""
    splits = "".join(
        f"  - name: {split}\n    num_examples: {sum(sizes)}\n    num_bytes: 1\n" for split, sizes in shards.items()
    )
    (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
