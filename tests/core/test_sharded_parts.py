"""What others show of FSDP2 and HSDP, under tensor parallelism too; and noise on frozen weights in every layout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_each
from sharded import HIDDEN, PARALLEL, Case, Net, assert_same, batch, build, follow, part, shard, snapshot
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy
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


TP = Case("tp", accumulation=2, windows=2)
AROUND = {
    "non-reentrant checkpointing": {"shard": Cut(non_reentrant)},
    "reentrant checkpointing": {"shard": Cut(reentrant)},
    "compiled layers": {"shard": Cut(compiled)},
    "a scaled loss": {"scale": 1024.0},
}


def test_none_of_it_changes_a_bit_of_the_gradient_of_cut_weights():
    plain, *others = run_each(
        4, follow, [(TP,), *[(dataclasses.replace(TP, **case),) for case in AROUND.values()]], keep_group=True
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
    except RuntimeError as error:
        return str(error)
    return ""


def test_torch_itself_neither_clips_nor_scales_gradients_of_several_meshes():
    """As `hf_rwp/README.md` says: what torch refuses there has nothing to do with noise."""
    cases = [Case("tp", clip=0.1), Case("fsdp_tp", clip=0.1), Case("tp", dtype=torch.float32, scale=1024.0)]
    for ranks in run_each(4, without_noise, [(case,) for case in cases], keep_group=True):
        assert all("mixed torch.Tensor and DTensor" in said or "must have the same mesh" in said for said in ranks)
