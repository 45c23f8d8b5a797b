"""The flags of images, shared by all recipes, and those of timm's models, optimizers and augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_rwp.core.checks import check_all

# Where a flag is not set: for the embedded digits, and for other data (None: the model's own; the rest is timm's).
_DIGITS = {"img_size": 32, "crop_pct": 1.0, "scale": [0.7, 1.0], "hflip": 0.0, "color_jitter": 0.0}
_OTHER_DATA = {"scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": 0.4, "train_interpolation": "random"}

_BUILDERS = ("imagefolder", "parquet", "webdataset")
LABEL_NOISE = ("symmetric", "asymmetric")


@dataclass
class ImageArguments:
    """Where the images come from and what happens to them, as flags; the names of the latter are timm's.

    Raises ValueError for a value out of range and for flags that contradict each other.
    """

    help_group = "data"

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder: train/CLASS/IMAGE and validation/CLASS/IMAGE, or CLASS/IMAGE, or parquet files, or "
            "WebDataset shards (.tar). The embedded digits if neither this nor `--dataset` is set."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "A dataset's id on the Hub, `ILSVRC/imagenet-1k`; a folder is as for `--data_dir`."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of the dataset, where it has more than one."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub; its newest if not set."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Name of the split to train on; found if not set."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Name of the split to evaluate on; found if not set."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each class of the training images, in (0, 1), that is held out for evaluation, always "
            "the same ones; 0.2 of a folder of classes without splits, else none if not set."
        },
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
        default=None, metadata={"help": "Strength of color jitter, without `--aa`; 0.4, for the digits 0."}
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
        if self.dataset and Path(self.dataset).expanduser().is_dir() and self.data_dir is None:
            self.data_dir, self.dataset = self.dataset, None
        if self.dataset in _BUILDERS and self.data_dir is not None:  # as `datasets` has them
            self.dataset = None
        for name, default in (_OTHER_DATA if self.data_dir or self.dataset else _DIGITS).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_all(
            self,
            ("data_dir", self.data_dir is None or self.dataset is None, "unset where dataset is set"),
            ("streaming", not self.streaming or self.data_dir or self.dataset, "false without data_dir or dataset"),
            ("dataset_revision", self.dataset_revision is None or self.dataset, "unset without dataset"),
            ("validation_split", *_apart(self.train_split, self.validation_split)),
            ("validation_fraction", self.validation_fraction is None or 0 < self.validation_fraction < 1, "in (0, 1)"),
            (
                "validation_fraction",
                self.validation_fraction is None or ((self.data_dir or self.dataset) and self.validation_split is None),
                "unset without data_dir or dataset, and where validation_split is set",
            ),
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

    def look_ahead(self) -> None:
        """Raise ValueError or FileNotFoundError for a folder that is not there."""
        if self.data_dir is not None:
            folder_of(self.data_dir)
        getattr(super(), "look_ahead", lambda: None)()

    @property
    def data_options(self) -> dict[str, Any]:
        """Keyword arguments for `hf_rwp.images.data.load_images`."""
        names = ["data_dir", "dataset", "dataset_config", "dataset_revision", "train_split", "validation_split"]
        names += ["validation_fraction", "image_column", "label_column", "num_classes", "streaming"]
        return {name: getattr(self, name) for name in names}


@dataclass
class MemoryArguments(ImageArguments):
    """The flags of images that lie on the device: which of them, and how many of their labels are wrong.

    Raises ValueError for a value out of range and for what is done to one image at a time.
    """

    help_group = "data"

    color_jitter: float | None = field(default=0.0, metadata={"help": "Not available here: only 0."})
    train_images: int | None = field(default=None, metadata={"help": "Train on so many images; on all if not set."})
    test_images: int | None = field(default=None, metadata={"help": "Evaluate on so many; on all if not set."})
    validation_images: int | None = field(
        default=None,
        metadata={
            "help": "Images of the training split for `--search`, outside of `--train_images` where there are enough; "
            "a fifth if not set."
        },
    )
    label_noise: float = field(
        default=0.0, metadata={"help": "Share of the training labels, in [0, 1], that are made wrong."}
    )
    label_noise_kind: str = field(
        default="symmetric",
        metadata={
            "help": "How: `symmetric`, drawn evenly from all classes, or `asymmetric`, the next class.",
            "choices": LABEL_NOISE,
        },
    )
    data_seed: int = field(default=0, metadata={"help": "Chooses images and wrong labels, the same for all runs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        in_batches = "images are augmented in batches, by crop, flip and cutout"
        check_all(
            self,
            ("test_images", self.test_images is None or self.test_images >= 1, "at least 1"),
            ("label_noise", 0 <= self.label_noise <= 1, "in [0, 1]"),
            ("label_noise_kind", self.label_noise_kind in LABEL_NOISE, f"one of {', '.join(LABEL_NOISE)}"),
            ("streaming", not self.streaming, "false: the images lie on the device"),
            ("aa", self.aa is None, f"unset: {in_batches}"),
            ("color_jitter", not self.color_jitter, f"0: {in_batches}"),
            ("reprob", not self.reprob, f"0: {in_batches}"),
        )


def folder_of(data_dir: str) -> Path:
    """The folder that `--data_dir` names. Raises FileNotFoundError where nothing is there, ValueError for a file."""
    folder = Path(data_dir).expanduser()
    if folder.is_dir():
        return folder
    if not folder.exists():
        raise FileNotFoundError(
            f"data_dir={str(folder)!r} is not a folder, nor anything else: set the one that holds train and "
            "validation, or the class folders"
        )
    unpack = " Unpack it, and set the folder" if folder.suffix in (".zip", ".tar", ".gz", ".tgz") else ""
    raise ValueError(f"data_dir={str(folder)!r} is a file and not a folder: set the one that holds it.{unpack}")


def _apart(train: str | None, validation: str | None) -> tuple[bool, str]:
    return (
        train is None or train != validation,
        "another split than train_split (validation_fraction holds out a part of it)",
    )


def _increasing(pair: Sequence[float] | None) -> bool:
    return pair is not None and len(pair) == 2 and 0 < pair[0] <= pair[1]


@dataclass
class TimmArguments:
    """What timm's train.py knows of model, batch, optimizer, schedule, mixing and loss, under its names.

    Raises ValueError for a value out of range; `look_up` does for a name that timm does not have.
    """

    # Model
    model: str = field(default="test_resnet", metadata={"help": "A timm model."})
    model_kwargs: str = field(default="{}", metadata={"help": "Further arguments of the model, as JSON or YAML."})
    pretrained: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "timm",
            "help": "Weights to start from, with a new head where the classes differ: a folder or an id on the Hub, "
            "which name the model as well; without a value those that timm has for `--model`.",
        },
    )
    drop: float | None = field(default=None, metadata={"help": "Dropout rate ahead of the classifier, in [0, 1)."})
    drop_path: float | None = field(default=None, metadata={"help": "Rate of stochastic depth, in [0, 1)."})
    channels_last: bool = field(default=False, metadata={"help": "Whether to use the channels_last memory format."})
    torch_compile: bool = field(default=False, metadata={"help": "Whether to compile the model with torch.compile."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "What accelerate launch says if not set.", "choices": ("no", "fp16", "bf16")},
    )
    sync_bn: bool = field(
        default=False, metadata={"help": "Whether BatchNorm takes its statistics over the replicas of one role (GPUs)."}
    )
    model_ema: bool = field(
        default=False, metadata={"help": "Whether to keep an average of the weights, evaluate it, and save it at last."}
    )
    model_ema_decay: float = field(default=0.9998, metadata={"help": "Decay of that average, in (0, 1)."})
    model_ema_warmup: bool = field(default=False, metadata={"help": "Whether that decay begins small."})
    # Batch
    batch_size: int = field(default=64, metadata={"help": "Images per replica and optimizer step."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Parts that a replica's batch is cut into, one backward pass each."}
    )
    aug_repeats: int = field(
        default=1, metadata={"help": "Repeated augmentation: how often an epoch shows an image, beside fewer others."}
    )
    # Optimizer
    opt: str = field(
        default="sgd", metadata={"help": "A timm optimizer; sgd has Nesterov momentum, momentum the classical one."}
    )
    lr: float = field(default=0.1, metadata={"help": "Peak learning rate, for the batch as it is."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    weight_decay_1d: bool = field(default=False, metadata={"help": "Whether biases and norm weights decay as well."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum, where the optimizer has one."})
    opt_eps: float | None = field(default=None, metadata={"help": "The optimizer's epsilon; its own if not set."})
    opt_betas: list[float] | None = field(default=None, metadata={"help": "Its betas; its own if not set."})
    layer_decay: float | None = field(
        default=None, metadata={"help": "Factor on the learning rate from each layer to the one before, in (0, 1]."}
    )
    clip_grad: float | None = field(default=None, metadata={"help": "Gradient clipping, above 0; none if not set."})
    clip_mode: str = field(
        default="norm", metadata={"help": "How gradients are clipped.", "choices": ("norm", "value", "agc")}
    )
    # Schedule
    epochs: int = field(default=10, metadata={"help": "Passes over the training images, cooldown not counted."})
    sched: str = field(default="cosine", metadata={"help": "A timm schedule of the learning rate, per update."})
    warmup_epochs: int = field(default=1, metadata={"help": "Epochs of linear warm-up."})
    warmup_lr: float = field(default=1e-5, metadata={"help": "Learning rate at the start of warm-up."})
    min_lr: float = field(default=0.0, metadata={"help": "Least learning rate of schedules that have one."})
    decay_epochs: float | None = field(default=None, metadata={"help": "Epochs between steps of a step schedule."})
    decay_milestones: list[int] | None = field(default=None, metadata={"help": "Epochs of a multistep schedule."})
    decay_rate: float = field(default=0.1, metadata={"help": "Factor of a step of the schedule."})
    cooldown_epochs: int = field(default=0, metadata={"help": "Epochs at the least learning rate, at the end."})
    # Mixing and loss
    mixup: float = field(default=0.0, metadata={"help": "Mixup's alpha; 0 is none."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix's alpha; 0 is none."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Probability of Mixup or CutMix."})
    mixup_switch_prob: float = field(default=0.5, metadata={"help": "Probability of CutMix, where both are on."})
    mixup_mode: str = field(
        default="batch", metadata={"help": "What one draw is for.", "choices": ("batch", "pair", "elem")}
    )
    mixup_off_epoch: int = field(default=0, metadata={"help": "Epoch from which on nothing is mixed; 0 is never."})
    smoothing: float = field(default=0.0, metadata={"help": "Label smoothing, in [0, 1)."})
    bce_loss: bool = field(default=False, metadata={"help": "Whether to use binary cross-entropy, as timm has it."})
    bce_target_thresh: float | None = field(
        default=None, metadata={"help": "Threshold above which mixed targets count as 1 for `--bce_loss`."}
    )
    bce_sum: bool = field(default=False, metadata={"help": "Whether `--bce_loss` is summed over classes."})

    def __post_init__(self) -> None:
        betas = self.opt_betas
        check_all(
            self,
            ("model_kwargs", isinstance(yaml.safe_load(self.model_kwargs), dict), "a mapping, {name: value}"),
            ("drop", self.drop is None or 0 <= self.drop < 1, "in [0, 1)"),
            ("drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("model_ema_decay", 0 < self.model_ema_decay < 1, "in (0, 1)"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("aug_repeats", self.aug_repeats >= 1, "at least 1"),
            ("opt", self.opt != "adahessian", "one that needs no second derivatives"),
            ("opt_betas", betas is None or len(betas) > 1, "two numbers or more, as the optimizer has"),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "in (0, 1]"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("sched", self.sched != "plateau", "a schedule that depends only on the number of updates"),
            ("sched", self.sched != "none" or self.layer_decay is None, "`constant` or another one with layer_decay"),
            ("warmup_epochs", self.warmup_epochs >= 0, "at least 0"),
            ("cooldown_epochs", self.cooldown_epochs >= 0, "at least 0"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
            ("mixup_prob", 0 <= self.mixup_prob <= 1, "in [0, 1]"),
            ("mixup_switch_prob", 0 <= self.mixup_switch_prob <= 1, "in [0, 1]"),
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
        )

    def look_ahead(self) -> None:
        """Raise ValueError for weights that are not there, and for a name that is in none of timm's files."""
        from hf_rwp.images.timm_files import no_model, similar_in_files
        from hf_rwp.images.weights import find_weights

        if self.pretrained not in (None, "timm"):
            find_weights(str(self.pretrained), "pretrained")
        elif (names := similar_in_files(self.model)) is not None:
            raise ValueError(no_model("model", self.model, names))
        getattr(super(), "look_ahead", lambda: None)()

    def look_up(self) -> None:
        """Raise ValueError for a name that timm does not have."""
        from hf_rwp.images.names import check_model, check_optimizer, check_schedule  # they import timm

        check_model("model", self.model)
        check_optimizer(self.opt)
        check_schedule(self.sched, **self.schedule_options)

    @property
    def schedule_options(self) -> dict[str, Any]:
        """Keyword arguments for timm's `create_scheduler_v2`."""
        milestones = {"decay_milestones": self.decay_milestones} if self.decay_milestones else {}
        names = ("decay_epochs", "cooldown_epochs", "decay_rate", "min_lr", "warmup_lr", "warmup_epochs")
        return {"num_epochs": self.epochs, **{name: getattr(self, name) for name in names}, **milestones}

    def check_batch(self, replicas: int, micro_steps: int, mixes: bool) -> None:
        """Raise ValueError for a batch size that the parts of a step, or what happens to them, cannot share.

        micro_steps: of a step, on each replica. mixes: whether a step has a clean and a perturbed gradient.
        """
        whole, repeats = self.batch_size, self.aug_repeats
        if whole % micro_steps:
            halves = micro_steps == 2 and self.gradient_accumulation_steps == 1
            parts = "halves, a clean and a perturbed one" if halves else f"{micro_steps} parts"
            raise ValueError(f"batch_size={whole} cannot be cut into {parts}: set a multiple of {micro_steps}")
        part = whole // micro_steps
        if (self.mixup or self.cutmix) and part % 2:
            raise ValueError(
                f"batch_size={whole} makes parts of {part} images, and Mixup and CutMix mix pairs of one part: set a "
                f"multiple of {2 * micro_steps}"
            )
        together = whole if replicas > 1 else part
        if mixes and together % repeats:
            raise ValueError(
                f"aug_repeats={repeats} and {together} images to a gradient: copies of one image would land in the "
                "clean and in the perturbed gradient, which RWP needs from different images. Set batch_size to a "
                f"multiple of {repeats * whole // together}, or aug_repeats to 1"
            )
