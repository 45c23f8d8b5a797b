"""What a step of Random Weight Perturbation (RWP) costs, beside plain training and SAM.

# On whatever this machine has: two ranks on a CPU, one or several GPUs
```bash
python recipes/benchmark.py
```

# All of it in two minutes on two cores; and one model at other sizes
```bash
python recipes/benchmark.py --quick
python recipes/benchmark.py --models resnet50 --batch_size 32 --rounds 20
```

# As on a GPU in earnest
```bash
python recipes/benchmark.py --batch_size 128 --mixed_precision bf16 --channels_last
```

# For the record
```bash
python recipes/benchmark.py --output recipes/results/benchmark/cpu.jsonl
```

It starts its own ranks, which share the CPU's cores; a process alone has all of them, but for noise and restore by
themselves, which have one thread. Within one process, or one group of ranks, every round takes each kind of step once,
in an order drawn anew; a step lasts until the slowest rank is done. Ratios are taken within rounds, and the table shows
their median and quartiles. One JSON line with all times goes to the end of `--output`.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import imagenet_rwp
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from compare import make_stem_small
from datasets import Image
from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from tqdm import tqdm

from hf_rwp import RWP
from hf_rwp.core import draws
from hf_rwp.core.noise import Source
from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import append_record, command_of, environment, without_places

GAMMA = 0.01  # the paper's
PASSES = 5  # over the weights' bytes: read and write them, write and read the snapshot, write them back; a copy has 2
LOOP: dict[str, Any] = {"model": "test_resnet", "img_size": 32, "batch_size": 64}  # where loading is most of the work
HOST_WEIGHTS = 161  # as many as a ResNet-50 has; of 2 elements each, so that the time is Python's and the launches'
# Rounds that are not counted: memory is allocated, DDP's buckets are built, kernels are tried, writes are looked for.
WARM_UP = 2
IMPORT = """
import time, torch
start = time.perf_counter()
import hf_rwp
print(time.perf_counter() - start)
from hf_rwp import RWP
print(time.perf_counter() - start)
"""


@dataclass
class Arguments:
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "timm models, or cifar_resnet18, a ResNet-18 for images of 32 pixels. If not set cifar_resnet18 "
            "resnet18 resnet50 vit_small_patch16_224, with `--quick` cifar_resnet18 alone."
        },
    )
    quick: bool = field(default=False, metadata={"help": "Whether to be done in two minutes on two cores."})
    rounds: int | None = field(
        default=None,
        metadata={"help": "How often each variant is timed, at least 2; on a CPU 9, on a GPU 50, with `--quick` 3."},
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Images per rank, even; on a GPU 128, on a CPU 16, or 64 of 32 pixels."}
    )
    img_size: int | None = field(default=None, metadata={"help": "Height and width in pixels; the model's own."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Images to compare loops on, as imagenet_rwp.py takes them; the embedded digits if not set."},
    )
    workers: int = field(default=0, metadata={"help": "Processes that load these images; 0 is the main one."})
    threads: int | None = field(
        default=None,
        metadata={
            "help": "Of each rank; a process alone has those of all. If not set the ranks share the CPU's cores."
        },
    )
    mixed_precision: str = field(default="no", metadata={"help": "Autocast's dtype.", "choices": ("no", "bf16")})
    channels_last: bool = field(default=False, metadata={"help": "Whether to use the channels_last memory format."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, images and the order within rounds."})
    output: str = field(
        default="outputs/benchmark.jsonl", metadata={"help": "The file that the record is appended to."}
    )

    def __post_init__(self) -> None:
        cuda = torch.cuda.is_available()
        everything = ["cifar_resnet18", "resnet18", "resnet50", "vit_small_patch16_224"]
        self.models = self.models or (everything[:1] if self.quick else everything)
        self.rounds = (3 if self.quick else 50 if cuda else 9) if self.rounds is None else self.rounds
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.ranks) if self.threads is None else self.threads
        unknown = [name for name in self.models if name != "cifar_resnet18" and not timm.is_model(name)]
        for name, valid, valid_range in (
            ("models", not unknown, f"timm models, or cifar_resnet18; not {', '.join(unknown)}"),
            ("rounds", self.rounds >= 2, "at least 2"),
            ("batch_size", self.batch_size is None or self.batch_size % 2 == 0 < self.batch_size, "even and above 0"),
            ("threads", self.threads >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it has to be {valid_range}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("several processes were started: start one, with python; it starts its own ranks")

    @property
    def ranks(self) -> int:
        return max(2, torch.cuda.device_count())

    @property
    def shared(self) -> bool:
        """Whether the ranks have one GPU between them, so that steps side by side cannot be timed."""
        return torch.cuda.device_count() == 1


def main(args: Arguments) -> None:
    busy = os.getloadavg()[0]  # before there is any load of our own
    facts = environment(Accelerator(mixed_precision=args.mixed_precision))
    facts["hardware"] |= {"replicas": args.ranks, "threads": args.threads, "threads_alone": args.threads * args.ranks}
    print(f"{facts['hardware']['device']}, {args.ranks} ranks of {args.threads} threads, load average {busy:.2f}")
    groups = start(run_rank, args.ranks, args)
    (alones,) = start(run_rank, 1, args)
    (loops,) = start(run_loops, 1, args)
    (host,) = start(run_host, 1, args)
    imports = [import_seconds() for _ in range(min(args.rounds, 5))]
    defaults = {item.name: item.default for item in fields(Arguments)}
    given = without_places(asdict(args))
    record = {
        "command": command_of("python recipes/benchmark.py", given, defaults),
        "arguments": given,
        "load_average": busy,
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
        "shared_gpu": args.shared,
        **facts,
        "loop_images_per_second": loops,
        "host_milliseconds": host,
        "import_seconds": dict(zip(("hf_rwp", "RWP"), zip(*imports, strict=True), strict=True)),
        "measurements": [combined(*found) for found in zip(zip(*groups, strict=True), alones, strict=True)],
    }
    record["rows"] = rows(record)
    append_record(Path(args.output), record)
    print(table(record["rows"]))


# Measuring.


def start(function: Callable[[int, int, Arguments, str], None], ranks: int, args: Arguments) -> list[Any]:
    """Run `function` in as many processes; what each of them found."""
    multiprocessing.set_forkserver_preload(["timm.data", "datasets", "hf_rwp.runs.parsing"])  # imported once for all
    with tempfile.TemporaryDirectory() as folder:
        start_processes(function, (ranks, args, folder), nprocs=ranks, start_method="forkserver")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]


def run_rank(rank: int, ranks: int, args: Arguments, folder: str) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes
    torch.set_num_threads(args.threads * args.ranks // ranks)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    imagenet_rwp.use_fast_kernels(deterministic=False)
    if ranks > 1:
        backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"  # nccl wants a GPU for each rank
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    found = [measure(name, rank, ranks, device, args) for name in args.models]
    Path(folder, str(rank)).write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def measure(name: str, rank: int, ranks: int, device: torch.device, args: Arguments) -> dict:
    """What one model costs on this rank."""
    torch.manual_seed(args.seed)
    module, img_size = create_model(name, args.img_size)
    batch_size = args.batch_size or images_per_rank(name, args.quick)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    module.to(device, memory_format=memory_format)
    torch.manual_seed(args.seed + rank)
    images = torch.randn(batch_size, 3, img_size, img_size).to(device, memory_format=memory_format)
    labels = torch.randint(module.num_classes, (batch_size,)).to(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")

    kinds = ["base", "rwp"] + (["sam"] if ranks > 1 or args.shared else [])
    steps = {kind: step_of(kind, copy.deepcopy(module), images, labels, ranks, autocast) for kind in kinds}
    variants = {kind: partial(timed, step, device) for kind, step in steps.items()}
    if ranks == 1:
        variants |= noise_variants(module, device)
    # Ranks that share a GPU are there for what they exchange and hold, not for the time that takes.
    rounds = 2 if ranks > 1 and args.shared else args.rounds
    seconds: dict[str, list[float]] = {kind: [] for kind in variants}
    order = random.Random(args.seed)  # the same on all ranks
    progress = tqdm(range(WARM_UP + rounds), desc=f"{name}, ranks: {ranks}", disable=rank > 0)
    for index in progress:
        for kind in order.sample(list(variants), len(variants)):
            progress.set_postfix_str(kind)
            if ranks > 1:
                dist.barrier()
            taken = variants[kind]()
            if index >= WARM_UP:
                seconds[kind].append(taken)

    weights = list(module.parameters())
    found: dict[str, Any] = {
        "model": name,
        "img_size": img_size,
        "batch_size": batch_size,
        "seconds": seconds,
        "weights_bytes": sum(weight.nbytes for weight in weights),
        "buffers_bytes": sum(buffer.nbytes for buffer in module.buffers()),
        "scratch_bytes": Source(weights[0]).scratch.nbytes,
    }
    if ranks > 1:
        found["collectives"] = {kind: collectives(step) for kind, step in steps.items()}
        found["extra_bytes"] = peak_bytes(noise_and_restore(module, device, accumulation_steps=1), device)
        found["peak_bytes"] = {
            kind: peak_bytes(step_of(kind, copy.deepcopy(module), images, labels, ranks, autocast), device)
            for kind in kinds
        }
    return found


def combined(group: tuple[dict, ...], alone: dict) -> dict:
    """One model's figures, of all ranks and of one alone. A step of the group lasts until its slowest rank is done."""
    parallel = {
        kind: [max(times) for times in zip(*(rank["seconds"][kind] for rank in group), strict=True)]
        for kind in group[0]["seconds"]
    }
    return {
        **{name: value for name, value in alone.items() if name != "seconds"},
        "alone_seconds": alone["seconds"],
        "parallel_seconds": parallel,
        "collectives": group[0]["collectives"],
        "extra_bytes": [rank["extra_bytes"] for rank in group],
        "peak_bytes": {kind: [rank["peak_bytes"][kind] for rank in group] for kind in group[0]["peak_bytes"]},
    }


