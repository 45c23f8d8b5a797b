"""Scalers, precision policies, buffers, unsynchronised steps and the traffic of a step where weights are sharded."""

import dataclasses
import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import night, run, run_each
from sharded import PARALLEL, Case, Net, assert_same, batch, buffers_of, build, follow, part, replica_index
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALED = Case("hsdp", windows=3, dtype=torch.float32)


def scaled(case: Case) -> tuple[list[Any], list[float], bool]:
    """`follow` with a GradScaler, which skips the second step: the gradient of one rank is infinite."""
    model, optimizer, base = build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights, scales, clean = [], [], True
    for index in range(case.windows + 1):
        x, y = batch(case, index - (index > 1))
        before = [part(parameter) for parameter in base.param_groups[0]["params"]]
        overflows = index == 1 and dist.get_rank() == 3
        scaler.scale(mse_loss(model(x), y) * (torch.inf if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if index == 1:
            clean = all(torch.equal(part(p), b) for p, b in zip(base.param_groups[0]["params"], before, strict=True))
        else:
            weights.append({name: part(parameter) for name, parameter in model.named_parameters()})
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return weights, scales, clean


def test_a_step_that_a_scaler_skips_leaves_clean_weights_and_all_replicas_skip_it():
    """The first step is the plain run's; later ones have another noise, that of one window more."""
    plain = run(4, follow, SCALED, keep_group=True)
    ranks = run(4, scaled, SCALED, keep_group=True)
    for (weights, scales, clean), (_, expected) in zip(ranks, plain, strict=True):
        assert clean
        assert scales == [1024.0, 512.0, 512.0, 512.0]
        assert_same(weights[0], expected[0])
    assert_same([weights for weights, *_ in ranks[:2]], [weights for weights, *_ in ranks[2:]])


def shard_in_low_precision(case, model, mesh) -> None:
    """The model's output is in float32, its layers' are not."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32))


POLICIES = {
    "bf16": {"sharding": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}},
    "bf16, reduced in float32, output in float32": {"shard": shard_in_low_precision},
}


def in_low_precision(policy: dict[str, Any]) -> tuple[Any, Any, float]:
    """Gradients of a step, and those that FSDP2 by itself finds at the same noisy shards; the size of the noise."""
    case = Case("hsdp", 0.5, dtype=torch.float32, **policy)
    x, y = batch(case, 0)
    model, optimizer, base = build(case)
    clean = [part(parameter) for parameter in base.param_groups[0]["params"]]
    output = model(x)
    noisy = [part(parameter) for parameter in base.param_groups[0]["params"]]
    mse_loss(output.float(), y).backward()
    own = [part(parameter.grad) for parameter in model.parameters()]
    optimizer.remove()
    plain, other, plain_base = build(case)
    other.remove()
    for parameter, values in zip(plain_base.param_groups[0]["params"], noisy, strict=True):
        parameter.detach().to_local().copy_(values)
    mse_loss(plain(x).float(), y).backward()
    size = sum(float((one - two).square().sum()) for one, two in zip(noisy, clean, strict=True))
    return own, [part(parameter.grad) for parameter in plain.parameters()], size


def test_the_shards_are_perturbed_in_full_precision_and_gathered_in_low():
    for ranks in run_each(4, in_low_precision, [(policy,) for policy in POLICIES.values()], keep_group=True):
        for own, expected, _ in ranks:
            assert_same(own, expected)
        assert [size > 0 for *_, size in ranks] == [False, False, True, True]


def warnings_of(gamma: float, policy: dict[str, Any]) -> list[str]:
    """What the measure of a noise's size says of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("hf_rwp.core.report")
    logger.addHandler(handler)
    case = Case("fsdp", 1.0, gamma=gamma, windows=1, dtype=torch.float32, loss=loss_in_float32, **policy)
    follow(case)
    logger.removeHandler(handler)
    return said


def loss_in_float32(model, x, y):
    return mse_loss(model(x).float(), y)


def test_noise_that_rounding_drowns_where_weights_are_gathered_is_told():
    cases = [(gamma, policy) for gamma in (0.2, 1e-4) for policy in ({}, POLICIES["bf16"])]
    *fine, small = run_each(4, warnings_of, cases, keep_group=True)
    assert not any("rounding of the sum" in said for ranks in fine for own in ranks for said in own)
    assert any("which are bfloat16: below 0.005" in said for own in small for said in own)


class Normed(Net):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return super().forward(self.batch_norm(x))


def with_batch_norm(model):
    torch.manual_seed(0)
    return Normed().double()


def test_buffers_are_updated_by_clean_passes_and_synchronised_over_all_ranks():
    cases = [Case("hsdp", change=with_batch_norm), Case("fsdp", accumulation=2, change=with_batch_norm)]
    hsdp, fsdp = run_each(4, buffers_of, [(case,) for case in cases], keep_group=True)
    for ranks in (hsdp, fsdp):
        means = [before["batch_norm.running_mean"] for before, _ in ranks]
        assert not any(torch.equal(means[0], mean) for mean in means[1:])  # each saw other data
        for _, after in ranks:
            assert_same(after, ranks[0][0])
    x, _ = batch(cases[1], 0, 0)
    assert fsdp[0][0]["batch_norm.num_batches_tracked"] == 1
    torch.testing.assert_close(fsdp[0][0]["batch_norm.running_mean"], 0.1 * x.mean((0, 2)))


def never_averaged(case: Case, how: str) -> str:
    model, optimizer, _ = build(case)
    getattr(model, how)(False)
    x, y = batch(case, 0)
    mse_loss(model(x), y).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["set_requires_all_reduce", "set_requires_gradient_sync"])
def test_a_step_of_gradients_that_were_never_averaged_is_refused(how):
    for answer in run(4, never_averaged, Case("hsdp"), how, keep_group=True):
        assert "never averaged over the replicas" in answer
        assert how in answer


class Traffic(TorchDispatchMode):
    """Counts messages by the operation, the ranks in its group and the bytes that each gives."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            leaves = tree_leaves(args)
            ranks = next(
                dist.ProcessGroup.unbox(leaf).size() for leaf in leaves if isinstance(leaf, torch.ScriptObject)
            )
            size = sum(leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.counts[str(function).split(".")[1], ranks, size] += 1
        return function(*args, **(kwargs or {}))


def traffic(case: Case) -> Counter[tuple[str, int, int]]:
    with Traffic() as seen:
        follow(case)
    return seen.counts


# What a perturbed pass adds: ranks of a group, and filters whose squares are added up there. Shards cut the 11 weights
# of one dimension. Tensor parallelism cuts 2 of these, and the columns of 2 matrices with 6 filters each.
ADDED = {
    "hsdp": ([(2, 11)], []),
    "replicate": ([], []),
    "fsdp": ([(4, 11)], []),
    "tp": ([(4, 2 + 12)], [(4, 12)]),
    "hsdp_tp": ([(2, 2 + 12)], [(2, 12)]),
    "fsdp_tp": ([(2, 11), (2, 2 + 6)], [(2, 6)]),
}


@pytest.mark.parametrize("engine", night(ADDED, ["fsdp_tp"]))
def test_a_step_sends_no_more_than_without_noise_but_one_sum_of_norms(engine):
    """Only in a perturbed replica, along a dimension of the mesh that cuts filters."""
    case = Case(engine, windows=2) if engine in PARALLEL else Case(engine, windows=2, accumulation=2)
    variants = [dataclasses.replace(case, gamma=0.0), case, dataclasses.replace(case, options={"noise_1d": False})]
    plain, *noisy = run_each(4, traffic, [(own,) for own in variants], keep_group=True)
    for ranks, added in zip(noisy, ADDED[engine], strict=True):
        for rank, own in enumerate(ranks):
            perturbed = engine not in PARALLEL or replica_index(case, rank) % 2
            sums = [("allreduce_", size, 8 * filters) for size, filters in added if perturbed for _ in range(2)]
            assert plain[rank]
            assert own == plain[rank] + Counter(sums)
