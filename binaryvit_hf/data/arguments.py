"""The command line's arguments about images."""

from dataclasses import dataclass

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.pixels import choose_background

from ..argument_checks import argument
from .augmentation import AugmentationArguments
from .known_datasets import KNOWN_DATASETS
from .schema import CLASS_NAMES


HELD_OUT_SHARE = 0.15
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass
class DataArguments(AugmentationArguments):
    """The images: their source, columns, number and processing."""

    dataset_name: str | None = argument(
        None,
        "Hub id or local path of a dataset, also a table (.csv, .parquet, …) or a folder of WebDataset archives "
        "(.tar); or " + ", ".join(f"{name!r} ({description})" for name, description in KNOWN_DATASETS.items()),
    )
    dataset_config_name: str | None = argument(None, "Configuration of the dataset.")
    train_dir: str | None = argument(None, "Training images, one sub-folder per class.")
    validation_dir: str | None = argument(None, "Evaluation images, one sub-folder per class.")
    train_files: str | None = argument(
        None, "Train only on these files of --dataset_name: a pattern such as 'train-*.tar'."
    )
    validation_files: str | None = argument(
        None, "Evaluate only on these files of --dataset_name: a pattern such as 'val-*.tar'."
    )
    train_split_name: str = argument("train", "Split to train on.")
    validation_split_name: str | None = argument(
        None, "Split to evaluate on. Default: the first of " + ", ".join(map(repr, EVALUATION_SPLITS)) + "."
    )
    test_split_name: str = argument("test", "Split that --do_predict tests on.")
    image_column_name: str = argument(
        "image", "Column of the images. Default: 'image', or else the only column of images."
    )
    label_column_name: str = argument(
        "label", "Column of the labels. Default: 'label', or else the only column of classes or 'cls'."
    )
    class_names: str | None = argument(
        None,
        "File of class names, one per line, label 0 first, for labels that are numbers without names. Default: "
        f"{CLASS_NAMES} in --dataset_name, or else the numbers.",
    )
    streaming: bool = argument(
        False, "Read the images of --dataset_name during training instead of downloading them first."
    )
    shuffle_buffer_size: int = argument(
        1000, "Streamed training images are shuffled within a buffer of this many images."
    )
    train_val_split: float | None = argument(
        None,
        "Evaluate on this share (below 1) or number (from 1) of the training images, which are not trained on. Every "
        f"class gives the same share, whatever the seed. Default: {HELD_OUT_SHARE} if there are no evaluation images.",
    )
    max_train_samples: int | None = argument(
        None,
        "Train on at most this many images. In a stream, an epoch has this many, drawn anew from the shuffled images; if "
        "the stream does not state its number of images, this states it, and fewer are an error.",
    )
    max_eval_samples: int | None = argument(None, "Evaluate on at most this many images; in a stream, the first ones.")
    skip_broken_images: bool = argument(
        False, "Decode all images before training, and leave out broken and too large ones instead of stopping."
    )
    keep_images_in_memory: bool = argument(
        False,
        "Decode every image once, before training. Training images are kept at the smallest size that random crops "
        "need, evaluation images as the network's input. Use it for a few thousand large photos.",
    )
    crop_in_batches: bool = argument(
        False,
        "Crop, resize and mirror the training images of a batch at once: several times as fast for small images of one size, "
        "such as CIFAR's. It keeps all images in memory, and draws other random numbers.",
    )
    background: str | None = argument(
        None,
        "Colour behind transparent pixels, such as white or #ffcc00. It is saved with the model. Default: the colour of the "
        "model that is given, or of a new network's teacher. Without any, or with 'none', transparency is dropped, which "
        "shows the colours beneath it, as in transformers' pipelines.",
    )
    crop_pct: float = argument(
        0.875, "For evaluation, resize the shorter side to the image size divided by this, then crop."
    )

    def __post_init__(self):
        super().__post_init__()
        choose_background(self.background, None)  # raises its error now
        has_files = bool(self.dataset_name) and self.dataset_name not in KNOWN_DATASETS
        if (self.train_files or self.validation_files) and not has_files:
            raise ValueError(
                "--train_files and --validation_files are patterns of files in a dataset: give its --dataset_name."
            )
        if self.streaming and not has_files:
            raise ValueError(
                "--streaming needs a --dataset_name of the Hub or a local path; image folders are never copied."
            )
        for name in ("skip_broken_images", "train_val_split", "keep_images_in_memory", "crop_in_batches"):
            if self.streaming and getattr(self, name):
                raise ValueError(
                    f"--{name} needs all images before training, but --streaming reads them during training: leave one out."
                )
        for name in ("rand_augment", "color_jitter"):
            if self.crop_in_batches and getattr(self, name):
                raise ValueError(f"--crop_in_batches cannot change colours: leave it out, or --{name}.")

    def check_source(self, test: bool) -> None:
        """Raise UserError for images from nowhere, from two places, or from folders, which have no split to `test` on."""
        folders = self.train_dir or self.validation_dir
        if self.dataset_name and folders:
            raise UserError("Give either --dataset_name or --train_dir and --validation_dir, not both.")
        if not self.dataset_name and not folders:
            raise UserError("No images are given: pass --dataset_name, or --train_dir with one sub-folder per class.")
        if test and folders:
            raise UserError("--do_predict needs a --dataset_name with images to test on (--test_split_name).")
