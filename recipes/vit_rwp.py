"""Train or fine-tune a vision transformer with Random Weight Perturbation (RWP): transformers' Trainer, with a flag.

# Handwritten digits, embedded, on whatever this machine has: a small ViT from scratch
```bash
accelerate launch recipes/vit_rwp.py
```

# Fine-tune trained weights, with a new head where the classes differ: an id on the Hub (or timm's there), or a folder
```bash
accelerate launch recipes/vit_rwp.py --config recipes/configs/vit/cifar10_vit_b16.yaml --dataset uoft-cs/cifar10
accelerate launch recipes/vit_rwp.py --data_dir path/to/pets --model_name_or_path timm/vit_base_patch16_224.augreg_in21k
```

# The same with LoRA (pip install peft); `--rwp_frozen` perturbs the base weights as well, as Flat-LoRA does
```bash
accelerate launch recipes/vit_rwp.py --data_dir path/to/pets --model_name_or_path google/vit-base-patch16-224-in21k \
    --lora_r 16 --learning_rate 5e-4
```

# ImageNet from scratch on eight GPUs: a bare name is one of timm's models, without weights; `--rwp false` to compare
```bash
accelerate launch --config_file recipes/accelerate/gpu_8.yaml recipes/vit_rwp.py \
    --config recipes/configs/vit/imagenet_vit_s16.yaml --dataset ILSVRC/imagenet-1k
```

# After a crash: on from the last checkpoint, bit for bit
```bash
accelerate launch recipes/vit_rwp.py ... --resume_from_checkpoint latest
```

# Two replicas without a GPU
```bash
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch --config_file recipes/accelerate/cpu_2.yaml \
    recipes/vit_rwp.py
```

The flags are Trainer's own (`--num_train_epochs`, `--bf16`, `--push_to_hub`, ...), those of RWP, and those of images
that imagenet_rwp.py has as well; all can stand in a file, `--config FILE.yaml`. With `--push_to_hub` what `model` holds
goes to the Hub at last, or the `adapter`; if that fails, the command that finishes it is on stderr, and the exit status
is 1.
"""

import copy
import difflib
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import PIL.Image
import timm
import torch
import yaml
from accelerate.utils import gather_object
from timm.data import Mixup, resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from hf_rwp import RWPTrainer, RWPTrainingArguments
from hf_rwp.analysis.plots import training_curves
from hf_rwp.core.sharding import refuse_lone_processes
from hf_rwp.hub.export import save_model
from hf_rwp.hub.push import PushError, add_card, push
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import BatchPlan, ImageDataset
from hf_rwp.images.metrics import Top1, Top5, label_rank
from hf_rwp.images.transforms import image_transforms
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import base_of, environment, weights_digest, without_places