def images_per_rank(name: str, quick: bool) -> int:
    if torch.cuda.is_available():
        return 128
    return (32 if quick else 64) if name == "cifar_resnet18" else 16


def create_model(name: str, img_size: int | None) -> tuple[nn.Module, int]:
    """The model and the size of its images."""
    if name == "cifar_resnet18":
        model = timm.create_model("resnet18", num_classes=10)
        make_stem_small(model)
        return model, img_size or 32
    model = timm.create_model(name)
    return model, img_size or model.pretrained_cfg["input_size"][-1]


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `function` takes, the GPU's work included."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def step_of(
    kind: str, module: nn.Module, images: Tensor, labels: Tensor, ranks: int, autocast: Callable[[], Any]
) -> Callable[[], None]:
    """One optimizer step of the kind, as imagenet_rwp.py takes it: RWP on one rank halves its batch."""
    base = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    parts = 2 if kind == "rwp" and ranks == 1 else 1
    optimizer: Any = RWP(base, module, gamma=GAMMA, accumulation_steps=parts) if kind == "rwp" else base
    sam = None
    if kind == "sam":
        sam = SAM(base.param_groups, lambda *_, **__: base, rho=0.05)
    on = [images.device] if images.is_cuda else None
    model = DistributedDataParallel(module, device_ids=on) if ranks > 1 else module

    def add_gradients(sync: bool = True) -> None:
        with contextlib.nullcontext() if sync or ranks == 1 else model.no_sync():
            for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                with autocast():
                    loss = cross_entropy(model(part), targets)
                (loss / parts).backward()

    def step() -> None:
        add_gradients(sync=sam is None)
        if sam:
            sam.first_step(zero_grad=True)
            disable_running_stats(model)
            add_gradients()
            enable_running_stats(model)
            sam.second_step()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


