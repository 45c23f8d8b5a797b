"""The flags of images, shared by all recipes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rwp.core.checks import check_all

# Where a flag is not set: for the embedded digits, and for other data (None: the model's own; the rest is timm's).
_DIGITS = {"img_size": 32, "crop_pct": 1.0, "scale": [0.7, 1.0], "hflip": 0.0, "color_jitter": 0.0}
_OTHER_DATA = {"scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": 0.4, "train_interpolation": "random"}


@dataclass
class ImageArguments:
    """Where the images come from and what happens to them, as flags; the names of the latter are timm's.

    Raises ValueError for a value out of range and for flags that contradict each other.
    """

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder: train/CLASS/IMAGE and validation/CLASS/IMAGE, or parquet files, or WebDataset shards "
            "(.tar). The embedded digits if neither this nor `--dataset` is set."
        },
    )
    dataset: str | None = field(default=None, metadata={"help": "A dataset's id on the Hub, `ILSVRC/imagenet-1k`."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of the dataset, where it has several."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Name of the split to train on; found if not set."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Name of the split to evaluate on; found if not set."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Name of the images' column; found if not set."})
    label_column: str | None = field(default=None, metadata={"help": "Name of the labels' column; found if not set."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes, where streamed data does not name them."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Whether to read the data while training instead of having it on disk first."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Images that a stream is shuffled among, per loading process, at least 1."}
    )
    train_num_samples: int | None = field(
        default=None, metadata={"help": "Images in an epoch, where a stream does not say how many it holds."}
    )
    max_bad_images: int = field(
        default=10, metadata={"help": "How many unreadable images are skipped before training stops, at least 0."}
    )
    workers: int = field(
        default=0, metadata={"help": "Processes that load data, per replica, at least 0; 0 is the main one."}
    )
    img_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; if not set the model's own, for the digits 32."}
    )
    crop_pct: float | None = field(
        default=None,
        metadata={"help": "Share of an image's side in evaluation, in (0, 1]; the model's own, for the digits 1."},
    )
    scale: list[float] | None = field(
        default=None,
        metadata={
            "help": "Least and largest share of an image's area in a training crop; 0.08 1, for the digits 0.7 1."
        },
    )
    ratio: list[float] | None = field(
        default=None, metadata={"help": "Least and largest aspect ratio of a training crop; 3/4 and 4/3 if not set."}
    )
    crop_padding: int | None = field(
        default=None,
        metadata={"help": "Crop after padding by so many pixels, as on CIFAR, instead of a random resized crop."},
    )
    hflip: float | None = field(
        default=None, metadata={"help": "Probability of a horizontal flip; 0.5, for the digits 0."}
    )
    vflip: float = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Strength of colour jitter, without `--aa`; 0.4, for the digits 0."}
    )
    aa: str | None = field(
        default=None, metadata={"help": "RandAugment, AutoAugment, AugMix as timm writes them, `rand-m9-mstd0.5-inc1`."}
    )
    train_interpolation: str | None = field(
        default=None, metadata={"help": "How training images are resized: bilinear, bicubic, random (timm's default)."}
    )
    interpolation: str | None = field(
        default=None, metadata={"help": "How images are resized in evaluation; the model's own if not set."}
    )
    reprob: float = field(default=0.0, metadata={"help": "Probability of random erasing, in [0, 1]."})
    remode: str = field(
        default="pixel", metadata={"help": "What random erasing fills in.", "choices": ("const", "rand", "pixel")}
    )
    recount: int = field(default=1, metadata={"help": "Largest number of boxes that random erasing erases."})
    cutout: int | None = field(
        default=None, metadata={"help": "Side in pixels of a square that is erased from every training image."}
    )

    def __post_init__(self) -> None:
        for name, default in (_OTHER_DATA if self.data_dir or self.dataset else _DIGITS).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_all(
            self,
            ("data_dir", self.data_dir is None or self.dataset is None, "unset where dataset is set"),
            ("streaming", not self.streaming or self.data_dir or self.dataset, "false without data_dir or dataset"),
            ("shuffle_buffer", self.shuffle_buffer >= 1, "at least 1"),
            ("max_bad_images", self.max_bad_images >= 0, "at least 0"),
            ("workers", self.workers >= 0, "at least 0"),
            ("img_size", self.img_size is None or self.img_size >= 1, "at least 1"),
            ("crop_pct", self.crop_pct is None or 0 < self.crop_pct <= 1, "in (0, 1]"),
            ("scale", _increasing(self.scale), "two numbers above 0, the least first"),
            ("ratio", self.ratio is None or _increasing(self.ratio), "two numbers above 0, the least first"),
            ("hflip", self.hflip is None or 0 <= self.hflip <= 1, "in [0, 1]"),
            ("vflip", 0 <= self.vflip <= 1, "in [0, 1]"),
            ("reprob", 0 <= self.reprob <= 1, "in [0, 1]"),
            ("recount", self.recount >= 1, "at least 1"),
            ("crop_padding", self.crop_padding is None or self.crop_padding >= 0, "at least 0"),
            ("cutout", self.cutout is None or self.cutout >= 1, "at least 1"),
        )

    @property
    def data_options(self) -> dict[str, Any]:
        """Keyword arguments for `hf_rwp.images.data.load_images`."""
        names = ["data_dir", "dataset", "dataset_config", "train_split", "validation_split"]
        names += ["image_column", "label_column", "num_classes", "streaming"]
        return {name: getattr(self, name) for name in names}


def _increasing(pair: Sequence[float] | None) -> bool:
    return pair is not None and len(pair) == 2 and 0 < pair[0] <= pair[1]