# Flags whose old values come back with a checkpoint's optimizer and schedule, or change what was trained.
KEPT_BY_CHECKPOINTS = ("rwp", "rwp_gamma", "rwp_seed", "learning_rate", "lr_scheduler_type", "optim", "weight_decay")
KEPT_BY_CHECKPOINTS += ("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "lora_r", "model_kwargs")

# The small ViT that is trained where no model is named, on 32 pixels: 16 patches, 0.3 million parameters. At the usual
# initializer_range, 0.02, such narrow layers hardly learn.
SMALL_VIT = {
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "initializer_range": 0.1,
}


@dataclass
class Arguments(ImageArguments, RWPTrainingArguments):
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is plain Trainer."})
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When `--push_to_hub` pushes: at the `end`, or Trainer's `every_save` or its checkpoints."},
    )
    # Model
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained weights: a folder, or an id on the Hub, transformers' or timm's; or, without weights, the "
            "bare name of a timm model; a small ViT if not set."
        },
    )
    model_kwargs: str = field(
        default="{}",
        metadata={"help": "Further arguments, as JSON or YAML: of timm's model, or of transformers' configuration."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA on every linear layer but the head, at least 1; none if not set."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of LoRA, in multiples of 1/r, above 0; r if not set."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout ahead of LoRA's layers, in [0, 1)."})
    # Training: Trainer's flags, with other defaults
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate; 5e-5 from trained weights, 2e-3 from scratch if not set."},
    )
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images per replica and micro-step; a single replica halves them for RWP."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per replica in evaluation."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, except of biases and norm weights."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1 the fraction of training that they are."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Mixup's alpha; 0 is none."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix's alpha; 0 is none."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Whether to pin the images' memory, for a GPU."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, shuffling and augmentation, at least 0."})
    # Output
    eval_only: bool = field(default=False, metadata={"help": "Whether to evaluate `--model_name_or_path` alone."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for all that is written; outputs/DATA_vit_METHOD_seedN if not set."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run that output_dir holds may be deleted for this one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's path, or `latest` for the last one in output_dir."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many of the last checkpoints are kept."})
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "Whether to hide progress bars; shown on a terminal alone if not set."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the losses: no, steps or epoch."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide losses that are no number; else training stops at one."}
    )
    logging_steps: float = field(
        default=50,
        metadata={
            "help": "Steps between logs for `--logging_strategy steps`; replicas agree then on unreadable images, too."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where figures go: tensorboard, wandb, trackio, ... (as far as installed), or none."},
    )
    metric_for_best_model: str | None = field(
        default="top1", metadata={"help": "What `--load_best_model_at_end` and `--save_strategy best` go by."}
    )
    # Trainer does these in its own way, and has flags of its own for what it offers
    workers: int = field(default=0, init=False, repr=False)
    shuffle_buffer: int = field(default=1, init=False, repr=False)
    train_num_samples: int | None = field(default=None, init=False, repr=False)
    remove_unused_columns: bool = field(default=False, init=False, repr=False)
    prediction_loss_only: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        img_size = self.img_size
        ImageArguments.__post_init__(self)
        if self.model_name_or_path is not None:
            self.img_size = img_size  # the digits' 32 pixels are the small ViT's
        if self.learning_rate is None:
            self.learning_rate = 5e-5 if self.weights else 2e-3
        if self.output_dir is None:
            data = Path(self.data_dir or self.dataset or "digits").name
            self.output_dir = f"outputs/{data}_vit_{self.method}_seed{self.seed}"
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.label_names is None:
            self.label_names = ["labels"]  # which Trainer does not find under a PEFT model
        RWPTrainingArguments.__post_init__(self)
        for name, valid, valid_range in (
            ("num_train_epochs", self.num_train_epochs > 0 or self.max_steps > 0, "above 0"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
            ("lora_r", self.lora_r is None or self.lora_r >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")
        if self.streaming:
            raise ValueError(
                "streaming=True: Trainer neither shuffles a stream anew each epoch nor finds the place in it where a "
                "checkpoint was made. Set it to false, or stream with imagenet_rwp.py, which does both"
            )
        if self.lora_r and not importlib.util.find_spec("peft"):
            raise ValueError(f"lora_r={self.lora_r} needs PEFT, which is not installed: pip install peft")
        if (self.lora_r or self.eval_only) and not self.weights:
            flag = "eval_only" if self.eval_only else f"lora_r={self.lora_r}"
            raise ValueError(
                f"{flag} is for trained weights, and model_name_or_path={self.model_name_or_path!r} has none: set it "
                "to a folder with a model, or to an id on the Hub"
            )
        if self.lora_r is None and (self.lora_alpha or self.lora_dropout):
            raise ValueError("lora_alpha and lora_dropout have no effect without LoRA: set lora_r")
        name = self.model_name_or_path
        if name and not self.weights and not timm.is_model(name):
            similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0))
            raise ValueError(
                f"model_name_or_path={name!r} is no folder, no id on the Hub (which has a slash) and none of timm's "
                f"models. Similar ones: {similar}"
            )
        if not isinstance(yaml.safe_load(self.model_kwargs), dict):
            raise ValueError(f"model_kwargs={self.model_kwargs!r} is no mapping: write it as {{name: value}}")
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last=True would leave images out of the evaluation, too: set it to false")

    @property
    def method(self) -> str:
        return "rwp" if self.rwp else "base"

    @property
    def weights(self) -> str | None:
        """Where trained weights come from, a folder or an id on the Hub; None from scratch."""
        name = self.model_name_or_path
        return name if name and ("/" in name or Path(name).is_dir()) else None


def main(args: Arguments) -> None:
    refuse_lone_processes()
    output_dir = Path(args.output_dir)
    results_file = output_dir / "results.json"
    resume_from = checkpoint_to_resume(args, finished=results_file.exists())
    facts = without_places(args.to_dict())
    if resume_from:
        check_arguments(facts, resume_from.parent / "arguments.json")
    output_dir.mkdir(parents=True, exist_ok=True)

    set_seed(args.seed)
    splits = load_images(**args.data_options)
    label_names = splits["train"].features["label"].names
    model, model_args = create_model(args, label_names)
    data_config = preprocessing(args, model)
    if args.lora_r:
        model = with_lora(args, model)
    train_transform, eval_transform = image_transforms(args, data_config, normalized=True)
    shared = {"seed": args.seed, "max_bad_images": args.max_bad_images}
    timm_model = isinstance(unwrapped(model), TimmWrapperForImageClassification)
    trainer = ImageTrainer(
        model,
        args,
        train_dataset=ImageDataset(splits["train"], train_transform, training=True, **shared),
        eval_dataset=ImageDataset(splits["validation"], eval_transform, training=False, **shared),
        data_collator=collate,
        processing_class=None if timm_model else processor(data_config),  # a timm model's configuration says it
        compute_metrics=Accuracy(),
        preprocess_logits_for_metrics=ranks_and_losses,
    )
    trainer.mix(len(label_names))
    trainer.add_callback(Record(trainer))
    accelerator, is_main = trainer.accelerator, trainer.is_world_process_zero()

    if args.eval_only:
        figures = trainer.evaluate()
        if is_main:
            (output_dir / "eval.json").write_text(json.dumps(figures, indent=2))
            print(aligned({name.removeprefix("eval_"): f"{value:.4f}" for name, value in figures.items()}))
        return

    accelerator.wait_for_everyone()  # all have found the checkpoint, before others go
    if is_main:
        results_file.unlink(missing_ok=True)
        (output_dir / "arguments.json").write_text(json.dumps(facts, indent=2))
        remove_checkpoints(output_dir, after=0 if resume_from is None else step_of(resume_from))
    accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))

    history = epochs_of(trainer.state.log_history, len(trainer.train_dataset))
    if "top1" not in history[-1]:
        history[-1] |= accuracies(trainer.evaluate())
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    kept = accuracies(trainer.evaluate()) if best else {}
    digests = gather_object([weights_digest(unwrapped(model))])
    if is_main:
        curves, folder = output_dir / "curves.png", output_dir / "model"
        pushed, library = folder, "timm" if timm_model else "transformers"
        if args.lora_r:
            pushed, library = output_dir / "adapter", "peft"
            model.save_pretrained(pushed)
            model = copy.deepcopy(model).merge_and_unload()
        save_whole(model, folder, label_names, data_config, model_args)
        training_curves(history, curves)
        results = {
            "final": history[-1],
            **({"best": {"checkpoint": Path(best).name, **kept}} if best else {}),
            "seconds": sum(row["seconds"] for row in history),
            "weights_sha256": weights_digest(model),
            "replicas_sha256": sorted(set(digests)),  # one, as long as all replicas are bit-equal
            "arguments": facts,
            "base_model": base_of(model),
            "data": {
                role: {"images": split.num_rows, "split": str(split.split) if split.split else None}
                for role, split in splits.items()
            },
            **environment(accelerator),
            "history": history,
        }
        partial_file = results_file.with_suffix(".partial")
        partial_file.write_text(json.dumps(results, indent=2))
        partial_file.replace(results_file)
        step, of_pushed = trainer.state.best_global_step, dict(results)
        if best:
            row = next((row for row in history if row["step"] == step), {"step": step})
            of_pushed |= {"final": row | kept, "chosen": "best"}
        if args.lora_r:
            del of_pushed["weights_sha256"]  # of the whole model
        add_card(
            pushed,
            of_pushed,
            pictures=[curves],
            repo_id=trainer.hub_model_id or args.hub_model_id,
            library=library,
            architecture=model.config.architecture if timm_model else type(model).__name__,
        )
        print(table(results))
        print(f"Wrote {results_file}, {curves} and {folder}" + (f", {output_dir / 'adapter'}" if args.lora_r else ""))
    if args.push_to_hub and is_main:
        where = {"revision": args.hub_revision, "private": args.hub_private_repo, "token": args.hub_token}
        try:
            print(f"Pushed to {push(pushed, trainer.hub_model_id, message='End of training', **where)}")
        except PushError as error:
            raise SystemExit(f"error: {error}") from None


class ImageTrainer(RWPTrainer):
    """RWPTrainer for an `ImageDataset`, with timm's Mixup and CutMix.

    Mixing happens in `compute_loss`, which sees one micro-step's images: RWP's two gradients share none. As pairs are
    mixed, and an epoch's last batch may be odd, that is left out then.
    """

    mixup: Mixup | None = None
    rows: Any = None  # the order of the training images

    def mix(self, num_classes: int) -> None:
        """Mix from now on, if the arguments say so. Raises ValueError for a batch that does not make pairs."""
        args = self.args
        if not (args.mixup or args.cutmix):
            return
        halved = args.rwp and 0 < args.rwp_alpha < 1 and args.world_size == args.gradient_accumulation_steps == 1
        if args.train_batch_size % (4 if halved else 2):
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size}: Mixup and CutMix mix pairs"
                + (" of each of the two halves that RWP needs" if halved else "")
                + f". Set a multiple of {4 if halved else 2}"
            )
        self.mixup = Mixup(
            args.mixup, args.cutmix, label_smoothing=args.label_smoothing_factor, num_classes=num_classes
        )
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over its batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.train_batch_size * self.args.world_size if self.mixup else 1
        self.rows = ShuffledRows(len(self.train_dataset), seed, together)
        return self.rows

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mixup is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        images, targets = self.mixup(inputs["pixel_values"], inputs["labels"])
        logits = model(pixel_values=images).logits
        return -(targets * log_softmax(logits.float(), dim=1)).sum(1).mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, without a draw from the generator of training, before or after which a checkpoint may be made."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._restore(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _restore(self, checkpoint: str) -> bool:
        """Load a checkpoint's weights, unless they are LoRA's; whether it did.

        Trainer looks for the names that weights have in memory. A ViT's are saved under older ones, in checkpoints too:
        it would pass them over, with a warning (huggingface/transformers issue 43701).
        """
        if not isinstance(self.model, PreTrainedModel):
            return False
        saved = type(self.model).from_pretrained(checkpoint, config=copy.deepcopy(self.model.config))
        self.model.load_state_dict(saved.state_dict())
        return True


