"""What a command line says about images: which, how many, and what is done with them."""

from dataclasses import dataclass, field

from ..pixels import check_background
from .augmentation import AugmentationArguments
from .known_datasets import KNOWN_DATASETS
from .schema import CLASS_NAMES


HELD_OUT_SHARE = 0.15


@dataclass
class DataArguments(AugmentationArguments):
    """Which images, which of their columns, how many, and how they are cut and, for training, augmented."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local path of a dataset, a table (.csv, .parquet, …) or a folder of WebDataset archives (.tar) "
            "too; or " + ", ".join(f"{name!r} ({what})" for name, what in KNOWN_DATASETS.items())
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of training images, one folder a class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of evaluation images, likewise."})
    train_files: str | None = field(
        default=None,
        metadata={"help": "Train on these files of --dataset_name alone, a pattern such as 'train-*.tar'."},
    )
    validation_files: str | None = field(
        default=None, metadata={"help": "Evaluate on these files of --dataset_name, likewise."}
    )
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split_name: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: 'validation', else 'test', where there is one."},
    )
    test_split_name: str = field(default="test", metadata={"help": "Split that --do_predict tests on."})
    image_column_name: str = field(
        default="image",
        metadata={"help": "Column of the images. Where 'image' is none: the only one that has images."},
    )
    label_column_name: str = field(
        default="label",
        metadata={"help": "Column of the labels. Where 'label' is none: the only one of classes, or 'cls'."},
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "File of class names, one a line, for labels that are numbers without names. Default: "
            f"{CLASS_NAMES} in --dataset_name where it is there, else the numbers."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the images of --dataset_name as they are needed instead of downloading them first."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "StreamedSample training images come in the order of their shards, mixed among that many."},
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Hold out that share of the training images (below 1), or that many (from 1), and evaluate on them, "
            f"always the same ones. Default: {HELD_OUT_SHARE} where there are no others to evaluate on."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on that many images at most; of a stream on its first."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on that many images at most, likewise."}
    )
    skip_broken_images: bool = field(
        default=False,
        metadata={"help": "Decode every image before training and leave out those that fail, instead of stopping."},
    )
    background: str | None = field(
        default=None,
        metadata={
            "help": "Colour to put behind transparent pixels, such as white or #ffcc00. Default: transparency is dropped, as "
            "transformers' pipelines do, which shows the colours beneath it."
        },
    )
    crop_pct: float = field(
        default=0.875,
        metadata={"help": "Evaluation resizes the shorter side to the image size over this, then crops."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_background(self.background)
        if (self.train_files or self.validation_files) and (
            not self.dataset_name or self.dataset_name in KNOWN_DATASETS
        ):
            raise ValueError(
                "--train_files and --validation_files are patterns of files in a --dataset_name: name one."
            )
        if self.streaming:
            self.check_streaming()

    def check_streaming(self):
        if not self.dataset_name or self.dataset_name in KNOWN_DATASETS:
            raise ValueError("--streaming is for a --dataset_name of the Hub or a local path; folders need none.")
        for name in ("skip_broken_images", "train_val_split"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"--{name} needs all images before training, and --streaming never has them: leave one out."
                )