class Idle(nn.Module):
    """The weights and buffers of a model without its work: of a micro-step, noise and restore are all that is left."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.output = nn.Parameter(torch.ones((), device=next(module.parameters()).device))

    def forward(self) -> Tensor:
        return self.output * 1


def noise_and_restore(
    module: nn.Module, device: torch.device, accumulation_steps: int, alpha: float = 0.5
) -> Callable[[], float]:
    """RWP's own part of a step: seconds that the window's last micro-step takes, which on one rank is perturbed."""
    idle = Idle(copy.deepcopy(module))
    base = torch.optim.SGD(idle.parameters(), lr=0.0)
    optimizer = RWP(base, idle, gamma=GAMMA, alpha=alpha, accumulation_steps=accumulation_steps)

    def window() -> float:
        seconds = [timed(lambda: idle().backward(), device) for _ in range(accumulation_steps)]
        optimizer.step()
        optimizer.zero_grad()
        return seconds[-1]

    return window


def run_host(_: int, __: int, args: Arguments, folder: str) -> None:
    """Milliseconds of one thread to begin and end a perturbed step of many small weights, a GPU's work aside."""
    weights = nn.ParameterList(torch.ones(2) for _ in range(HOST_WEIGHTS))
    paths = {"torch": contextlib.nullcontext(), "kernels": kernels_without_launches()}
    found: dict[str, list[float]] = {}
    for name, path in paths.items():
        with contextlib.suppress(ImportError), path:  # a torch without Triton has no kernels
            step = noise_and_restore(weights, torch.device("cpu"), accumulation_steps=1, alpha=1.0)
            found[name] = [1000 * on_one_thread(step) for _ in range(WARM_UP + 10 * args.rounds)][WARM_UP:]
    Path(folder, "0").write_text(json.dumps(found))


