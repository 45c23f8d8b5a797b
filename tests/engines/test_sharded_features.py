"""What training loops do around FSDP2: none of it changes the mixed gradient by a bit."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from distributed import run_each
from sharded import Case, assert_same, data_mesh_of, follow, shard
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.functional import mse_loss
from transformers.utils import ModelOutput


def checkpointed(model, kind):
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)
    return model


def non_reentrant(model):
    return checkpointed(model, CheckpointImpl.NO_REENTRANT)


def reentrant(model):
    return checkpointed(model, CheckpointImpl.REENTRANT)


def compiled_layers(model):
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    return model


def compiled(model):
    """As accelerator.prepare does it, ahead of the sharding."""
    return torch.compile(model, backend="aot_eager")


def shard_root_only(case, model, mesh):
    fully_shard(model, mesh=data_mesh_of(case, mesh))


def shard_grouped(case, model, mesh):
    """The last two modules in one group, as Accelerate does with norm and head."""
    mesh = data_mesh_of(case, mesh)
    fully_shard([model.norm, model.head], mesh=mesh)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


PLAIN = {
    "non-reentrant checkpointing": {"change": non_reentrant},
    "reentrant checkpointing": {"change": reentrant},
    "compiled layers": {"change": compiled_layers},
    "compiled model": {"change": compiled},
    "grouped modules": {"shard": shard_grouped},
    "reshard_after_forward=False": {"sharding": {"reshard_after_forward": False}},
    "reshard_after_forward=True": {"sharding": {"reshard_after_forward": True}},
    "reshard_after_forward=2": {"sharding": {"reshard_after_forward": 2}},
    "weights that stay gathered": {"keep": True},
    "CPU offload": {"sharding": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}},
    "a scaled loss": {"scale": 1024.0},
}


@dataclasses.dataclass
class Output(ModelOutput):
    logits: Tensor | None = None
    loss: Tensor | None = None


@dataclasses.dataclass
class Plain:
    logits: Tensor
    note: str = "not a tensor"


Pair = collections.namedtuple("Pair", ["logits", "note"])


class Keeping(torch.nn.Module):
    """A layer that keeps an auxiliary loss on itself, as mixtures of experts do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.kept = layer, None

    def forward(self, x):
        x = self.layer(x)
        self.kept = x.square().mean()
        return x


def keeping(model):
    model.layers[0] = Keeping(model.layers[0])
    return model


class Wrapped(torch.nn.Module):
    """Sharded in place of its net, whose output it returns otherwise."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.layers, self.how = net, net.layers, forward

    def forward(self, x, y=None):
        return self.how(self.net, self.net(x), y)


def kept_and_returned(model):
    return Wrapped(keeping(model), as_kept)


@dataclasses.dataclass(frozen=True)
class Wrap:
    how: Any

    def __call__(self, model):
        return Wrapped(model, self.how)


def as_model_output(net, out, y):
    return Output(logits=out)


def as_dataclass(net, out, y):
    return Plain(out)


def as_namedtuple(net, out, y):
    return Pair(out, None)


def as_dict(net, out, y):
    return {"logits": out, "deep": [{"note": 1}]}


def as_list(net, out, y):
    return [out]


def as_several(net, out, y):
    twice = 2 * out  # made from another output
    return out, twice


def as_kept(net, out, y):
    return out, net.layers[0].kept


def as_loss(net, out, y):
    return Output(loss=mse_loss(out, y), logits=out)


def loss_of_logits(model, x, y):
    output = model(x)
    assert type(output) in (Output, Plain)
    return mse_loss(output.logits, y)


def loss_of_dict(model, x, y):
    return mse_loss(model(x)["logits"], y)


def loss_of_first(model, x, y):
    output = model(x)
    assert type(output) in (Pair, list)
    return mse_loss(output[0], y)


def loss_inside(model, x, y):
    return model(x, y).loss


def loss_of_both(model, x, y):
    one, other = model(x)
    return mse_loss(one, y) + mse_loss(other, 3 * y)


def loss_of_one_and_twice(model, x, y):
    out = model(x)
    return mse_loss(out, y) + mse_loss(2 * out, 3 * y)


def loss_in_place(model, x, y):
    out = model(x)
    out.mul_(3).sub_(y)
    return out.square().mean()


def loss_out_of_place(model, x, y):
    return (model(x) * 3 - y).square().mean()


def loss_and_kept(model, x, y):
    return mse_loss(model(x), y) + model.layers[0].kept


def loss_and_returned(model, x, y):
    out, kept = model(x)
    return mse_loss(out, y) + kept


# The same mathematics as the base case's, so the same bits.
OUTPUTS = {
    "ModelOutput": {"change": Wrap(as_model_output), "loss": loss_of_logits},
    "dataclass": {"change": Wrap(as_dataclass), "loss": loss_of_logits},
    "namedtuple": {"change": Wrap(as_namedtuple), "loss": loss_of_first},
    "dict": {"change": Wrap(as_dict), "loss": loss_of_dict},
    "list": {"change": Wrap(as_list), "loss": loss_of_first},
    "loss inside": {"change": Wrap(as_loss), "loss": loss_inside},
}


def evaluate(model, optimizer):
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 5, 6, dtype=torch.float64))
    model.train()


def look(model, optimizer):
    """After which the noise is out of the weights until the backward pass."""
    model.state_dict()
    optimizer.eval()
    optimizer.train()


def shard_inside(case, model, mesh):
    """The module that the loop calls is not FSDP2's."""
    shard(case, model.net, mesh)


