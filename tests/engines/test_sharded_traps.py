"""What once gave a wrong number, or none, where FSDP2 or tensor parallelism holds the weights: each by its name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run, run_each
from sharded import (
    Case,
    assert_mixed,
    assert_same,
    batch,
    build,
    data_mesh_of,
    follow,
    follow_built,
    mesh_of,
    part,
    record,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_rwp import RWP
from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.sharding import block_of


def evaluate(model, optimizer=None):
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 5, 6, dtype=torch.float64))
    model.train()


def ask_ahead(model):
    model.unshard(async_op=True)


def gather_ahead(model):
    model.unshard()


def move(model):
    """Between two steps, or ahead of all as Accelerate's prepare does."""
    if all(parameter.grad is None for parameter in model.parameters()):
        sharded = next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
        behind = sharded._local_tensor
        model.to("cpu")
        assert sharded._local_tensor is not behind


@pytest.mark.parametrize("engine", ["hsdp", "fsdp"])
def test_first_forward_when_the_hook_of_fsdp2_is_in_front(engine):
    case = Case(engine, accumulation=2, wrapped_first=True)
    assert_mixed(case, run(4, record, case, keep_group=True))


MIXED = {
    "an evaluation leaves the root gathered": [
        Case("hsdp", ahead=evaluate),
        Case("fsdp", ahead=evaluate, accumulation=2),
    ],
    "gathered by the loop": [Case("hsdp", ahead=gather_ahead), Case("fsdp", ahead=gather_ahead, accumulation=2)],
    "asked for ahead": [Case("hsdp", ahead=ask_ahead), Case("fsdp", ahead=ask_ahead, accumulation=2)],
    "moved after it was wrapped": [
        Case("fsdp", ahead=move, accumulation=2),
        Case("tp", ahead=move, accumulation=2),
    ],
    "an evaluation between the passes": [
        Case("hsdp", between=evaluate),
        Case("fsdp", between=evaluate, accumulation=2),
    ],
}


@pytest.mark.parametrize("trap", MIXED)
def test_step_gradient_is_the_mix_when(trap):
    cases = [dataclasses.replace(case, windows=2) for case in MIXED[trap]]
    for case, ranks in zip(cases, run_each(4, record, [(case,) for case in cases], keep_group=True), strict=True):
        assert_mixed(case, ranks)


class Stream:
    """Of the gathers, in the place of an accelerator's. waits: for what they wait."""

    def __init__(self) -> None:
        self.waits: list[str] = []

    def wait_event(self, event) -> None:
        self.waits.append(event if isinstance(event, str) else "another event")

    def record_event(self) -> str:
        return "another event"

    def wait_stream(self, stream) -> None:
        self.waits.append("all that was asked for")


def waits(gamma: float) -> list[str]:
    """For what the gathers of a second forward pass wait, where a loop set an event after the step ahead of it."""
    case = Case("hsdp", gamma=gamma, windows=1)
    model, optimizer, base = build(case)
    follow_built(case, model, optimizer, base)
    model.set_post_optim_event("the step")
    context = model._get_fsdp_state()._comm_ctx
    context.all_gather_copy_in_stream = context.all_gather_stream = stream = Stream()
    model(batch(case, 1)[0])
    return stream.waits[:2]


def test_gathers_wait_for_the_noise_where_a_loop_lets_them_wait_for_its_step():
    """set_post_optim_event: the noise comes after the event."""
    plain, noisy = run_each(4, waits, [(0.0,), (0.2,)], keep_group=True)
    assert plain == [["the step", "the step"]] * 4
    assert noisy == [["all that was asked for"] * 2] * 4


def refused(shape: tuple[int, ...], dim: int) -> str:
    """What a rank says in the first forward pass of a model with a weight that is cut along `dim`."""
    model = nn.Module()
    mesh = init_device_mesh("cpu", (4,))
    model.weight = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]))
    model.forward = lambda: model.weight.sum()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, alpha=1.0)
    try:
        model()
    except NotImplementedError as error:
        return str(error)
    return str(optimizer.role)


def test_a_refusal_is_one_of_all_ranks():
    """Also of those that hold nothing, or no less than a whole dimension: else the others wait for them for ever."""
    shapes = [((4, 3, 2, 3), 2), ((1, 2, 3, 1), 3), ((1, 1, 24), 2)]
    inner, ones, row = run_each(4, refused, shapes, keep_group=True)
    assert all("cut along dim 2" in answer for answer in inner)
    assert all("cut along dim 3" in answer for answer in ones)
    assert row == ["Role(perturbed=True, weight=1.0)"] * 4


def blocks(shape: tuple[int, ...]) -> list[Any]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    block = block_of(distribute_tensor(weight, init_device_mesh("cpu", (4,)), [Shard(0)]))
    target = Target(0, "weight", block.memory, block.memory, block)
    return [block.filters, block.length, block.row, tuple(block.memory.shape), Draws().add_([target], [1.0], [0])[0]]