class Launches:
    """In place of a Triton kernel: takes a launch's arguments, and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def kernels_without_launches() -> Iterator[None]:
    """Let weights on a CPU go the way of the kernels, whose launches do nothing: no noise comes."""
    from hf_rwp.core import kernels

    with (
        patch.object(draws, "_fuses", lambda *_: True),
        patch.multiple(kernels, supports=lambda _: True, _norms_kernel=Launches(), _noise_kernel=Launches()),
    ):
        yield


def noise_variants(module: nn.Module, device: torch.device) -> dict[str, Callable[[], float]]:
    """Noise and restore alone, on one thread: RWP's, the reference code's, and a copy of as many bytes."""
    parameters = list(copy.deepcopy(module).parameters())
    source = torch.ones(sum(parameter.numel() for parameter in parameters), device=device)
    target = torch.empty_like(source)

    def reference() -> None:
        noises = reference_noise(parameters)
        reference_restore(parameters, noises)

    variants = {
        "noise": noise_and_restore(module, device, accumulation_steps=2),
        "reference": partial(timed, reference, device),
        "copy": partial(timed, lambda: target.copy_(source), device),
    }
    return {kind: partial(on_one_thread, variant) for kind, variant in variants.items()}


def on_one_thread(function: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def reference_noise(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Add noise as the reference code does (github.com/nblt/RWP): one parameter, one tensor of std at a time."""
    noises = []
    for weight in parameters:
        if weight.ndim > 1:
            norms = weight.reshape(len(weight), -1).norm(dim=1, keepdim=True)
            std = norms.repeat(1, weight[0].numel()).view(weight.shape)
            noise = torch.normal(0, GAMMA * std)
        else:
            noise = torch.empty_like(weight).normal_(0, GAMMA * (weight.norm().item() + 1e-16))
        noises.append(noise)
        weight.add_(noise)
    return noises


