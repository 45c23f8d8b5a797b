"""A batch in two halves, for the clean and the perturbed gradient of a step that has one batch."""

import copy
from collections.abc import Mapping
from typing import Any


def in_halves(inputs: Any, smallest: int | None) -> tuple[list[Any], list[int]]:
    """A batch in halves, and how many samples each has: one more in the first where their number is odd.

    smallest: the samples that a half needs (BatchNorm fails on a single one); a smaller batch is taken whole, twice,
    and so is any where it is None.
    Raises ValueError by name for what has no batch dimension, unless it is None, a bool or a str: a number may count
    what is in the batch, and another length may lay its samples out one after the other.
    """
    length = rows(inputs)

    def cut(value: Any, name: str, part: slice) -> Any:
        if isinstance(value, Mapping):
            kind: Any = type(value)
            return kind({key: cut(item, f"{name}[{key!r}]", part) for key, item in value.items()})
        if value is None or isinstance(value, (bool, str)):
            return value
        if not length or _length(value) != length:
            raise ValueError(
                f"{name} is {_described(value)}, and a batch of {length or 'unknown length'} is split in halves, "
                "a clean and a perturbed one. Set gradient_accumulation_steps=2, with half the batch size for the same "
                "step: then whole batches take turns"
            )
        return value[part]

    if smallest is None or 0 < length < 2 * smallest:
        return [inputs, copy.copy(inputs)], 2 * [length or 1]
    middle = (length + 1) // 2
    parts = [cut(inputs, "inputs", part) for part in (slice(middle), slice(middle, None))]
    return parts, [middle, length - middle]


def rows(inputs: Any) -> int:
    """How many rows a batch has, by its first value with a length; 0 where none has one."""
    return next(filter(None, map(_length, inputs.values())), 0) if isinstance(inputs, Mapping) else 0


def _length(value: Any) -> int | None:
    shape = getattr(value, "shape", ())
    return shape[0] if shape else len(value) if isinstance(value, (list, tuple)) else None


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
