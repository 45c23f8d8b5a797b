"""What others show of FSDP2 and HSDP, under tensor parallelism too; and noise on frozen weights in every layout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_each
from sharded import (
    HIDDEN,
    PARALLEL,
    Case,
    Net,
    Task,
    assert_mixed,
    assert_same,
    batch,
    buffers_of,
    build,
    follow,
    mesh_of,
    part,
    record,
    shard,
    snapshot,
    whole,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tensor parallelism ahead of `then`, which takes the model."""

    then: Callable[[Any], None]

    def __call__(self, case, model, mesh):
        shard(case, model, mesh)
        self.then(model)


def non_reentrant(model):
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def reentrant(model):
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)


def compiled(model):
    for layer in model.layers:
        layer.compile(backend="aot_eager")


TP = Case("tp2ranks", accumulation=2, windows=2)
AROUND = {
    "non-reentrant checkpointing": {"shard": Cut(non_reentrant)},
    "reentrant checkpointing": {"shard": Cut(reentrant)},
    "compiled layers": {"shard": Cut(compiled)},
    "a scaled loss": {"scale": 1024.0},
}


def test_none_of_it_changes_a_bit_of_the_gradient_of_cut_weights():
    plain, *others = run_each(
        2, follow, [(TP,), *[(dataclasses.replace(TP, **case),) for case in AROUND.values()]], keep_group=True
    )
    assert all(gradients for gradients, _ in plain)
    for name, own in zip(AROUND, others, strict=True):
        try:
            assert_same(own, plain)
        except AssertionError as error:
            raise AssertionError(name) from error


# The ranks that have data of their own, by replica of the weights.
SHARES = {"hsdp": [[0, 1], [2, 3]], "fsdp": [[0, 1, 2, 3]], "tp": [[0]]}


def freeze(model):
    model.pos.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    return model


def course(case: Case, model, optimizer, batches_of) -> dict[str, torch.Tensor]:
    for index in range(case.windows * case.accumulation):
        x, y = batches_of(index)
        (mse_loss(model(x), y) / case.accumulation).backward()
        if (index + 1) % case.accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(optimizer.model)


