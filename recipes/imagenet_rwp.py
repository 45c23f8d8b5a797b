"""Train an image classifier with Random Weight Perturbation (RWP), plainly, or with SAM: Accelerate + timm.

# Handwritten digits, embedded, on whatever this machine has
```bash
accelerate launch recipes/imagenet_rwp.py
```

# Any folder: CLASS/IMAGE, train/CLASS/IMAGE and validation/CLASS/IMAGE, parquet files, or WebDataset shards
```bash
accelerate launch recipes/imagenet_rwp.py --data_dir path/to/images --model resnet50 --epochs 90 --lr 0.1
```

# From trained weights (a folder or a Hub id) with a new head; `--eval_only` says how good they are
```bash
accelerate launch recipes/imagenet_rwp.py --data_dir path/to/pets --pretrained timm/resnet50.a1_in1k --lr 0.01
```

# ImageNet from the Hub on eight GPUs; `--method base` and `--method sam` to compare
```bash
accelerate launch --config_file recipes/accelerate/gpu_8.yaml recipes/imagenet_rwp.py \
    --config recipes/configs/imagenet_resnet50.yaml --dataset ILSVRC/imagenet-1k --workers 8
```

# After a crash or Ctrl-C: on from the last checkpoint with the run's own flags, bit for bit (GPUs: --deterministic)
```bash
accelerate launch recipes/imagenet_rwp.py --resume_from_checkpoint outputs/NAME
```

# On the Hub when it is done, for anyone's timm and transformers (`hf auth login` first)
```bash
accelerate launch recipes/imagenet_rwp.py --push_to_hub --hub_model_id USER/NAME
```

Every flag can also stand in a file, `--config FILE.yaml`. On several replicas the odd ones take the perturbed gradient.
A single one takes both: from the two halves of each batch, or by turns where it accumulates gradients.
SIGTERM to this process, or to its group, saves a checkpoint and exits with status 75, Ctrl-C with 130; SIGTERM to
`accelerate launch` itself ends that one and leaves a single process running. A push that fails costs no weights: they
are on disk, with the command that finishes it on stderr, and the exit status is 1.

Your own loss is in `create_criterion`, your own augmentation in `create_loader` (each image) or `take_step` (batches on
the device), your own metric in `validate`.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("train", __name__)
from hf_rwp import RWPArguments
from hf_rwp.core.checks import check_all
from hf_rwp.hub.arguments import HubArguments
from hf_rwp.images.arguments import ImageArguments, TimmArguments
from hf_rwp.runs.arguments import RunArguments
from hf_rwp.runs.parsing import flags_first, start


@dataclass
class Arguments(HubArguments, RunArguments, TimmArguments, ImageArguments, RWPArguments):
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is `--method base`."})
    method: str = field(
        default="rwp",
        metadata={"help": "Plain training, RWP, or SAM, on the same optimizer.", "choices": ("base", "rwp", "sam")},
    )
    sam_rho: float = field(default=0.05, metadata={"help": "Radius of SAM's neighbourhood, above 0."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and augmentation, at least 0."})
    deterministic: bool = field(
        default=False, metadata={"help": "Whether GPUs compute the same bits each time, which takes them longer."}
    )

    def __post_init__(self) -> None:
        of_the_weights = {"img_size": self.img_size, "crop_pct": self.crop_pct}  # which say it if no flag does
        for flags in Arguments.__bases__:
            flags.__post_init__(self)
        if self.eval_only and self.pretrained:
            vars(self).update(of_the_weights)
        self.method = "base" if self.method == "rwp" and not self.rwp else self.method
        self.rwp = self.method == "rwp"
        if self.output_dir is None:
            data = Path(self.data_dir or self.dataset or "digits").name
            self.output_dir, self.numbered = f"outputs/{data}_{self.method}_seed{self.seed}", True
        check_all(
            self,
            ("sam_rho", self.sam_rho > 0, "above 0"),
            ("aug_repeats", self.aug_repeats == 1 or not self.streaming, "1 for a stream, which is read in its order"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
        )
        if self.method == "sam" and not importlib.util.find_spec("pytorch_optimizer"):
            raise ValueError("method='sam' takes SAM from pytorch_optimizer: pip install 'hf-rwp[compare]'")
        if self.eval_only and not (self.pretrained or self.resume_from_checkpoint):
            raise ValueError("eval_only has nothing to evaluate: set pretrained or resume_from_checkpoint")
        if self.eval_only and self.train_split is None:
            self.train_split = self.validation_split


flags_first("train", __name__, Arguments, __doc__)  # ahead of the slow imports
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from timm.data import Mixup, resolve_data_config
from timm.loss import BinaryCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_rwp import RWP, LossTracker
from hf_rwp.analysis.run_plots import pictures_of_run
from hf_rwp.core.buffers import sync_buffers
from hf_rwp.core.placement import fewest_micro_steps, mixes
from hf_rwp.hub.card import add_card
from hf_rwp.hub.configs import config_of
from hf_rwp.hub.export import save_model
from hf_rwp.hub.publish import begin_publishing, publish
from hf_rwp.images.data import describe_splits, load_images
from hf_rwp.images.found import found_in
from hf_rwp.images.loaders import ImageLoader, build_loader
from hf_rwp.images.metrics import Accuracy
from hf_rwp.images.models import (
    clip_gradients,
    create_mixup,
    create_model,
    create_optimizer,
    create_scheduler,
    refuse_single_images,
    sync_bn,
    timm_id,
)
from hf_rwp.images.orders import in_order_of
from hf_rwp.images.transforms import BatchTransform, erasings, image_transforms
from hf_rwp.runs.arguments import HARMLESS
from hf_rwp.runs.deepspeed import is_engine, set_up_engine
from hf_rwp.runs.determinism import derive_seed, use_fast_kernels
from hf_rwp.runs.divergence import is_finite, refuse_divergence
from hf_rwp.runs.evaluation import evaluate_only
from hf_rwp.runs.launch import check_launch
from hf_rwp.runs.opening import data_facts, model_facts, opening, say, step_facts
from hf_rwp.runs.records import Results, Row, command_of, environment, hub_id, repeatable, scrub_paths
from hf_rwp.runs.resuming import check_flags, find_checkpoint, settle_folder
from hf_rwp.runs.run import Run, agree
from hf_rwp.runs.sharded import in_lockstep, replicas_of_run, shard_alike, whole_copy
from hf_rwp.runs.steps import accumulate, plain_step, sam_step, wrap_sam

# Flags whose old values come back with a checkpoint.
KEPT_BY_CHECKPOINTS = {"rwp_gamma", "rwp_seed", "opt", "opt_eps", "opt_betas", "momentum", "weight_decay"}
KEPT_BY_CHECKPOINTS |= {"weight_decay_1d", "layer_decay", "model", "model_kwargs", "model_ema"}


def main(args: Arguments) -> None:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else None,
        log_with=None if args.eval_only else args.report_to or None,
        project_config=ProjectConfiguration(args.output_dir),
    )
    check_launch(accelerator, args.method, {"--channels_last": args.channels_last, "--sync_bn": args.sync_bn})
    replicas, device = replicas_of_run(accelerator), accelerator.device
    use_fast_kernels(args.deterministic)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_rwp.images").setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)

    # RWP mixes two gradients, so a replica that is alone halves its batch; pairs of opposite noises take quarters.
    alpha = args.rwp_alpha if args.rwp and args.rwp_gamma != 0 else 0.0
    micro_steps = max(args.gradient_accumulation_steps, fewest_micro_steps(replicas, alpha, args.rwp_antithetic))
    if not args.eval_only:
        set_up_engine(accelerator, args, micro_steps)
        args.check_batch(replicas, micro_steps, mixes(alpha))
    settle_folder(args)
    accelerator.project_configuration.logging_dir = f"{args.output_dir}/logs"
    flags, background = scrub_paths(asdict(args)), None
    checkpoint, state = find_checkpoint(args)
    if not args.eval_only:
        kept = KEPT_BY_CHECKPOINTS | ({"lr"} if args.sched == "none" else set())
        harmless = HARMLESS | (set() if args.streaming else {"workers"})
        check_flags(accelerator, flags, state, kept=kept, harmless=harmless, weights="--pretrained .../model")
        background = begin_publishing(args, accelerator, Path(args.output_dir, "pushing"))

    set_seed(args.seed)
    evaluated = args.pretrained if args.eval_only and checkpoint is None else None
    splits = in_order_of(load_images(**args.data_options), evaluated, config_of)
    label_names = splits["train"].features["label"].names
    module, model_args = create_model(args, label_names, args.img_size, new_head=evaluated is None)
    data_config = resolve_data_config(
        {"img_size": args.img_size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}, model=module
    )
    if not args.eval_only:
        refuse_single_images(module, data_config["input_size"], args.batch_size, micro_steps)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    module.to(device, memory_format=memory_format)
    eval_loader = create_loader(args, splits, data_config, accelerator, training=False)
    normalize = BatchTransform(data_config, device, memory_format=memory_format)

    def evaluate(weights: nn.Module) -> dict[str, Any]:
        return validate(accelerator, weights, eval_loader, normalize, args.max_bad_images)

    step = None if args.eval_only else step_facts(accelerator, args.batch_size, micro_steps, mixes(alpha))
    facts = describe_run(args, accelerator, module, splits, step)
    found = found_in(splits).lines()
    say(accelerator, opening(accelerator, args.given, found, facts["model"], step, args.output_dir, checkpoint))
    if args.eval_only:
        evaluate_only(accelerator, Path(args.output_dir), module, checkpoint, evaluate)
        return

    ema = ModelEmaV3(module, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    averages = {"ema": ema} if ema else {}  # not registered with accelerate, which would unpickle whatever is there
    whole = whole_copy(accelerator, module)  # takes sharded weights when they are written
    if args.sync_bn:  # after the copies: process groups cannot be copied
        module = sync_bn(module, device, accelerator.process_index, replicas, alpha)
    base = create_optimizer(args, module)
    rwp = RWP(base, module, accumulation_steps=micro_steps, **args.rwp_options) if args.rwp else None
    sam = wrap_sam(base, args.sam_rho) if args.method == "sam" else None
    model, optimizer = accelerator.prepare(module, rwp or sam or base)
    shard_alike(accelerator, ema)
    loader = create_loader(args, splits, data_config, accelerator, training=True)
    augment = BatchTransform(data_config, device, erasings(args, data_config, device), memory_format)
    mixup = create_mixup(args, len(label_names))
    criterion = create_criterion(args, mixed=mixup is not None)
    scheduler, epochs = create_scheduler(args, optimizer, updates=len(loader))
    tracker = LossTracker(rwp, device)
    trained = ema.module if ema else module  # the weights that a user gets
    parts = {"label_names": label_names, "data_config": data_config, "model_args": model_args}
    write = partial(write_model, args, trained if whole is None else whole, parts)
    pushing = (background, args.hub_strategy == "best")
    bad = loader.unreadable
    run = Run(accelerator, args, flags, facts, module, averages, trained, tracker, rwp, write, *pushing, whole, bad)
    training = Training(
        run, loader, augment, mixup, model, criterion, optimizer, sam, ema, scheduler, micro_steps, epochs
    )
    run.begin(checkpoint, state, epochs, updates=len(loader), images=args.batch_size * accelerator.num_processes)
    with run:
        try:
            for epoch in range(len(run.history), epochs):
                row = train_one_epoch(training, epoch)
                optimizer.eval()
                # Replicas update BatchNorm's buffers apart; DDP gives them replica 0's only at its next forward pass.
                sync_buffers([module, *averages.values()])
                row |= evaluate(module)
                if ema:
                    row |= {f"{name}_ema": value for name, value in evaluate(ema.module).items()}
                run.end_epoch(row)
                stops, _ = agree(accelerator, loader.unreadable.slots, args.max_bad_images, run.preempted)
                if stops and epoch + 1 < epochs:
                    run.stop()
        finally:
            optimizer.eval()  # an interrupt may have left noise in the weights

    run.finish("train")
    accelerator.end_training()  # the other replicas need not wait for a push
    if args.push_to_hub and accelerator.is_main_process:
        publish(args, run)


@dataclass
class Training:
    """What `main` builds and a step needs; the model by itself is `run.module`."""

    run: Run
    loader: ImageLoader
    augment: BatchTransform
    mixup: Mixup | None
    model: nn.Module  # as accelerator.prepare gave it
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: Any
    sam: Any
    ema: ModelEmaV3 | None
    scheduler: Any
    micro_steps: int
    epochs: int
    diverged: int = 0  # logs in a row whose loss was not a number


def train_one_epoch(training: Training, epoch: int) -> Row:
    """Train for an epoch, or for the rest of it."""
    run, loader = training.run, training.loader
    args, accelerator = run.args, run.accelerator
    updates, images_per_update = len(loader), args.batch_size * accelerator.num_processes
    loader.set_epoch(epoch, run.images)
    training.model.train()
    training.optimizer.train()
    if training.mixup:
        training.mixup.mixup_enabled = not 0 < args.mixup_off_epoch <= epoch
    run.start_clock(f"epoch {epoch + 1}/{training.epochs}")
    for update, (images, labels) in enumerate(loader, start=epoch * updates + run.images // images_per_update):
        # All chance in a step follows from its place, so that a resumed run repeats it.
        set_seed(derive_seed(args.seed, update, accelerator.process_index))
        if training.scheduler:
            training.scheduler.step_update(update)
        if run.rwp:
            run.rwp.scale_gamma(args.rwp_gamma_factor(update / (training.epochs * updates)))
        take_step(training, images, labels)
        if training.ema:
            training.ema.update(run.module, step=update + 1)
        run.advance(images_per_update)
        if update + 1 == (epoch + 1) * updates:
            continue  # what is due comes after the epoch
        saves = bool(args.checkpointing_steps) and run.step % args.checkpointing_steps == 0
        stops = accelerator.num_processes == 1 and run.preempted
        if saves or stops or run.step % args.logging_steps == 0:
            stops, _ = log_losses(training)
        if saves or stops:
            run.save()
        if stops:
            run.stop()
    stops, unreadable = log_losses(training)
    seconds = run.read_clock()
    if stops:  # evaluation may take longer than there is time
        run.images = updates * images_per_update
        run.save()
        run.stop()
    losses, report = run.tracker.total(), run.rwp_report()
    return {
        "epoch": epoch + 1,
        "step": run.step,
        "method": args.method,
        "train_loss": losses.pop("loss"),
        "learning_rate": max(group["lr"] for group in training.optimizer.param_groups),
        "seconds": seconds,
        "images_per_second": updates * images_per_update / seconds,
        "unreadable_images": unreadable,
        **(losses | {"rwp": report} if report else {}),
    }


def take_step(training: Training, images: Tensor, labels: Tensor) -> None:
    """One optimizer step."""
    run, model, criterion = training.run, training.model, training.criterion
    images, labels = training.augment(images), labels.to(run.accelerator.device, non_blocking=True)
    count = training.micro_steps if run.rwp and run.rwp.active else run.args.gradient_accumulation_steps
    parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
    if training.mixup:  # which pairs image i with image -i: RWP's two gradients must share none
        parts = [training.mixup(*part) for part in parts]

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        return criterion(model(images).float(), targets)  # FSDP2 gives them in the precision that it computes in

    add_gradients = partial(accumulate, model, parts, loss_of, accelerator=run.accelerator, tracker=run.tracker)
    clip = partial(clip_gradients, run.args, run.accelerator.unscale_gradients, run.module)
    if training.sam:
        sam_step(training.sam, model, add_gradients, clip)
    else:
        plain_step(training.optimizer, add_gradients, None if is_engine(run.accelerator) else clip)


def create_criterion(args: Arguments, mixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of logits and targets; mixed: targets are probabilities (B, C), and smooth already."""
    smoothing = 0.0 if mixed else args.smoothing
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum)
    return partial(cross_entropy, label_smoothing=smoothing)


