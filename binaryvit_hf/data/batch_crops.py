"""Random crops of small images of one size: a whole batch at once, several times as fast as one image after the other."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .augmentation import AugmentationArguments, Normalize, create_erasing
from .model_inputs import RGB, ModelInput
from .sampling import seeded_rng


ASPECT = (3 / 4, 4 / 3)  # of a crop, width by height; values of torchvision
ATTEMPTS = 10  # to draw a box that lies within the image
MOST_NUMBERS = 2**25  # of the pixels and matrices that are computed at once, 4 or 8 bytes each
MATRIX_COPIES = 8  # of a resizing matrix while it is computed
SHARPNESS = -0.5  # of the bicubic kernel (Keys, 1981), as in Pillow and in torch with antialias


class BatchCrops:
    """
    Augmented batches of images of one size, each of which was decoded once.

    A crop has the distribution of `v2.RandomResizedCrop`, and the values of a bicubic resizing with antialiasing, before they are
    rounded to 8 bits. Resizing is a product with two small matrices for each image, and mirroring is the order of a matrix's rows.
    The random numbers of an image depend on the seed and its key alone; they are other numbers than `CroppingDecoder` draws.

    Args:
        images: `uint8 (images, height, width, 3)`.
        arguments: the smallest crop and the probabilities of mirroring and erasing.
        wanted: input of the model.
        seed: seed of the random numbers.
    """

    def __init__(self, images: np.ndarray, arguments: AugmentationArguments, wanted: ModelInput, seed: int):
        # Not a tensor: a worker that is spawned would get it through /dev/shm, which has 64 MB in a container.
        self.images, self.size, self.channels, self.seed = images, wanted.size, wanted.channels, seed
        self.min_scale, self.flip_prob = arguments.random_resized_crop_min_scale, arguments.horizontal_flip_prob
        self.normalize, self.erase = Normalize(wanted.mean, wanted.std), create_erasing(arguments)

    def __call__(self, keys: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """
        Args:
            keys: the `SampleKey` of each image of the batch.

        Returns:
            `pixel_values (batch, 3, height, width)`.
        """
        at_once = self.images_at_once()
        return torch.cat([self.crop(keys[start : start + at_once]) for start in range(0, len(keys), at_once)])

    @property
    def matrix_size(self) -> int:
        """Numbers in the two resizing matrices of an image."""
        (height, width), (rows, columns) = self.images.shape[1:3], self.size
        return rows * height + columns * width

    def images_at_once(self) -> int:
        """How many images can be cropped together in little memory: all of a batch of small ones."""
        (height, width), (rows, columns) = self.images.shape[1:3], self.size
        pixels = 3 * (height * width + rows * width + rows * columns)
        return max(1, MOST_NUMBERS // (pixels + MATRIX_COPIES * self.matrix_size))

    def crop(self, keys: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        generators = [np.random.default_rng([self.seed, *key]) for key in keys]
        numbers = np.array([generator.random(1 + 4 * ATTEMPTS) for generator in generators])
        height, width = self.images.shape[1:3]
        tops, lefts, heights, widths = draw_boxes(numbers[:, 1:], height, width, self.min_scale)
        rows = resizing_matrices(tops, heights, height, self.size[0])
        columns = resizing_matrices(lefts, widths, width, self.size[1])
        mirrored = numbers[:, 0] < self.flip_prob
        columns[mirrored] = columns[mirrored, ::-1]

        pixels = torch.from_numpy(self.images[[key[1] for key in keys]]).float()
        resized = torch.from_numpy(rows) @ pixels.flatten(2)  # (batch, crop's height, width * 3)
        resized = resized.view(len(keys), self.size[0], width, 3).transpose(2, 3).flatten(1, 2)
        resized = resized @ torch.from_numpy(columns).transpose(1, 2)  # (batch, crop's height * 3, crop's width)
        resized = resized.clamp_(0, 255).view(len(keys), self.size[0], 3, self.size[1]).transpose(1, 2)
        crops = self.normalize(resized)
        if self.erase is not None:
            for crop, key in zip(crops, keys):
                with seeded_rng(self.seed, *key):
                    crop.copy_(self.erase(crop))
        return crops if self.channels == RGB else crops[:, list(self.channels)]


def draw_boxes(
    numbers: np.ndarray, height: int, width: int, min_scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Boxes of random area and aspect ratio within an image (Szegedy et al., CVPR 2015). Where none of the attempts lies within it,
    the largest box in the middle of an allowed aspect ratio.

    Args:
        numbers: uniform random numbers from 0 to 1, `(batch, 4 * ATTEMPTS)`.
        height, width: of the images in pixels.
        min_scale: smallest share of the image's area.

    Returns:
        Tops, lefts, heights and widths in whole pixels, each `(batch,)`.
    """
    areas, ratios, downs, rights = numbers.reshape(len(numbers), 4, ATTEMPTS).swapaxes(0, 1)
    areas = height * width * (min_scale + (1 - min_scale) * areas)
    lowest, highest = (math.log(ratio) for ratio in ASPECT)
    ratios = np.exp(lowest + (highest - lowest) * ratios)
    heights, widths = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, every = fits.argmax(axis=1), np.arange(len(numbers))
    heights, widths, downs, rights = (values[every, first] for values in (heights, widths, downs, rights))
    tops, lefts = np.floor(downs * (height - heights + 1)), np.floor(rights * (width - widths + 1))

    unfit = ~fits.any(axis=1)
    central_height = min(height, round(width / ASPECT[0]))
    central_width = min(width, round(height * ASPECT[1]))
    heights[unfit], widths[unfit] = central_height, central_width
    tops[unfit], lefts[unfit] = (height - central_height) // 2, (width - central_width) // 2
    return tops, lefts, heights, widths


def resizing_matrices(starts: np.ndarray, lengths: np.ndarray, side: int, size: int) -> np.ndarray:
    """
    Matrices that cut a part from the side of an image and resize it (bicubic, antialiased): `(batch, size, side)`, float32.

    Args:
        starts, lengths: of the parts, in pixels, `(batch,)`.
        side: length of the images' side in pixels.
        size: pixels of the result.
    """
    scale = (lengths / size)[:, None, None]
    centres = starts[:, None, None] + scale * (np.arange(size) + 0.5)[:, None]
    pixels = np.arange(side) + 0.5
    distances = np.abs(pixels - centres) / np.maximum(scale, 1)
    is_inside = (starts[:, None, None] < pixels) & (pixels < (starts + lengths)[:, None, None])
    weights = np.where(is_inside, bicubic_kernel(distances), 0)
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def bicubic_kernel(x: np.ndarray) -> np.ndarray:
    """The kernel of cubic convolution at distances `x >= 0` (Keys, 1981, eq. 15, with a = -1/2)."""
    a = SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))
