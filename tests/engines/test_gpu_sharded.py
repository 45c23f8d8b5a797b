"""Sharded weights on GPUs, over NCCL: FSDP2 gathers and scatters on streams of its own, beside the noise on ours.

The oracle is the same training with whole weights, in float64: noise is the same in every layout. A stream that did not
wait for another would find weights without their noise, or with it: before each pass and each step the current stream
is kept busy, so that it would find them early. On a CPU, where the same code runs over gloo, there are no streams.
Of two processes each has a GPU, or the case is skipped; one needs one GPU.
"""

import os
import statistics

import pytest
import torch
import torch.distributed as dist
from distributed import rank, run, stop
from sharded import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP

STEPS, IMAGES = 3, 4
WIDTH = {"cpu": 12, "cuda": 2048}  # on a GPU as wide as a gather takes a while
GPU = pytest.mark.gpu
TWO_GPUS = [GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
LAYOUTS = [
    ("cpu", 1, "fsdp"),
    ("cpu", 2, "fsdp"),
    ("cpu", 2, "hsdp"),
    pytest.param("cuda", 1, "fsdp", marks=GPU),
    pytest.param("cuda", 2, "fsdp", marks=TWO_GPUS),
    pytest.param("cuda", 2, "hsdp", marks=TWO_GPUS),
]


@pytest.fixture(autouse=True)
def new_processes():
    """DTensor caches plans with the names of process groups, which a test before this one may have ended."""
    stop(0)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1, 3, width))  # the root's own
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def join_nccl(device: str, folder: str) -> None:
    """A group over NCCL in place of that over gloo, one GPU for each process. folder: of this call's own."""
    if device == "cuda":
        world = dist.get_world_size()
        dist.destroy_process_group()
        torch.cuda.set_device(rank())
        os.makedirs(folder, exist_ok=True)
        place = {"init_method": f"file://{folder}/nccl", "rank": rank(), "world_size": world}
        dist.init_process_group("cpu:gloo,cuda:nccl", **place)


def keep_busy(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms, of the current stream


def sharded(net: Net, device: str, layout: str, prefetch: bool = False, **options) -> Net:
    world = dist.get_world_size()
    shape = (world, 1) if layout == "hsdp" else (1, world)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if layout == "hsdp" else mesh["shard"]
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    if prefetch:
        for layer, following in zip(net.layers, net.layers[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])
    return net


def batch(index: int, process: int, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * process + index)
    shape = (IMAGES, 3, WIDTH[device])
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))


def build(device: str, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(WIDTH[device]).to(device, dtype)


def trained(device: str, folder: str, layout: str, processes: int, prefetch: bool = False, offload: bool = False):
    """The weights after some steps, whole, on the CPU, and what an evaluation after each one found.

    layout: fsdp or hsdp; ddp; or plain, one process with the images of all `processes`.
    """
    join_nccl(device, folder)
    net = build(device)
    if layout in ("fsdp", "hsdp"):
        sharded(
            net, device, layout, prefetch, **({"offload_policy": CPUOffloadPolicy(device == "cuda")} if offload else {})
        )
    model = DistributedDataParallel(net) if layout == "ddp" else net
    halves = 1 if layout in ("hsdp", "ddp") else 2
    base = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    optimizer = RWP(base, net, gamma=0.05, alpha=0.3, accumulation_steps=halves)
    own = range(processes) if layout == "plain" else [rank()]
    losses = []
    for step in range(STEPS):
        for half in range(halves):
            x, y = map(torch.cat, zip(*(batch(step * halves + half, one, device) for one in own), strict=True))
            keep_busy(device)
            loss = mse_loss(model(x), y) / halves
            keep_busy(device)
            loss.backward()
        keep_busy(device)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.eval()
        with torch.no_grad():
            losses.append(mse_loss(net(batch(0, 0, device)[0]), batch(0, 0, device)[1]).item())
        optimizer.train()
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    return {name: whole(weight.to(device)).cpu() for name, weight in weights.items()}, losses


def assert_like(found, oracle) -> None:
    weights, losses = oracle
    for own, own_losses in found:
        torch.testing.assert_close(own, weights, rtol=1e-9, atol=1e-10)
        assert own_losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("device", "world", "layout"), LAYOUTS)