@torch.no_grad()
def validate(
    accelerator: Accelerator, module: nn.Module, loader: ImageLoader, normalize: BatchTransform, max_bad_images: int
) -> dict[str, Any]:
    """Top-1, top-5, mean cross-entropy, figures by class and unreadable images, over all replicas, each image once.

    Replicas may hold any number of images, and wait for each other at the end only; under FSDP2, with each batch.
    """
    module.eval()
    accuracy = Accuracy(accelerator.device, loader.label_names)
    for images, labels in in_lockstep(accelerator, loader, normalize.nothing):
        with accelerator.autocast():
            logits = module(normalize(images))
        accuracy.add(logits, labels.to(accelerator.device))
    figures = accuracy.compute()
    if module.num_classes <= 5:
        figures.pop("top5")  # always right
    _, unreadable = agree(accelerator, loader.unreadable.slots, max_bad_images)
    return figures | {"unreadable_eval_images": unreadable}


def log_losses(training: Training) -> tuple[bool, int]:
    """Log the losses since the last time; returns what `agree` does."""
    run = training.run
    losses = run.tracker.compute()
    training.diverged = 0 if is_finite(losses) else training.diverged + 1
    if training.diverged > (2 if run.accelerator.scaler else 0):  # fp16's scaler skips a step that overflows
        refuse_divergence(losses, run.step, "lr or rwp_gamma" if run.rwp else "lr")
    run.log(losses, max(group["lr"] for group in training.optimizer.param_groups))
    return agree(run.accelerator, training.loader.unreadable.slots, run.args.max_bad_images, run.preempted)


