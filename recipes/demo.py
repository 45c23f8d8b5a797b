"""Plain training, SAM and RWP side by side, on a task where flat minima help: two minutes on two cores.

```bash
hf-rwp demo
hf-rwp demo --seeds 0 1 2 3 4 5     # six times, with other weights, batches and wrong labels
```

A small ResNet learns the embedded handwritten digits at 16 pixels, where 40 % of the training labels are drawn at
random. The methods take turns, epoch by epoch, on the same images in the same order; each has the settings that were
best for it among as many (recipes/results/plans/demo.md). Without the extra `compare` there is no SAM. At the end there
is one picture, demo.png, and what it shows in words: how many held-out images each method gets wrong, what its training
took, and how flat the loss is where it ended.
"""

import copy
import importlib.util
import logging
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("demo", __name__)
from hf_rwp.core.checks import check_all
from hf_rwp.experiments.arguments import SmallArguments
from hf_rwp.runs.parsing import flags_first, start

STEP = SmallArguments.batch_size


@dataclass
class Arguments:
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Of weights, order, augmentation and wrong labels; all methods train once with each."},
    )
    epochs: int = field(default=30, metadata={"help": "Passes over the training images, at least 2."})
    train_images: int | None = field(default=None, metadata={"help": "Train on so many images; on all if not set."})
    results: str | None = field(
        default=None, metadata={"help": "File of records to append to; seeds that it holds are left out."}
    )
    output_dir: str = field(
        default="outputs/demo", metadata={"help": "Folder for the picture; where it is taken OUTPUT_DIR/2, and so on."}
    )

    def __post_init__(self) -> None:
        check_all(
            self,
            ("seeds", 0 < len(set(self.seeds)) == len(self.seeds) <= 20, "1 to 20 of them, each once"),
            ("seeds", all(0 <= seed < 2**32 for seed in self.seeds), "in [0, 2^32)"),
            ("epochs", self.epochs >= 2, "at least 2, of which the first warms the learning rate up"),
            (
                "train_images",
                self.train_images is None or self.train_images >= STEP,
                f"at least {STEP}, those of a step",
            ),
        )


flags_first("demo", __name__, Arguments, __doc__)  # ahead of the slow imports
import torch
from accelerate import Accelerator
from torch import nn

from hf_rwp import missing
from hf_rwp.analysis.plots import demonstration
from hf_rwp.analysis.sharpness import loss_slice, random_directions
from hf_rwp.analysis.timing import timed
from hf_rwp.experiments.demonstration import table, title, words
from hf_rwp.experiments.lanes import Lanes
from hf_rwp.experiments.training import Data, Training, load_data, options_of
from hf_rwp.runs.closing import COLUMNS, with_comments
from hf_rwp.runs.comparison import is_new
from hf_rwp.runs.determinism import use_fast_kernels
from hf_rwp.runs.folders import new_folder
from hf_rwp.runs.launch import check_comparison
from hf_rwp.runs.methods import METHODS
from hf_rwp.runs.records import append_record, command_of, environment, read_records, without_nan

Record = dict[str, Any]
SETTINGS: Mapping[
    str, Mapping[str, float | None]
] = {  # each method's best of six by the search in recipes/results/demo
    "base": {"lr": 0.2, "weight_decay": 2e-2, "strength": None},
    "sam": {"lr": 0.2, "weight_decay": 2e-2, "strength": 0.1},
    "rwp": {"lr": 0.1, "weight_decay": 4e-2, "strength": 0.04},
}
COORDINATES = [step / 16 for step in range(-8, 9)]  # of the landscape, in norms of the filters
DIRECTIONS, AROUND = 3, 512  # random ones, over which the landscape is averaged, and the training images that it is of
NEXT = {
    "RWP in a loop of your own": "optimizer = RWP(optimizer, model, gamma=0.01)",
    "images of your own": "hf-rwp train --data_dir path/to/images",
    "which gamma to begin with": "hf-rwp gamma",
}


def main(args: Arguments) -> None:
    accelerator = Accelerator()
    check_comparison(accelerator)
    if accelerator.num_processes > 1:
        raise ValueError(f"it runs in one process, not {accelerator.num_processes}: `hf-rwp compare` takes more")
    use_fast_kernels()
    logging.getLogger("hf_rwp.core.report").setLevel(logging.ERROR)  # it warns of noise as large as the search chose
    names = [name for name in SETTINGS if not METHODS[name].sam_every or importlib.util.find_spec("pytorch_optimizer")]
    runs: dict[str, list[Record]] = {name: [] for name in names}
    folder = new_folder(Path(args.output_dir))
    print("\n".join(opening(args, names)), flush=True)
    for seed in args.seeds:
        for record in side_by_side(accelerator, args, names, seed):
            runs[record["method"]].append(record)
    if runs["rwp"]:
        picture = folder / "demo.png"
        demonstration({METHODS[name].title: mine for name, mine in runs.items()}, picture, title(runs))
        said = [textwrap.fill(sentence, COLUMNS, break_on_hyphens=False) for sentence in words(runs)]
        print("\n".join(["", *table(runs), "", *said, "", f"Wrote {picture}", "", with_comments(NEXT)]))
    else:
        print(f"{args.results} holds all of these seeds already")
    accelerator.end_training()