@torch.no_grad()
def reference_restore(parameters: list[nn.Parameter], noises: list[Tensor]) -> None:
    for weight, noise in zip(parameters, noises, strict=True):
        weight.sub_(noise)


def collectives(step: Callable[[], None]) -> dict[str, int]:
    """How often a step calls each collective operation, DDP's own included."""
    with profile() as profiler:
        step()
    names = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
    return {name.removeprefix("c10d::").rstrip("_"): names.count(name) for name in sorted(set(names))}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `function` has beyond what there was, in its first two calls: as torch's allocator says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def run_loops(_: int, __: int, args: Arguments, folder: str) -> None:
    """Images per second of imagenet_rwp.py without RWP, and of a loop as in timm's train.py, on the same images."""
    torch.set_num_threads(args.threads * args.ranks)
    data = [f"--data_dir={args.data_dir}"] if args.data_dir else []
    flags = ["--method=base", f"--img_size={LOOP['img_size']}", f"--batch_size={LOOP['batch_size']}", "--lr=0.01"]
    flags += ["--epochs=2", "--hflip=0.5", "--color_jitter=0.4", "--train_interpolation=bilinear", "--report_to=none"]
    flags += ["--scale", "0.08", "1", f"--workers={args.workers}", f"--output_dir={folder}/run"]
    found: dict[str, list[float]] = {"imagenet_rwp": [], "timm": []}
    for _ in tqdm(range(min(args.rounds, 5)), desc="loops"):
        AcceleratorState._reset_state(True)
        with contextlib.redirect_stdout(None):
            imagenet_rwp.main(parse_arguments(imagenet_rwp.Arguments, [*flags, *data, "--overwrite_output_dir=true"]))
        results = json.loads(Path(folder, "run", "results.json").read_text())
        found["imagenet_rwp"].append(results["history"][-1]["images_per_second"])
        found["timm"].append(timm_loop(load_images(data_dir=args.data_dir)["train"], args.workers))
    Path(folder, "0").write_text(json.dumps(found))


class Rows(torch.utils.data.Dataset):
    """Images and labels as timm's reader of datasets takes them: one by one."""

    transform: Callable[[Any], Any]  # timm's create_loader sets it

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.split[index]
        return self.transform(row["image"].convert("RGB")), row["label"]


def timm_loop(split: Any, workers: int) -> float:
    """Images per second of the second epoch, as timm's train.py trains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(LOOP["model"], num_classes=split.features["label"].num_classes).to(device)
    config = resolve_data_config({"img_size": LOOP["img_size"]}, model=model)
    loader = create_loader(
        Rows(split.cast_column("image", Image())),
        input_size=config["input_size"],
        batch_size=LOOP["batch_size"],
        is_training=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=0.4,
        interpolation="bilinear",
        mean=config["mean"],
        std=config["std"],
        num_workers=workers,
        device=device,
        persistent_workers=workers > 0,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=5e-4, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, step_on_epochs=False, updates_per_epoch=len(loader))
    losses, updates = AverageMeter(), 0
    for _ in range(2):
        seen, start = 0, time.perf_counter()
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            losses.update(loss.item(), len(images))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen, updates = seen + len(images), updates + 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)
        seconds = time.perf_counter() - start
    return seen / seconds


def import_seconds() -> list[float]:
    """How long `import hf_rwp`, and also taking RWP from it, last after `import torch`."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True, text=True)
    return list(map(float, done.stdout.split()))


# Reporting.


