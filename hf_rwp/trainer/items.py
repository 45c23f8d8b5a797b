"""How what Trainer counts in the batches of a step, its tokens, divides between slots.

Where a loss is a mean over tokens, Trainer gives every slot (a micro-step of a process) a factor: its part of all of
them.

1. On several replicas these have the roles. Processes that hold a replica together add their tokens up; tensor-parallel
   peers have the same batch, so that each counts as often as the others.
2. On one replica micro-steps have the roles. Processes that hold it together (FSDP2) have batches of their own, and
   their tokens add up where Trainer counts across processes. Where it does not, each process mixes over its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_rwp.core.placement import role_shares


class Slots(NamedTuple):
    """What the slots of a step are in its loss. shares: see `placement.role`; None where all are alike.

    parts: how much of its process's loss each micro-step is, which add up to 1 over a step, on average over processes.
    """

    shares: tuple[float, float] | None
    parts: list[float]


def alike(micro_steps: int) -> Slots:
    """Where the loss is a mean over slots."""
    return Slots(None, [1 / micro_steps] * micro_steps)


def count_once(
    accelerator: Any, count: Callable[[list[Any]], Any], batches: list[Any], each: bool
) -> tuple[Any, list[list[float]], list[float]]:
    """Trainer's count of a step's batches, and what it is made of: by process, and by batch of this one.

    count: Trainer's. each: whether batches are counted one by one as well. Returns the count as it is; per process its
    tokens, followed by those of each of its batches, nothing where the count is not across processes; and this
    process's own by batch. None of it costs a collective that Trainer would not have had.
    """
    own: list[Any] = []
    if each:
        with _gathering(accelerator, lambda tensor: tensor) as asked:
            counts = [count([batch]) for batch in batches]
        own = asked if len(asked) == len(batches) else [n for n in counts if n is not None]
    everyone: list[Tensor] = []

    def with_own(tensor: Tensor) -> Tensor:
        if tensor.ndim or len(own) != len(batches) * each:
            return plain(tensor)  # type: ignore[no-any-return]
        parts = [torch.as_tensor(n, dtype=tensor.dtype, device=tensor.device) for n in own]
        everyone.append(plain(torch.stack([tensor, *parts])).view(-1, 1 + len(parts)))
        return everyone[-1][:, 0]

    plain = accelerator.gather
    with _gathering(accelerator, with_own):
        total = count(batches)
    return total, [row for table in everyone for row in table.tolist()], [float(n) for n in own]


def slots_of(rank: int, homes: Sequence[int], micro_steps: int, everyone: list[list[float]], own: list[float]) -> Slots:
    """rank: of this process. homes: by process, which replica it belongs to. everyone, own: from `count_once`."""
    replicas = max(homes) + 1
    if replicas > 1:
        if not everyone:
            return alike(micro_steps)
        tokens = [sum(row[0] for row, home in zip(everyone, homes, strict=True) if home == r) for r in range(replicas)]
        mine = everyone[rank][0] * len(everyone) / (sum(tokens) or 1)
        return Slots(role_shares(tokens), [mine / micro_steps] * micro_steps)
    if len(own) != micro_steps:
        return alike(micro_steps)
    tokens = [sum(column) for column in list(zip(*everyone, strict=True))[1:]] if everyone else own
    scale = max(1, len(everyone)) / (sum(tokens) or 1)
    return Slots(role_shares(tokens), [n * scale for n in own])


@contextmanager
def _gathering(accelerator: Any, gather: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """`gather` in place of the accelerator's meanwhile; yields what was asked of it."""
    plain, asked = accelerator.gather, []

    def recording(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        return gather(tensor)

    accelerator.gather = recording
    try:
        yield asked
    finally:
        accelerator.gather = plain
