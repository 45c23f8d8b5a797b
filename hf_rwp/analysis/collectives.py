"""What processes send each other in a step of training: counted by the profiler, and foretold by a formula.

Bytes are those of a whole message: what an all-gather gives each process, what a reduce-scatter or an all-reduce takes
from it. Of n bytes a ring over p processes sends (p - 1) / p * n from each for the first two, twice that for the last.
"""

import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from hf_rwp.core.optimizer import RWP

Shape = Sequence[int]


class Traffic(NamedTuple):
    """calls: collectives of a process in a step. size: bytes of all of them."""

    calls: int
    size: int


METHODS = ("base", "rwp")
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
BLOCKS = 12  # of the network that is measured
# The processes of each layout as copies of the weights and as those that hold one together.
LAYOUTS = {
    "ddp": {1: (1, 1), 2: (2, 1), 4: (4, 1)},
    "fsdp2": {2: (1, 2), 4: (1, 4)},
    "hsdp": {4: (2, 2)},
}


def padded(shape: Shape, shards: int) -> int:
    """Elements of a weight whose first dimension FSDP2 has filled up to a multiple of `shards`."""
    first, *rest = shape or (1,)
    return math.ceil(first / shards) * shards * math.prod(rest)


def foretold(
    units: Sequence[Sequence[Shape]],
    *,
    replicas: int,
    shards: int,
    micro_steps: int = 1,
    perturbed: int = 0,
    gathered_bytes: int = 4,
    reduced_bytes: int = 4,
) -> dict[str, Traffic]:
    """The traffic of a process in a step.

    units: the shapes of the weights that are gathered together, the root's last; under DDP (shards 1) a single bucket.
    micro_steps: gradients that a process computes, and FSDP2 reduces, in a step. perturbed: how many of them are.
    gathered_bytes, reduced_bytes: of an element on its way.

    1. Each unit but the root is gathered ahead of its forward pass and again ahead of its backward pass.
    2. Gradients are scattered once a micro-step; replicas average what a process then has, 1/shards of them.
    3. A perturbed micro-step adds one all-reduce among the processes that hold a replica together: a float64 for each
       weight of at most one dimension, whose norm no process has by itself.
    """
    sizes = [sum(padded(shape, shards) for shape in shapes) for shapes in units]
    total, none = sum(sizes), Traffic(0, 0)
    if shards == 1:
        reduced = Traffic(1, total * reduced_bytes) if replicas > 1 else none
        return {"all_gather": none, "reduce_scatter": none, "all_reduce": reduced}
    gathers = 2 * total - sizes[-1]
    averaged = micro_steps * len(sizes) if replicas > 1 else 0
    norms = sum(len(shape) <= 1 for shapes in units for shape in shapes)
    return {
        "all_gather": Traffic(micro_steps * (2 * len(sizes) - 1), micro_steps * gathers * gathered_bytes),
        "reduce_scatter": Traffic(micro_steps * len(sizes), micro_steps * total * reduced_bytes),
        "all_reduce": Traffic(
            averaged + perturbed,
            (micro_steps * total // shards * reduced_bytes if replicas > 1 else 0) + perturbed * norms * 8,
        ),
    }


def sent(traffic: Mapping[str, Traffic], *, replicas: int, shards: int) -> float:
    """Bytes that a process sends in a step where rings carry them, the few of norms among those between replicas."""
    within, between = (shards - 1) / shards, 2 * (replicas - 1) / replicas
    return within * (traffic["all_gather"].size + traffic["reduce_scatter"].size) + between * traffic["all_reduce"].size


def perturbed_bytes(units: Sequence[Sequence[Shape]], shards: int, weight_bytes: int = 4) -> int:
    """Bytes of its own memory that a process reads and writes for the noise of one gradient, and to take it away.

    Each element is read for the norms, read and written for the copy, for the noise and for restoring.
    """
    return 7 * weight_bytes * sum(padded(shape, shards) for shapes in units for shape in shapes) // shards


def counted(step: Callable[[], object]) -> dict[str, Traffic]:
    """The traffic of `step()`, as the profiler saw it on this process of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "trace.json"))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            step()
        seen.export_chrome_trace(file)
        events = json.loads(Path(file).read_text())["traceEvents"]
    gathers = _messages(events, "c10d::_allgather_base_", 0)
    scatters = _messages(events, "c10d::_reduce_scatter_base_", 1)
    # A list of tensors has no dtype in a trace. Gloo's own event has; it reduces and scatters by an all-reduce, too.
    reduces = Counter(_messages(events, "gloo:all_reduce", 0)) - Counter(scatters)
    return {
        kind: Traffic(len(found), sum(found))
        for kind, found in zip(KINDS, (gathers, scatters, list(reduces.elements())), strict=True)
    }


def _messages(events: Iterable[Mapping[str, Any]], name: str, which: int) -> list[int]:
    """The bytes of each event's tensor number `which`."""
    bytes_of = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}
    found = [event["args"] for event in events if event.get("name") == name]
    return [math.prod(one["Input Dims"][which]) * bytes_of[one["Input type"][which]] for one in found]


