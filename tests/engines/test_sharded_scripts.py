"""What scripts do around a sharded model: other meshes, evaluations ahead of time, modules around it, groups given."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from distributed import run, run_each
from sharded import (
    HIDDEN,
    Case,
    Net,
    Task,
    assert_mixed,
    assert_same,
    batch,
    build,
    mesh_of,
    part,
    record,
    shard,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP


def shard_root_over_all(case: Case, model: nn.Module, mesh: Any) -> None:
    """The layers under HSDP, and the root over all processes, as fully_shard does where it is given no mesh."""
    layers = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.layers:
        fully_shard(layer, mesh=layers)
    fully_shard(model)


def test_step_gradient_is_the_mix_where_a_dimension_copies_some_weights_and_not_others():
    """No process has a copy of the root of its own: clean and perturbed ones would gather each other's noise."""
    case = Case("fsdp", accumulation=2, windows=2, shard=shard_root_over_all)
    assert_mixed(case, run(4, record, case, keep_group=True))


def with_group(engine: str, name: str) -> tuple[str, Any]:
    """What a first pass says where it is given a group of processes, and what it then knows of the replicas."""
    case = Case(engine)
    mesh = mesh_of(case)
    group = mesh[name].get_group() if name else dist.group.WORLD
    model, optimizer, _ = build(dataclasses.replace(case, options={"process_group": group}))
    try:
        model(batch(case, 0)[0])
    except ValueError as error:
        return str(error), None
    replicas = optimizer.replicas
    return "", (replicas.index, replicas.count, len(replicas.peers))


def test_a_process_group_of_those_that_hold_weights_together_is_refused():
    cases = [("fsdp", ""), ("hsdp", ""), ("hsdp", "shard"), ("fsdp_tp", "tp"), ("hsdp", "replicate")]
    *refused, found = run_each(4, with_group, cases, keep_group=True)
    for ranks in refused:
        assert all("hold weights together" in said and "leave process_group out" in said for said, _ in ranks)
    assert found == [("", (index, 2, 1)) for index in (0, 0, 1, 1)]


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 5, 6, dtype=torch.float64))
    model.train()


def evaluated_first(early: bool) -> tuple[Any, ...]:
    """The replicas as seen after an evaluation, and what RWP says of an optimizer. early: built ahead of it."""
    case = Case("hsdp", sharding={"reshard_after_forward": False})
    torch.manual_seed(0)
    model = Net().double()
    shard(case, model, mesh_of(case))
    if early:
        base = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluate(model)
    if not early:
        base = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        optimizer = RWP(base, model, gamma=0.2)
    except ValueError as error:
        return (str(error),)
    evaluate(model)
    before, report = optimizer.replicas, optimizer.report()
    x, y = batch(case, 0)
    mse_loss(model(x), y).backward()
    perturbed = optimizer.role.perturbed
    optimizer.step()
    after = optimizer.replicas
    seen = [(one.index, one.count, len(one.peers)) for one in (before, after)]
    return (*seen, report["replicas"], perturbed)


def test_an_evaluation_ahead_of_the_wrapper_hides_neither_weights_nor_replicas():
    early, late = run_each(4, evaluated_first, [(True,), (False,)], keep_group=True)
    assert early == [((index, 2, 1), (index, 2, 1), 2, index == 1) for index in (0, 0, 1, 1)]
    assert all("weights that FSDP2 had gathered" in said for (said,) in late)


def around() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of weights around the wrapped model, which FSDP2 gathers together with some of its: their gradient, its own part
    of what it must be, and whether this process was perturbed."""
    case = Case("hsdp")
    torch.manual_seed(0)
    task = Task(Net().double())
    proxies = task.proxies.detach().clone().requires_grad_()
    fully_shard(task.net.layers[0], mesh=mesh_of(case))
    fully_shard(task, mesh=mesh_of(case))
    optimizer = RWP(torch.optim.SGD(task.net.parameters(), lr=0.1), task.net, gamma=0.2, alpha=0.3)
    features: list[torch.Tensor] = []
    task.net.register_forward_hook(lambda *args: features.append(args[-1].detach()))
    x, y = batch(case, 0)
    mse_loss(task(x), y).backward()
    mse_loss(features[0] @ proxies, y).backward()
    return whole(task.proxies.grad), proxies.grad, optimizer.role.perturbed


def test_weights_around_the_model_get_an_ordinary_gradient():
    ranks = run(4, around, keep_group=True)
    assert [perturbed for *_, perturbed in ranks] == [False, False, True, True]
    expected = torch.stack([own for _, own, _ in ranks]).mean(0)
    for gradient, *_ in ranks:
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def with_ddp(wrapped_first: bool) -> str:
    """What RWP says where torch's DistributedDataParallel averages the parts that tensor parallelism cuts."""
    mesh = mesh_of(Case("fsdp_tp"))
    model = Net(HIDDEN).double()
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    try:
        if wrapped_first:
            optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model)
            averaged = DistributedDataParallel(model, device_mesh=mesh["shard"])
        else:
            averaged = DistributedDataParallel(model, device_mesh=mesh["shard"])
            optimizer = RWP(torch.optim.SGD(averaged.parameters(), lr=0.1), averaged)
        averaged(batch(Case("fsdp_tp"), 0)[0])
    except NotImplementedError as error:
        return str(error)
    return str(optimizer.role)


def test_ddp_over_tensor_parallelism_is_refused_by_name():
    """It makes the parts plain weights: their noise would be that of whole ones, and the same on all peers."""
    for ranks in run_each(4, with_ddp, [(True,), (False,)], keep_group=True):
        assert all("DistributedDataParallel over tensor parallelism" in said for said in ranks)


def redundant(alone: bool) -> Any:
    """What comes of DTensors that all ranks hold whole, and a batch that they all have. alone: each a replica."""
    mesh = mesh_of(Case("replicated"))
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    distribute_module(model, mesh)
    options = {"process_group": dist.new_subgroups(1)[0], "accumulation_steps": 2} if alone else {}
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.2, **options)
    try:
        for step in range(2):
            x = torch.ones(2, 6, dtype=torch.float64) + step
            model(distribute_tensor(x, mesh, [Replicate()])).square().mean().backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return optimizer.report()["slots"], part(model.weight)


def test_whole_dtensors_whose_gradients_nobody_adds_up_are_refused():
    refused, alone = run_each(4, redundant, [(False,), (True,)], keep_group=True)
    assert all("drift apart" in said and "Shard(0)" in said for said in refused)
    for slots, weight in alone:
        assert slots == {"clean": 1, "perturbed": 1}
        assert_same(weight, alone[0][1])
