"""Losses that compare the samples of a batch with each other: in halves of it each meets half as many others.

What can be noticed of them: names, of losses, of modules and of Trainers; and an output of the model in which every
sample of a batch has a number for every other one.
"""

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_rwp.core.hooks import tensors_in
from hf_rwp.trainer.halves import rows

logger = logging.getLogger(__name__)

_NAMES = re.compile(
    "Contrastive|InfoNCE|NT_?Xent|N_?Pairs?Loss|MultipleNegatives|InBatchNegatives|MegaBatch|GIST|CoSENT|AnglE"
    "|Batch(Semi)?(All|Hard)|SupCon|Clip_?Loss|SigLip_?Loss|BarlowTwins|VICReg|GlobalOrthogonal",
    re.IGNORECASE,
)
_PAIRS = {"ContrastiveLoss", "ContrastiveTensionLoss"}  # of sentence-transformers: of pairs that the data sets have
_TRAINERS = {"KTOTrainer": "the mean KL divergence of a batch"}


@contextmanager
def noticing(trainer: Any, model: nn.Module, half: Any) -> Iterator[None]:
    """Say it where names, or the model's outputs of half a batch meanwhile, tell of such a loss."""
    found = [*_named(trainer), *(["return_loss"] if isinstance(half, Mapping) and half.get("return_loss") else [])]
    handle = model.register_forward_hook(functools.partial(_look, found, half))
    try:
        yield
    finally:
        handle.remove()
    if found and trainer.is_world_process_zero():
        logger.warning(
            "%s: a loss that compares the samples of a batch with each other means something else in a half of it, "
            "where each meets half as many others. With rwp_split=False, and gradient_accumulation_steps=2 or "
            "rwp_alpha=1, batches stay whole",
            found[0],
        )


def _look(found: list[str], half: Any, model: nn.Module, _: Any, output: Any) -> None:
    """Add what the output for half a batch says."""
    size = rows(half)
    names = output.keys() if isinstance(output, Mapping) else ()
    found.extend(str(name) for name in names if str(name).startswith("logits_per_"))
    # As many columns as rows, no sample is so long, and no weight has so many outputs: they come from the batch.
    within = any(size in tensor.shape[1:] for tensor in tensors_in(half))
    if size > 1 and not within and all(parameter.shape[:1] != (size,) for parameter in model.parameters()):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(output)]
        found.extend(f"an output of shape {shape}" for shape in shapes if shape == (size, size))


def _named(trainer: Any) -> Iterator[str]:
    """What the names of a Trainer's class, of its losses and of its model's modules say."""
    for base in type(trainer).__mro__:
        if base.__name__ in _TRAINERS:
            yield f"{base.__name__}, with {_TRAINERS[base.__name__]}"
    for loss in (getattr(trainer, "loss", None), trainer.compute_loss_func, trainer.model):
        yield from filter(_NAMES.search, _names_in(loss))


def _names_in(loss: Any) -> Iterator[str]:
    if isinstance(loss, Mapping):
        for one in loss.values():
            yield from _names_in(one)
    elif isinstance(loss, nn.Module):
        for module in loss.modules():
            kind = type(module)
            if not (kind.__module__.startswith("sentence_transformers") and kind.__name__ in _PAIRS):
                yield kind.__name__
    elif isinstance(loss, functools.partial):
        yield from _names_in(loss.func)
    elif loss is not None:
        yield getattr(loss, "__qualname__", type(loss).__name__)
