"""One optimizer step of a loop: the gradient of a batch in some parts, then a plain update or SAM's.

    parts = list(zip(images.chunk(2), labels.chunk(2), strict=True))
    add_gradients = partial(accumulate, model, parts, lambda x, y: cross_entropy(model(x), y), accelerator=accelerator)
    plain_step(optimizer, add_gradients)

RWP needs no step of its own: wrapped, the optimizer of a plain step is RWP's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_rwp.core.losses import LossTracker
from hf_rwp.runs.sharded import is_mesh

Part = tuple[Any, ...]  # what the loss of one part is a function of: (images, labels)


class AddGradients(Protocol):
    """`accumulate` with all but its last two arguments given, by `functools.partial`."""

    def __call__(self, *, sync: bool = True, track: bool = True) -> None: ...


def accumulate(
    model: nn.Module,
    parts: Sequence[Part],
    loss_of: Callable[..., Tensor],
    *,
    accelerator: Accelerator | None = None,
    tracker: LossTracker | None = None,
    sync: bool = True,
    track: bool = True,
) -> None:
    """Add the gradient of the parts' mean loss, one forward and one backward pass for each.

    model: what `accelerator.prepare` or DistributedDataParallel gave. loss_of: calls it on one part, and returns the
    mean loss. accelerator: None where the loop is plain PyTorch. tracker: takes each part's loss, unless `track` is
    false. sync: whether the last backward pass averages the gradients over the replicas; the others do so only where
    FSDP2 holds the weights, since a gradient that it has not reduced is whole on every process.
    """
    for number, part in enumerate(parts, start=1):
        synchronizes = sync and number == len(parts)
        with nullcontext() if synchronizes else _no_sync(model, accelerator):
            loss = loss_of(*part)
            (Tensor.backward if accelerator is None else accelerator.backward)(loss / len(parts))
        if tracker is not None and track:
            tracker.update(loss.detach())


def plain_step(
    optimizer: torch.optim.Optimizer, add_gradients: AddGradients, clip: Callable[[], None] | None = None
) -> None:
    """One step of `optimizer`, and RWP's where it wraps one. clip: changes the gradients ahead of the update."""
    add_gradients()
    if clip is not None:
        clip()
    optimizer.step()
    optimizer.zero_grad()


def sam_step(sam: Any, model: nn.Module, add_gradients: AddGradients, clip: Callable[[], None] | None = None) -> None:
    """One step of `wrap_sam`'s optimizer: the base's with the gradient at the top of the ascent (arXiv 2010.01412).

    Each replica climbs by its own gradient. BatchNorm's running statistics are those of the first pass.
    """
    add_gradients(sync=False)
    sam.first_step(zero_grad=True)
    with frozen_statistics(model):
        add_gradients(track=False)
    if clip is not None:
        clip()
    sam.second_step(zero_grad=True)


def wrap_sam(base: torch.optim.Optimizer, rho: float, adaptive: bool = False) -> Any:
    """pytorch_optimizer's SAM around a base optimizer that there is already. adaptive: ASAM (arXiv 2102.11600)."""
    from pytorch_optimizer import SAM

    return SAM(base.param_groups, lambda *_, **__: base, rho=rho, adaptive=adaptive)  # type: ignore[arg-type]


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are."""
    from pytorch_optimizer import disable_running_stats, enable_running_stats  # type: ignore[attr-defined]

    disable_running_stats(model)
    try:
        yield
    finally:
        enable_running_stats(model)


def _no_sync(model: nn.Module, accelerator: Accelerator | None) -> Any:
    if accelerator is not None and is_mesh(accelerator):
        return nullcontext()
    return getattr(model, "no_sync", nullcontext)() if accelerator is None else accelerator.no_sync(model)
