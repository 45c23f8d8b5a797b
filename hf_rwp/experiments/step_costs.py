"""What a step of a model costs beside plain training's and SAM's: the pieces of recipes/benchmark.py for one model."""

import copy
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_rwp.analysis.noise_cost import noise_and_restore, noise_variants
from hf_rwp.analysis.pieces import round_done
from hf_rwp.analysis.timing import WARM_UP, collectives, peak_bytes, peak_of_process, timed
from hf_rwp.core.noise import Source
from hf_rwp.core.optimizer import RWP
from hf_rwp.images.small_models import make_stem_small
from hf_rwp.runs.determinism import use_fast_kernels
from hf_rwp.runs.steps import accumulate, plain_step, sam_step, wrap_sam

Record = dict[str, Any]
KINDS = ("base", "rwp", "sam")


def set_up(rank: int, ranks: int, args: Any, folder: str) -> torch.device:
    """A process's device, threads and group."""
    logging.getLogger("hf_rwp").setLevel(logging.ERROR)  # some weights are perturbed without a model around them
    torch.set_num_threads(args.threads * args.ranks // ranks)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    use_fast_kernels()
    if ranks > 1:
        backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"  # nccl wants a GPU for each rank
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    return device


def leave(rank: int, ranks: int, folder: str, found: Any) -> None:
    Path(folder, str(rank)).write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


@dataclass
class Work:
    """What a step of a model is on this rank."""

    name: str
    rank: int
    ranks: int
    device: torch.device
    args: Any

    def __post_init__(self) -> None:
        args = self.args
        torch.manual_seed(args.seed)
        self.module: Any
        self.module, self.img_size = create_model(self.name, args.img_size)
        self.batch_size = args.batch_size or images_per_rank(self.name, args.quick)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.module.to(self.device, memory_format=memory_format)
        torch.manual_seed(args.seed + self.rank)
        images = torch.randn(self.batch_size, 3, self.img_size, self.img_size)
        self.images = images.to(self.device, memory_format=memory_format)
        self.labels = torch.randint(self.module.num_classes, (self.batch_size,)).to(self.device)
        bf16 = args.mixed_precision == "bf16"
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)

    def step(self, kind: str) -> Callable[[], None]:
        """Of a copy of the model."""
        return step_of(kind, copy.deepcopy(self.module), self.images, self.labels, self.ranks, self.autocast)


def run_steps(name: str, rank: int, ranks: int, args: Any, folder: str) -> None:
    """What the steps of one model take on this rank, and exchange."""
    device = set_up(rank, ranks, args, folder)
    work = Work(name, rank, ranks, device, args)
    kinds = ["base", "rwp"] + (["sam"] if ranks > 1 or args.shared else [])
    steps = {kind: work.step(kind) for kind in kinds}
    variants: dict[str, Callable[[], float]] = {kind: partial(timed, step, device) for kind, step in steps.items()}
    if ranks == 1:
        variants |= noise_variants(work.module, device)
    rounds = 2 if ranks > 1 and args.shared else args.rounds
    seconds: dict[str, list[float]] = {kind: [] for kind in variants}
    order = random.Random(args.seed)  # the same on all ranks
    for index in range(WARM_UP + rounds):
        for kind in order.sample(list(variants), len(variants)):
            if ranks > 1:
                dist.barrier()
            taken = variants[kind]()
            if index >= WARM_UP:
                seconds[kind].append(taken)
        if rank == 0:
            round_done(folder)

    weights = list(work.module.parameters())
    found: dict[str, Any] = {
        "model": name,
        "img_size": work.img_size,
        "batch_size": work.batch_size,
        "seconds": seconds,
        "weights_bytes": sum(weight.nbytes for weight in weights),
        "buffers_bytes": sum(buffer.nbytes for buffer in work.module.buffers()),
        "scratch_bytes": Source(weights[0]).scratch.nbytes,
    }
    if ranks > 1:
        found["collectives"] = {kind: collectives(step) for kind, step in steps.items()}
        found["extra_bytes"] = peak_bytes(noise_and_restore(work.module, device, accumulation_steps=1), device)
    leave(rank, ranks, folder, found)


def run_memory(name: str, kind: str, rank: int, ranks: int, args: Any, folder: str) -> None:
    """The most memory that two steps of a kind take on this rank, in a process that does nothing else."""
    device = set_up(rank, ranks, args, folder)
    work = Work(name, rank, ranks, device, args)
    leave(rank, ranks, folder, peak_of_process(partial(work.step, kind), device, tries=1 if args.quick else 4))


def combined(group: list[Record] | None, alone: list[Record] | None, memory: dict[str, list[int]]) -> Record:
    """One model's figures, of the ranks and of a single process. A step of ranks lasts until the slowest is done."""
    found = {name: value for name, value in (*(group or alone or [{}]),)[0].items() if name != "seconds"}
    if alone:
        found["alone_seconds"] = alone[0]["seconds"]
    if group:
        found["parallel_seconds"] = {
            kind: [max(times) for times in zip(*(rank["seconds"][kind] for rank in group), strict=True)]
            for kind in group[0]["seconds"]
        }
        found["extra_bytes"] = [rank["extra_bytes"] for rank in group]
    return found | {"peak_bytes": memory}


def images_per_rank(name: str, quick: bool) -> int:
    if torch.cuda.is_available():
        return 128
    return (16 if quick else 64) if name == "cifar_resnet18" else 16


def create_model(name: str, img_size: int | None) -> tuple[nn.Module, int]:
    """The model and the size of its images."""
    if name == "cifar_resnet18":
        model: Any = timm.create_model("resnet18", num_classes=10)
        make_stem_small(model)
        return model, img_size or 32
    model = timm.create_model(name)
    return model, img_size or model.pretrained_cfg["input_size"][-1]


def step_of(
    kind: str, module: nn.Module, images: Tensor, labels: Tensor, ranks: int, autocast: Callable[[], Any]
) -> Callable[[], None]:
    """One optimizer step of the kind, as imagenet_rwp.py takes it: RWP on one rank halves its batch."""
    base = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    parts = 2 if kind == "rwp" and ranks == 1 else 1
    optimizer = RWP(base, module, accumulation_steps=parts) if kind == "rwp" else base
    on = [images.device] if images.is_cuda else None
    model = DistributedDataParallel(module, device_ids=on) if ranks > 1 else module

    def loss_of(part: Tensor, targets: Tensor) -> Tensor:
        with autocast():
            return cross_entropy(model(part), targets)

    chunks = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    add_gradients = partial(accumulate, model, chunks, loss_of)
    if kind == "sam":
        return partial(sam_step, wrap_sam(base, rho=0.05), model, add_gradients)
    return partial(plain_step, optimizer, add_gradients)
