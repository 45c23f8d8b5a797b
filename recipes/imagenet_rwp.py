"""Train an image classifier with Random Weight Perturbation (RWP), plainly, or with SAM: Accelerate + timm.

# Handwritten digits, embedded, on whatever this machine has
```bash
accelerate launch recipes/imagenet_rwp.py
```

# ImageNet from the Hub on eight GPUs; `--method base` and `--method sam` to compare
```bash
accelerate launch --config_file recipes/accelerate/gpu_8.yaml recipes/imagenet_rwp.py \
    --config recipes/configs/imagenet_resnet50.yaml --dataset ILSVRC/imagenet-1k --workers 8
```

# Any folder: train/CLASS/IMAGE and validation/CLASS/IMAGE, parquet files, or WebDataset shards
```bash
accelerate launch recipes/imagenet_rwp.py --data_dir path/to/images --model resnet50 --epochs 90 --lr 0.1
```

# From trained weights (a folder or a Hub id) with a new head; then how good it is
```bash
accelerate launch recipes/imagenet_rwp.py --data_dir path/to/pets --pretrained timm/resnet50.a1_in1k --lr 0.01
accelerate launch recipes/imagenet_rwp.py --data_dir path/to/pets --pretrained outputs/pets_rwp_seed0/model --eval_only
```

# After a crash or a preemption: on from the last checkpoint, bit for bit (on GPUs with --deterministic)
```bash
accelerate launch recipes/imagenet_rwp.py ... --resume_from_checkpoint latest
```

# On the Hub when it is done, for anyone's timm and transformers (`hf auth login` first)
```bash
accelerate launch recipes/imagenet_rwp.py --push_to_hub --hub_model_id USER/NAME
```

# Two replicas without a GPU
```bash
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch --config_file recipes/accelerate/cpu_2.yaml \
    recipes/imagenet_rwp.py
```

Every flag can also stand in a file, `--config FILE.yaml`. On several replicas the odd ones take the perturbed gradient.
A single one takes both: from the two halves of each batch, or by turns where it accumulates gradients.
SIGTERM to this process, or to its group, saves a checkpoint and exits with status 75. `accelerate launch` reports a
failure of its own then; given the signal alone, it ends and leaves a single process running. A push that fails costs no
weights: they are on disk, with the command that finishes it on stderr, and the exit status is 1.
"""

