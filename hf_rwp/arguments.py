"""The flags of RWP and of images, shared by all recipes and Trainer scripts, and how a recipe reads its own."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_rwp.core.noise import MODES, SCHEDULES, gamma_factor

Arguments = TypeVar("Arguments")


@dataclass
class RWPArguments:
    """The options of `RWP`, and a schedule for gamma, as flags for `HfArgumentParser`.

    For a Trainer with arguments of its own, such as TRL's, put it in front of them:

        @dataclass
        class RWPSFTConfig(RWPArguments, SFTConfig): ...

    Raises ValueError for a value out of range.
    """

    rwp: bool = field(default=False, metadata={"help": "Whether to train with Random Weight Perturbation."})
    rwp_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Size of the noise, at least 0, relative to the weights; 0.01 for `--rwp_noise filter` and 0.2 for "
            "`filter_normalized` if not set."
        },
    )
    rwp_alpha: float = field(
        default=0.5,
        metadata={"help": "The perturbed gradient's share of the mix, in [0, 1]; 1 perturbs every gradient."},
    )
    rwp_seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    rwp_noise: str = field(
        default="filter",
        metadata={
            "help": "What the noise is relative to: the norm of every filter, as in the paper, or its weights' rms "
            "(`filter_normalized`).",
            "choices": MODES,
        },
    )
    rwp_noise_1d: bool = field(
        default=True, metadata={"help": "Whether biases and norm weights are perturbed as well."}
    )
    rwp_frozen: bool = field(
        default=False,
        metadata={
            "help": "Whether frozen weights are perturbed as well, such as the base weights under LoRA (Flat-LoRA)."
        },
    )
    rwp_antithetic: bool = field(
        default=False,
        metadata={
            "help": "Whether the perturbed gradients of a step, where it has two or more, take a noise and its "
            "opposite in pairs."
        },
    )
    rwp_eta: float = field(
        default=0.0, metadata={"help": "ARWP's damping of the noise where gradients are large, at least 0; 0 is none."}
    )
    rwp_beta: float = field(
        default=0.99, metadata={"help": "Decay of the squared gradients that ARWP's damping follows, in [0, 1)."}
    )
    rwp_schedule: str = field(
        default="constant", metadata={"help": "How gamma grows over training.", "choices": SCHEDULES}
    )
    rwp_growth: float = field(
        default=0.0,
        metadata={"help": "How much larger gamma is at the end of a growing schedule, at least 0, in multiples of it."},
    )
    rwp_start: float = field(
        default=0.0, metadata={"help": "Fraction of training, in [0, 1], before which there is no noise."}
    )

    def __post_init__(self) -> None:
        for name, valid, valid_range in (
            ("rwp_gamma", self.rwp_gamma is None or 0 <= self.rwp_gamma < math.inf, "finite and at least 0"),
            ("rwp_alpha", 0 <= self.rwp_alpha <= 1, "in [0, 1]"),
            ("rwp_seed", -(2**63) <= self.rwp_seed < 2**63, "an integer of 64 bits"),
            ("rwp_noise", self.rwp_noise in MODES, f"one of {', '.join(MODES)}"),
            ("rwp_eta", 0 <= self.rwp_eta < math.inf, "finite and at least 0"),
            ("rwp_beta", 0 <= self.rwp_beta < 1, "in [0, 1)"),
            ("rwp_schedule", self.rwp_schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("rwp_growth", 0 <= self.rwp_growth < math.inf, "finite and at least 0"),
            ("rwp_start", 0 <= self.rwp_start <= 1, "in [0, 1]"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")
        if self.rwp_growth and self.rwp_schedule == "constant":
            raise ValueError(
                f"rwp_growth={self.rwp_growth} has no effect while rwp_schedule is constant: set it to linear or cosine"
            )
        getattr(super(), "__post_init__", lambda: None)()

    def __getstate__(self) -> dict[str, Any]:
        """Without the token that Trainer's `hub_token` may hold: Trainer pickles its arguments beside the weights, and
        pushes them with it. Copies have none either, and fall back on the one of `hf auth login`."""
        secrets = ("hub_token", "push_to_hub_token")
        return {name: None if name in secrets else value for name, value in self.__dict__.items()}

    @property
    def rwp_options(self) -> dict[str, Any]:
        """Keyword arguments for `RWP`."""
        names = ("gamma", "alpha", "seed", "noise", "noise_1d", "frozen", "antithetic", "eta", "beta")
        return {name: getattr(self, f"rwp_{name}") for name in names}

    def rwp_gamma_factor(self, progress: float) -> float:
        """What to hand to `RWP.scale_gamma` at `progress`, the fraction of the optimizer steps behind us."""
        return gamma_factor(progress, self.rwp_schedule, self.rwp_growth, self.rwp_start)


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
        for name, valid, valid_range in (
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
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")

    @property
    def data_options(self) -> dict[str, Any]:
        """Keyword arguments for `hf_rwp.data.load_images`."""
        names = ["data_dir", "dataset", "dataset_config", "train_split", "validation_split"]
        names += ["image_column", "label_column", "num_classes", "streaming"]
        return {name: getattr(self, name) for name in names}


def _increasing(pair: Sequence[float] | None) -> bool:
    return pair is not None and len(pair) == 2 and 0 < pair[0] <= pair[1]


HUB_STRATEGIES = ("end", "best", "every_save")


@dataclass
class HubArguments:
    """Whether and where a model goes on the Hub, as flags; Trainer has its own under the same names.

    No flag takes a token: huggingface_hub finds the one of `hf auth login`, or HF_TOKEN.
    Raises ValueError for a push without a place, and for what is no place.
    """

    push_to_hub: bool = field(default=False, metadata={"help": "Whether to push the model, with its card, to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where on the Hub: USER/NAME."})
    hub_private: bool = field(default=False, metadata={"help": "Whether the repository is to be private."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "A branch to push to, made if missing; main if not set."}
    )
    hub_tag: str | None = field(default=None, metadata={"help": "A tag for the last commit, such as v1.0."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What is pushed: the last weights at the `end`; the `best` ones by held-out accuracy, in the "
            "background whenever they improve; or those of `every_save`, in the background, and the last ones.",
            "choices": HUB_STRATEGIES,
        },
    )
    hub_logs: bool = field(default=False, metadata={"help": "Whether TensorBoard's logs are pushed too."})

    def __post_init__(self) -> None:
        if not self.push_to_hub:
            return
        name = self.hub_model_id or ""
        if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", name, re.ASCII) or ".." in name or "--" in name:
            raise ValueError(
                f"push_to_hub needs to know where to: hub_model_id={self.hub_model_id!r}, and it has to be USER/NAME, "
                "of letters, digits, -, _ and ."
            )
        if self.hub_strategy not in HUB_STRATEGIES:
            raise ValueError(f"hub_strategy={self.hub_strategy!r} is none of {', '.join(HUB_STRATEGIES)}")


@dataclass
class RWPTrainingArguments(RWPArguments, TrainingArguments):
    """`TrainingArguments` with the flags of RWP, for `RWPTrainer`."""


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """An instance of the dataclass `kind` from the command line, and from the file that `--config FILE.yaml` names.

    The file maps the same names to values; a flag on the command line overrides it. argv: None is the process's own.
    Exits with a usage message for a flag or value that argparse refuses; raises ValueError for an unknown flag and for
    a file of something else.
    """
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="A file of flags, `name: value`; flags given here win.")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parser.parse_known_args(argv)[0].config
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {} if config else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds no flags: each has to be a line of its own, `name: value`")
    # As flags ahead of the others they are checked and converted alike, and the later flag wins.
    flags = [flag for name, value in settings.items() if value is not None for flag in _flags(name, value)]
    parsed: Arguments = parser.parse_args_into_dataclasses(flags + argv, look_for_args_file=False)[0]
    return parsed


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
