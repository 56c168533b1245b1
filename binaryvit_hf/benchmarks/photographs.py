"""Pictures that cost as much to decode as photographs: noise of all scales, written as JPEGs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


WIDTH, HEIGHT = 500, 375  # typical of ImageNet
DETAIL = 0.1  # the amplitude of noise is its scale to this power: chosen for files of about 110 kB at quality 90


def write_photographs(files: list[Path], quality: int) -> None:
    """Write a picture to each file, always the same ones. A file has about 110 kB at quality 90, 65 kB at quality 75."""
    rng = np.random.default_rng(0)
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_photograph(rng)).save(file, quality=quality)


def draw_photograph(rng: np.random.Generator) -> np.ndarray:
    """Noise of all scales, as in photographs, more in grey than in colour: `uint8 (height, width, 3)`."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for scale in (2**octave for octave in range(8)):
        shape = (HEIGHT // scale + 2, WIDTH // scale + 2)
        grey = rng.standard_normal((1, *shape), np.float32)
        noise = torch.from_numpy(grey + 0.35 * rng.standard_normal((3, *shape), np.float32))[None]
        noise = torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")
        pixels += scale**DETAIL * noise[0].permute(1, 2, 0).numpy()
    return (120 + 55 * pixels / pixels.std()).clip(0, 255).astype("uint8")
