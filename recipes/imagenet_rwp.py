"""Train an image classifier with Random Weight Perturbation (RWP), plainly, or with SAM: Accelerate + timm.

# Handwritten digits, embedded, on whatever this machine has
```bash
accelerate launch recipes/imagenet_rwp.py
```

# CIFAR-10, or any folder: train/CLASS/IMAGE and validation/CLASS/IMAGE, or parquet files
```bash
accelerate launch recipes/imagenet_rwp.py \
    --data_dir path/to/cifar10 \
    --model resnet18 \
    --image_size 32 --crop_scale 0.5 --crop_pct 1 \
    --epochs 200 --batch_size 256 --lr 0.1 --weight_decay 1e-3 \
    --workers 2
```

# ImageNet from the Hub, bf16, on all GPUs; then with SAM, to compare (base: plain training)
```bash
accelerate launch --mixed_precision bf16 recipes/imagenet_rwp.py \
    --dataset ILSVRC/imagenet-1k \
    --model resnet50 \
    --epochs 90 --batch_size 128 --lr 0.4 --weight_decay 1e-4 --warmup_epochs 5 \
    --rwp_gamma 0.005 \
    --workers 8
accelerate launch --mixed_precision bf16 recipes/imagenet_rwp.py --method sam ...
```

# After a crash: on from the last whole epoch, bit for bit
```bash
accelerate launch recipes/imagenet_rwp.py ... --resume_from_checkpoint latest
```

# Two replicas without a GPU
```bash
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 recipes/imagenet_rwp.py
```

Every flag can also stand in a file, `--config FILE.yaml`. On several replicas the odd ones take the perturbed gradient.
A single one takes both: from the two halves of each batch, or by turns where it accumulates gradients.
"""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_rwp import RWP, LossTracker, RWPArguments
from hf_rwp.arguments import parse_arguments
from hf_rwp.data import build_loader, load_images
from hf_rwp.metrics import Top1, Top5
from hf_rwp.plots import training_curves

# Where a flag is not set: for the embedded digits, and for other data (None: the model's own).
DIGITS = {"image_size": 32, "crop_scale": 0.7, "crop_pct": 1.0, "hflip": 0.0}
OTHER_DATA = {"image_size": None, "crop_scale": 0.08, "crop_pct": None, "hflip": 0.5}