def whole_and_sharded(case: Case) -> tuple[Any, Any]:
    """The weights after a run with whole ones, by DDP over a rank of every replica, and after the sharded run."""
    model, optimizer, _ = build(case)
    freeze(model)  # parallelize_module of torch 2.8 has weights learn that it cuts
    sharded = course(case, model, optimizer, lambda index: batch(case, index))
    shares = SHARES[case.engine]
    size, rank = 4 // len(shares), dist.get_rank()
    groups = [[other * size + place for other in range(len(shares))] for place in range(size)]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    torch.manual_seed(0)
    net = freeze(Net(HIDDEN if "tp" in case.engine else 7).to(case.dtype))
    steps = case.accumulation if case.accumulation > 1 else None
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rwp = RWP(
        base, net, gamma=case.gamma, alpha=case.alpha, accumulation_steps=steps, process_group=group, **case.options
    )
    wrapped = DistributedDataParallel(net, process_group=group) if len(shares) > 1 else net

    def batches_of(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [batch(case, index, peer) for peer in shares[rank // size]]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    return course(case, wrapped, rwp, batches_of), sharded


@pytest.mark.parametrize("engine", SHARES)
def test_noise_on_frozen_weights_is_that_of_whole_ones(engine):
    cases = [
        Case(engine, accumulation=1 if engine in PARALLEL else 2, change=freeze, options={"frozen": frozen})
        for frozen in (False, True)
    ]
    without, with_noise = run_each(4, whole_and_sharded, [(case,) for case in cases], keep_group=True)
    for plain, sharded in (*without, *with_noise):
        torch.testing.assert_close(sharded, plain, rtol=1e-10, atol=1e-12)
    apart = [(without[0][0][name] - with_noise[0][0][name]).abs().max() for name in ("head.weight", "norm.weight")]
    assert min(apart) > 1e-6  # the frozen weights' noise is in the others' gradients
    assert torch.equal(without[0][1]["pos"], with_noise[0][1]["pos"])


OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
BOTH = Case("fsdp_tp", accumulation=2, windows=2)


def test_shards_of_cut_weights_in_host_memory_change_no_bit():
    plain, offloaded = run_each(4, follow, [(BOTH,), (dataclasses.replace(BOTH, sharding=OFFLOAD),)], keep_group=True)
    assert_same(offloaded, plain)


def scaled(case: Case) -> list[tuple[float, bool]]:
    """After each step the scale, and whether the weights are as they were; the first overflows on all ranks."""
    model, optimizer, base = build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    for step in range(3):
        before = [part(parameter) for parameter in base.param_groups[0]["params"]]
        for index in range(2):
            x, y = batch(case, 2 * step + index)
            scaler.scale(mse_loss(model(x), y) * (torch.inf if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [part(parameter) for parameter in base.param_groups[0]["params"]]
        seen.append((scaler.get_scale(), all(map(torch.equal, before, after))))
    return seen


def test_a_step_that_a_scaler_skips_leaves_cut_weights_clean():
    case = dataclasses.replace(BOTH, dtype=torch.float32)
    for seen in run_each(4, scaled, [(case,)], keep_group=True)[0]:
        assert seen == [(512.0, True), (512.0, False), (512.0, False)]


def test_peers_have_the_same_bits_of_weights_that_are_not_cut_in_bfloat16():
    case = Case("tp", accumulation=2, windows=10, dtype=torch.bfloat16)
    (ranks,) = run_each(4, follow, [(case,)], keep_group=True)
    whole = [name for name in ranks[0][1][-1] if not {"up", "down"} & set(name.split("."))]
    assert {"pos", "head.weight", "layers.0.norm.bias"} <= set(whole)
    for _, weights in ranks:
        for own, first in zip(weights, ranks[0][1], strict=True):
            assert_same([own[name] for name in whole], [first[name] for name in whole])
    assert not torch.equal(ranks[0][1][0]["pos"], ranks[0][1][-1]["pos"])


def without_noise(case: Case) -> str:
    """What training without any noise says of `case`."""
    model, _, base = build(dataclasses.replace(case, gamma=0.0))
    x, y = batch(case, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=case.scale)
    scaler.scale(mse_loss(model(x), y)).backward()
    try:
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        scaler.step(base)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_torch_itself_neither_clips_nor_scales_gradients_of_several_meshes():
    """As `hf_rwp/README.md` says: what torch refuses there has nothing to do with noise."""
    cases = [Case("tp", clip=0.1), Case("fsdp_tp", clip=0.1), Case("tp", dtype=torch.float32, scale=1024.0)]
    for ranks in run_each(4, without_noise, [(case,) for case in cases], keep_group=True):
        assert all("mixed torch.Tensor and DTensor" in said or "must have the same mesh" in said for said in ranks)


class Normed(Net):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__(HIDDEN)
        self.batch_norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.batch_norm(x))


def with_batch_norm(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Normed().double()


@pytest.mark.parametrize("engine", ["tp", "fsdp_tp", "hsdp_tp"])
def test_buffers_beside_cut_weights_are_of_clean_passes_and_synchronised_over_all_ranks(engine):
    parallel = engine in PARALLEL
    case = Case(engine, accumulation=1 if parallel else 2, change=with_batch_norm)
    (ranks,) = run_each(4, buffers_of, [(case,)], keep_group=True)
    for own, (before, after) in enumerate(ranks):
        x, _ = batch(case, 0, own)
        torch.testing.assert_close(before["batch_norm.running_mean"], 0.1 * x.mean((0, 2)))
        assert before["batch_norm.num_batches_tracked"] == 1
        assert_same(after, ranks[0][0])
    assert torch.equal(ranks[0][0]["batch_norm.running_mean"], ranks[3][0]["batch_norm.running_mean"]) == (
        engine == "tp"
    )


def shard_layers_apart(case: Case, model: nn.Module, mesh: Any) -> None:
    """One layer is cut by all processes, the other by each half of them."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "tp"))
    parallelize_module(model.layers[0], mesh, plan)
    parallelize_module(model.layers[1], halves["tp"], plan)


def test_step_gradient_is_the_mix_where_layers_are_cut_along_other_meshes():
    """A half holds no copy of the weights of its own, so that there is one replica."""
    case = Case("tp", accumulation=2, windows=2, shard=shard_layers_apart)
    (ranks,) = run_each(4, record, [(case,)], keep_group=True)
    assert_mixed(case, ranks)


def evaluated_first(engine: str, when: str) -> Any:
    """What a run comes to. when: an evaluation is ahead of the optimizer, of the wrapper, or nowhere."""
    parallel = engine in PARALLEL
    case = Case(engine, accumulation=1 if parallel else 2, sharding={"reshard_after_forward": False})
    torch.manual_seed(0)
    model = Net(HIDDEN).double()
    shard(case, model, mesh_of(case))

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 5, 6, dtype=torch.float64))
        model.train()

    if when == "optimizer":
        evaluate()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    if when == "wrapper":
        evaluate()
    steps = None if parallel else 2
    try:
        optimizer = RWP(base, model, gamma=case.gamma, alpha=case.alpha, accumulation_steps=steps)
    except ValueError as error:
        return str(error)
    evaluate()
    replicas = optimizer.replicas
    for index in range(case.accumulation):
        x, y = batch(case, index)
        mse_loss(model(x), y).backward()
    optimizer.step()
    return (replicas.index, replicas.count, len(replicas.peers)), {
        name: part(parameter) for name, parameter in model.named_parameters()
    }


# The replicas that a rank finds, and whether an optimizer of gathered weights is refused.
FOUND = {"tp": ([0] * 4, 1, 1, False), "fsdp_tp": ([0] * 4, 1, 2, True), "hsdp_tp": ([0, 0, 1, 1], 2, 1, True)}


@pytest.mark.parametrize("engine", FOUND)
def test_an_evaluation_ahead_of_the_wrapper_changes_nothing_of_cut_weights(engine):
    indices, count, peers, gathers = FOUND[engine]
    cases = [(engine, when) for when in ("", "wrapper", "optimizer")]
    plain, wrapper, optimizer = run_each(4, evaluated_first, cases, keep_group=True)
    assert [found for found, _ in plain] == [(index, count, peers) for index in indices]
    for own, twin in zip(wrapper, plain, strict=True):
        assert own[0] == twin[0]
        assert_same(own[1], twin[1])
    if gathers:
        assert all("weights that FSDP2 had gathered" in said for said in optimizer)
    else:
        assert_same([weights for _, weights in optimizer], [weights for _, weights in plain])


def around(engine: str) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Of weights around the wrapped model: their gradient, this process's part of what it must be, and its roles."""
    case = Case(engine, accumulation=1 if engine in PARALLEL else 2)
    torch.manual_seed(0)
    task = Task(Net(HIDDEN).double())
    proxies = task.proxies.detach().clone().requires_grad_()
    mesh = mesh_of(case)
    shard(case, task.net, mesh)
    if engine != "tp":
        fully_shard(task, mesh=mesh[tuple(name for name in mesh.mesh_dim_names if name != "tp")])
    steps = case.accumulation if case.accumulation > 1 else None
    base = torch.optim.SGD(task.net.parameters(), lr=0.1)
    optimizer = RWP(base, task.net, gamma=0.2, alpha=0.3, accumulation_steps=steps)
    features: list[torch.Tensor] = []
    task.net.register_forward_hook(lambda *args: features.append(args[-1].detach()))
    roles = []
    for index in range(case.accumulation):
        x, y = batch(case, index)
        mse_loss(task(x), y).backward()
        roles.append(optimizer.role.perturbed)
        mse_loss(features[-1] @ proxies, y).backward()
    return whole(task.proxies.grad), proxies.grad, roles


@pytest.mark.parametrize("engine", FOUND)
def test_weights_around_a_model_of_cut_weights_get_an_ordinary_gradient(engine):
    (ranks,) = run_each(4, around, [(engine,)], keep_group=True)
    turns = [[index == 1] for index in FOUND[engine][0]] if engine in PARALLEL else [[False, True]] * 4
    assert [roles for *_, roles in ranks] == turns
    expected = torch.stack([own for _, own, _ in ranks]).mean(0)
    for gradient, *_ in ranks:
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