def rows(record: dict) -> list[dict]:
    """The table of design.md: each row's figure in every round, as median and quartiles, beside its limit."""
    gpu, found = record["device_type"] == "cuda", []

    def add(model: str, what: str, values: list[float], limit: float | None, at_least: bool = False) -> None:
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        found.append(
            {
                "model": model,
                "what": what,
                "median": median,
                "quartiles": [first, third],
                "limit": limit,
                "at_least": at_least,
                "holds": None if limit is None else median >= limit if at_least else median <= limit,
                "clear": None if limit is None else not first <= limit <= third or first == third,
            }
        )

    for measured in record["measurements"]:
        name, group, alone = measured["model"], measured["parallel_seconds"], measured["alone_seconds"]
        on_row = partial(add, name)
        if record["shared_gpu"]:
            parallel = [base + noise for base, noise in zip(alone["base"], alone["noise"], strict=True)]
            base, sam, how = alone["base"], alone["sam"], "1 + (noise + restore) / step"
        else:
            base, parallel, sam, how = group["base"], group["rwp"], group["sam"], "parallel RWP step / DDP step"
        as_in_design = gpu or (name, measured["img_size"], measured["batch_size"]) == ("resnet50", 224, 16)
        on_row(how, ratios(parallel, base), (1.01 if gpu else 1.05) if as_in_design else None)
        # Of few pixels the draw is a tenth of a step.
        limit = 1.05 if gpu else 1.10 if measured["img_size"] >= 224 else 1.20
        on_row("sequential RWP step / plain step", ratios(alone["rwp"], alone["base"]), limit)
        on_row("SAM step / parallel RWP step", ratios(sam, parallel), 1.9, at_least=True)
        floor = [PASSES / 2 * copied for copied in alone["copy"]]
        on_row("noise + restore / memory floor", ratios(alone["noise"], floor), 3.0 if gpu else None)
        reference = ratios(alone["noise"], alone["reference"])
        on_row("noise + restore / the reference's, one thread", reference, 0.1 if gpu else 0.8)
        copied = sum(measured[f"{what}_bytes"] for what in ("weights", "buffers", "scratch"))
        for role, first in (("clean", 0), ("perturbed", 1)):
            most = max(measured["extra_bytes"][first::2]) / copied
            # A filter's std takes one number for all its weights, which is less than a percent.
            on_row(f"extra memory / (weights + scratch), {role}", [most] * 2, 0.01 + first)
        peak = {kind: max(ranks) for kind, ranks in measured["peak_bytes"].items()}  # beyond weights and DDP's buckets
        for kind, title in (("rwp", "parallel RWP"), ("sam", "SAM")):
            on_row(f"peak memory of a rank, {title} / DDP", [peak[kind] / peak["base"]] * 2, None)
        counts = {kind: sum(calls.values()) for kind, calls in measured["collectives"].items()}
        on_row("collectives in a step, RWP - base", [counts["rwp"] - counts["base"]] * 2, 0.0)
    loops = record["loop_images_per_second"]
    speeds = ratios(loops["imagenet_rwp"], loops["timm"])
    add("", "images/s, imagenet_rwp base / timm's loop", speeds, 1.0, at_least=True)
    for path, limit in (("torch", 3.0), ("kernels", 1.5)):
        if path in record["host_milliseconds"]:  # no kernels without Triton
            add("", f"host ms of begin + restore, {path}", record["host_milliseconds"][path], limit)
    add("", "seconds of import hf_rwp after import torch", record["import_seconds"]["hf_rwp"], 0.2)
    add("", "seconds of from hf_rwp import RWP, all in all", record["import_seconds"]["RWP"], None)
    return found


def ratios(dividends: list[float], divisors: list[float]) -> list[float]:
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]


def table(rows: list[dict]) -> str:
    lines = [f"{'':24} {'':46} median (quartiles)      limit"]
    for row in rows:
        first, third = row["quartiles"]
        limit = "" if row["limit"] is None else f"{'>=' if row['at_least'] else '<='} {row['limit']:g}"
        verdict = {None: "", True: "holds", False: "missed"}[row["holds"]]
        doubt = ", within the spread" if row["clear"] is False else ""
        figures = f"{row['median']:.3f} ({first:.3f} to {third:.3f})"
        lines.append(f"{row['model']:24} {row['what']:46} {figures:23} {limit:8} {verdict}{doubt}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_arguments(Arguments, description=__doc__.splitlines()[0]))
