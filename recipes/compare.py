"""Compare RWP with plain training and with SAM, in one run and under equal terms, on small images.

# All methods on the embedded digits; then CIFAR-10, the settings chosen for each method on a validation split
```bash
python recipes/compare.py
python recipes/compare.py --config recipes/configs/compare/cifar10_resnet18.yaml --dataset uoft-cs/cifar10 \
    --methods base sam rwp --seeds 0 1 2 --search true
```

The terms are one of three protocols:

1. `images`: every method sees the same images in the same number of steps. SAM computes two gradients of each (2x),
   plain training and RWP one (1x); on one replica RWP's come from the halves of a batch, with BatchNorm's statistics.
2. `gradients`: every method computes as many gradients of an image, 2 * epochs for each. RWP takes two batches a step,
   as in the reference code; plain training lasts twice as long.
3. `time`: every method trains as many steps as fit into the time that plain training takes for `--epochs`, by step
   times that are measured before, all methods in turn.

Every run is a whole schedule. With `--search true` each method first tries one grid of the same size on images held out
from the training split: all pairs of `--lrs` and `--weight_decays`, with `--strengths` (factors on the method's rho or
gamma) spread over them as in a Latin square. Accuracy is that of the last epoch, on images that chose nothing.

Runs and trials become lines of `--results`; those that are there are not run again, and one that was cut goes on from
its last checkpoint. Images are decoded once and lie on the device, where they are augmented in batches.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from filelock import FileLock, Timeout
from imagenet_rwp import seed_of, use_fast_kernels
from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_rwp import RWP, LossTracker, RWPArguments
from hf_rwp.analysis.plots import comparison
from hf_rwp.core.noise import DEFAULT_GAMMA, gamma_factor
from hf_rwp.core.sharding import refuse_lone_processes
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import ImageDataset
from hf_rwp.images.metrics import label_rank
from hf_rwp.images.transforms import BatchTransform, augmented, cut_out_, image_transforms
from hf_rwp.runs.checkpoints import load_checkpoint, newest, read_state, remove_checkpoints, save_checkpoint
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import append_record, command_of, environment, read_records, without_nan, without_places

RECIPES = Path(__file__).parent
PROTOCOLS = {
    "images": "equal images per step and equal steps",
    "gradients": "equal gradient evaluations",
    "time": "equal wall-clock",
}


@dataclass(frozen=True)
class Method:
    """strength: its rho or gamma, what `--strengths` multiplies. sam_every: SAM's second gradient in one of so many
    steps, 0 for none. rwp: options of `RWP` and of gamma's schedule, over those of the flags."""

    title: str
    strength: float | None = None
    sam_every: int = 0
    adaptive: bool = False
    rwp: Mapping[str, Any] | None = None

    @property
    def gradients_per_image(self) -> float:
        return 1 + (1 / self.sam_every if self.sam_every else 0)


METHODS = {
    "base": Method("plain"),
    "sam": Method("SAM", 0.05, sam_every=1),  # rho as in arXiv 2010.01412
    "asam": Method("ASAM", 0.5, sam_every=1, adaptive=True),  # rho as in arXiv 2102.11600
    "sam10": Method("SAM every 10th step", 0.05, sam_every=10),  # composer's advice
    "rwp": Method("RWP", rwp={}),
    "rwp_1x": Method(
        "RWP, alpha 1", 0.001, rwp={"alpha": 1.0, "schedule": "cosine", "growth": 10.0}
    ),  # arXiv 2404.00357
    "arwp": Method("ARWP", 0.015, rwp={"eta": 0.1, "beta": 0.99}),  # m-ARWP in arXiv 2404.00357
    "rwp_antithetic": Method("RWP, antithetic", 0.01, rwp={"antithetic": True}),
    "rwp_normalized": Method("RWP, filter_normalized", 0.2, rwp={"noise": "filter_normalized"}),
}


