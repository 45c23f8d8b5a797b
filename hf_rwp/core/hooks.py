"""What a wrapper needs of modules and autograd: hooks that stay behind, and the end of a backward pass."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Hook:
    """A method as a module's hook, that never outlives its object or the module it was put on.

    It holds the object weakly. A copy or a pickle of the module takes a hook along that does nothing.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod[Callable[..., Any]](method)

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        method = self._method and self._method()
        return method(*args) if method else None

    @property
    def owner(self) -> Any:
        """The object whose method this is; None in a copy, and once the object is gone."""
        method = self._method and self._method()
        return getattr(method, "__self__", None)


class Same(torch.autograd.Function):
    """A tensor itself, with hooks of its own. Not a view: in-place changes keep its hooks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running now has ended; to be called from a tensor's hook.

    With reentrant checkpointing that is the end of the pass in which the tensor's gradient arrived, not of the passes
    nested in it. A private call: autograd offers no public one that is right there.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether a backward pass is running in this thread. Private too; activation checkpointing asks the same way."""
    return bool(torch._C._current_graph_task_id() != -1)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, however nested in mappings, sequences and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        yield from tensors_in([getattr(output, field.name) for field in dataclasses.fields(output)])


def with_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A model's output with `change` of each of the tensors that `tensors_in` finds, of the same types."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        values = [with_tensors(value, change) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    keys: Any = ()
    if isinstance(output, Mapping):
        keys = list(output)
    elif isinstance(output, list):
        keys = range(len(output))
    elif dataclasses.is_dataclass(output):
        keys = [field.name for field in dataclasses.fields(output)]
    else:
        return output
    changed: Any = copy.copy(output)
    for key in keys:
        if isinstance(output, (Mapping, list)):
            changed[key] = with_tensors(output[key], change)
        else:
            object.__setattr__(changed, key, with_tensors(getattr(output, key), change))
    return changed