def test_streams_of_fsdp2_see_the_noise_and_no_more_than_it(device, world, layout, prefetch, tmp_path):
    found = run(world, trained, device, str(tmp_path / "sharded"), layout, world, prefetch, timeout=120)
    processes, like = (world, "ddp") if layout == "hsdp" else (1, "plain")
    oracle, *_ = run(processes, trained, device, str(tmp_path / "whole"), like, world, timeout=120)
    assert_like(found, oracle)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_shards_in_host_memory_take_the_noise_there(device, tmp_path):
    found = run(1, trained, device, str(tmp_path), "fsdp", 1, False, True, timeout=120)
    (plain,) = run(1, trained_on_a_cpu, device, timeout=120)
    assert_like(found, plain)


def trained_on_a_cpu(width_of: str):
    WIDTH["cpu"] = WIDTH[width_of]
    return trained("cpu", "", "plain", 1)


def scaled(device: str, folder: str) -> list[dict]:
    """Of each step whether the scaler skipped it, its scale, and whether all weights are as they were."""
    join_nccl(device, folder)
    half = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    net = sharded(build(device, torch.float32), device, "fsdp", mp_policy=half)
    base = torch.optim.SGD(net.parameters(), lr=0.5)
    optimizer = RWP(base, net, gamma=0.05, accumulation_steps=2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
    seen = []
    for step in range(40):
        before, windows = [whole(parameter) for parameter in net.parameters()], optimizer.report()["windows"]
        for part in range(2):
            x, y = batch(2 * step + part, rank(), device, torch.float16)
            scaler.scale(mse_loss(net(x).float(), y.float()) / 2).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [whole(parameter) for parameter in net.parameters()]
        seen.append(
            {
                "skipped": scaler.get_scale() < scale,
                "alike": all(map(torch.equal, before, after)),
                "finite": all(bool(torch.isfinite(weight).all()) for weight in after),
                "windows": optimizer.report()["windows"] - windows,
            }
        )
        if not seen[-1]["skipped"]:
            break
    return seen


@pytest.mark.parametrize(
    ("device", "world"), [("cpu", 2), pytest.param("cuda", 1, marks=GPU), pytest.param("cuda", 2, marks=TWO_GPUS)]
)
def test_a_step_that_fp16s_scaler_skips_leaves_the_shards_clean(device, world, tmp_path):
    for seen in run(world, scaled, device, str(tmp_path), timeout=120):
        *skipped, last = seen
        assert len(skipped) > 3
        assert all(step == {"skipped": True, "alike": True, "finite": True, "windows": 1} for step in skipped)
        assert last == {"skipped": False, "alike": False, "finite": True, "windows": 1}


def costs(folder: str) -> dict[str, float]:
    """Milliseconds of a step of two gradients at transformer's sizes, plainly and with RWP: medians of 20."""
    join_nccl("cuda", folder)
    found = {}
    for method in ("base", "rwp"):
        net = sharded(build("cuda", torch.float32), "cuda", "fsdp")
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        if method == "rwp":
            optimizer = RWP(optimizer, net, accumulation_steps=2)
        x, y = (tensor.float().repeat(64, 1, 1) for tensor in batch(0, rank(), "cuda"))
        times = []
        for _ in range(25):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(2):
                mse_loss(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found[method] = statistics.median(times[5:])
    return found


@pytest.mark.parametrize("world", [pytest.param(1, marks=GPU), pytest.param(2, marks=TWO_GPUS)])
def test_noise_on_shards_costs_a_fraction_of_a_step(world, tmp_path):
    for process, found in enumerate(run(world, costs, str(tmp_path), timeout=300)):
        print(f"{torch.cuda.get_device_name()}, process {process} of {world}: milliseconds of a step: {found}")
        assert found["rwp"] < 1.5 * found["base"]
