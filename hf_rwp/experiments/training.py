"""One short training on small images by one of the methods of `METHODS`: the data, the model, and a step at a time.

data = load_data(args, accelerator.device)
settings = default_settings(args, "rwp")
training = Training(accelerator, args, data, data["train"], "rwp", settings, seed=0, steps=100, per_replica=64)
for number in range(100):
    training.step(number)
training.evaluate(data["test"])         # {"top1": ..., "eval_loss": ...}
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.data import resolve_data_config  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_rwp.analysis.finder import NothingLearnedError, find_gamma
from hf_rwp.analysis.robustness import robustness
from hf_rwp.core.buffers import sync_buffers
from hf_rwp.core.gamma import DEFAULT_GAMMA, gamma_factor
from hf_rwp.core.losses import LossTracker
from hf_rwp.core.optimizer import RWP
from hf_rwp.core.placement import fewest_micro_steps
from hf_rwp.experiments.arguments import SmallArguments
from hf_rwp.images.data import load_images
from hf_rwp.images.memory import Batches, Images, images_digest, select_images
from hf_rwp.images.metrics import Accuracy
from hf_rwp.images.small_models import create_small_model
from hf_rwp.images.transforms import BatchTransform
from hf_rwp.runs.determinism import derive_seed
from hf_rwp.runs.methods import METHODS, Settings
from hf_rwp.runs.steps import accumulate, plain_step, sam_step, wrap_sam

Data = Mapping[str, Any]  # what `load_data` gives


def load_data(args: SmallArguments, device: torch.device, held_out: bool = False) -> Data:
    """The images of `select_images`; `classes`, timm's `config`, and the `digest` of what trains and what judges."""
    splits = load_images(**args.data_options)
    classes, pixels = splits["train"].features["label"].num_classes, args.img_size or 32
    size = {"img_size": pixels, "crop_pct": args.crop_pct or 1.0, "interpolation": args.interpolation}
    model = create_model(args, classes, pixels)
    config = resolve_data_config(size, model=model) | {"input_size": (3, pixels, pixels)}
    images = select_images(args, splits, config, device, held_out=held_out)
    digest = images_digest(images["train"], images["test"])
    return images | {"classes": classes, "config": config, "digest": digest}


def create_model(args: SmallArguments, classes: int, img_size: int) -> nn.Module:
    return create_small_model(args.model, classes, img_size, args.small_stem, **yaml.safe_load(args.model_kwargs))


def options_of(args: SmallArguments, name: str) -> dict[str, Any]:
    """The options of `RWP`, and of gamma's schedule, that a method has; gamma is in its settings."""
    method = METHODS[name]
    if method.rwp is None:
        return {}
    own = {"schedule": args.rwp_schedule, "growth": args.rwp_growth, "start": args.rwp_start}
    return {**args.rwp_options, **own, **method.rwp, "gamma": None}


def default_settings(args: SmallArguments, name: str) -> Settings:
    strength = METHODS[name].strength
    if METHODS[name].rwp is not None and strength is None:
        strength = DEFAULT_GAMMA[args.rwp_noise] if args.rwp_gamma is None else args.rwp_gamma
    return {"lr": args.lr, "weight_decay": args.weight_decay, "strength": strength}


def needs_gamma(args: SmallArguments, name: str) -> bool:
    """Whether a method has the gamma of the flags, and they leave it open."""
    method = METHODS[name]
    return method.rwp is not None and method.strength is None and args.rwp_gamma is None


def found_gamma(accelerator: Accelerator, args: SmallArguments, data: Data, images: Images, steps: int) -> float:
    """What `find_gamma` proposes after so many steps of plain training on the images; its default gamma where that has
    learned nothing. Collective."""
    settings, size = {"lr": args.lr, "weight_decay": args.weight_decay, "strength": None}, args.batch_size
    plain = Training(accelerator, args, data, images, "base", settings, args.data_seed, steps, size)
    for number in range(steps):
        plain.step(number)
    sync_buffers([plain.module])
    some = Images(images.pixels[:512], images.labels[:512])
    try:
        gamma = find_gamma(
            plain.module, plain.as_they_are(some), noise=args.rwp_noise, noise_1d=args.rwp_noise_1d
        ).gamma
    except NothingLearnedError:
        gamma = DEFAULT_GAMMA[args.rwp_noise]
    accelerator.free_memory()
    return float(broadcast(torch.tensor(gamma, dtype=torch.float64, device=accelerator.device)))