def loss_of_two_passes(model, x, y):
    """With an evaluation between two forward passes of a micro-step."""
    loss = mse_loss(model(x), y)
    evaluate(model, None)
    return loss + mse_loss(model(2 * x), y)


def loss_of_two_passes_in_a_row(model, x, y):
    return mse_loss(model(x), y) + mse_loss(model(2 * x), y)


def loss_of_a_second_pass_that_counts_for_nothing(model, x, y):
    return mse_loss(model(x), y) + 0 * model(2 * x).sum()


# With the noise taken out between the passes, and put in again while FSDP2 is in the middle of something.
LOOKED = {
    f"a look, {name}": {**changes, "between": look}
    for name, changes in {
        "compiled model": {"change": compiled},
        "a module around it": {"change": Wrap(as_list), "shard": shard_inside, "loss": loss_of_first},
        "reentrant checkpointing": {"change": reentrant},
        "non-reentrant checkpointing": {"change": non_reentrant},
        "compiled layers": {"change": compiled_layers},
        "grouped modules": {"shard": shard_grouped},
    }.items()
}
# And pairs of the same mathematics.
PAIRS = {
    "an output made from another": (
        {"change": Wrap(as_several), "loss": loss_of_both},
        {"loss": loss_of_one_and_twice},
    ),
    "an output changed in place": ({"loss": loss_in_place}, {"loss": loss_out_of_place}),
    "an auxiliary loss kept on a module": (
        {"change": keeping, "loss": loss_and_kept},
        {"change": kept_and_returned, "loss": loss_and_returned},
    ),
    "an evaluation of a compiled model": ({"change": compiled, "between": evaluate}, {}),
    "an evaluation of a module around it": (
        {"change": Wrap(as_list), "shard": shard_inside, "between": evaluate, "loss": loss_of_first},
        {},
    ),
    "an evaluation between two forward passes": ({"loss": loss_of_two_passes}, {"loss": loss_of_two_passes_in_a_row}),
    "a second forward pass, whose gradient is weighted once": (
        {"loss": loss_of_a_second_pass_that_counts_for_nothing},
        {},
    ),
    "an evaluation between two of a compiled model": (
        {"change": compiled, "loss": loss_of_two_passes},
        {"loss": loss_of_two_passes_in_a_row},
    ),
    "a compiled model in one group": ({"change": compiled, "shard": shard_root_only}, {"shard": shard_root_only}),
}

BASES = [Case("hsdp", windows=2), Case("fsdp2ranks", accumulation=2, windows=2)]
# Replicas add only passes side by side: compilation, looks and pairs are as on one replica, and are tested there.
ON_REPLICAS = [name for name in {**PLAIN, **OUTPUTS} if "compiled" not in name or name == "compiled model"]
ON_REPLICAS += ["a look, a module around it", "an auxiliary loss kept on a module"]
ON_ONE = [name for name in {**PLAIN, **LOOKED, **PAIRS} if name not in ON_REPLICAS or "look" in name]


def plain_names(answers):
    """The parts by the names that they have without the modules above."""
    return [
        tuple(
            [{name.removeprefix("net.").replace(".layer.", "."): part for name, part in one.items()} for one in kind]
            for kind in rank
        )
        for rank in answers
    ]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["parts", "whole"])
@pytest.mark.parametrize("base", BASES, ids=lambda case: case.engine)
def test_none_of_it_changes_a_bit_of_the_gradient(base, whole):
    pairs = {**{name: (changes, {}) for name, changes in {**PLAIN, **OUTPUTS, **LOOKED}.items()}, **PAIRS}
    names = pairs if whole else ON_REPLICAS if base.engine == "hsdp" else ON_ONE
    pairs = {name: pair for name, pair in pairs.items() if name in names}
    distinct = [(dataclasses.replace(base, **changes),) for pair in pairs.values() for changes in pair if changes]
    answers = iter(run_each(base.world, follow, [(base,), *distinct], keep_group=True, timeout=120))
    plain = next(answers)
    for name, (_, other) in pairs.items():
        own = next(answers)
        try:
            assert_same(plain_names(own), plain_names(next(answers) if other else plain))
        except AssertionError as error:
            raise AssertionError(name) from error
