"""What a step of Random Weight Perturbation (RWP) costs, beside plain training and SAM.

# On whatever this machine has: two ranks on a CPU, one GPU or more
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

# For the record; and what processes send each other in a step, under DDP, FSDP2 and HSDP: counted, and foretold
```bash
python recipes/benchmark.py --output recipes/results/benchmark/cpu.jsonl
python recipes/benchmark.py --collectives --output recipes/results/collectives/cpu.jsonl
```

It starts its own ranks, which share the CPU's cores; a single process has all of them, but for noise and restore by
themselves, which have one thread. Within one process, or one group of ranks, every round takes each kind of step once,
in an order drawn anew; a step lasts until the slowest rank is done. Ratios are taken within rounds, and the table shows
their median and quartiles. One JSON line with all times goes to the end of `--output`.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("benchmark", __name__)
from hf_rwp.core.checks import check_all
from hf_rwp.runs import parsing


@dataclass
class Arguments:
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "timm models, or cifar_resnet18, a ResNet-18 for images of 32 pixels. If not set cifar_resnet18 "
            "resnet18 resnet50 vit_small_patch16_224, with `--quick` only cifar_resnet18."
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
            "help": "Of each rank; a single process has those of all. If not set the ranks share the CPU's cores."
        },
    )
    mixed_precision: str = field(default="no", metadata={"help": "Autocast's dtype.", "choices": ("no", "bf16")})
    channels_last: bool = field(default=False, metadata={"help": "Whether to use the channels_last memory format."})
    collectives: bool = field(
        default=False, metadata={"help": "Whether to count what 1, 2 and 4 processes on CPUs send each other instead."}
    )
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
        check_all(
            self,
            ("models", not unknown, f"timm models, or cifar_resnet18; not {', '.join(unknown)}"),
            ("rounds", self.rounds >= 2, "at least 2"),
            ("batch_size", self.batch_size is None or self.batch_size % 2 == 0 < self.batch_size, "even and above 0"),
            ("threads", self.threads >= 1, "at least 1"),
        )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("more than one process was started: start one, with python; it starts its own ranks")

    @property
    def ranks(self) -> int:
        return max(2, torch.cuda.device_count())

    @property
    def shared(self) -> bool:
        """Whether the ranks have one GPU between them, so that steps side by side cannot be timed."""
        return torch.cuda.device_count() == 1


parsing.flags_first("benchmark", __name__, Arguments, __doc__)  # ahead of the slow imports
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Image
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hf_rwp import RWP
from hf_rwp.analysis.collectives import LAYOUTS, Network, traffic_rows, units_of
from hf_rwp.analysis.costs import rows, table
from hf_rwp.analysis.frozen_cost import run_frozen
from hf_rwp.analysis.noise_cost import kernels_without_launches, noise_and_restore, noise_variants
from hf_rwp.analysis.timing import collectives, on_one_thread, peak_bytes, timed
from hf_rwp.core.noise import Source
from hf_rwp.images.data import load_images
from hf_rwp.images.small_models import make_stem_small
from hf_rwp.runs.determinism import use_fast_kernels
from hf_rwp.runs.records import append_record, command_of, environment, scrub_paths
from hf_rwp.runs.steps import accumulate, plain_step, sam_step, wrap_sam

RECIPE = Path(__file__).with_name("imagenet_rwp.py")
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


def main(args: Arguments) -> None:
    if args.collectives:
        record_collectives(args)
        return
    busy = os.getloadavg()[0]  # before there is any load of our own
    facts = environment(Accelerator(mixed_precision=args.mixed_precision))
    facts["hardware"] |= {"replicas": args.ranks, "threads": args.threads, "threads_alone": args.threads * args.ranks}
    print(f"{facts['hardware']['device']}, {args.ranks} ranks of {args.threads} threads, load average {busy:.2f}")
    groups = start(run_rank, args.ranks, args)
    (alones,) = start(run_rank, 1, args)
    imports = [import_seconds() for _ in range(min(args.rounds, 5))]
    defaults = {item.name: item.default for item in fields(Arguments)}
    given = scrub_paths(asdict(args))
    record = {
        "command": command_of("python recipes/benchmark.py", given, defaults),
        "arguments": given,
        "load_average": busy,
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
        "shared_gpu": args.shared,
        **facts,
        "loop_images_per_second": start(run_loops, 1, args)[0],
        "host_milliseconds": start(run_host, 1, args)[0],
        "frozen": start(run_frozen, 1, args)[0],
        "import_seconds": dict(zip(("hf_rwp", "RWP"), zip(*imports, strict=True), strict=True)),
        "measurements": [combined(*found) for found in zip(zip(*groups, strict=True), alones, strict=True)],
    }
    record["rows"] = rows(record)
    append_record(Path(args.output), record)
    print(table(record["rows"]))


def record_collectives(args: Arguments) -> None:
    """A record of the traffic of every layout, on every process, beside what the formula says of it."""
    worlds = sorted({world for worlds in LAYOUTS.values() for world in worlds})
    record = {
        "command": "python recipes/benchmark.py --collectives",
        **environment(Accelerator(cpu=True)),
        "weights": sum(math.prod(shape) for shapes in units_of(Network()) for shape in shapes),
        "rows": [row for world in worlds for rows in start(run_collectives, world, args) for row in rows],
    }
    record["hardware"] |= {"replicas": max(worlds), "threads": 1}
    append_record(Path(args.output), record)
    for row in record["rows"]:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")


def run_collectives(rank: int, ranks: int, args: Arguments, folder: str) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    Path(folder, str(rank)).write_text(json.dumps(traffic_rows()))
    dist.destroy_process_group()


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
    use_fast_kernels()
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
    """One model's figures, of the ranks and of a single process. A step of ranks lasts until the slowest is done."""
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


def run_loops(_: int, __: int, args: Arguments, folder: str) -> None:
    """Images per second of imagenet_rwp.py without RWP, and of a loop as in timm's train.py, on the same images."""
    threads = args.threads * args.ranks
    torch.set_num_threads(threads)
    flags = ["--method=base", f"--img_size={LOOP['img_size']}", f"--batch_size={LOOP['batch_size']}", "--lr=0.01"]
    flags += ["--epochs=2", "--hflip=0.5", "--color_jitter=0.4", "--train_interpolation=bilinear", "--report_to=none"]
    flags += ["--scale", "0.08", "1", f"--workers={args.workers}", "--overwrite_output_dir=true"]
    flags += [f"--data_dir={args.data_dir}"] if args.data_dir else []
    found: dict[str, list[float]] = {"imagenet_rwp": [], "timm": []}
    for _ in tqdm(range(min(args.rounds, 5)), desc="loops"):
        found["imagenet_rwp"].append(recipe_loop(Path(folder, "run"), flags, threads))
        found["timm"].append(timm_loop(load_images(data_dir=args.data_dir)["train"], args.workers))
    Path(folder, "0").write_text(json.dumps(found))


def recipe_loop(output_dir: Path, flags: list[str], threads: int) -> float:
    """Images per second of the last epoch of imagenet_rwp.py, which is a process of its own."""
    command = [sys.executable, str(RECIPE), *flags, f"--output_dir={output_dir}"]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{RECIPE.name} failed, and its loop could not be timed:\n{done.stderr}")
    results = json.loads((output_dir / "results.json").read_text())
    return results["history"][-1]["images_per_second"]


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


if __name__ == "__main__":
    parsing.start(main, Arguments, __doc__)
