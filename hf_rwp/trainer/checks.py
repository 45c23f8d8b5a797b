"""What RWPTrainer and RWPFactory refuse by name, or say, ahead of training: how a run is spread, and how it splits."""

import logging
from typing import Any

from torch import nn
from transformers.training_args import ParallelMode

from hf_rwp.core.placement import mixes
from hf_rwp.core.refusals import refuse_data_parallel, refuse_unsupported

logger = logging.getLogger(__name__)

_PAIRS = "has the chosen answers in one half of its rows and the rejected ones in the other, so that no half has a pair"
_PROMPTS = "is made of prompts, whose answers come from the model inside of the step"
_WHOLE = {"DPOTrainer": _PAIRS, "RewardTrainer": _PAIRS}  # Trainers of TRL whose batches cannot be cut in halves
_ONLINE = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")  # the model answers: a loss of its own batch's answers
_WHOLE |= dict.fromkeys(_ONLINE, _PROMPTS)


def check_parallel(args: Any) -> None:
    """Refuse by name how Trainer would spread a run, where RWP does not work with it."""
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        refuse_data_parallel()
    if args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
        raise NotImplementedError(
            f"RWP does not work with {args.parallel_mode.value}. What works is one process, DistributedDataParallel "
            "(accelerate launch --multi_gpu), FSDP2 (fsdp=True), tensor parallelism and DeepSpeed ZeRO up to stage 2"
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            f"auto_find_batch_size on {args.world_size} processes: a perturbed replica needs more memory than "
            "a clean one, so it can run out by itself, and the others would wait for it forever. Set "
            "per_device_train_batch_size, and gradient_accumulation_steps to keep the images per step"
        )


def check_supported(args: Any, model: nn.Module) -> None:
    """Refuse by name what RWP does not work with, and say what costs twice as much. args: with RWP's flags."""
    check_parallel(args)
    refuse_unsupported(model.parameters())
    slots = args.world_size * args.gradient_accumulation_steps
    single = slots * args.per_device_train_batch_size == 1 and not is_packed(args)
    if single and mixes(args.rwp_alpha, args.rwp_gamma):
        logger.warning(
            "one process and one sample to a step: both gradients are taken on it, at twice the cost of plain "
            "training. With gradient_accumulation_steps=2 they take turns, and cost nothing extra"
        )


def check_batches(args: Any, kind: type) -> None:
    """Raise ValueError, ahead of a Trainer's own work on the data, where each step's only batch cannot be split.

    args: with RWP's flags. kind: the Trainer's class. Where a mesh holds the weights that no argument tells of, the
    first batch is where that shows.
    """
    if splits(args):
        why = next((_WHOLE[name] for name in _names(kind) if name in _WHOLE), None)
        if why is not None:
            raise ValueError(whole(f"a batch of {kind.__name__} {why}"))
        if not args.rwp_split:
            raise ValueError(whole("rwp_split=False leaves batches whole"))


def splits(args: Any) -> bool:
    """Whether arguments say that a step is to take both gradients from a single batch."""
    mesh = getattr(args, "parallelism_config", None)
    single = args.world_size == 1 or (bool(args.fsdp) and getattr(mesh, "dp_replicate_size", 1) == 1)
    return single and args.gradient_accumulation_steps == 1 and mixes(args.rwp_alpha, args.rwp_gamma)


def whole(why: str) -> str:
    """The line that says why a batch is not split, and what to do."""
    return (
        f"{why}, and a step of one batch would take a clean and a perturbed gradient from its halves. Set "
        "gradient_accumulation_steps=2, with half the batch size for the same step, and whole batches take turns; or "
        "rwp_alpha=1, which perturbs every gradient"
    )


def is_online(kind: type) -> bool:
    """Whether a Trainer's losses are of answers that its model gives in training: a difference between two is no
    measure of flatness, and no batch can be taken twice."""
    return not set(_ONLINE).isdisjoint(_names(kind))


def is_packed(args: Any) -> bool:
    """Whether the collator of TRL, or of Axolotl, lays all samples of a batch out in one row."""
    if getattr(args, "sample_packing", False):
        return True
    packs = getattr(args, "packing", False) and getattr(args, "packing_strategy", "") != "wrapped"
    return bool(packs or getattr(args, "padding_free", False))


def _names(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__]