def test_a_filter_is_that_of_the_whole_weight():
    """Of a convolution (4, 3, 3, 3) a rank has one filter, which by itself looks like 3 of 9."""
    norms = torch.linalg.vector_norm(
        torch.randn((4, 3, 3, 3), generator=torch.Generator().manual_seed(0)).view(4, -1), dim=1
    )
    for rank, (*facts, stds) in enumerate(run(4, blocks, (4, 3, 3, 3), keep_group=True)):
        assert facts == [4, 27, rank, (1, 27)]
        torch.testing.assert_close(stds.view(-1), norms[rank : rank + 1])


class Ones(nn.Module):
    """Two matrices whose rows are all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.copied = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x):
        return self.cut(x) + self.copied(x)


def noise_of_ones(engine: str) -> list[torch.Tensor]:
    """This rank's parts of the noise in two matrices, of which tensor parallelism cuts one."""
    model, case = Ones(), Case(engine)
    mesh = mesh_of(case)
    if "tp" in engine:
        parallelize_module(model, mesh["tp"], {"cut": ColwiseParallel(output_layouts=Replicate())})
    if data_mesh := data_mesh_of(case, mesh):
        fully_shard(model, mesh=data_mesh)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = RWP(base, model, gamma=0.2, alpha=1.0)
    model(torch.ones(1, 6))
    parts = [part(parameter) - 1 for parameter in base.param_groups[0]["params"]]
    optimizer.eval()
    return parts


@pytest.mark.parametrize("engine", ["fsdp", "tp", "fsdp_tp"])
def test_equal_rows_get_different_noise_and_copies_of_a_row_the_same(engine):
    """Each rank by the place of its rows, and not by its number: as in the plain run."""
    plain = Ones()
    optimizer = RWP(torch.optim.SGD(plain.parameters(), lr=0.1), plain, gamma=0.2, alpha=1.0)
    plain(torch.ones(1, 6))
    cut, copied = (parameter.detach() - 1 for parameter in plain.parameters())
    assert len(cut.unique(dim=0)) == len(copied.unique(dim=0)) == 8
    optimizer.eval()
    ranks = run(4, noise_of_ones, engine, keep_group=True)
    order = {"fsdp": [0, 1, 2, 3], "tp": [0, 1, 2, 3], "fsdp_tp": [0, 2, 1, 3]}[engine]  # of the first one's rows
    assert_same(torch.cat([ranks[rank][0] for rank in order]), cut)
    holders = {"fsdp": [[0, 1, 2, 3]], "tp": [[0], [1], [2], [3]], "fsdp_tp": [[0, 2], [1, 3]]}[engine]
    for own in holders:
        assert_same(torch.cat([ranks[rank][1] for rank in own]), copied)


def memory_of(case: Case) -> list[Any]:
    """Where the copies of the weights are, and which list of targets it was, in each window."""
    model, optimizer, base = build(case)
    found = []

    def look(model, optimizer) -> None:
        window, perturbation = optimizer._windows.current, optimizer._passes._perturbation
        found.append((id(window.targets), [clean.data_ptr() for clean in perturbation._clean]))
        evaluate(model)

    follow_built(dataclasses.replace(case, between=look), model, optimizer, base)
    return found


def test_views_made_anew_do_not_cost_new_memory():
    """FSDP2 puts other parameters in place with every gather, and DTensor gives another local tensor each time."""
    cases = [Case("hsdp"), Case("fsdp", 1.0), Case("tp", 1.0)]
    for ranks in run_each(4, memory_of, [(case,) for case in cases], keep_group=True):
        perturbed = ranks[-1]
        assert len(perturbed) == 3
        assert perturbed[0][1]
        assert perturbed == [perturbed[0]] * 3


def write_in_third(case: Case, write: Callable[[nn.Parameter], Any]) -> list[str]:
    """What comes of a write into a shard between the passes of the third step, when weights are no longer compared."""
    said, step = [], 0

    def between(model, optimizer) -> None:
        nonlocal step
        step += 1
        if step == 3:
            write(optimizer.base.param_groups[0]["params"][3])

    try:
        follow(dataclasses.replace(case, between=between))
    except RuntimeError as error:
        said.append(str(error))
    dist.barrier()
    return said


def write_whole(weight):
    with torch.no_grad():
        weight.mul_(2)


def write_part(weight):
    weight._local_tensor.mul_(2)


def test_a_write_into_a_noisy_shard_is_told():
    """DTensor counts changes of the whole, and its local tensor its own."""
    cases = [(Case("fsdp", 1.0), write) for write in (write_whole, write_part)]
    cases.append((Case("tp", 1.0), write_part))  # of the other one autograd tells
    for ranks in run_each(4, write_in_third, cases, keep_group=True):
        told = [any("something wrote into layers.0.up.weight" in said for said in own) for own in ranks]
        assert told == [True] * 4