class ShuffledRows(torch.utils.data.Sampler):
    """The rows of an `ImageDataset` in an order of (seed, epoch), as keys that seed the augmentation of each batch.

    A resumed run meets the same images, whatever was loaded ahead of the checkpoint. together: as many rows as this
    divides, those that are left over are left out.
    """

    def __init__(self, size: int, seed: int, together: int = 1) -> None:
        self.plan = BatchPlan(size, batch_size=together, training=True, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.plan.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.plan) * self.plan.batch_size

    def __iter__(self) -> Any:
        return itertools.chain.from_iterable(self.plan)


class Record(TrainerCallback):
    """Keeps what Trainer does not, in its own log, which checkpoints hold: what RWP did, seconds, unreadable images.

    Raises on all replicas at once, ValueError for too many unreadable images, FloatingPointError for a loss that is no
    number.
    """

    def __init__(self, trainer: ImageTrainer) -> None:
        self.trainer = trainer
        self.slots = {"clean": 0, "perturbed": 0}  # before this session
        self.seconds = 0.0  # of this epoch, before this session

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for entry in state.log_history:  # of the checkpoint that training goes on from
            if "seconds" in entry:
                self.slots = entry.get("rwp", {}).get("slots", self.slots)
                self.seconds = 0.0 if entry["whole"] else entry["seconds"]

    def on_epoch_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter() - self.seconds
        self.seconds = 0.0
        if self.trainer.rows is not None:  # Trainer does not reach it on several replicas, in the epoch that it resumes
            self.trainer.rows.set_epoch(math.floor(round(state.epoch or 0, 6)))

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save:
            control.should_log = True  # a checkpoint holds what was logged, not the losses since then
            self.note(state, whole=state.epoch == round(state.epoch))
        elif state.global_step % (state.logging_steps or 1) == 0:
            self.unreadable(self.trainer.train_dataset)

    def on_epoch_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        noted = next((entry for entry in reversed(state.log_history) if "seconds" in entry), {})
        if (noted.get("step"), noted.get("whole")) != (state.global_step, True):  # a save may have come first
            self.note(state, whole=True)

    def on_evaluate(self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        count = self.unreadable(self.trainer.eval_dataset)
        if count:
            state.log_history[-1]["eval_unreadable_images"] = count

    def on_log(
        self, args: Arguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        losses = {name: value for name, value in logs.items() if name in ("loss", "loss_clean", "loss_perturbed")}
        if not args.logging_nan_inf_filter and not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(
                f"the loss is {losses} by step {state.global_step}: nothing was saved since it diverged. Try a smaller "
                "learning_rate" + (" or rwp_gamma" if args.rwp else "")
            )

    def note(self, state: TrainerState, whole: bool) -> None:
        entry: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step, "whole": whole}
        entry |= {"seconds": time.perf_counter() - self.started}
        entry |= {"unreadable_images": self.unreadable(self.trainer.train_dataset)}
        if self.trainer.rwp is not None:
            report = self.trainer.rwp.report()
            slots = {kind: self.slots[kind] + count for kind, count in report["slots"].items()}
            entry["rwp"] = {**report, "slots": slots, "gamma": self.trainer.rwp.defaults["rwp_gamma"]}
        state.log_history.append(entry)

    def unreadable(self, images: ImageDataset) -> int:
        """How many images no replica could read. Collective."""
        slots = images.unreadable.slots
        args, accelerator = self.trainer.args, self.trainer.accelerator
        count = int(accelerator.reduce(torch.tensor(len(slots), device=accelerator.device)))
        if count:  # replicas may have met some alike
            count = len(set().union(*gather_object([slots])))
        if count > args.max_bad_images:
            raise ValueError(
                f"{count} images could not be read, more than max_bad_images={args.max_bad_images}: the warnings above "
                "name them. Repair or remove them, or raise max_bad_images"
            )
        return count


class Accuracy:
    """Trainer's `compute_metrics`, over what `ranks_and_losses` gave: top-1, top-5 and mean cross-entropy."""

    def __init__(self) -> None:
        self.metrics, self.losses = evaluate.combine([Top1(), Top5()]), []

    def __call__(self, predicted: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """compute_result: Trainer's, for `--batch_eval_metrics`."""
        predictions, labels = torch.as_tensor(predicted.predictions), torch.as_tensor(predicted.label_ids)
        readable = labels >= 0
        if readable.any():
            self.metrics.add_batch(predictions=predictions[readable, 0].long(), references=labels[readable])
            self.losses.append(predictions[readable, 1].double())
        if not compute_result:
            return {}
        if not self.losses:
            raise ValueError(
                "no image for evaluation could be read: see the warnings above for what is wrong with them"
            )
        losses, self.losses = torch.cat(self.losses), []
        return {**self.metrics.compute(), "loss": losses.mean().item()}


def ranks_and_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's rank and the cross-entropy (B, 2): what `Accuracy` needs of logits (B, C). For a label -100, 0."""
    logits, known = logits.float(), labels.clamp(min=0)
    losses = cross_entropy(logits, labels, reduction="none")
    return torch.stack([label_rank(logits, known).float(), losses], 1)


def collate(items: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    # An unreadable image's label -1 becomes the one that losses ignore.
    return {"pixel_values": torch.stack(images), "labels": torch.tensor([y if y >= 0 else -100 for y in labels])}


def create_model(args: Arguments, label_names: list[str]) -> tuple[PreTrainedModel, dict]:
    """The model, and the arguments that make it again in timm, beside the classes."""
    kwargs = yaml.safe_load(args.model_kwargs)
    names = dict(enumerate(label_names))
    classes = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    classes["problem_type"] = "single_label_classification"
    if args.model_name_or_path is None:
        config = ViTConfig(**{**SMALL_VIT, "image_size": args.img_size, **kwargs}, **classes)
        return ViTForImageClassification(config), {}
    if args.weights is None:
        name = args.model_name_or_path
        if args.img_size and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            kwargs["img_size"] = args.img_size
        config = TimmWrapperConfig(architecture=name, model_args=kwargs or None, **classes)
        model = TimmWrapperForImageClassification(config)
    else:
        model = load_weights(args, classes, kwargs)
    if not isinstance(model, TimmWrapperForImageClassification):
        size = getattr(model.config, "image_size", None)
        if args.img_size and size and args.img_size != size:
            raise ValueError(
                f"img_size={args.img_size}, and the position embeddings of {args.weights} are for {size} pixels: leave "
                "img_size out, or take the model from timm (timm/...), which resizes them"
            )
        return model, {}
    inner, kwargs = model.timm_model, dict(model.config.model_args or {})
    if args.weights and args.img_size and inner.pretrained_cfg.get("fixed_input_size"):
        inner.set_input_size(img_size=args.img_size)
        kwargs["img_size"] = args.img_size
        model.config.model_args = kwargs
    return model, kwargs


def load_weights(args: Arguments, classes: dict, kwargs: dict) -> PreTrainedModel:
    """The model with trained weights, and a new head where the classes differ; ValueError if more would be new."""
    try:
        config = AutoConfig.from_pretrained(args.weights)
        if isinstance(config, TimmWrapperConfig):
            kwargs = {"model_args": {**(config.model_args or {}), **kwargs} or None}
        config.update({**classes, **kwargs})
        model, loading = AutoModelForImageClassification.from_pretrained(
            args.weights,
            config=config,
            dtype=torch.float32,  # else that of the file
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={args.weights!r} could not be loaded: {error}. Set a folder that holds a model, or an "
            "id on the Hub, and check the connection and your access (`hf auth login`)"
        ) from error
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    lost = sorted(key for key in new if not key.startswith(f"{head_of(model)}."))
    if lost:
        raise ValueError(
            f"{args.weights} does not fit the model, which would have random weights beside a new head: "
            f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}. Leave out model_kwargs, or take other weights"
        )
    if args.eval_only and new:
        raise ValueError(
            f"{args.weights} has no head for the {len(classes['id2label'])} classes of the data: eval_only needs the "
            "data that the weights were trained for"
        )
    return model


def head_of(model: PreTrainedModel) -> str:
    """The name of the model's classifier."""
    if isinstance(model, TimmWrapperForImageClassification):
        head = model.timm_model.get_classifier()
        return next(name for name, module in model.named_modules() if module is head)
    names = [name for name in ("classifier", "head") if hasattr(model, name)]
    if not names:
        raise NotImplementedError(
            f"{type(model).__name__} has no layer called classifier or head: a model like ViTForImageClassification, "
            "or one of timm's, is needed"
        )
    return names[0]


def with_lora(args: Arguments, model: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    head = head_of(model)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=[name for name in targets if not f"{name}.".startswith(f"{head}.")],
        modules_to_save=[head],
    )
    return get_peft_model(model, config)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that LoRA was put on, LoRA's layers in it."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def preprocessing(args: Arguments, model: PreTrainedModel) -> dict[str, Any]:
    """What is done to an image ahead of the model: its own way, where no flag says otherwise; as timm writes it."""
    chosen = {"img_size": args.img_size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}
    if isinstance(model, TimmWrapperForImageClassification):
        trained = getattr(model.config, "pretrained_cfg", None) or {}
        return resolve_data_config(chosen, pretrained_cfg={**model.timm_model.pretrained_cfg, **trained})
    own = ViTImageProcessor()
    if args.weights:
        try:
            own = AutoImageProcessor.from_pretrained(args.weights)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{args.weights} does not say how its images are to be prepared ({error}): it needs a "
                "preprocessor_config.json, as ViTImageProcessor().save_pretrained writes"
            ) from error
    size, crop = dict(own.size), dict(getattr(own, "crop_size", None) or {})
    side = args.img_size or getattr(model.config, "image_size", None) or crop.get("height") or size.get("height")
    cropped = bool(getattr(own, "do_center_crop", None)) and "shortest_edge" in size
    config = {
        "input_size": (3, side, side),
        "mean": tuple(own.image_mean),
        "std": tuple(own.image_std),
        "interpolation": PIL.Image.Resampling(own.resample).name.lower(),
        # Without a crop, transformers squashes the image into a square.
        "crop_pct": side / size["shortest_edge"] if cropped else 1.0,
        "crop_mode": "center" if cropped or args.crop_pct else "squash",
    }
    return config | {name: value for name, value in chosen.items() if value is not None and name != "img_size"}


def processor(data_config: dict[str, Any]) -> ViTImageProcessor:
    """transformers' preprocessing, the same as the evaluation's."""
    side = data_config["input_size"][-1]
    square = {"height": side, "width": side}
    cropped = data_config["crop_mode"] != "squash"
    crop = {"size": {"shortest_edge": math.floor(side / data_config["crop_pct"])}, "do_center_crop": True}
    return ViTImageProcessor(
        **(crop | {"crop_size": square} if cropped else {"size": square}),
        image_mean=list(data_config["mean"]),
        image_std=list(data_config["std"]),
        resample=PIL.Image.Resampling[data_config["interpolation"].upper()],
    )


def save_whole(
    model: PreTrainedModel, folder: Path, label_names: list[str], data_config: dict[str, Any], model_args: dict
) -> None:
    """The model with preprocessing and label names, in a folder that transformers loads; timm too, if it is timm's."""
    if isinstance(model, TimmWrapperForImageClassification):
        parts = {"label_names": label_names, "data_config": data_config, "model_args": model_args}
        save_model(model.timm_model, folder, **parts)
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor(data_config).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def checkpoint_to_resume(args: Arguments, finished: bool) -> Path | None:
    """The checkpoint that the flags name. Raises where they name none, and where a run would be lost that is there."""
    # Trainer writes its state last: a kill in the middle of a save leaves a folder without.
    whole = [path for path in Path(args.output_dir).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    last = max(whole, key=lambda path: step_of(path) or 0, default=None)
    if args.resume_from_checkpoint == "latest":
        if last is None:
            raise FileNotFoundError(
                f"{args.output_dir} holds no whole checkpoint: start without --resume_from_checkpoint"
            )
        return last
    if args.resume_from_checkpoint is not None:
        folder = Path(args.resume_from_checkpoint)
        if not (folder / "trainer_state.json").is_file() or step_of(folder) is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={str(folder)!r} is no folder checkpoint-STEP with a trainer_state.json: set "
                "one that this recipe wrote, or latest"
            )
    else:
        folder = None
    inside = folder is not None and folder.resolve().parent == Path(args.output_dir).resolve()
    if (last or finished) and not (inside or args.eval_only or args.overwrite_output_dir):
        what = "a finished run" if finished else "the checkpoints of an unfinished run"
        raise FileExistsError(
            f"{args.output_dir} holds {what}: set another --output_dir, or --resume_from_checkpoint latest to go on, "
            "or --overwrite_output_dir to delete it"
        )
    return folder


def check_arguments(facts: dict[str, Any], file: Path) -> None:
    """Raise ValueError for a flag whose old value comes back with the checkpoint. file: the flags of that run."""
    saved = json.loads(file.read_text()) if file.is_file() else {}
    kept = [name for name in KEPT_BY_CHECKPOINTS if name in saved and saved[name] != facts.get(name)]
    if kept:
        raise ValueError(
            f"the checkpoint was written with {', '.join(f'{name}={saved[name]!r}' for name in kept)}, and keeps that: "
            "resume with the same, or start anew from the weights (--model_name_or_path .../model)"
        )


def step_of(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def remove_checkpoints(output_dir: Path, after: int) -> None:
    """Delete the checkpoints of steps beyond `after`: they are of another run."""
    for folder in output_dir.glob("checkpoint-*"):
        if (step_of(folder) or 0) > after:
            shutil.rmtree(folder)


def epochs_of(log_history: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """One row an epoch: mean losses over its logs, its last evaluation, and what `Record` noted at its end.

    A log counts for the epoch that it was made in.
    """
    rows: dict[int, dict[str, Any]] = {}
    logged: dict[int, list[tuple[int, dict[str, float]]]] = {}
    last_step = 0
    for entry in log_history:
        number = math.ceil(round(entry["epoch"], 6))
        row = rows.setdefault(number, {})
        if "seconds" in entry:
            if entry["whole"]:
                epoch = round(entry["epoch"], 6)
                row |= {name: value for name, value in entry.items() if name != "whole"} | {"epoch": epoch}
        elif {"loss", "learning_rate"} <= entry.keys():
            logged.setdefault(number, []).append((entry["step"] - last_step, entry))
            last_step, row["learning_rate"] = entry["step"], entry["learning_rate"]
        else:
            row |= accuracies(entry)
    for number, parts in logged.items():
        for name in ("loss", "loss_clean", "loss_perturbed", "loss_gap"):
            known = [(steps, entry[name]) for steps, entry in parts if name in entry]
            if known:
                mean = sum(steps * value for steps, value in known) / sum(steps for steps, _ in known)
                rows[number]["train_loss" if name == "loss" else name] = mean
    whole = [row for row in rows.values() if "seconds" in row]
    for row, begin in zip(whole, [0.0, *(row["epoch"] for row in whole)], strict=False):
        row["images_per_second"] = (row["epoch"] - begin) * images / row["seconds"]
    return whole


def accuracies(figures: dict[str, float]) -> dict[str, float]:
    """Of an evaluation: top1, top5, eval_loss and, where there are any, unreadable_eval_images."""
    names = {"eval_top1": "top1", "eval_top5": "top5", "eval_loss": "eval_loss"}
    names["eval_unreadable_images"] = "unreadable_eval_images"
    return {name: figures[key] for key, name in names.items() if key in figures}


def table(results: dict[str, Any]) -> str:
    """The results as two columns of text."""
    final = results["final"]
    rows = {
        "method": "rwp" if results["arguments"]["rwp"] else "base",
        "replicas": results["hardware"]["replicas"],
        "epochs": f"{final['epoch']:g}",
        "top-1": f"{final['top1']:.2%}",
        "top-5": f"{final['top5']:.2%}",
    }
    if "best" in results:
        rows |= {"top-1, best checkpoint": f"{results['best']['top1']:.2%}"}
    unreadable = final["unreadable_images"] + final.get("unreadable_eval_images", 0)
    if unreadable:
        rows["unreadable images"] = unreadable
    if "train_loss" in final:
        rows["training loss"] = f"{final['train_loss']:.4f}"
    rows |= {
        "training seconds": f"{results['seconds']:.1f}",
        "images per second": f"{final['images_per_second']:.0f}",
    }
    if "rwp" in final:
        rwp = final["rwp"]
        losses = [f"{final[key]:.4f}" if key in final else "-" for key in ("loss_clean", "loss_perturbed")]
        sizes = [f"{layer['size']:.2g} ({layer['name']})" for layer in rwp["relative_noise"].values()]
        rows |= {
            "placement": rwp["placement"],
            "slots, clean / perturbed": f"{rwp['slots']['clean']} / {rwp['slots']['perturbed']}",
            "loss, clean / perturbed": " / ".join(losses),
            "noise / weights": ", ".join(sizes) or "-",
        }
    return aligned(rows)


def aligned(rows: dict[str, Any]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    main(parse_arguments(Arguments, description=__doc__.splitlines()[0]))
