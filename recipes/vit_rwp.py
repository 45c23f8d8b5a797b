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

# After a crash, Ctrl-C or SIGTERM: on from the last checkpoint with the run's own flags, bit for bit
```bash
accelerate launch recipes/vit_rwp.py --resume_from_checkpoint outputs/NAME
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
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("vit", __name__)
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.runs.parsing import flags_first, start, values_first
from hf_rwp.trainer.model_arguments import ModelArguments
from hf_rwp.trainer.ranges import Ranges, check_ranges


@dataclass
class Ahead(ModelArguments, Ranges):
    """What is checked ahead of the slow imports."""

    def __post_init__(self) -> None:
        ImageArguments.__post_init__(self)  # that of ModelArguments imports timm
        Ranges.__post_init__(self)


values_first(__name__, Ahead)
import torch

from hf_rwp import RWPTrainingArguments
from hf_rwp.core.checks import check_all
from hf_rwp.runs.given import Given, save_flags


@dataclass
class Arguments(ModelArguments, RWPTrainingArguments):
    given = Given()  # no flag: those that were typed, as `parse_arguments` notes them
    numbered = False  # no flag: whether output_dir is the first of a row of folders, `settle_folder`
    rwp: bool = field(default=True, metadata={"help": "`--rwp false` is plain Trainer."})
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When `--push_to_hub` pushes: at the `end`, or Trainer's `every_save` or its checkpoints."},
    )
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
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for all that is written. If not set, a new one for each run: "
            "outputs/DATA_vit_METHOD_seedN, then .../2, .../3."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a run that output_dir holds may be deleted for this one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A run's folder, for its last checkpoint, one of its checkpoints, or `latest` for the last one in "
            "output_dir; with the flags that the run was given, and those given now."
        },
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many of the last checkpoints are kept."})
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "Whether to hide progress bars; shown only on a terminal if not set."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the losses: no, steps or epoch."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide losses that are not numbers; else training stops at one."}
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
        ModelArguments.__post_init__(self)
        if self.learning_rate is None:
            self.learning_rate = 5e-5 if self.weights else 2e-3
        if self.output_dir is None:
            data = Path(self.data_dir or self.dataset or "digits").name
            self.output_dir, self.numbered = f"outputs/{data}_vit_{self.method}_seed{self.seed}", True
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.label_names is None:
            self.label_names = ["labels"]  # which Trainer does not find under a PEFT model
        check_ranges(self)  # type: ignore[arg-type]
        RWPTrainingArguments.__post_init__(self)
        check_all(
            self,
            ("mixup", self.mixup >= 0, "at least 0"),
            ("cutmix", self.cutmix >= 0, "at least 0"),
        )
        if self.streaming:
            raise ValueError(
                "streaming=True: Trainer neither shuffles a stream anew each epoch nor finds the place in it where a "
                "checkpoint was made. Set it to false, or stream with imagenet_rwp.py, which does both"
            )
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last=True would leave images out of the evaluation, too: set it to false")

    @property
    def method(self) -> str:
        return "rwp" if self.rwp else "base"


flags_first("vit", __name__, Arguments, __doc__, light=False)  # ahead of the slow imports
from accelerate.utils import gather_object
from datasets import DatasetDict
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from hf_rwp.analysis.run_plots import pictures_of_run
from hf_rwp.core.placement import mixes
from hf_rwp.core.refusals import refuse_lone_processes
from hf_rwp.hub.card import add_card
from hf_rwp.hub.configs import config_of
from hf_rwp.hub.push import PushError, push
from hf_rwp.images.data import describe_splits, load_images
from hf_rwp.images.found import found_in
from hf_rwp.images.loaders import ImageDataset
from hf_rwp.images.models import refuse_single_images
from hf_rwp.images.orders import in_order_of
from hf_rwp.images.transforms import image_transforms
from hf_rwp.runs.closing import commands, last_screen
from hf_rwp.runs.evaluation import write_evaluation
from hf_rwp.runs.files import as_json, write
from hf_rwp.runs.opening import data_facts, model_facts, opening, say, step_facts
from hf_rwp.runs.records import Results, base_of, environment, scrub_paths, weights_digest, with_by_class
from hf_rwp.runs.resuming import RESULTS, check_writable, name_of, refuse_other_flags, settle_folder
from hf_rwp.runs.sharded import gathered, refuse_sharded, replicas_of_run, shard_blocks, whole_copy
from hf_rwp.runs.signals import Signals
from hf_rwp.runs.tracking import track_trainer
from hf_rwp.trainer.checkpoints import find_trainer_checkpoint, remove_later_checkpoints
from hf_rwp.trainer.history import Record, evaluated, rows_by_epoch
from hf_rwp.trainer.images import EvaluationMetrics, ImageTrainer, collate, ranks_and_losses
from hf_rwp.trainer.models import (
    add_lora,
    create_model,
    image_processor,
    preprocessing,
    save_whole,
    timm_model_of,
    unwrapped,
)
from hf_rwp.trainer.watching import watch

# Flags whose old values come back with a checkpoint's optimizer and schedule, or change what was trained.
KEPT_BY_CHECKPOINTS = ("rwp", "rwp_gamma", "rwp_seed", "learning_rate", "lr_scheduler_type", "optim", "weight_decay")
KEPT_BY_CHECKPOINTS += ("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "lora_r", "model_kwargs")


def main(args: Arguments) -> None:
    refuse_lone_processes()
    disable_progress_bar()  # of each file that transformers reads
    given = vars(args).pop("given", args.given)  # which Trainer need not pickle beside the weights
    if args.push_to_hub and args.hub_model_id is None and (args.numbered or given.run):
        args.hub_model_id = name_of(Path(args.output_dir))
    settle_folder(args)
    output_dir = Path(args.output_dir)
    results_file, flags_file = output_dir / RESULTS, output_dir / "arguments.json"
    checkpoint, flags = find_trainer_checkpoint(args), scrub_paths(args.to_dict())
    if checkpoint and (saved := checkpoint.parent / flags_file.name).is_file():
        refuse_other_flags(flags, json.loads(saved.read_text()), KEPT_BY_CHECKPOINTS, "--model_name_or_path .../model")
    check_writable(output_dir)

    set_seed(args.seed)
    numbered_as = args.weights if args.eval_only and not checkpoint else None
    splits = in_order_of(load_images(**args.data_options), numbered_as, config_of)
    label_names = splits["train"].features["label"].names
    model, model_args = create_model(args, label_names)
    data_config = preprocessing(args, model)
    if not args.eval_only:
        refuse_single_images(model, data_config["input_size"], args.per_device_train_batch_size, 1)
    if args.lora_r:
        model = add_lora(args, model)
    signals = Signals()
    trainer = create_trainer(args, model, splits, data_config, signals)
    accelerator, is_main = trainer.accelerator, trainer.is_world_process_zero()
    refuse_sharded(accelerator)
    facts = describe_run(args, trainer, splits)
    step = None if args.eval_only else facts["images_per_step"]
    found = found_in(splits).lines()
    say(accelerator, opening(accelerator, given, found, facts["model"], step, output_dir, checkpoint))
    if args.eval_only:
        if checkpoint:
            trainer.load_checkpoint(checkpoint)
        figures = trainer.evaluate()
        if is_main:
            write_evaluation(output_dir, figures)
        return

    accelerator.wait_for_everyone()  # all have found the checkpoint, before others go
    if is_main:
        results_file.unlink(missing_ok=True)
        write(flags_file, as_json(flags))
        save_flags(output_dir, given.flags)
        remove_later_checkpoints(output_dir, checkpoint)
    accelerator.wait_for_everyone()
    shard_blocks(accelerator, model)
    whole = whole_copy(accelerator, model)  # takes sharded weights when they are written
    track_trainer(trainer, output_dir, resumed=checkpoint is not None)
    with signals:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    history = rows_by_epoch(trainer.state.log_history, len(trainer.train_dataset))
    if "top1" not in history[-1]:
        history[-1] |= evaluated(trainer.evaluate())
    best = evaluate_best(trainer)
    digests = gather_object([weights_digest(unwrapped(model))])
    model = gathered(accelerator, whole, model)
    if not is_main:
        return
    folder = pushed = output_dir / "model"
    library = "transformers" if timm_model_of(model) is None else "timm"
    if args.lora_r:
        pushed, library = output_dir / "adapter", "peft"
        model.save_pretrained(pushed)
        model = copy.deepcopy(model).merge_and_unload()
    save_whole(model, folder, label_names, data_config, model_args)
    results: Results = {
        "final": history[-1],
        **({"best": best} if best else {}),
        "seconds": sum(row["seconds"] for row in history),
        "weights_sha256": weights_digest(model),
        "replicas_sha256": sorted(set(digests)),  # one, as long as all replicas are bit-equal
        "arguments": flags,
        **facts,
        "history": history,
    }
    results = with_by_class(results)
    pictures = pictures_of_run(results, output_dir)
    write(results_file, as_json(results))
    of_pushed = results_of_pushed(results, trainer.state.best_global_step)
    add_card(
        pushed,
        of_pushed,
        pictures=pictures_of_run(of_pushed, pushed) if best else pictures,
        repo_id=trainer.hub_model_id or args.hub_model_id,
        library=library,
        architecture=model.config.architecture if timm_model_of(model) is not None else type(model).__name__,
    )
    waits, logs = None if args.push_to_hub else args.hub_model_id, output_dir / "logs"
    where = {"logs": logs if "tensorboard" in args.report_to else None, "processes": accelerator.num_processes}
    then = commands(output_dir, "vit", results, given.flags, **where, repo_id=waits)
    print(last_screen(results, [results_file, folder, *pictures, *([pushed] if args.lora_r else [])], then))
    if args.push_to_hub:
        where = {"revision": args.hub_revision, "private": args.hub_private_repo, "token": args.hub_token}
        try:
            print(f"Pushed to {push(pushed, trainer.hub_model_id, message='End of training', **where)}")
        except PushError as error:
            raise SystemExit(f"error: {error}") from None


def create_trainer(
    args: Arguments, model: torch.nn.Module, splits: DatasetDict, data_config: dict[str, Any], signals: Signals
) -> ImageTrainer:
    """What trains and evaluates: for another loss, another augmentation or another metric, change it here."""
    train_transform, eval_transform = image_transforms(args, data_config, normalized=True)
    shared = {"seed": args.seed, "max_bad_images": args.max_bad_images}
    timm_model = timm_model_of(model) is not None  # its configuration says how images are prepared
    trainer = ImageTrainer(  # its `compute_loss` is the loss
        model,
        args,
        train_dataset=ImageDataset(splits["train"], train_transform, training=True, **shared),
        eval_dataset=ImageDataset(splits["validation"], eval_transform, training=False, **shared),
        data_collator=collate,
        processing_class=None if timm_model else image_processor(data_config),
        compute_metrics=EvaluationMetrics(splits["train"].features["label"].names),
        preprocess_logits_for_metrics=ranks_and_losses,
    )
    trainer.mix(splits["train"].features["label"].num_classes)
    trainer.add_callback(Record(trainer, signals))
    watch(trainer)
    return trainer


def describe_run(args: Arguments, trainer: ImageTrainer, splits: DatasetDict) -> dict[str, Any]:
    """What results.json says of a run beside its flags and figures."""
    model, accelerator, parts = unwrapped(trainer.model), trainer.accelerator, args.gradient_accumulation_steps
    mixing = args.rwp and mixes(args.rwp_alpha, args.rwp_gamma)
    halved = mixing and replicas_of_run(accelerator) == parts == 1
    base = base_of(model)
    inner = timm_model_of(model)
    name = type(model).__name__ if inner is None else model.config.architecture
    source = base or (Path(args.weights).name if args.weights else None)
    per_process = args.train_batch_size * parts
    return {
        "base_model": base,
        "data": describe_splits(splits),
        "found": data_facts(found_in(splits).facts()),
        "model": model_facts(name, trainer.model, source),
        "images_per_step": step_facts(accelerator, per_process, 2 if halved else parts, mixing),
        **environment(accelerator),
    }


def evaluate_best(trainer: ImageTrainer) -> dict[str, Any]:
    """With `--load_best_model_at_end`, the best checkpoint's name and figures."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return {"checkpoint": Path(best).name, **evaluated(trainer.evaluate())} if best else {}


def results_of_pushed(results: Results, best_step: int | None) -> Results:
    """The results of the weights that are pushed, which are the best ones where those were loaded."""
    pushed = Results(**results)
    if "best" in results:
        row = next((row for row in results["history"] if row["step"] == best_step), {"step": best_step})
        best = {name: value for name, value in results["best"].items() if name != "checkpoint"}
        pushed = with_by_class(pushed | {"final": row | best, "chosen": "best"})
    if results["arguments"]["lora_r"]:
        del pushed["weights_sha256"]  # of the whole model
    return pushed


if __name__ == "__main__":
    start(main, Arguments, __doc__)
