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
their median and quartiles. One JSON line with all times goes to the end of `--output`. What is measured is kept beside
it until then, in FILE.unfinished: the same command goes on there after a cut.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
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
        metadata={"help": "How often each variant is timed, at least 2; on a CPU 9, on a GPU 50, with `--quick` 2."},
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
        everything = ["cifar_resnet18", "resnet18", "resnet50", "vit_small_patch16_224"]
        self.models = self.models or (everything[:1] if self.quick else everything)
        check_all(
            self,
            ("rounds", self.rounds is None or self.rounds >= 2, "at least 2"),
            ("batch_size", self.batch_size is None or self.batch_size % 2 == 0 < self.batch_size, "even and above 0"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
        )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("more than one process was started: start one, with python; it starts its own ranks")

    def look_up(self) -> None:
        """Settle what this machine decides. Raises ValueError for a model that timm does not have."""
        unknown = [name for name in self.models if name != "cifar_resnet18" and not timm.is_model(name)]
        check_all(self, ("models", not unknown, f"timm models, or cifar_resnet18; not {', '.join(unknown)}"))
        rounds = 2 if self.quick else 50 if torch.cuda.is_available() else 9
        self.rounds = rounds if self.rounds is None else self.rounds
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.ranks) if self.threads is None else self.threads

    @property
    def unfinished(self) -> Path:
        """Where what was measured is kept until all of it is."""
        return Path(f"{self.output}.unfinished")

    def kept(self) -> str | None:
        """What a run that is stopped has kept, and how to go on; None for nothing."""
        there = self.unfinished.exists()
        return f"{self.unfinished} has what was measured, and the same command goes on there" if there else None

    @property
    def ranks(self) -> int:
        return max(2, torch.cuda.device_count())

    @property
    def loops(self) -> int:
        """How often what takes a process of its own is timed: each of two training loops, imports."""
        return min(self.rounds // 2, 5)

    @property
    def shared(self) -> bool:
        """Whether the ranks have one GPU between them, so that steps side by side cannot be timed."""
        return torch.cuda.device_count() == 1


parsing.flags_first("benchmark", __name__, Arguments, __doc__)  # ahead of the slow imports
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from hf_rwp.analysis.collectives import LAYOUTS, Network, traffic_rows, units_of
from hf_rwp.analysis.costs import rows, table
from hf_rwp.analysis.noise_cost import kernels_without_launches, noise_and_restore
from hf_rwp.analysis.pieces import Piece, kept_pieces, measure_pieces, round_done, start, total_rounds
from hf_rwp.analysis.timing import WARM_UP, on_one_thread
from hf_rwp.experiments.loops import LOOP, timm_loop
from hf_rwp.experiments.lora_costs import MODELS, run_lora
from hf_rwp.experiments.step_costs import KINDS, combined, run_memory, run_steps
from hf_rwp.images.data import load_images
from hf_rwp.runs.progress import Progress
from hf_rwp.runs.records import append_record, command_of, environment, scrub_paths

RECIPE = Path(__file__).with_name("imagenet_rwp.py")
HOST_WEIGHTS = 161  # as many as a ResNet-50 has; of 2 elements each, so that the time is Python's and the launches'
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
    surroundings = environment(Accelerator(mixed_precision=args.mixed_precision))
    surroundings["hardware"] |= {"replicas": args.ranks, "threads": args.threads}
    surroundings["hardware"]["threads_alone"] = args.threads * args.ranks
    where = f"{surroundings['hardware']['device']}, {args.ranks} ranks of {args.threads} threads"
    print(f"{where}, load average {busy:.2f}", flush=True)
    given = scrub_paths(asdict(args))
    facts = {
        "command": command_of("python recipes/benchmark.py", given, {item.name: item.default for item in fields(args)}),
        "arguments": given,
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
        "shared_gpu": args.shared,
        **surroundings,
    }
    output, kept, pieces = Path(args.output), args.unfinished, pieces_of(args)
    if there := kept_pieces(kept, facts):
        print(f"goes on with what {kept} has: {len(there)} of {len(pieces)} pieces", flush=True)
    progress = Progress(total_rounds([*pieces.values()]), unit="rounds", step="round")
    try:
        found = measure_pieces(pieces, args, kept, facts, progress)
    except KeyboardInterrupt:
        progress.close()
        print(table(rows(record_of(args, facts, kept_pieces(kept, facts)))))
        raise
    progress.close()
    record = {"load_average": busy, **record_of(args, facts, found)}
    record["rows"] = rows(record)
    append_record(output, record)
    kept.unlink(missing_ok=True)
    print(table(record["rows"]))


def pieces_of(args: Arguments) -> dict[str, Piece]:
    """All that is measured, by what it is called while it is. The costs of a step come first."""
    rounds = WARM_UP + args.rounds
    together = WARM_UP + 2 if args.shared else rounds  # ranks that share a GPU are there for what they exchange
    found = {}
    for name in args.models:
        found[f"{name}, {args.ranks} ranks"] = Piece(partial(run_steps, name), args.ranks, together)
        found[f"{name}, one process"] = Piece(partial(run_steps, name), 1, rounds)
        for kind in KINDS:
            found[f"{name}, memory of {kind}"] = Piece(partial(run_memory, name, kind), args.ranks)
    found["loops"] = Piece(run_loops, rounds=2 * args.loops)
    found["host"], found["import"] = Piece(run_host), Piece(run_imports)
    for name, measured in MODELS.items():
        if args.quick and measured.long:
            continue
        found[f"LoRA, {name}"] = Piece(partial(run_lora, name), rounds=measured.rounds(args.rounds))
    return found


def record_of(args: Arguments, facts: dict, found: dict[str, list]) -> dict[str, Any]:
    """The record of the pieces that there are; without those that there are not."""
    names = {"loop_images_per_second": "loops", "host_milliseconds": "host"} | {
        name: f"LoRA, {name}" for name in MODELS
    }
    record = {**facts, **{key: found[title][0] for key, title in names.items() if title in found}}
    if "import" in found:
        record["import_seconds"] = found["import"][0]
    record["measurements"] = []
    for name in args.models:
        group, alone = found.get(f"{name}, {args.ranks} ranks"), found.get(f"{name}, one process")
        titles = {kind: f"{name}, memory of {kind}" for kind in KINDS}
        memory = {kind: found[title] for kind, title in titles.items() if title in found}
        if group or alone or memory:
            record["measurements"].append(combined(group, alone, memory))
    return record


def record_collectives(args: Arguments) -> None:
    """A record of the traffic of every layout, on every process, beside what the formula says of it."""
    worlds = sorted({world for worlds in LAYOUTS.values() for world in worlds})
    record = {
        "command": "python recipes/benchmark.py --collectives",
        **environment(Accelerator(cpu=True)),
        "weights": sum(math.prod(shape) for shapes in units_of(Network()) for shape in shapes),
        "rows": [row for world in worlds for rows in start(Piece(run_collectives, world), args) for row in rows],
    }
    record["hardware"] |= {"replicas": max(worlds), "threads": 1}
    append_record(Path(args.output), record)
    for row in record["rows"]:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")


def run_collectives(rank: int, ranks: int, args: Arguments, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    Path(folder, str(rank)).write_text(json.dumps(traffic_rows()))
    dist.destroy_process_group()


# Measuring.


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
    for _ in range(args.loops):
        found["imagenet_rwp"].append(recipe_loop(Path(folder, "run"), flags, threads))
        round_done(folder)
        found["timm"].append(timm_loop(load_images(data_dir=args.data_dir)["train"], args.workers))
        round_done(folder)
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


def run_imports(_: int, __: int, args: Arguments, folder: str) -> None:
    """Seconds that `import hf_rwp`, and also taking RWP from it, last after `import torch`."""
    imports = [import_seconds() for _ in range(args.loops)]
    found = dict(zip(("hf_rwp", "RWP"), zip(*imports, strict=True), strict=True))
    Path(folder, "0").write_text(json.dumps(found))


def import_seconds() -> list[float]:
    """How long `import hf_rwp`, and also taking RWP from it, last after `import torch`."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True, text=True)
    return list(map(float, done.stdout.split()))


if __name__ == "__main__":
    parsing.start(main, Arguments, __doc__)
