"""The private calls and the hooks that the wrapper rests on.

1. `at_end_of_backward` calls back once, after the last gradient, under no, reentrant and non-reentrant checkpointing.
2. A `Hook` never outlives its object; copies and pickles of the module take along one that does nothing (guarantee 10).
3. `tensors_in` finds a model's output tensors wherever they are nested.
"""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_rwp.core.hooks import Hook, at_end_of_backward, in_backward, tensors_in


class Segments(nn.Module):
    """Four layers, each a checkpointed segment, that notes when it runs."""

    def __init__(self, kind: str, events: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.kind, self.events = kind, events
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: events.append("recompute" if in_backward() else "forward"))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.kind == "none" else checkpoint(layer, x, use_reentrant=self.kind == "reentrant")
        return x


@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_end_of_backward_is_after_the_last_gradient_under_checkpointing(kind, input_requires_grad):
    events: list[str] = []
    model = Segments(kind, events)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    # Reentrant checkpointing gives no gradient where no input of a segment asks for one.
    x = torch.ones(2, 4, requires_grad=input_requires_grad)
    output = model(x if input_requires_grad else x * torch.ones(1, requires_grad=True))
    output.register_hook(lambda _: at_end_of_backward(lambda: events.append("end")))
    del events[:]
    output.sum().backward()
    assert events.count("gradient") == 8
    assert events.count("recompute") == (0 if kind == "none" else 4)
    assert events.count("end") == 1
    assert events[-1] == "end"


def test_in_backward_is_true_within_a_backward_pass_alone():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(in_backward()))
    assert not in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not in_backward()


def test_end_of_backward_belongs_to_one_pass():
    calls = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: at_end_of_backward(lambda: calls.append(in_backward())))
    y.sum().backward()
    (x * 3).sum().backward()
    assert len(calls) == 1


class Owner:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def record(self, *args: Any) -> None:
        self.calls.append(args)


def hooked() -> tuple[nn.Module, Owner]:
    model, owner = nn.Linear(2, 2), Owner()
    model.register_forward_pre_hook(Hook(owner.record))
    model.register_state_dict_pre_hook(Hook(owner.record))
    return model, owner


def test_a_hook_calls_its_method():
    model, owner = hooked()
    x = torch.ones(1, 2)
    model(x)
    (call,) = owner.calls
    assert call[0] is model
    assert call[1][0] is x
    assert next(iter(model._forward_pre_hooks.values())).owner is owner


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_duplicated_modules_hook_does_nothing(duplicate):
    model, owner = hooked()
    hook = next(iter(model._forward_pre_hooks.values()))
    other = duplicate(hook)
    assert (other.owner, other(model)) == (None, None)
    assert owner.calls == []
    if duplicate is not copy.copy:  # a shallow copy of a module shares its hooks
        twin = duplicate(model)
        twin(torch.ones(1, 2))
        twin.state_dict()
        assert owner.calls == []
        assert torch.equal(twin.weight, model.weight)


def test_a_hook_keeps_nothing_alive_and_outlives_its_object_harmlessly():
    model, owner = hooked()
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
    assert next(iter(model._forward_pre_hooks.values())).owner is None
    model(torch.ones(1, 2))


@dataclass
class Output:
    loss: Any = None
    hidden: Any = ()


class MappingOutput(OrderedDict):  # as transformers' ModelOutput
    pass


Pair = namedtuple("Pair", "first second")


def test_tensors_in_finds_every_tensor_however_nested():
    a, b, c = (torch.tensor(float(number)) for number in range(3))
    nestings = [
        (a, b, c),
        [a, [b, (c,)]],
        {"x": a, "y": {"z": [b, None, "text", 3]}, "w": c},
        Output(loss=a, hidden=(b, {"c": c})),
        MappingOutput(loss=a, hidden=Pair(b, [c])),
        Pair(a, Output(b, [Output(c)])),
    ]
    for nesting in nestings:
        found = list(tensors_in(nesting))
        assert len(found) == 3
        assert {id(tensor) for tensor in found} == {id(a), id(b), id(c)}
    assert list(tensors_in(a)) == [a]
    assert [list(tensors_in(nothing)) for nothing in (None, "text", 3, (), {}, Output())] == [[]] * 6
