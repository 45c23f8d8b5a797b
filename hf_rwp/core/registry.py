"""Which model is some wrapper's: no two wrappers perturb one weight, and no two draw one noise."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

_LIVE: "weakref.WeakKeyDictionary[Any, nn.Module]" = weakref.WeakKeyDictionary()  # wrapper -> its model
_WINDOWS: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


def claim(wrapper: Any, model: nn.Module) -> None:
    """Say that `wrapper` may perturb `model`, until `release`."""
    _LIVE[wrapper] = model


def release(wrapper: Any) -> None:
    _LIVE.pop(wrapper, None)


def refuse_overlap(model: nn.Module) -> None:
    """Raise ValueError where another model with a wrapper has a parameter of this one."""
    if all(other is model for other in _LIVE.values()):
        return
    if any(_shared(model)):
        gc.collect()  # a wrapper that nobody holds any more
    for name, other in _shared(model):
        raise ValueError(
            f"{name} belongs to the model of another RWP too ({type(other).__name__}), and would get the noise and the "
            "weight of both: put one RWP around the whole model, or call remove() on the other one, or take two models "
            "that share no parameter"
        )


def windows_of(model: nn.Module) -> int:
    """How many windows all wrappers of a model had: the next one goes on from there, and draws other noise."""
    return _WINDOWS.get(model, 0)


def count_windows(model: nn.Module, windows: int) -> None:
    _WINDOWS[model] = windows


def _shared(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    for other in set(_LIVE.values()) - {model}:
        for parameter in other.parameters():
            if id(parameter) in own:
                yield own[id(parameter)], other