class Training:
    """A model, an optimizer and a method; `step` is one optimizer step, and a function of its number and the seed."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: SmallArguments,
        data: Data,
        images: Images,
        name: str,
        settings: Settings,
        seed: int,
        steps: int,
        per_replica: int,
    ) -> None:
        self.accelerator, self.seed, self.steps, device = accelerator, seed, steps, accelerator.device
        self.method, self.options = METHODS[name], options_of(args, name)
        self.gradients = 0  # of one image each, over all replicas
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.normalize = BatchTransform(data["config"], device, memory_format=memory_format)
        self.batches = Batches(images, args, self.normalize, per_replica, seed)

        set_seed(seed)
        self.module = create_model(args, data["classes"], data["config"]["input_size"][-1])
        self.module.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.base = create_optimizer_v2(
            self.module,
            opt=args.opt,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            momentum=args.momentum,
            filter_bias_and_bn=not args.weight_decay_1d,
        )
        self.rwp = self.sam = None
        if self.options:
            own = {key: value for key, value in self.options.items() if key not in ("schedule", "growth", "start")}
            self.micro_steps = fewest_micro_steps(accelerator.num_processes, own["alpha"], own["antithetic"])
            own |= {"gamma": settings["strength"], "accumulation_steps": self.micro_steps}
            own["seed"] += seed
            self.rwp = RWP(self.base, self.module, **own)
        elif self.method.sam_every:
            self.sam = wrap_sam(self.base, settings["strength"], self.method.adaptive)
        self.model, self.optimizer = accelerator.prepare(self.module, self.rwp or self.sam or self.base)
        warmup = round(args.warmup_epochs / args.epochs * steps)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=1e-5 if warmup else 0, t_in_epochs=False
        )
        self.tracker = LossTracker(self.rwp, device)
        self.smoothing = settings["strength"] if self.method.smoothed else 0.0
        self.average = None
        if self.method.averaged:
            reach = settings["strength"] * len(images) / (per_replica * accelerator.num_processes)  # in steps
            decay = get_ema_multi_avg_fn(1 - 1 / max(reach, 1))
            self.average = AveragedModel(self.module, multi_avg_fn=decay, use_buffers=True)

    @property
    def judged(self) -> nn.Module:
        """The module whose weights are the result."""
        return self.module if self.average is None else self.average.module

    def step(self, number: int) -> None:
        self.scheduler.step_update(number)
        if self.rwp:
            schedule = (self.options[key] for key in ("schedule", "growth", "start"))
            self.rwp.scale_gamma(gamma_factor(number / self.steps, *schedule))
        images, labels = self.batch(number)
        # Whole batches before the start of the noise.
        count = self.micro_steps if self.rwp and self.rwp.active else self.method.parts
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
        add_gradients = partial(
            accumulate, self.model, parts, self.loss_of, accelerator=self.accelerator, tracker=self.tracker
        )
        climbs = self.sam is not None and number % self.method.sam_every == 0
        self.gradients += (2 if climbs else 1) * len(labels) * self.accelerator.num_processes
        if climbs:
            sam_step(self.sam, self.model, add_gradients)
        else:
            plain_step(self.base if self.sam else self.optimizer, add_gradients)
        if self.average is not None:
            self.average.update_parameters(self.module)

    def loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(images).float(), labels, label_smoothing=self.smoothing)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """This replica's share of the images of a step."""
        replicas, replica = self.accelerator.num_processes, self.accelerator.process_index
        return self.batches.batch(number * replicas + replica, derive_seed(self.seed, number, replica))

    @torch.no_grad()
    def evaluate(self, images: Images) -> dict[str, float]:
        """Top-1 accuracy in [0, 1] and mean cross-entropy, with clean weights and replica 0's buffers."""
        self.optimizer.eval()
        sync_buffers([self.module])
        self.judged.eval()
        accuracy = Accuracy(images.labels.device)
        for pixels, labels in self.as_they_are(images):
            with self.accelerator.autocast():
                logits = self.judged(pixels)
            accuracy.add(logits, labels)
        self.judged.train()
        self.optimizer.train()
        found = accuracy.compute(over_replicas=False)  # each of them has seen all images
        return {key: found[key] for key in ("top1", "eval_loss")}

    def as_they_are(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized images (B, 3, H, W), not augmented, and labels (B,), in their order."""
        for pixels, labels in zip(images.pixels.split(512), images.labels.split(512), strict=True):
            yield self.normalize(pixels), labels

    def robustness(self, judges: Images, count: int) -> dict[str, Any]:
        """`hf_rwp.analysis.robustness` of the result, on so many of `judges` and of the training images, or all."""
        self.optimizer.eval()
        sync_buffers([self.module])
        learned = self.batches.images
        batches = [
            list(self.as_they_are(Images(part.pixels[:count], part.labels[:count]))) for part in (judges, learned)
        ]
        found = robustness(self.judged, *batches, seed=self.seed)
        self.optimizer.train()
        return found

    def report(self, slots_before: Mapping[str, int]) -> dict[str, Any]:
        """What RWP did, with the slots before a cut; empty without RWP. Collective."""
        if self.rwp is None:
            return {}
        found = self.rwp.report()
        return found | {"slots": {kind: slots_before[kind] + count for kind, count in found["slots"].items()}}
