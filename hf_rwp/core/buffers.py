"""Which buffers a perturbed pass may update, and how those that it may not come back."""

from collections.abc import Iterable

from torch import Tensor, nn

from hf_rwp.core.replicas import Replicas, broadcast, replicas_of

Guarded = tuple[nn.Module, str, Tensor]  # a buffer, its module and its name in there


def guarded_buffers(model: nn.Module, replicas: Replicas, alpha: float) -> tuple[list[Guarded], list[Guarded]]:
    """The buffers that a perturbed pass of this replica must leave as they are, and the floating ones it may update.

    Only clean slots update buffers. With none at all (alpha = 1) replica 0's perturbed ones do; so do those of a
    replica that has none, where nothing broadcasts the buffers of replica 0. What is not persistent, a cache such as
    rotary frequencies, is none of them.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    floating = [entry for entry in buffers if entry[2].is_floating_point() or entry[2].is_complex()]
    if replicas.count == 1:
        return ([], floating) if alpha == 1 else (buffers, [])
    if replicas.broadcasts_buffers and not (alpha == 1 and replicas.index == 0):
        return floating, []  # counters advance on all replicas alike
    return [], [entry for entry in floating if entry[1] not in entry[0]._non_persistent_buffers_set]


def replaced(guarded: Iterable[Guarded]) -> list[tuple[Guarded, Tensor | None]]:
    """The buffers that a pass replaced, to be put back, and what stands in their places.

    One of another shape stays: statistics that a first pass lays out are that way on every replica. So does one that is
    not persistent: a cache, whose module knows what it holds.
    """
    found = [(entry, entry[0]._buffers.get(entry[1])) for entry in guarded]
    return [
        ((module, name, buffer), now)
        for (module, name, buffer), now in found
        if now is not buffer
        and name not in module._non_persistent_buffers_set
        and (now is None or now.shape == buffer.shape)
    ]


def put_back(guarded: Iterable[Guarded]) -> None:
    """Put the buffers back that a pass replaced."""
    for (module, name, buffer), _ in replaced(guarded):
        module._buffers[name] = buffer


def sync_buffers(modules: Iterable[nn.Module], replicas: Replicas | None = None) -> None:
    """Give all replicas replica 0's buffers. Collective. replicas: None for those of the world."""
    replicas = replicas or replicas_of()
    if replicas.groups:
        broadcast((unexpanded(buffer) for module in modules for buffer in module.buffers()), replicas)


def unexpanded(tensor: Tensor) -> Tensor:
    """The view of an expanded tensor that can be written to in place: no two of its elements share memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