@dataclass
class Arguments(ImageArguments, RWPArguments):
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Which to compare: {', '.join(METHODS)}."}
    )
    protocols: list[str] = field(
        default_factory=lambda: ["images"], metadata={"help": f"Under which terms: {', '.join(PROTOCOLS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of weights, order and augmentation; a run for each."}
    )
    # Data
    color_jitter: float | None = field(default=0.0, metadata={"help": "Not to be had here."})
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
        default=0.0, metadata={"help": "Share of the training labels, in [0, 1], that are drawn at random."}
    )
    data_seed: int = field(default=0, metadata={"help": "Chooses images and wrong labels, the same for all runs."})
    # Model
    model: str = field(default="test_resnet", metadata={"help": "A timm model, or wrn16_8, a WideResNet-16-8."})
    model_kwargs: str = field(default="{}", metadata={"help": "Further arguments of the model, as JSON or YAML."})
    small_stem: bool = field(
        default=True,
        metadata={
            "help": "Whether a ResNet on images of at most 64 pixels begins as for CIFAR, with a 3x3 convolution and "
            "no pooling; `output_stride`, which imagenet_rwp.py has to use for that, is then left out."
        },
    )
    channels_last: bool = field(default=True, metadata={"help": "Whether to use the channels_last memory format."})
    torch_compile: bool = field(default=False, metadata={"help": "Whether to compile the model with torch.compile."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "What accelerate launch says if not set.", "choices": ("no", "bf16")}
    )
    # Training
    epochs: int = field(default=10, metadata={"help": "Passes over the training images, for protocol `images`."})
    batch_size: int = field(default=64, metadata={"help": "Images per replica and optimizer step."})
    opt: str = field(default="sgd", metadata={"help": "A timm optimizer; sgd has Nesterov momentum."})
    lr: float = field(default=0.1, metadata={"help": "Peak learning rate, without a search."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, without a search."})
    weight_decay_1d: bool = field(default=False, metadata={"help": "Whether biases and norm weights decay as well."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum, where the optimizer has one."})
    sched: str = field(default="cosine", metadata={"help": "Schedule of the learning rate.", "choices": ("cosine",)})
    warmup_epochs: float = field(default=1, metadata={"help": "Epochs of linear warm-up."})
    # Search
    search: bool = field(default=False, metadata={"help": "Whether to choose lr, weight decay, rho and gamma first."})
    lrs: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2], metadata={"help": "Learning rates to try."})
    weight_decays: list[float] = field(default_factory=lambda: [5e-4, 2e-3], metadata={"help": "Weight decays to try."})
    strengths: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0], metadata={"help": "Factors on a method's rho or gamma to try."}
    )
    # Output
    evaluations: int = field(default=10, metadata={"help": "How often a run is evaluated and saved, evenly spread."})
    name: str | None = field(default=None, metadata={"help": "Of the comparison; the data's name if not set."})
    results: str | None = field(
        default=None, metadata={"help": "File of records; recipes/results/compare/NAME.jsonl if not set."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for checkpoints and the picture; outputs/compare_NAME if not set."}
    )

    def __post_init__(self) -> None:
        ImageArguments.__post_init__(self)
        RWPArguments.__post_init__(self)
        self.name = self.name or Path(self.data_dir or self.dataset or "digits").name
        self.results = self.results or str(RECIPES / "results" / "compare" / f"{self.name}.jsonl")
        self.output_dir = self.output_dir or f"outputs/compare_{self.name}"
        for name, known in (("methods", METHODS), ("protocols", PROTOCOLS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"{name}: {', '.join(unknown)} is none of {', '.join(known)}")
        for name in ("methods", "protocols", "seeds", "lrs", "weight_decays", "strengths"):
            if len(set(getattr(self, name))) < max(1, len(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} has to hold one value or more, each once")
        pairs = self.rwp_antithetic or "rwp_antithetic" in self.methods
        for name, valid, valid_range in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size % 2 == 0 < self.batch_size, "even, for RWP to halve it, and above 0"),
            ("batch_size", not pairs or self.batch_size % 4 == 0, "a multiple of 4, for antithetic pairs of halves"),
            ("rwp_start", self.rwp_start < 1, "below 1: without noise it is the method base"),
            ("test_images", self.test_images is None or self.test_images >= 1, "at least 1"),
            ("model_kwargs", isinstance(yaml.safe_load(self.model_kwargs), dict), "a mapping, {name: value}"),
            ("evaluations", self.evaluations >= 1, "at least 1"),
            ("seeds", all(0 <= seed < 2**32 for seed in self.seeds), "in [0, 2^32)"),
            ("label_noise", 0 <= self.label_noise <= 1, "in [0, 1]"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and less than epochs"),
            ("rwp_alpha", self.rwp_alpha > 0, "above 0: without noise it is the method base"),
            ("rwp_gamma", self.rwp_gamma != 0, "above 0: without noise it is the method base"),
            ("streaming", not self.streaming, "false: the images lie on the device"),
            # All that timm does to one image at a time.
            ("aa", self.aa is None, "unset: images are augmented in batches, by crop, flip and cutout"),
            ("color_jitter", not self.color_jitter, "0: images are augmented in batches, by crop, flip and cutout"),
            ("reprob", not self.reprob, "0: images are augmented in batches, by crop, flip and cutout"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")


def main(args: Arguments) -> None:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, dynamo_backend="inductor" if args.torch_compile else None
    )
    refuse_lone_processes()
    if accelerator.gradient_accumulation_steps > 1 or accelerator.scaler is not None:
        raise ValueError("methods are compared without accelerate's gradient accumulation, in bf16 or full precision")
    use_fast_kernels(deterministic=False)
    torch._dynamo.config.recompile_limit = 256  # each model is compiled anew
    results, output_dir = Path(args.results), Path(args.output_dir)
    data = load_data(args, accelerator.device)
    check_records(args, accelerator, data["digest"], records_in(results))
    lock = locked(output_dir, results) if accelerator.is_main_process else None
    launcher = "python" if accelerator.num_processes == 1 else "accelerate launch"
    facts = {"command": command_of(f"{launcher} recipes/{Path(__file__).name}", *described_arguments(args))}
    facts |= environment(accelerator) | {"load_average": os.getloadavg()[0], "data_sha256": data["digest"]}
    per_step = args.batch_size * accelerator.num_processes
    if len(data["held_in" if args.search else "train"]) < per_step:
        raise ValueError(
            f"{len(data['train'])} images to train on, {len(data['held_in'])} in a search, are fewer than the "
            f"{per_step} of one step: set a smaller batch_size, more train_images, or fewer validation_images"
        )
    train, news = partial(run, accelerator, args, data, facts), 0

    for protocol in args.protocols:
        times = step_times(accelerator, args, data) if protocol == "time" else {}
        lengths = {name: steps_of(args, name, protocol, len(data["train"]), per_step, times) for name in args.methods}
        shorter = len(data["held_in"]) / len(data["train"])
        trials = [(name, settings) for name in args.methods for settings in grid(args, name)] if args.search else []
        for number, (name, settings) in enumerate(trials, start=1):
            label = f"{protocol}, trial {number}/{len(trials)}"
            steps = max(1, round(shorter * lengths[name]))
            news += train("trial", protocol, name, settings, args.data_seed, steps, label)
        runs = [(seed, name) for seed in args.seeds for name in args.methods]
        for number, (seed, name) in enumerate(runs, start=1):
            settings = chosen(args, records_in(results), name, protocol)
            label = f"{protocol}, run {number}/{len(runs)}"
            news += train("run", protocol, name, settings, seed, lengths[name], label)

    if accelerator.is_main_process:
        records = [record for record in records_in(results) if record["kind"] == "run"]
        if not news:
            print(f"All of it is in {results} already; --results FILE begins another one")
        for protocol in args.protocols:
            mine = [record for record in records if record["protocol"] == protocol]
            comparison(curves_of(mine), output_dir / f"{protocol}.png")
            print(f"\n{args.name}, {PROTOCOLS[protocol]}\n\n{table(mine)}")
        print(f"\nWrote {results} and {', '.join(str(output_dir / f'{protocol}.png') for protocol in args.protocols)}")
        lock.release()
    accelerator.end_training()


# What is trained: data, model, method and the length of a run.


@dataclass
class Images:
    """Images (N, 3, H, W) in uint8 and labels (N,), on the device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_data(args: Arguments, device: torch.device) -> dict[str, Any]:
    """`train` and `test`; `held_in` and `held_out`, the parts of the training split for a search; `classes`, `config`;
    the `digest` of what is trained on and what judges.

    Wrong labels are in `train` and `held_in` alone.
    """
    splits = load_images(**args.data_options)
    names = splits["train"].features["label"].names
    size = {"img_size": args.img_size or 32, "crop_pct": args.crop_pct or 1.0, "interpolation": args.interpolation}
    model = create_model(args, len(names), size["img_size"])
    config = resolve_data_config(size, model=model) | {"input_size": (3, size["img_size"], size["img_size"])}
    _, transform = image_transforms(args, config)
    rows, test_rows = len(splits["train"]), len(splits["validation"])
    validation = rows // 5 if args.validation_images is None else args.validation_images
    for name, wanted, there in (
        ("train_images", args.train_images, rows),
        ("validation_images", validation if args.search else None, rows - 1),
        ("test_images", args.test_images, test_rows),
    ):
        if wanted is not None and not 1 <= wanted <= there:
            raise ValueError(f"{name}={wanted} is out of range: the split has {there} for it")
    order = np.random.default_rng(args.data_seed).permutation(rows)
    train, held_out = order[: args.train_images], order[rows - validation :]
    held_in = train[: rows - validation]
    test = np.random.default_rng(args.data_seed).permutation(test_rows)[: args.test_images]

    def decoded(split: str, chosen: np.ndarray) -> Images:
        dataset = ImageDataset(splits[split].select(chosen), transform, training=False, max_bad_images=0)
        blocks = range(0, len(dataset), 256)
        shown = tqdm(blocks, desc=f"decoding {split}", unit_scale=256, unit="img", leave=False, disable=None)
        items = [item for start in shown for item in dataset.__getitems__(range(start, min(start + 256, len(dataset))))]
        if dataset.unreadable.slots:
            raise ValueError(f"{len(dataset.unreadable.slots)} of the {split} images could not be read: see above")
        pixels, labels = zip(*items, strict=True)
        stacked = torch.from_numpy(np.stack([np.asarray(image) for image in pixels]))
        return Images(stacked.to(device), torch.tensor(labels, device=device))

    images = {"train": decoded("train", train), "test": decoded("validation", test)}
    images["held_out"] = decoded("train", held_out) if args.search else None
    images["train"].labels = with_noise(images["train"].labels, args.label_noise, len(names), args.data_seed)
    images["held_in"] = Images(*(tensor[: len(held_in)] for tensor in vars(images["train"]).values()))
    digest = hashlib.sha256()
    for part in (images["train"], images["test"]):
        for tensor in (part.pixels, part.labels):
            digest.update(tensor.cpu().numpy().tobytes())
    return images | {"classes": len(names), "config": config, "digest": digest.hexdigest()}


def with_noise(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """`labels` with a share of them drawn anew, evenly from all classes, the right one among them."""
    chance = np.random.default_rng([seed, 1])
    noisy = chance.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.clone()
    labels[torch.from_numpy(noisy)] = torch.from_numpy(chance.integers(classes, size=len(noisy))).to(labels)
    return labels


def create_model(args: Arguments, classes: int, img_size: int) -> nn.Module:
    options = yaml.safe_load(args.model_kwargs)
    if args.model == "wrn16_8":  # arXiv 1605.07146
        model = ResNetV2(
            [2, 2, 2],
            channels=(128, 256, 512),
            num_classes=classes,
            stem_chs=16,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            **options,
        )
        model.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        return model
    small = args.small_stem and img_size <= 64
    if small and args.model.startswith("resnet"):
        options.pop("output_stride", None)
    model = timm.create_model(args.model, num_classes=classes, **options)
    if small and isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d):
        make_stem_small(model)
    return model


def make_stem_small(model: ResNet) -> None:
    """CIFAR's stem in place of ImageNet's: a 3x3 convolution, without pooling."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions


def options_of(args: Arguments, name: str) -> dict[str, Any]:
    """The options of `RWP`, and of gamma's schedule, that a method has; gamma is in its settings."""
    method = METHODS[name]
    if method.rwp is None:
        return {}
    own = {"schedule": args.rwp_schedule, "growth": args.rwp_growth, "start": args.rwp_start}
    return {**args.rwp_options, **own, **method.rwp, "gamma": None}


def mixes(options: Mapping[str, Any]) -> bool:
    """Whether a step takes a clean and a perturbed gradient."""
    return bool(options) and options["alpha"] < 1


def micro_steps(options: Mapping[str, Any], replicas: int) -> int:
    """Gradients of a step on each replica: a clean and a perturbed one somewhere, and two of the latter for a pair."""
    perturbed = max(1, replicas // 2) if mixes(options) else replicas
    pairs = 2 if options.get("antithetic") and perturbed < 2 else 1
    return pairs * (2 if mixes(options) and replicas == 1 else 1)


def default_strength(args: Arguments, name: str) -> float | None:
    if METHODS[name].rwp == {}:
        return DEFAULT_GAMMA[args.rwp_noise] if args.rwp_gamma is None else args.rwp_gamma
    return METHODS[name].strength


def grid(args: Arguments, name: str) -> list[dict[str, float | None]]:
    """The settings that a method tries: as many for each, with or without a strength."""
    strength = default_strength(args, name)
    settings = []
    for row, lr in enumerate(args.lrs):
        for column, weight_decay in enumerate(args.weight_decays):
            factor = args.strengths[(row + column) % len(args.strengths)]
            own = None if strength is None else strength * factor
            settings.append({"lr": lr, "weight_decay": weight_decay, "strength": own})
    return settings


def chosen(args: Arguments, records: Iterable[Mapping[str, Any]], name: str, protocol: str) -> dict[str, float | None]:
    """The best settings of this protocol's search, else of that under `images`, else those of the flags."""
    trials = [record for record in records if record["kind"] == "trial" and record["method"] == name]
    for searched in (protocol, "images"):
        found = [record for record in trials if record["protocol"] == searched]
        if found:
            return max(found, key=lambda record: record["top1"])["settings"]
    return {"lr": args.lr, "weight_decay": args.weight_decay, "strength": default_strength(args, name)}


def images_per_step(args: Arguments, name: str, protocol: str, per_step: int) -> int:
    return per_step * (2 if protocol == "gradients" and mixes(options_of(args, name)) else 1)


def steps_of(args: Arguments, name: str, protocol: str, images: int, per_step: int, times: Mapping[str, float]) -> int:
    """How many steps a whole run of a method has.

    per_step: images that plain training takes for a step. times: of a step, in those of plain training.
    """
    if protocol == "time":
        return max(1, round(args.epochs * images / per_step / times[name]))
    seen = args.epochs * images
    if protocol == "gradients":
        seen = 2 * seen / METHODS[name].gradients_per_image
    return max(1, round(seen / images_per_step(args, name, protocol, per_step)))


# A run.


class Training:
    """A model, an optimizer and a method; `step` is one optimizer step, and a function of its number and the seed."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: Arguments,
        data: Mapping[str, Any],
        images: Images,
        name: str,
        settings: Mapping[str, float | None],
        seed: int,
        steps: int,
        per_replica: int,
    ) -> None:
        self.accelerator, self.args, self.images, self.seed, self.steps = accelerator, args, images, seed, steps
        self.method, self.options, self.per_replica = METHODS[name], options_of(args, name), per_replica
        self.config, device = data["config"], accelerator.device
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.normalize = BatchTransform(self.config, device, memory_format=self.memory_format)
        self.generator = torch.Generator(device)
        self.order: tuple[int, Tensor] | None = None
        self.gradients = 0  # of one image each, over all replicas

        set_seed(seed)
        self.module = create_model(args, data["classes"], self.config["input_size"][-1])
        self.module.to(device, memory_format=self.memory_format)
        base = create_optimizer_v2(
            self.module,
            opt=args.opt,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            momentum=args.momentum,
            filter_bias_and_bn=not args.weight_decay_1d,
        )
        self.rwp = self.sam = None
        self.micro_steps = micro_steps(self.options, accelerator.num_processes)
        if self.options:
            own = {key: value for key, value in self.options.items() if key not in ("schedule", "growth", "start")}
            own |= {"gamma": settings["strength"], "accumulation_steps": self.micro_steps}
            own["seed"] += seed
            self.rwp = RWP(base, self.module, **own)
        elif self.method.sam_every:
            adaptive = self.method.adaptive
            self.sam = SAM(base.param_groups, lambda *_, **__: base, rho=settings["strength"], adaptive=adaptive)
        self.base = base
        self.model, self.optimizer = accelerator.prepare(self.module, self.rwp or self.sam or base)
        warmup = round(args.warmup_epochs / args.epochs * steps)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=1e-5 if warmup else 0, t_in_epochs=False
        )
        self.tracker = LossTracker(self.rwp, device)

    def step(self, number: int) -> None:
        self.scheduler.step_update(number)
        if self.rwp:
            schedule = (self.options[key] for key in ("schedule", "growth", "start"))
            self.rwp.scale_gamma(gamma_factor(number / self.steps, *schedule))
        images, labels = self.batch(number)
        count = self.micro_steps if self.rwp and self.rwp.active else 1  # whole batches before the start of the noise
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
        seen = len(labels) * self.accelerator.num_processes
        self.gradients += seen
        if self.sam and number % self.method.sam_every == 0:
            self.gradients += seen
            self.add_gradients(parts, sync=False)
            self.sam.first_step(zero_grad=True)
            disable_running_stats(self.model)
            self.add_gradients(parts, track=False)
            enable_running_stats(self.model)
            self.sam.second_step()
        else:
            self.add_gradients(parts)
            (self.base if self.sam else self.optimizer).step()
        self.optimizer.zero_grad()

    def add_gradients(self, parts: Sequence[tuple[Tensor, Tensor]], sync: bool = True, track: bool = True) -> None:
        """Add the gradient of the parts' mean loss, one after the other."""
        for index, (images, labels) in enumerate(parts, start=1):
            together = sync and index == len(parts)
            with nullcontext() if together else self.accelerator.no_sync(self.model):
                loss = cross_entropy(self.model(images).float(), labels)
                self.accelerator.backward(loss / len(parts))
            if track:
                self.tracker.update(loss.detach())

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """This replica's share of the images of a step, augmented; the shares take turns in one order of all images."""
        replicas, replica = self.accelerator.num_processes, self.accelerator.process_index
        first = (number * replicas + replica) * self.per_replica
        rows = torch.cat(list(self.rows(first, first + self.per_replica)))
        self.generator.manual_seed(seed_of(self.seed, number, replica))
        images = augmented(self.images.pixels[rows], self.args, self.generator)
        images = self.normalize(images)
        if self.args.cutout:
            images = cut_out_(images, self.args.cutout, self.generator)
        return images, self.images.labels[rows]

    def rows(self, start: int, stop: int) -> Iterator[Tensor]:
        """Places `start` to `stop` of the order that goes through all images again and again, shuffled each time."""
        size = len(self.images)
        while start < stop:
            epoch, offset = divmod(start, size)
            if self.order is None or self.order[0] != epoch:
                # Apart from the draws of load_data, which are seeded by [data_seed] and [data_seed, 1].
                shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(size)
                self.order = epoch, torch.from_numpy(shuffled).to(self.images.labels.device)
            rows = self.order[1][offset : offset + stop - start]
            yield rows
            start += len(rows)

    @torch.no_grad()
    def evaluate(self, images: Images) -> dict[str, float]:
        """Top-1 accuracy in [0, 1] and mean cross-entropy, with clean weights and replica 0's buffers."""
        self.optimizer.eval()
        broadcast(list(self.module.buffers()))
        self.module.eval()
        right, loss = (torch.zeros((), dtype=torch.float64, device=images.labels.device) for _ in range(2))
        for pixels, labels in zip(images.pixels.split(512), images.labels.split(512), strict=True):
            with self.accelerator.autocast():
                logits = self.module(self.normalize(pixels)).float()
            right += (label_rank(logits, labels) == 0).sum()
            loss += cross_entropy(logits, labels, reduction="sum")
        self.module.train()
        self.optimizer.train()
        return {"top1": right.item() / len(images), "eval_loss": loss.item() / len(images)}


def run(
    accelerator: Accelerator,
    args: Arguments,
    data: Mapping[str, Any],
    facts: Mapping[str, Any],
    kind: str,
    protocol: str,
    name: str,
    settings: Mapping[str, float | None],
    seed: int,
    steps: int,
    label: str,
) -> bool:
    """Train one model to the end and append its record, unless that is there already. Returns whether it trained.

    kind: `run`, on all training images, evaluated on the test images; `trial`, on and with those held in and out.
    """
    results, replicas = Path(args.results), accelerator.num_processes
    what = {
        "kind": kind,
        "task": task_of(args),
        "protocol": protocol,
        "method": name,
        "options": options_of(args, name),
        "settings": settings,
        "seed": seed,
        "replicas": replicas,
        "steps": steps,
    }
    there = records_in(results)
    accelerator.wait_for_everyone()  # all replicas have read before the main one writes
    if any(all(record[key] == what[key] for key in what) for record in there):
        return False
    for record in there:
        if kind == record["kind"] == "run" and (record["protocol"], record["method"]) == (protocol, name):
            other = [key for key in ("settings", "steps") if record[key] != what[key]]
            if other:
                raise ValueError(
                    f"{results} has a run of {name} with {other[0]} {record[other[0]]}, to which one with "
                    f"{what[other[0]]} is no further seed: set another --name, or --results FILE"
                )
    images, judges = (data["train"], data["test"]) if kind == "run" else (data["held_in"], data["held_out"])
    per_step = images_per_step(args, name, protocol, args.batch_size * replicas)
    training = Training(accelerator, args, data, images, name, settings, seed, steps, per_step // replicas)
    folder = Path(args.output_dir) / "checkpoints" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    history: list[dict[str, Any]] = []
    done, seconds, slots_before = 0, 0.0, {"clean": 0, "perturbed": 0}
    if (latest := newest(folder)) is not None:
        kept = ("step", "seconds", "history", "gradients", "slots")
        try:
            state = read_state(latest, needed=kept)
            load_checkpoint(accelerator, latest)
        except ValueError as error:
            raise ValueError(f"{error}: delete {folder}, and this run begins anew") from error
        done, seconds, history, training.gradients, slots_before = (state[key] for key in kept)
    points = sorted({round(steps * part / args.evaluations) for part in range(1, args.evaluations + 1)} - {0})
    progress = tqdm(
        desc=f"{label}, {name}, seed {seed}",
        total=steps * per_step,
        initial=done * per_step,
        unit="img",
        unit_scale=True,
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )

    def report() -> dict[str, Any]:
        """What RWP did, before a cut too. Collective."""
        if training.rwp is None:
            return {}
        found = training.rwp.report()
        return found | {"slots": {kind: slots_before[kind] + count for kind, count in found["slots"].items()}}

    training.module.train()
    try:
        for point in (point for point in points if point > done):
            synchronize(accelerator.device)
            started = time.perf_counter()
            for number in range(done, point):
                training.step(number)
                progress.update(per_step)
            synchronize(accelerator.device)
            seconds += time.perf_counter() - started
            done = point
            losses = training.tracker.compute()
            row = {"step": done, "epoch": done * per_step / len(images), "seconds": seconds}
            row |= {"gradients": training.gradients / len(images), "train_loss": losses.pop("loss")}
            figures = losses | training.evaluate(judges)
            history.append(row | figures)
            progress.set_postfix(loss=f"{row['train_loss']:.3f}", top1=f"{figures['top1']:.2%}")
            if not math.isfinite(row["train_loss"]):
                break  # diverged: the accuracy that it has is the result
            if done < steps:
                position = {"step": done, "seconds": seconds, "gradients": training.gradients}
                position |= {"history": history, "slots": report().get("slots", slots_before)}
                save_checkpoint(accelerator, folder / f"step_{done}", position)
                if accelerator.is_main_process:
                    remove_checkpoints(folder, keep=[done])
    finally:
        training.optimizer.eval()  # an interrupt may have left noise in the weights
        progress.close()
    did = report()
    if did and all(layer["size"] < 1e-4 for layer in did["relative_noise"].values()):
        raise RuntimeError(
            f"{name} perturbed next to nothing ({did}): that is no result of RWP. Set rwp_gamma, rwp_start"
        )
    if accelerator.is_main_process:
        final = history[-1]
        record = what | {
            "evaluations": args.evaluations,
            "batch_size": args.batch_size,
            "images_per_step": per_step,
            "top1": final["top1"],
            "gradients": final["gradients"],
            "seconds": final["seconds"],
            **({"rwp": did} if did else {}),
            "images": {"train": len(images), "evaluated": len(judges)},
        }
        append_record(results, without_nan(record | ({"history": history} if kind == "run" else {}) | facts))
        remove_checkpoints(folder, keep=[])
    accelerator.wait_for_everyone()  # what was appended may choose the next settings
    accelerator.free_memory()
    return True


def step_times(accelerator: Accelerator, args: Arguments, data: Mapping[str, Any]) -> dict[str, float]:
    """The time of each method's step in those of plain training; measured once, and kept in the output folder."""
    file = Path(args.output_dir) / "step_times.json"
    (times,) = broadcast_object_list([json.loads(file.read_text()) if file.exists() else {"base": 1.0}])
    missing = [name for name in args.methods if name not in times]
    if missing:
        seconds = seconds_per_step(accelerator, args, data, ["base", *missing])
        times |= {name: seconds[name] / seconds["base"] for name in missing}
        if accelerator.is_main_process:
            file.write_text(json.dumps(times))
    return times


def seconds_per_step(
    accelerator: Accelerator, args: Arguments, data: Mapping[str, Any], names: Sequence[str]
) -> dict[str, float]:
    """The median step time of some methods, in rounds in which all of them take turns."""
    trainings = {}
    for name in names:
        settings = {"lr": args.lr, "weight_decay": args.weight_decay, "strength": default_strength(args, name)}
        trainings[name] = Training(
            accelerator, args, data, data["train"], name, settings, args.data_seed, 1000, args.batch_size
        )
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for number in tqdm(range(6), desc="step times", leave=False, disable=None):
        for name, training in trainings.items():
            training.module.train()
            synchronize(accelerator.device)
            started = time.perf_counter()
            for step in range(10 * number, 10 * number + 10):  # one in ten is SAM's where SAM is seldom
                training.step(step)
            synchronize(accelerator.device)
            if number:
                times[name].append((time.perf_counter() - started) / 10)
    accelerator.free_memory()
    medians = torch.tensor([statistics.median(values) for values in times.values()], device=accelerator.device)
    return dict(zip(times, broadcast(medians).tolist(), strict=True))  # replicas have to agree on steps


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# What is written down.


def task_of(args: Arguments) -> dict[str, Any]:
    """What is learned and how, alike for the methods and settings that are compared."""
    others = {"methods", "protocols", "seeds", "search", "lrs", "weight_decays", "strengths", "lr", "weight_decay"}
    others |= {"name", "evaluations", "workers", "max_bad_images", "shuffle_buffer"}
    facts, defaults = described_arguments(args)
    kept = {key: value for key, value in facts.items() if key not in others and not key.startswith("rwp")}
    always = ("model", "epochs", "batch_size", "opt", "data_dir")
    return {key: value for key, value in kept.items() if value != defaults[key] or key in always}


def check_records(args: Arguments, accelerator: Accelerator, digest: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a file has runs that these cannot be compared to, or a search of another grid."""
    alike = {"replicas": accelerator.num_processes, "evaluations": args.evaluations, "data_sha256": digest}
    for record in records:
        name = record["method"]
        theirs = record["task"] | {key: record[key] for key in alike if key in record}
        ours = task_of(args) | {key: value for key, value in alike.items() if key in record}
        theirs |= {"options": record["options"], "mixed_precision": record["hardware"]["mixed_precision"]}
        ours |= {"options": options_of(args, name), "mixed_precision": accelerator.mixed_precision}
        if args.search and record["kind"] == "trial" and record["settings"] not in grid(args, name):
            theirs["a trial's settings"], ours["a trial's settings"] = record["settings"], "one of this grid"
        other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if other:
            said = ", ".join(f"{key} {theirs.get(key)!r} and not {ours.get(key)!r}" for key in other)
            raise ValueError(f"{args.results} holds another comparison ({said}): set another --name, or --results FILE")


def locked(output_dir: Path, results: Path) -> FileLock:
    """The output folder for this process alone. Raises ValueError where another has it, or nothing can be written."""
    lock = FileLock(output_dir / "lock")
    try:
        for folder in (output_dir, results.parent):
            folder.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{output_dir} is in use by another run: wait for it, or set another --output_dir") from None
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} and results={str(results)!r}: {error}. Set others") from error
    return lock


def described_arguments(args: Arguments) -> tuple[dict, dict]:
    """The arguments as given, and their defaults for the same data."""
    defaults = asdict(Arguments(data_dir=args.data_dir, dataset=args.dataset))
    facts = without_places(asdict(args))
    facts = {name: value for name, value in facts.items() if name not in ("results", "output_dir", "rwp")}
    return facts, defaults | {"data_dir": None, "dataset": None}


def records_in(results: Path) -> list[dict[str, Any]]:
    """Trials and runs, without notes."""
    return [record for record in read_records(results) if record["kind"] != "note"]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Of runs under one protocol, a row a method: accuracy over seeds, its distance to plain training, the cost."""
    heads = ("method", "top-1 (%)", "against plain", "seeds", "gradients of an image", "training time", "settings")
    rows = [heads, ("---",) * len(heads)]
    runs = by_method(records)
    plain = {record["seed"]: record["top1"] for record in runs.get("base", [])}
    for name, mine in runs.items():
        gains = [100 * (record["top1"] - plain[record["seed"]]) for record in mine if record["seed"] in plain]
        settings = [f"{value:g}" for value in mine[-1]["settings"].values() if value is not None]
        rows.append(
            (
                METHODS[name].title
                + (" (some runs diverged)" if any(run["history"][-1]["train_loss"] is None for run in mine) else ""),
                spread([100 * record["top1"] for record in mine]),
                "" if name == "base" else spread(gains, sign=True),
                str(len(mine)),
                f"{statistics.mean(record['gradients'] for record in mine):.3g}",
                f"{statistics.mean(record['seconds'] for record in mine):.3g} s",
                ", ".join(settings),
            )
        )
    return as_table(rows)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def by_method(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each method that has some, in the methods' order."""
    found = {name: [record for record in records if record["method"] == name] for name in METHODS}
    return {name: mine for name, mine in found.items() if mine}


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Mapping[str, Any]]]]:
    """For the picture: the histories of each method's runs, by its title."""
    return {METHODS[name].title: [record["history"] for record in mine] for name, mine in by_method(records).items()}


if __name__ == "__main__":
    main(parse_arguments(Arguments, description=__doc__.splitlines()[0]))