def opening(args: Arguments, names: Sequence[str]) -> list[str]:
    """What is about to happen."""
    noise = f"{100 * task(args, args.seeds[0]).label_noise:g} %"
    lines = [
        f"A small ResNet learns handwritten digits; {noise} of its labels are random.",
        "The methods take turns, on the same images in the same order:",
    ]
    for name in names:
        shown = {"lr": "lr", "weight_decay": "weight decay", "strength": "rho" if METHODS[name].sam_every else "gamma"}
        settings = [f"{shown[key]} {value:g}" for key, value in SETTINGS[name].items() if value is not None]
        lines.append(f"  {METHODS[name].title:<5}  {', '.join(settings)}")
    if "sam" not in names:
        lines.append(missing("  SAM", "pytorch_optimizer", "compare"))
    return lines


def side_by_side(accelerator: Accelerator, args: Arguments, names: Sequence[str], seed: int) -> list[Record]:
    """Train with each method, epochs in turns. Returns a record for each; none where `--results` holds the seed."""
    small = task(args, seed)
    data = load_data(small, accelerator.device)
    per_step, images = small.batch_size, len(data["train"])
    steps = round(args.epochs * images / per_step)
    whats = {name: described(small, name, seed, steps) for name in names}
    results = Path(args.results) if args.results else None
    if results and not all(is_new(what, read_records(results), results) for what in whats.values()):
        return []
    facts = {"command": command_of("python recipes/demo.py", *described_arguments(args))}
    facts |= environment(accelerator) | {"load_average": os.getloadavg()[0], "data_sha256": data["digest"]}
    trainings = {
        name: Training(accelerator, small, data, data["train"], name, SETTINGS[name], seed, steps, per_step)
        for name in names
    }
    histories: dict[str, list[Record]] = {name: [] for name in names}
    label = f"seed {seed}" if len(args.seeds) > 1 else ""
    try:
        with Lanes([METHODS[name].title for name in names], args.epochs, label) as lanes:
            for epoch in range(1, args.epochs + 1):
                part = range(*(round(steps * done / args.epochs) for done in (epoch - 1, epoch)))
                for name, training in trainings.items():
                    histories[name].append(trained(training, data, part, histories[name]))
                    lanes.show(METHODS[name].title, histories[name][-1])
                lanes.end_epoch(epoch)
    finally:
        for training in trainings.values():
            training.optimizer.eval()  # an interrupt may have left noise in the weights
    records = []
    for name, training in trainings.items():
        record = whats[name] | {"evaluations": args.epochs, "batch_size": per_step, "images_per_step": per_step}
        record |= {key: histories[name][-1][key] for key in ("top1", "gradients", "seconds")}
        did = training.report({"clean": 0, "perturbed": 0})
        record |= {"rwp": did} if did else {}
        record |= {"images": {"train": images, "evaluated": len(data["test"])}, "history": histories[name]}
        records.append(without_nan(record | {"landscape": landscape(training, data, seed)} | facts))
    for record in records if results else ():
        append_record(results, record)
    return records


def trained(training: Training, data: Data, part: range, history: Sequence[Record]) -> Record:
    """Take the steps of `part`. Returns what the training has come to, a row of its history."""

    def advance() -> None:
        for number in part:
            training.step(number)

    seconds = timed(advance, training.accelerator.device) + (history[-1]["seconds"] if history else 0)
    losses, images = training.tracker.compute(), len(data["train"])
    row = {"step": part.stop, "epoch": part.stop * training.batches.size / images, "seconds": seconds}
    row |= {"gradients": training.gradients / images, "train_loss": losses.pop("loss")}
    return row | losses | training.evaluate(data["test"])


def landscape(training: Training, data: Data, seed: int) -> Record:
    """The mean over random directions of the training loss on a line through the weights, on images as they are.

    BatchNorm takes its statistics from these images, at each point anew, as it does in training: running ones belong
    to the weights as they are, and would be wrong at all others.
    """
    training.optimizer.eval()
    module = copy.deepcopy(training.module)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean = layer.running_var = None
    pixels, labels = (part[:AROUND] for part in (data["train"].pixels, data["train"].labels))
    batches = [(training.normalize(pixels), labels)]
    directions = random_directions(module, DIRECTIONS, seed)
    losses = [loss_slice(module, batches, [direction], COORDINATES) for direction in directions]
    mean = torch.stack(losses).mean(0).tolist()
    return {"coordinates": COORDINATES, "losses": mean, "directions": DIRECTIONS, "images": len(labels)}


def task(args: Arguments, seed: int) -> SmallArguments:
    """What is learned, with the wrong labels of a seed."""
    return SmallArguments(
        img_size=16, label_noise=0.4, epochs=args.epochs, train_images=args.train_images, data_seed=seed
    )


def described(small: SmallArguments, name: str, seed: int, steps: int) -> Record:
    """What makes a run this one, the head of its record; as recipes/compare.py has it, under equal images."""
    kept = ("data_dir", "img_size", "label_noise", "model", "epochs", "batch_size", "opt", "train_images")
    learned = {key: value for key, value in asdict(small).items() if key in kept}
    learned = {key: value for key, value in learned.items() if key != "train_images" or value is not None}
    what = {"kind": "run", "task": learned, "protocol": "images", "method": name, "options": options_of(small, name)}
    return what | {"settings": SETTINGS[name], "seed": seed, "data_seed": seed, "replicas": 1, "steps": steps}


def described_arguments(args: Arguments) -> tuple[Record, Record]:
    """The flags that make a run this one, as given, and their defaults."""
    facts, defaults = (asdict(arguments) for arguments in (args, Arguments()))
    return {name: facts[name] for name in ("seeds", "epochs", "train_images")}, defaults


if __name__ == "__main__":
    start(main, Arguments, __doc__)