@dataclass
class Arguments(RWPArguments):
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is `--method base`."})
    method: str = field(
        default="rwp",
        metadata={"help": "Plain training, RWP, or SAM, on the same optimizer.", "choices": ("base", "rwp", "sam")},
    )
    sam_rho: float = field(default=0.05, metadata={"help": "Radius of SAM's neighbourhood, above 0."})
    # Data
    data_dir: str | None = field(
        default=None, metadata={"help": "A folder of images or parquet files; the embedded digits if not set."}
    )
    dataset: str | None = field(default=None, metadata={"help": "A dataset's id on the Hub."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; if not set the model's own, for the digits 32."}
    )
    crop_scale: float | None = field(
        default=None, metadata={"help": "Least share of an image's area in a training crop; 0.08, for the digits 0.7."}
    )
    crop_pct: float | None = field(
        default=None, metadata={"help": "Share of an image's side in evaluation; the model's own, for the digits 1."}
    )
    hflip: float | None = field(
        default=None, metadata={"help": "Probability of a horizontal flip in training; 0.5, for the digits 0."}
    )
    workers: int = field(default=0, metadata={"help": "Processes that load data, per replica; 0 is the main one."})
    # Training
    model: str = field(default="test_resnet", metadata={"help": "A timm model; its weights start at random."})
    epochs: int = field(default=10, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=64, metadata={"help": "Images per replica and optimizer step."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Parts that a replica's batch is cut into, one backward pass each."}
    )
    lr: float = field(default=0.1, metadata={"help": "Peak learning rate of SGD with Nesterov momentum 0.9."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, except of biases and norm weights."})
    warmup_epochs: int = field(default=1, metadata={"help": "Epochs of linear warm-up; a cosine follows."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and augmentation, at least 0."})
    # Output
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results and checkpoints; outputs/DATA_METHOD_seedN if not set."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's path, or `latest` for the last one in output_dir."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "rwp" and not self.rwp:
            self.method = "base"
        self.rwp = self.method == "rwp"
        for name, default in (OTHER_DATA if self.data_dir or self.dataset else DIGITS).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.output_dir is None:
            data = Path(self.data_dir or self.dataset or "digits").name
            self.output_dir = f"outputs/{data}_{self.method}_seed{self.seed}"
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing to train on: it has to be at least 1")
        if ":" not in self.model and not timm.is_model(self.model):
            similar = difflib.get_close_matches(self.model, timm.list_models(), n=5, cutoff=0)
            raise ValueError(f"model={self.model!r} is none of timm's models. Similar names: {', '.join(similar)}")
        if self.method == "sam" and not importlib.util.find_spec("pytorch_optimizer"):
            raise ValueError("method='sam' takes SAM from pytorch_optimizer: pip install 'hf-rwp[compare]'")


def main(args: Arguments) -> None:
    data_loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed_of(args.seed), non_blocking=True)
    accelerator = Accelerator(dataloader_config=data_loading)
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError("accelerate's gradient_accumulation_steps would count twice: set the recipe's own flag")
    if args.method == "sam" and accelerator.scaler is not None:
        raise ValueError("fp16's gradient scaler cannot work between SAM's two passes: set --mixed_precision bf16")

    # The gradients of one step on one replica. RWP mixes two, so a replica that is alone halves its batch.
    accumulation = args.gradient_accumulation_steps
    alone = accelerator.num_processes == accumulation == 1
    micro_steps = 2 if args.rwp and alone and 0 < args.rwp_alpha < 1 and args.rwp_gamma != 0 else accumulation
    if args.batch_size % micro_steps:
        parts = f"{micro_steps} parts" if accumulation > 1 else "halves, a clean and a perturbed one"
        raise ValueError(f"batch_size={args.batch_size} cannot be cut into {parts}: set a multiple of {micro_steps}")

    output_dir = Path(args.output_dir)
    results_file = output_dir / "results.json"
    saved = checkpoints_in(output_dir)
    resume_from = args.resume_from_checkpoint
    if resume_from == "latest":
        if not saved:
            raise FileNotFoundError(f"{output_dir} holds no checkpoint: start without --resume_from_checkpoint")
        resume_from = saved[max(saved)]
    elif resume_from is None and saved and not results_file.exists():
        raise FileExistsError(
            f"{output_dir} holds the checkpoints of an unfinished run: set --resume_from_checkpoint latest to go on, "
            "or another --output_dir, or delete it"
        )

    set_seed(args.seed)
    splits = load_images(args.data_dir, args.dataset)
    module = timm.create_model(args.model, num_classes=splits["train"].features["label"].num_classes)
    data_config = resolve_data_config({"img_size": args.image_size, "crop_pct": args.crop_pct}, model=module)
    augment = {"is_training": True, "scale": (args.crop_scale, 1.0), "hflip": args.hflip, "color_jitter": None}
    sizes = {"batch_size": args.batch_size, "workers": args.workers}
    train_loader = build_loader(
        splits["train"], transform=create_transform(**data_config, **augment), training=True, **sizes
    )
    eval_loader = build_loader(splits["validation"], transform=create_transform(**data_config), training=False, **sizes)

    base = create_optimizer_v2(module, opt="sgd", lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    rwp = RWP(base, module, accumulation_steps=micro_steps, **args.rwp_options) if args.rwp else None
    sam = None
    if args.method == "sam":
        from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats

        sam = SAM(base.param_groups, lambda *_, **__: base, rho=args.sam_rho)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        module, rwp or sam or base, train_loader, eval_loader
    )
    updates = len(train_loader)  # an epoch
    if not updates:
        raise ValueError(f"{len(splits['train'])} images make no batch of {args.batch_size} for each replica: set less")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )

    history = []
    if resume_from is not None:
        history = json.loads((Path(resume_from) / "history.json").read_text())
        if history[-1]["method"] != args.method or len(history) > args.epochs:
            raise ValueError(
                f"{Path(resume_from).name} is from epoch {len(history)} of method {history[-1]['method']!r}: resume it "
                f"with that method and at least as many epochs, not with {args.method!r} and epochs={args.epochs}"
            )
        accelerator.load_state(resume_from)
    slots_before = history[-1]["rwp"]["slots"] if rwp and history else {"clean": 0, "perturbed": 0}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        results_file.unlink(missing_ok=True)
        for epoch, checkpoint in saved.items():
            if epoch > len(history):  # of the run that this one replaces
                remove(checkpoint)

    tracker = LossTracker(rwp)
    progress = tqdm(
        total=args.epochs * updates,
        initial=len(history) * updates,
        unit="step",
        disable=None if accelerator.is_main_process else True,  # None: shown on a terminal only
    )

    def backward(images, labels, parts, sync=True, track=True):
        """Add the gradient of the batch's mean loss, one part of the batch after the other."""
        for part, (some, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
            with nullcontext() if sync and part == parts else accelerator.no_sync(model):
                loss = cross_entropy(model(some), targets)
                accelerator.backward(loss / parts)
            if track:
                tracker.update(loss)

    try:
        for epoch in range(len(history), args.epochs):
            # All chance in an epoch follows from its number, so that a resumed run repeats it.
            set_seed(seed_of(args.seed, epoch, accelerator.process_index))
            train_loader.set_epoch(epoch)
            model.train()
            optimizer.train()
            started = time.perf_counter()
            for update, (images, labels) in enumerate(train_loader, start=epoch * updates):
                scheduler.step_update(update)
                if rwp:
                    rwp.scale_gamma(args.rwp_gamma_factor(update / (args.epochs * updates)))
                if sam:
                    backward(images, labels, accumulation, sync=False)
                    sam.first_step(zero_grad=True)
                    disable_running_stats(model)
                    backward(images, labels, accumulation, track=False)
                    enable_running_stats(model)
                    sam.second_step()
                else:
                    backward(images, labels, micro_steps if rwp and rwp.active else accumulation)
                    optimizer.step()
                optimizer.zero_grad()
                progress.update()

            losses = tracker.compute()  # waits for the device
            seconds = time.perf_counter() - started
            row = {
                "epoch": epoch + 1,
                "method": args.method,
                "train_loss": losses.pop("loss"),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": seconds,
                "images_per_second": updates * args.batch_size * accelerator.num_processes / seconds,
            }
            if rwp:
                row |= losses
                row["rwp"] = rwp.report()
                row["rwp"]["slots"] = {kind: slots_before[kind] + n for kind, n in row["rwp"]["slots"].items()}
                rwp.sync_buffers()  # for the other methods DDP's next forward pass does it
            optimizer.eval()
            row |= validate(accelerator, model, eval_loader)
            history.append(row)
            save_checkpoint(accelerator, output_dir, history)
            if accelerator.is_main_process:
                if rwp and not epoch:
                    progress.write(f"noise / weights: {noise_sizes(row['rwp']) or 'none yet'}")
                progress.write(f"epoch {epoch + 1}: " + ", ".join(f"{k} {row[k]:.4f}" for k in ("train_loss", "top1")))
    finally:
        optimizer.eval()  # an interrupt may have left noise in the weights
        progress.close()

    digests = gather_object([digest(module)])
    if accelerator.is_main_process:
        results = {
            "final": history[-1],
            "seconds": sum(row["seconds"] for row in history),
            "weights_sha256": sorted(set(digests)),  # one, as long as all replicas are bit-equal
            "arguments": {name: unlocated(value) for name, value in asdict(args).items()},
            **environment(accelerator),
            "history": history,
        }
        results_file.write_text(json.dumps(results, indent=2))
        training_curves(history, output_dir / "curves.png")
        print(table(results))
        print(f"Wrote {results_file}, {output_dir / 'curves.png'} and {checkpoints_in(output_dir)[args.epochs]}")
    accelerator.end_training()


@torch.no_grad()
def validate(accelerator: Accelerator, model: torch.nn.Module, loader: torch.utils.data.DataLoader) -> dict[str, float]:
    """Top-1 and top-5 over all replicas, on the main process; empty on the others."""
    model.eval()
    metrics = evaluate.combine([Top1(), Top5()])
    for images, labels in loader:
        logits, labels = accelerator.gather_for_metrics((model(images), labels))
        if accelerator.is_main_process:
            metrics.add_batch(predictions=logits, references=labels)
    return metrics.compute() if accelerator.is_main_process else {}


def save_checkpoint(accelerator: Accelerator, output_dir: Path, history: list[dict]) -> None:
    """Write this epoch's checkpoint, which exists whole or not at all, and keep no more than the last two."""
    folder = output_dir / "checkpoints" / f"epoch_{len(history)}"
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "history.json").write_text(json.dumps(history))
        partial.rename(folder)
        for old in list(checkpoints_in(output_dir).values())[:-2]:
            remove(old)


def checkpoints_in(output_dir: Path) -> dict[int, Path]:
    """The whole checkpoints of a run, by epoch."""
    folders = [path for path in output_dir.glob("checkpoints/epoch_*") if not path.suffix]
    return dict(sorted((int(path.name.removeprefix("epoch_")), path) for path in folders))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves nothing that looks like one."""
    removed = checkpoint.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(removed))


def seed_of(*position: int) -> int:
    """A seed in [0, 2^32) for a place in a run: (seed, epoch, rank)."""
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def digest(module: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers: equal for models that are equal to the bit."""
    sha = hashlib.sha256()
    for tensor in module.state_dict().values():
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def unlocated(value):
    """An argument without the place of its file on this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def environment(accelerator: Accelerator) -> dict:
    """What the run ran on and with."""
    packages = ("accelerate", "timm", "transformers", "datasets", "hf-rwp")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cuda = accelerator.device.type == "cuda"
    return {
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "replicas": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "git_commit": commit or None,
    }


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
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    main(parse_arguments(Arguments, description=__doc__.splitlines()[0]))