import difflib
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import timm
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast, gather_object, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from timm.data import Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_rwp import RWP, LossTracker, RWPArguments
from hf_rwp.analysis.plots import training_curves
from hf_rwp.core.placement import role
from hf_rwp.core.sharding import refuse_lone_processes
from hf_rwp.hub.arguments import HubArguments
from hf_rwp.hub.export import save_model
from hf_rwp.hub.push import BackgroundPush, PushError, add_card, hf_upload, push, reserve
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import ImageLoader, build_loader
from hf_rwp.images.metrics import Top1, Top5, label_rank
from hf_rwp.images.transforms import BatchTransform, erasings, image_transforms
from hf_rwp.runs.checkpoints import (
    checkpoints_in,
    load_checkpoint,
    newest,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import command_of, environment, hub_id, scrub_paths, weights_digest

# Flags that may change on resuming; and those whose old values come back with the optimizer's state.
HARMLESS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_steps"}
HARMLESS |= {"checkpointing_steps", "save_total_limit", "max_bad_images", "eval_only", "push_to_hub"}
HARMLESS |= {"hub_model_id", "hub_private", "hub_revision", "hub_strategy", "hub_tag", "hub_logs"}
KEPT_BY_CHECKPOINTS = {"rwp_gamma", "rwp_seed", "opt", "opt_eps", "opt_betas", "momentum", "weight_decay"}
KEPT_BY_CHECKPOINTS |= {"weight_decay_1d", "layer_decay", "model", "model_kwargs", "model_ema"}
STATE = ("method", "arguments", "replicas", "step", "images", "seconds", "slots", "losses", "history")
PREEMPTED = 75  # the exit status after SIGTERM, once a checkpoint is saved: EX_TEMPFAIL, "try again later"
TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass
class Arguments(HubArguments, ImageArguments, RWPArguments):
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is `--method base`."})
    method: str = field(
        default="rwp",
        metadata={"help": "Plain training, RWP, or SAM, on the same optimizer.", "choices": ("base", "rwp", "sam")},
    )
    sam_rho: float = field(default=0.05, metadata={"help": "Radius of SAM's neighbourhood, above 0."})
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
    sync_bn: bool = field(
        default=False, metadata={"help": "Whether BatchNorm takes its statistics over the replicas of one role (GPUs)."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Whether to compile the model with torch.compile."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "What accelerate launch says if not set.", "choices": ("no", "fp16", "bf16")},
    )
    # Training
    epochs: int = field(default=10, metadata={"help": "Passes over the training images, cooldown not counted."})
    batch_size: int = field(default=64, metadata={"help": "Images per replica and optimizer step."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Parts that a replica's batch is cut into, one backward pass each."}
    )
    aug_repeats: int = field(
        default=1, metadata={"help": "Repeated augmentation: how often an epoch shows an image, beside fewer others."}
    )
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
    sched: str = field(default="cosine", metadata={"help": "A timm schedule of the learning rate, per update."})
    warmup_epochs: int = field(default=1, metadata={"help": "Epochs of linear warm-up."})
    warmup_lr: float = field(default=1e-5, metadata={"help": "Learning rate at the start of warm-up."})
    min_lr: float = field(default=0.0, metadata={"help": "Least learning rate of schedules that have one."})
    decay_epochs: float | None = field(default=None, metadata={"help": "Epochs between steps of a step schedule."})
    decay_milestones: list[int] | None = field(default=None, metadata={"help": "Epochs of a multistep schedule."})
    decay_rate: float = field(default=0.1, metadata={"help": "Factor of a step of the schedule."})
    cooldown_epochs: int = field(default=0, metadata={"help": "Epochs at the least learning rate, at the end."})
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
    model_ema: bool = field(
        default=False, metadata={"help": "Whether to keep an average of the weights, evaluate it, and save it at last."}
    )
    model_ema_decay: float = field(default=0.9998, metadata={"help": "Decay of that average, in (0, 1)."})
    model_ema_warmup: bool = field(default=False, metadata={"help": "Whether that decay begins small."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and augmentation, at least 0."})
    deterministic: bool = field(
        default=False, metadata={"help": "Whether GPUs compute the same bits each time, which takes them longer."}
    )
    # Output
    eval_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to evaluate alone, `--pretrained` weights or a checkpoint; data of a single split is fine "
            "if `--validation_split` names it."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for all that is written; outputs/DATA_METHOD_seedN if not set."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run that output_dir holds may be deleted for this one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's path, or `latest` for the last one in output_dir."}
    )
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps from one checkpoint to the next, beside each epoch's."}
    )
    save_total_limit: int = field(
        default=2, metadata={"help": "How many of the last checkpoints are kept, at least 1, beside the best one."}
    )
    logging_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps from one report of the loss to the next; several replicas also agree then on "
            "unreadable images and on SIGTERM."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": f"Where figures go: {', '.join(TRACKERS)} (as far as installed), or none."},
    )

    def __post_init__(self) -> None:
        ImageArguments.__post_init__(self)
        RWPArguments.__post_init__(self)
        HubArguments.__post_init__(self)
        if self.method == "rwp" and not self.rwp:
            self.method = "base"
        self.rwp = self.method == "rwp"
        if self.output_dir is None:
            data = Path(self.data_dir or self.dataset or "digits").name
            self.output_dir = f"outputs/{data}_{self.method}_seed{self.seed}"
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "aug_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing to train on: it has to be at least 1")
        for name, valid, valid_range in (
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
            ("sam_rho", self.sam_rho > 0, "above 0"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
            ("sched", self.sched != "plateau", "a schedule of the number of updates alone"),
            ("drop", self.drop is None or 0 <= self.drop < 1, "in [0, 1)"),
            ("drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "in (0, 1]"),
            ("model_ema_decay", 0 < self.model_ema_decay < 1, "in (0, 1)"),
            ("warmup_epochs", self.warmup_epochs >= 0, "at least 0"),
            ("cooldown_epochs", self.cooldown_epochs >= 0, "at least 0"),
            ("mixup_prob", 0 <= self.mixup_prob <= 1, "in [0, 1]"),
            ("mixup_switch_prob", 0 <= self.mixup_switch_prob <= 1, "in [0, 1]"),
            (
                "opt_betas",
                self.opt_betas is None or len(self.opt_betas) > 1,
                "two numbers or more, as the optimizer has",
            ),
            ("opt", self.opt != "adahessian", "one that needs no second derivatives"),
            ("sched", self.sched != "none" or self.layer_decay is None, "`constant` or another one with layer_decay"),
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
            ("checkpointing_steps", self.checkpointing_steps is None or self.checkpointing_steps > 0, "at least 1"),
            ("save_total_limit", self.save_total_limit >= 1, "at least 1"),
            ("logging_steps", self.logging_steps >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")
        for name, kind, known in (
            ("model", "models", timm.list_models()),
            ("opt", "optimizers", list_optimizers()),
        ):
            value = getattr(self, name).removeprefix("lookahead_" if name == "opt" else "")
            if ":" not in value and value.split(".")[0] not in known:
                similar = ", ".join(difflib.get_close_matches(value, known, n=5, cutoff=0))
                raise ValueError(f"{name}={value!r} is none of timm's {kind}. Similar names: {similar}")
        if self.report_to == ["none"]:
            self.report_to = []
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ValueError(f"report_to={tracker!r} is no tracker: choose of {', '.join(TRACKERS)}, or none")
            if not importlib.util.find_spec(tracker):
                raise ValueError(f"report_to={tracker!r} is not installed: pip install {tracker}, or --report_to none")
        if self.method == "sam" and not importlib.util.find_spec("pytorch_optimizer"):
            raise ValueError("method='sam' takes SAM from pytorch_optimizer: pip install 'hf-rwp[compare]'")
        if self.streaming and self.aug_repeats > 1:
            raise ValueError("aug_repeats needs data that can be read in any order: set streaming to false")
        if not isinstance(yaml.safe_load(self.model_kwargs), dict):
            raise ValueError(f"model_kwargs={self.model_kwargs!r} is no mapping: write it as {{name: value}}")
        if self.eval_only and not (self.pretrained or self.resume_from_checkpoint):
            raise ValueError("eval_only has nothing to evaluate: set pretrained or resume_from_checkpoint")
        if self.eval_only and self.train_split is None:
            self.train_split = self.validation_split


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else None,
        log_with=None if args.eval_only else args.report_to or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    refuse_lone_processes()
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError("accelerate's gradient_accumulation_steps would count twice: set the recipe's own flag")
    if args.method == "sam" and accelerator.scaler is not None:
        raise ValueError("fp16's gradient scaler cannot work between SAM's two passes: set --mixed_precision bf16")
    replicas, replica, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    use_fast_kernels(args.deterministic)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_rwp.images").setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)

    # The gradients of one step on one replica. RWP mixes two, so a replica that is alone halves its batch.
    accumulation = args.gradient_accumulation_steps
    mixes = args.rwp and 0 < args.rwp_alpha < 1 and args.rwp_gamma != 0
    micro_steps = 2 if mixes and replicas == accumulation == 1 else accumulation
    results_file, checkpoints = output_dir / "results.json", output_dir / "checkpoints"
    model_folder, best_folder, curves = output_dir / "model", output_dir / "best", output_dir / "curves.png"
    resume_from = checkpoint_to_resume(args, checkpoints, finished=results_file.exists())
    state = read_state(resume_from, needed=STATE) if resume_from else None
    check_writable(output_dir)
    facts = scrub_paths(asdict(args))
    if not args.eval_only:
        check_batch(args, replicas, micro_steps, mixes)
        if state:
            check_arguments(facts, state["arguments"], replicas, state["replicas"], accelerator)

    surroundings = environment(accelerator)  # now: by the end of the run the code on disk may be another
    hub = {"revision": args.hub_revision, "private": args.hub_private or None}
    background = None
    if args.push_to_hub and not args.eval_only:
        reserve_on_main(accelerator, args.hub_model_id, hub["private"])
        if args.hub_strategy != "end" and accelerator.is_main_process:
            background = BackgroundPush(output_dir / "pushing", args.hub_model_id, **hub)

    set_seed(args.seed)
    splits = load_images(**args.data_options)
    label_names = splits["train"].features["label"].names
    module, model_args = create_model(args, label_names)
    data_config = resolve_data_config(
        {"img_size": args.img_size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}, model=module
    )
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    module.to(device, memory_format=memory_format)
    eval_loader = create_loader(args, splits, data_config, accelerator, training=False)
    eval_batch = BatchTransform(data_config, device, memory_format=memory_format)

    def evaluate_weights(module: nn.Module) -> dict[str, float]:
        """Accuracy on the main process, and how many images could not be read."""
        figures = validate(accelerator, module, eval_loader, eval_batch)
        return figures | {"unreadable_eval_images": agree(accelerator, eval_loader, args.max_bad_images)[1]}

    if args.eval_only:
        if resume_from:
            module.load_state_dict(load_file(resume_from / "model.safetensors", device=str(device)))
        figures = evaluate_weights(module)
        if resume_from and (averaged := resume_from / "ema.safetensors").exists():
            weights = load_file(averaged, device=str(device))
            module.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
            figures |= {f"{name}_ema": value for name, value in evaluate_weights(module).items()}
        if accelerator.is_main_process:
            (output_dir / "eval.json").write_text(json.dumps(figures, indent=2))
            print(aligned({name: f"{value:.4f}" for name, value in figures.items()}))
        return

    train_loader = create_loader(args, splits, data_config, accelerator, training=True)
    train_batch = BatchTransform(data_config, device, erasings(args, data_config, device), memory_format)
    updates, images_per_update = len(train_loader), args.batch_size * replicas  # updates: in an epoch
    ema = ModelEmaV3(module, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    if args.sync_bn:  # after the copy: process groups cannot be copied
        module = sync_batch_norm(module, accelerator, args.rwp_alpha if mixes else None)
    base = create_optimizer(args, module)
    rwp = RWP(base, module, accumulation_steps=micro_steps, **args.rwp_options) if args.rwp else None
    sam = None
    if args.method == "sam":
        from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats

        sam = SAM(base.param_groups, lambda *_, **__: base, rho=args.sam_rho)
    model, optimizer = accelerator.prepare(module, rwp or sam or base)
    trained = ema.module if ema else module  # the weights that a user gets
    averages = {"ema": ema} if ema else {}  # not registered with accelerate, which would unpickle whatever is there
    scheduler, epochs = create_scheduler(args, optimizer, updates)
    mixup = create_mixup(args, len(label_names))
    criterion = create_criterion(args, mixed=mixup is not None)
    tracker = LossTracker(rwp, device)

    history, done, start, seconds_before, slots_before = [], 0, 0, 0.0, {"clean": 0, "perturbed": 0}
    if state:  # done: optimizer steps. start: images of the epoch that are behind us, over all replicas.
        history, done, start, seconds_before = (state[name] for name in ("history", "step", "images", "seconds"))
        if state["method"] != args.method or len(history) > epochs:
            raise ValueError(
                f"{resume_from.name} is from epoch {len(history)} of method {state['method']!r}: resume it with that "
                f"method and at least as many epochs, not with {args.method!r} and epochs={args.epochs}"
            )
        load_checkpoint(accelerator, resume_from, averages)
        tracker.load_state_dict(state["losses"])
        slots_before = state["slots"]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        results_file.unlink(missing_ok=True)
        remove_checkpoints(checkpoints, keep=[step for step in checkpoints_in(checkpoints) if step <= done])
    accelerator.init_trackers("hf_rwp", config={name: str(value) for name, value in facts.items()})

    def take_step(images: Tensor, labels: Tensor) -> None:
        """One optimizer step."""
        parts = micro_steps if rwp and rwp.active else accumulation
        images, labels = train_batch(images), labels.to(device, non_blocking=True)
        batches = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        if mixup:  # which pairs image i with image -i: the two gradients of RWP are to share none
            batches = [mixup(*batch) for batch in batches]
        if sam:
            add_gradients(batches, sync=False)
            sam.first_step(zero_grad=True)
            disable_running_stats(model)
            add_gradients(batches, track=False)
            enable_running_stats(model)
        else:
            add_gradients(batches)
        if args.clip_grad:
            accelerator.unscale_gradients()
            clipped = model_parameters(module, exclude_head=args.clip_mode == "agc")
            dispatch_clip_grad(clipped, args.clip_grad, args.clip_mode)
        if sam:
            sam.second_step()
        else:
            optimizer.step()
        optimizer.zero_grad()

    def add_gradients(batches: list[tuple[Tensor, Tensor]], sync: bool = True, track: bool = True) -> None:
        """Add the gradient of the batches' mean loss, one after the other."""
        for index, (images, targets) in enumerate(batches, start=1):
            with nullcontext() if sync and index == len(batches) else accelerator.no_sync(model):
                loss = criterion(model(images), targets)
                accelerator.backward(loss / len(batches))
            if track:
                tracker.update(loss.detach())

    def report(step: int) -> tuple[bool, int]:
        """Log the losses since the last time; returns what `agree` does."""
        nonlocal diverged
        losses = tracker.compute()
        diverged = 0 if all(map(math.isfinite, losses.values())) else diverged + 1
        if diverged > (2 if accelerator.scaler else 0):  # fp16's scaler skips a step that overflows
            raise FloatingPointError(
                f"the loss is {losses} by step {step}: nothing was saved since it diverged. Try a smaller lr"
                + (" or rwp_gamma" if rwp else "")
            )
        accelerator.log({**losses, "learning_rate": max(group["lr"] for group in optimizer.param_groups)}, step=step)
        if losses:
            progress.set_postfix(loss=f"{losses['loss']:.3f}")
        return agree(accelerator, train_loader, args.max_bad_images, preempted.received)

    def figures_of_rwp() -> dict:
        """What RWP did since the run began, earlier sessions of it included. Collective."""
        figures = rwp.report() | {"gamma": rwp.defaults["rwp_gamma"]}
        return figures | {"slots": {kind: slots_before[kind] + count for kind, count in figures["slots"].items()}}

    def save(images: int, seconds: float, slots: dict[str, int]) -> None:
        position = {"step": done, "images": images, "seconds": seconds, "slots": slots, "history": history}
        run = {"method": args.method, "replicas": replicas, "arguments": facts, "losses": tracker.state_dict()}
        save_checkpoint(accelerator, checkpoints / f"step_{done}", position | run, averages)
        if accelerator.is_main_process:
            kept = list(checkpoints_in(checkpoints))[-args.save_total_limit :]
            best = [max(history, key=accuracy_of)["step"]] if history else []
            remove_checkpoints(checkpoints, keep=kept + best)
            if background:
                publish(not images and done in best, seconds)

    def publish(improved: bool, seconds: float) -> None:
        """Have the weights as they are pushed in the background, if it is time. seconds: of this epoch."""
        by_accuracy = args.hub_strategy == "best"
        folder = best_folder if by_accuracy else model_folder
        if background.busy or (by_accuracy and not improved):  # the last push has the best weights anyway
            return
        try:
            write_model(folder, results_so_far(seconds))
            background.start(folder, f"Step {done}")
        except (OSError, RuntimeError, SafetensorError) as error:
            print(f"warning: nothing is pushed at step {done}: {error}. Training goes on", file=sys.stderr)

    def results_so_far(seconds: float = 0.0) -> dict:
        """What results.json will hold. On the main process. seconds: of an epoch that is under way."""
        last = history[-1] if history else {}
        return {
            "final": last if last.get("step") == done else {"step": done},
            "seconds": sum(row["seconds"] for row in history) + seconds,
            "weights_sha256": weights_digest(trained),
            "arguments": facts,
            "base_model": base_model_of(args, module),
            "command": command_of(f"accelerate launch recipes/{Path(__file__).name}", *described_arguments(args)),
            "data": {
                role: {"images": getattr(split, "num_rows", None), "split": name_of(split)}
                for role, split in splits.items()
            },
            **surroundings,
            "history": history,
        }

    def write_model(folder: Path, results: dict) -> None:
        """The weights as they are, and their card: all that goes to the Hub. On the main process."""
        parts = {"label_names": label_names, "data_config": data_config, "model_args": model_args}
        save_model(trained, folder, **parts)
        training_curves(history, curves)
        add_card(
            folder,
            results,
            pictures=[curves],
            logs=output_dir / "logs" if args.hub_logs else None,
            repo_id=args.hub_model_id,
            architecture=module.pretrained_cfg["architecture"],
        )

    def write_best() -> Path:
        """The weights of the best epoch, read from its checkpoint, and their card; returns their folder."""
        best = max(history, key=accuracy_of)
        checkpoint = checkpoints / f"step_{best['step']}"
        if not checkpoint.exists():  # a run that goes on from elsewhere
            print(f"warning: {checkpoint} is not there, the best one: the last weights are pushed", file=sys.stderr)
            return model_folder
        for name, of in {"model": module, **averages}.items():  # accelerate saves what it has wrapped
            load_model(of, checkpoint / f"{name}.safetensors")
        write_model(best_folder, results_so_far() | {"final": best, "chosen": "best"})
        return best_folder

    def stop() -> None:
        if background:
            background.stop()
        accelerator.print(f"SIGTERM: saved step {done}; --resume_from_checkpoint latest goes on", file=sys.stderr)
        accelerator.end_training()
        raise SystemExit(PREEMPTED)

    diverged = 0  # reports in a row whose loss was no number
    preempted = Preemption()
    try:
        for epoch in range(len(history), epochs):
            train_loader.set_epoch(epoch, start)
            model.train()
            optimizer.train()
            if mixup:
                mixup.mixup_enabled = not 0 < args.mixup_off_epoch <= epoch
            progress = tqdm(
                desc=f"epoch {epoch + 1}/{epochs}",
                total=updates * images_per_update,
                initial=start,
                unit="img",
                unit_scale=True,
                leave=False,
                disable=None if accelerator.is_main_process else True,  # None: shown on a terminal only
            )
            started = time.perf_counter() - seconds_before
            first = epoch * updates + start // images_per_update
            for update, (images, labels) in enumerate(train_loader, start=first):
                # All chance in a step follows from its place, so that a resumed run repeats it.
                set_seed(seed_of(args.seed, update, replica))
                if scheduler:
                    scheduler.step_update(update)
                if rwp:
                    rwp.scale_gamma(args.rwp_gamma_factor(update / (epochs * updates)))
                take_step(images, labels)
                if ema:
                    ema.update(module, step=update + 1)
                done += 1
                progress.update(images_per_update)
                if update + 1 == (epoch + 1) * updates:
                    continue  # what is due comes after the epoch
                saves = bool(args.checkpointing_steps) and done % args.checkpointing_steps == 0
                stops = replicas == 1 and preempted.received
                if saves or stops or done % args.logging_steps == 0:
                    stops, _ = report(done)
                if saves or stops:
                    seen = start + (update + 1 - first) * images_per_update
                    slots = figures_of_rwp()["slots"] if rwp else slots_before
                    save(seen, time.perf_counter() - started, slots)
                if stops:
                    stop()
            stops, unreadable = report(done)
            seconds = time.perf_counter() - started
            if stops:  # evaluation may take longer than there is time
                save(updates * images_per_update, seconds, figures_of_rwp()["slots"] if rwp else slots_before)
                stop()
            progress.close()

            losses = tracker.total()
            row = {
                "epoch": epoch + 1,
                "step": done,
                "method": args.method,
                "train_loss": losses.pop("loss"),
                "learning_rate": max(group["lr"] for group in optimizer.param_groups),
                "seconds": seconds,
                "images_per_second": updates * images_per_update / seconds,
                "unreadable_images": unreadable,
            }
            if rwp:
                row |= losses | {"rwp": figures_of_rwp()}
            optimizer.eval()
            # Replicas update BatchNorm's buffers apart; DDP gives them replica 0's at its next forward pass alone.
            broadcast([*module.buffers(), *(ema.module.buffers() if ema else ())])
            row |= evaluate_weights(module)
            if ema:
                row |= {f"{name}_ema": value for name, value in evaluate_weights(ema.module).items()}
            history.append(row)
            start, seconds_before = 0, 0.0
            tracker.reset()
            accelerator.log({name: value for name, value in row.items() if isinstance(value, float)}, step=done)
            save(0, 0.0, row["rwp"]["slots"] if rwp else slots_before)
            if accelerator.is_main_process:
                if rwp and not epoch:
                    print(f"noise / weights: {noise_sizes(row['rwp']) or 'none yet'}")
                shown = {name: row[name] for name in ("train_loss", "top1", "top1_ema") if name in row}
                print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
            if agree(accelerator, train_loader, args.max_bad_images, preempted.received)[0] and epoch + 1 < epochs:
                stop()
    except BaseException:
        if background:
            background.stop()
        raise
    finally:
        optimizer.eval()  # an interrupt may have left noise in the weights
        preempted.restore()

    digests = gather_object([weights_digest(module)])
    if accelerator.is_main_process:
        # One digest, as long as all replicas are bit-equal.
        results = results_so_far() | {"replicas_sha256": sorted(set(digests))}
        write_model(model_folder, results)
        partial_file = results_file.with_suffix(".partial")
        partial_file.write_text(json.dumps(results, indent=2))
        partial_file.replace(results_file)
        print(table(results))
        print(f"Wrote {results_file}, {curves}, {model_folder} and {newest(checkpoints)}")
    accelerator.end_training()  # the other replicas need not wait for a push
    if args.push_to_hub and accelerator.is_main_process:
        try:
            if background:
                background.finish()
            pushed = write_best() if args.hub_strategy == "best" else model_folder
            print(f"Pushed to {push(pushed, args.hub_model_id, tag=args.hub_tag, message='End of training', **hub)}")
        except PushError as error:
            raise SystemExit(f"error: {error}") from None
        except (OSError, RuntimeError, SafetensorError) as error:
            command = hf_upload(model_folder, args.hub_model_id, tag=args.hub_tag, **hub)
            raise SystemExit(
                f"error: nothing is pushed: {error}\n{model_folder} holds the last weights. This pushes them:\n\n"
                f"    {command}"
            ) from None


def accuracy_of(row: dict) -> float:
    """What tells which epoch was the best."""
    return row.get("top1_ema", row["top1"])


def base_model_of(args: Arguments, module: nn.Module) -> str | None:
    """The weights that training started from, by their id on the Hub; None where they have none."""
    if args.pretrained != "timm":
        return hub_id(args.pretrained)
    config = module.pretrained_cfg
    return config.get("hf_hub_id") or "timm/" + ".".join(filter(None, (config["architecture"], config.get("tag"))))


def name_of(split: Any) -> str | None:
    return str(split.split) if split.split else None


def described_arguments(args: Arguments) -> tuple[dict, dict]:
    """The arguments that decide what comes out of a run, and their defaults for the same data."""
    defaults = asdict(Arguments(data_dir=args.data_dir, dataset=args.dataset))
    places = ("rwp", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "push_to_hub")
    facts = scrub_paths(asdict(args))
    facts = {name: value for name, value in facts.items() if name not in places and not name.startswith("hub_")}
    return facts, defaults | {"data_dir": None, "dataset": None}


def checkpoint_to_resume(args: Arguments, checkpoints: Path, finished: bool) -> Path | None:
    """The checkpoint that the flags name. Raises where they name none, and where a run would be lost that is there."""
    last, output_dir = newest(checkpoints), checkpoints.parent
    if args.resume_from_checkpoint == "latest":
        if last is None:
            raise FileNotFoundError(f"{output_dir} holds no checkpoint: start without --resume_from_checkpoint")
        return last
    resume_from = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    inside = resume_from is not None and resume_from.resolve().parent == checkpoints.resolve()
    if (last or finished) and not (inside or args.eval_only or args.overwrite_output_dir):
        what = "a finished run" if finished else "the checkpoints of an unfinished run"
        raise FileExistsError(
            f"{output_dir} holds {what}: set another --output_dir, or --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to delete it"
        )
    return resume_from


def check_arguments(facts: dict, saved: dict, replicas: int, saved_replicas: int, accelerator: Accelerator) -> None:
    """Raise ValueError for a flag that the checkpoint would silently override, warn of others that changed."""
    changed = [name for name in facts if name in saved and facts[name] != saved[name] and name not in HARMLESS]
    if not facts["streaming"] and "workers" in changed:
        changed.remove("workers")
    kept = [name for name in changed if name in KEPT_BY_CHECKPOINTS or (name == "lr" and facts["sched"] == "none")]
    if kept:
        raise ValueError(
            f"the checkpoint was written with {', '.join(f'{name}={saved[name]!r}' for name in kept)}, and keeps that: "
            "resume with the same, or start anew from the weights (--pretrained .../model)"
        )
    if changed or replicas != saved_replicas:
        was = [f"{saved_replicas} replicas and not {replicas}"] if replicas != saved_replicas else []
        was += [f"{name}={saved[name]!r} and not {facts[name]!r}" for name in changed]
        accelerator.print(
            f"warning: the checkpoint was written with {', '.join(was)}. Training goes on after the images that were "
            "seen; what else depends on it (batches, the schedule, noise, which gradients are perturbed) changes, and "
            "it will not end in the same bits",
            file=sys.stderr,
        )


def check_writable(output_dir: Path) -> None:
    """Raise ValueError now, not after the first epoch."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} cannot be written to ({error}): set another one") from error


def reserve_on_main(accelerator: Accelerator, repo_id: str, private: bool | None) -> None:
    """Make the repository ahead of training. Raises PushError on all replicas if it will never be writable."""
    failure = None
    if accelerator.is_main_process:
        try:
            reserve(repo_id, private=private)
        except PushError as error:
            failure = str(error)
    failures = [text for text in gather_object([failure]) if text]
    if failures:
        raise PushError(failures[0])


def check_batch(args: Arguments, replicas: int, micro_steps: int, mixes: bool) -> None:
    """Raise ValueError for a batch size that the parts of a step, or what happens to them, cannot share."""
    parts = f"{micro_steps} parts" if args.gradient_accumulation_steps > 1 else "halves, a clean and a perturbed one"
    if args.batch_size % micro_steps:
        raise ValueError(f"batch_size={args.batch_size} cannot be cut into {parts}: set a multiple of {micro_steps}")
    part = args.batch_size // micro_steps
    if (args.mixup or args.cutmix) and part % 2:
        raise ValueError(
            f"batch_size={args.batch_size} makes parts of {part} images, and Mixup and CutMix mix pairs of one part: "
            f"set a multiple of {2 * micro_steps}"
        )
    together = args.batch_size if replicas > 1 else part
    if mixes and together % args.aug_repeats:
        raise ValueError(
            f"aug_repeats={args.aug_repeats} and {together} images to a gradient: copies of one image would land in "
            "the clean and in the perturbed gradient, which RWP needs from different images. Set batch_size to a "
            f"multiple of {args.aug_repeats * args.batch_size // together}, or aug_repeats to 1"
        )


def create_model(args: Arguments, label_names: list[str]) -> tuple[nn.Module, dict]:
    """The model, and the arguments that make it again, beside the classes."""
    model_args = yaml.safe_load(args.model_kwargs)
    name = args.model
    if args.pretrained not in (None, "timm"):
        name = f"local-dir:{args.pretrained}" if Path(args.pretrained).is_dir() else f"hf-hub:{args.pretrained}"
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    rates = {rate: value for rate, value in rates.items() if value is not None}
    options = {"num_classes": len(label_names), **rates, **model_args}
    try:
        model = timm.create_model(name, pretrained=args.pretrained is not None, **options)
    except (OSError, RuntimeError, ValueError) as error:
        if args.pretrained is None:
            raise
        raise ValueError(
            f"pretrained={args.pretrained!r} could not be loaded as {name}: {error}. Set a folder that holds a model, "
            "or an id on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error
    config = model.pretrained_cfg
    names, count = config.get("label_names") or label_names, config["num_classes"]
    if args.pretrained and (count != len(label_names) or names != label_names):
        if args.eval_only:
            index = next(
                (i for i, pair in enumerate(zip(names, label_names, strict=False)) if len(set(pair)) > 1), None
            )
            first = (
                "" if index is None else f"; class {index} is {names[index]!r} there and {label_names[index]!r} here"
            )
            raise ValueError(
                f"{args.pretrained} tells {count} classes apart and the data has {len(label_names)}{first}. eval_only "
                "needs the classes that the weights were trained for, in the same order"
            )
        model.reset_classifier(len(label_names))  # as many as before may still be others
    pixels = args.img_size and (args.img_size, args.img_size)
    if config.get("fixed_input_size") and pixels and "img_size" not in model_args:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=args.img_size)
            model_args["img_size"] = args.img_size
        elif tuple(config["input_size"][1:]) != pixels:
            raise ValueError(
                f"model={args.model!r} takes images of {config['input_size'][1]} pixels: set img_size to that, or give "
                "another size in model_kwargs, {img_size: ...}, if timm's model has such an argument"
            )
    return model, model_args


def create_loader(
    args: Arguments, splits: dict, data_config: dict, accelerator: Accelerator, training: bool
) -> ImageLoader:
    """This replica's share of the images."""
    transform = image_transforms(args, data_config)[0 if training else 1]
    options = {
        "repeats": args.aug_repeats,
        "shuffle_buffer": args.shuffle_buffer,
        "num_samples": args.train_num_samples,
    }
    return build_loader(
        splits["train" if training else "validation"],
        transform=transform,
        batch_size=args.batch_size,
        training=training,
        seed=args.seed,
        workers=args.workers,
        replica=accelerator.process_index,
        replicas=accelerator.num_processes,
        max_bad_images=args.max_bad_images,
        **(options if training else {}),
    )


def use_fast_kernels(deterministic: bool) -> None:
    """On GPUs what timm's train.py uses: the fastest kernels found by trial, and TF32; or those of the same bits."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def create_optimizer(args: Arguments, module: nn.Module) -> torch.optim.Optimizer:
    own = {"eps": args.opt_eps, "betas": args.opt_betas}
    return create_optimizer_v2(
        module,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        filter_bias_and_bn=not args.weight_decay_1d,
        layer_decay=args.layer_decay,
        **{name: value for name, value in own.items() if value is not None},
    )


def create_scheduler(
    args: Arguments, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[timm.scheduler.scheduler.Scheduler | None, int]:
    """timm's schedule per update, and how many epochs it lasts. updates: of an epoch."""
    milestones = {"decay_milestones": args.decay_milestones} if args.decay_milestones else {}
    return create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        cooldown_epochs=args.cooldown_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
        **milestones,
    )


def create_mixup(args: Arguments, num_classes: int) -> Mixup | None:
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def sync_batch_norm(module: nn.Module, accelerator: Accelerator, alpha: float | None) -> nn.Module:
    """`module` with SyncBatchNorm over the replicas of this one's role; over all where RWP mixes none (alpha None)."""
    replicas, replica = accelerator.num_processes, accelerator.process_index
    if accelerator.device.type == "cpu":
        raise ValueError("sync_bn needs GPUs: PyTorch has no SyncBatchNorm for CPUs")
    if replicas == 1:
        return module
    roles = [alpha is not None and role(index, 0, replicas, 1, alpha).perturbed for index in range(replicas)]
    # Every process has to make every group.
    groups = {kind: dist.new_group([i for i in range(replicas) if roles[i] is kind]) for kind in sorted(set(roles))}
    return convert_sync_batchnorm(module, groups[roles[replica]])


def create_criterion(args: Arguments, mixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss; mixed: targets are probabilities (B, C), and smooth already."""
    smoothing = 0.0 if mixed else args.smoothing
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum)
    return partial(cross_entropy, label_smoothing=smoothing)


@torch.no_grad()
def validate(
    accelerator: Accelerator, module: nn.Module, loader: ImageLoader, prepare: BatchTransform
) -> dict[str, float]:
    """Top-1, top-5 and mean cross-entropy over all replicas, each image once; empty but on the main process.

    No replica waits for another before the end, so that they may hold any number of images.
    """
    module.eval()
    seen = []  # (rank of the label, label, loss) of each image
    for images, labels in loader:
        labels = labels.to(accelerator.device)
        with accelerator.autocast():
            logits = module(prepare(images)).float()
        own = labels.clamp(min=0)  # -1 where the image could not be read
        losses = cross_entropy(logits, own, reduction="none")
        seen.append(torch.stack([label_rank(logits, own).double(), labels.double(), losses.double()], 1))
    everyone = torch.cat(gather_object([torch.cat(seen).cpu() if seen else torch.empty(0, 3, dtype=torch.float64)]))
    everyone = everyone[everyone[:, 1] >= 0]
    if not len(everyone):
        raise ValueError("no image for evaluation could be read: see the warnings above for what is wrong with them")
    if not accelerator.is_main_process:
        return {}
    metrics = evaluate.combine([Top1(), Top5()])
    metrics.add_batch(predictions=everyone[:, 0].long(), references=everyone[:, 1].long())
    return {**metrics.compute(), "eval_loss": everyone[:, 2].mean().item()}


def agree(accelerator: Accelerator, loader: ImageLoader, max_bad_images: int, stop: bool = False) -> tuple[bool, int]:
    """Whether any replica is to stop, and how many images none of them could read. Collective.

    Raises ValueError on all of them for too many unreadable images.
    """
    mine = loader.unreadable.slots
    stops, unreadable = accelerator.reduce(torch.tensor([stop, len(mine)], device=accelerator.device)).tolist()
    if unreadable:  # replicas may have met some alike
        unreadable = len(set().union(*gather_object([mine])))
    if unreadable > max_bad_images:
        raise ValueError(
            f"{unreadable} images could not be read, more than max_bad_images={max_bad_images}: the warnings above "
            "name them. Repair or remove them, or raise max_bad_images"
        )
    return stops > 0, unreadable


class Preemption:
    """Notes that SIGTERM came, for the training loop to act on between two steps."""

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.received = True

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)


def seed_of(*position: int) -> int:
    """A seed in [0, 2^32) for a place in a run: (seed, update, replica)."""
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def noise_sizes(report: dict) -> str:
    """The noise's size relative to the largest, the median and the smallest layer."""
    return ", ".join(f"{layer['size']:.2g} ({layer['name']})" for layer in report["relative_noise"].values())


def table(results: dict) -> str:
    """The results as two columns of text."""
    final, arguments = results["final"], results["arguments"]
    rows = {
        "method": arguments["method"],
        "replicas": results["hardware"]["replicas"],
        "epochs": final["epoch"],
        "top-1": f"{final['top1']:.2%}",
        "top-5": f"{final['top5']:.2%}",
    }
    unreadable = final["unreadable_images"] + final["unreadable_eval_images"]
    if unreadable:
        rows["unreadable images"] = unreadable
    if "top1_ema" in final:
        rows |= {"top-1, average of weights": f"{final['top1_ema']:.2%}"}
    rows |= {
        "training loss": f"{final['train_loss']:.4f}",
        "training seconds": f"{results['seconds']:.1f}",
        "images per second": f"{final['images_per_second']:.0f}",
    }
    if "rwp" in final:
        rwp = final["rwp"]
        losses = [f"{final[key]:.4f}" if key in final else "-" for key in ("loss_clean", "loss_perturbed")]
        rows |= {
            "placement": rwp["placement"],
            "slots, clean / perturbed": f"{rwp['slots']['clean']} / {rwp['slots']['perturbed']}",
            "loss, clean / perturbed": " / ".join(losses),
            "noise / weights": noise_sizes(rwp) or "-",
        }
    return aligned(rows)


def aligned(rows: dict) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    main(parse_arguments(Arguments, description=__doc__.splitlines()[0]))