class Network(nn.Module):
    """A transformer; of twelve blocks it has 5.3 million weights: those of a ViT-Tiny."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 192))
        options = {"dim_feedforward": 768, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(192, 3, **options) for _ in range(blocks))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


def units_of(model: Network) -> list[list[Shape]]:
    """The shapes of what is gathered together: each block, then the rest."""
    blocks = [list(block.parameters()) for block in model.blocks]
    inside = {id(weight) for block in blocks for weight in block}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    return [[tuple(weight.shape) for weight in weights] for weights in (*blocks, rest)]


def measure_traffic(layout: str, method: str, blocks: int = BLOCKS) -> dict[str, Traffic]:
    """The traffic of one step on this process of the group. method: base, or rwp, which takes halves on one replica."""
    world = dist.get_world_size()
    replicas, shards = LAYOUTS[layout][world]
    torch.manual_seed(0)
    module = Network(blocks)
    base = torch.optim.SGD(module.parameters(), lr=0.1)
    micro_steps = 2 if method == "rwp" and replicas == 1 else 1
    optimizer: Any = RWP(base, module, accumulation_steps=micro_steps) if method == "rwp" else base
    model: nn.Module = module
    if layout != "ddp":
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
        for part in (*module.blocks, module):
            fully_shard(part, mesh=mesh if replicas > 1 else mesh["shard"])
        base.param_groups[0]["params"] = list(module.parameters())
    elif world > 1:
        model = DistributedDataParallel(module, bucket_cap_mb=64)

    def step() -> None:
        for _ in range(micro_steps):
            model(torch.randn(2, 4, 192)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # buckets and buffers are made in the first one
    return counted(step)


def formula(layout: str, method: str, world: int, rank: int, blocks: int = BLOCKS) -> dict[str, Traffic]:
    """What `measure_traffic` is to find there."""
    replicas, shards = LAYOUTS[layout][world]
    alone = replicas == 1
    perturbed = method == "rwp" and (alone or rank // shards % 2 == 1)
    micro_steps = 2 if method == "rwp" and alone else 1
    units = units_of(Network(blocks))
    return foretold(units, replicas=replicas, shards=shards, micro_steps=micro_steps, perturbed=int(perturbed))


def traffic_rows(blocks: int = BLOCKS) -> list[dict[str, Any]]:
    """What this process of the group sends in a step, of every layout for so many, beside what the formula says."""
    world, rank = dist.get_world_size(), dist.get_rank()
    layouts = [layout for layout, worlds in LAYOUTS.items() if world in worlds]
    rows = []
    for layout, method in itertools.product(layouts, METHODS):
        said = formula(layout, method, world, rank, blocks)
        for kind, traffic in measure_traffic(layout, method, blocks).items():
            place = {"layout": layout, "processes": world, "rank": rank, "method": method, "kind": kind}
            rows.append({**place, **traffic._asdict(), "formula": list(said[kind])})
    return rows