def create_loader(args: Arguments, splits: dict, config: dict, accelerator: Accelerator, training: bool) -> ImageLoader:
    """This replica's share of the images."""
    train_transform, eval_transform = image_transforms(args, config)
    return build_loader(
        splits["train" if training else "validation"],
        transform=train_transform if training else eval_transform,
        batch_size=args.batch_size,
        training=training,
        seed=args.seed,
        workers=args.workers,
        replica=accelerator.process_index,
        replicas=accelerator.num_processes,
        repeats=args.aug_repeats if training else 1,
        shuffle_buffer=args.shuffle_buffer,
        max_bad_images=args.max_bad_images,
        num_samples=args.train_num_samples if training else None,
    )


def describe_run(args: Arguments, accelerator: Accelerator, module: nn.Module, splits: dict, step: dict | None) -> dict:
    """What results.json says of a run beside its flags and figures."""
    defaults = asdict(Arguments(data_dir=args.data_dir, dataset=args.dataset)) | {"data_dir": None, "dataset": None}
    base = timm_id(module) if args.pretrained == "timm" else hub_id(args.pretrained)
    source = base or (Path(args.pretrained).name if args.pretrained else None)
    return {
        "base_model": base,
        "command": command_of(f"accelerate launch recipes/{Path(__file__).name}", repeatable(asdict(args)), defaults),
        "data": describe_splits(splits),
        "found": data_facts(found_in(splits).facts()),
        "model": model_facts(module.pretrained_cfg["architecture"], module, source),
        "images_per_step": step,
        **environment(accelerator),  # now: by the end of the run the code on disk may be another
    }


def write_model(args: Arguments, model: nn.Module, parts: dict, folder: Path, results: Results) -> None:
    """Write a folder with the model's weights as they are, and their card: all that goes to the Hub."""
    save_model(model, folder, **parts)
    pictures = pictures_of_run(results, folder if "chosen" in results else Path(args.output_dir))
    logs = Path(args.output_dir) / "logs" if args.hub_logs else None
    architecture = model.pretrained_cfg["architecture"]
    add_card(folder, results, pictures=pictures, logs=logs, repo_id=args.hub_model_id, architecture=architecture)


if __name__ == "__main__":
    start(main, Arguments, __doc__)
