"""Propose a gamma for a model and its data, from how much noise its loss tolerates; in both modes of noise.

# The embedded digits and a small network, trained plainly for a few hundred steps first: a minute on a laptop
```bash
python recipes/gamma.py
```

# Trained weights as they are: a run's folder, a model of timm's or a causal language model; on your own data
```bash
python recipes/gamma.py outputs/digits_rwp_seed0
python recipes/gamma.py timm/resnet50.a1_in1k --data_dir path/to/images
python recipes/gamma.py path/to/llama --text_file texts.txt
```

# How far off is it? Whole runs on a grid of gammas beside the proposals, as recipes/results/plans/gamma_finder.md says
```bash
python recipes/gamma.py --validate true --config recipes/configs/gamma/test_resnet.yaml
```

It writes gamma.json (all of it in numbers) and gamma.png (the loss over gamma) to `--output_dir`. A new model, or a new
head for other classes, learns for `--steps` steps without noise; trained weights are measured as they are. Data and
models are those of imagenet_rwp.py; the images lie in memory, `--train_images` of them at most.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hf_rwp.cli import refuse_missing

refuse_missing("gamma", __name__)  # ahead of the imports that would fail

from hf_rwp.core.checks import check_all
from hf_rwp.core.gamma import MODES, SHARE
from hf_rwp.images.arguments import MemoryArguments, TimmArguments
from hf_rwp.runs.parsing import flags_first, start

RECIPE = Path(__file__)
STATES = (0.0, 0.25, 0.5, 1.0)  # shares of plain training after which a validation measures
WARMUP = 0.05  # of the steps of training
PLACES = ("output_dir", "device", "results")
# timm's flags that mean something here; the others are those of whole trainings.
USED = {
    "model",
    "model_kwargs",
    "pretrained",
    "drop",
    "drop_path",
    "channels_last",
    "batch_size",
    "epochs",
    "warmup_lr",
}
USED |= {"opt", "lr", "weight_decay", "weight_decay_1d", "momentum", "opt_eps", "opt_betas", "layer_decay"}


@dataclass
class Arguments(MemoryArguments, TimmArguments):
    text_file: str | None = field(
        default=None,
        metadata={
            "help": "Lines of text, for a causal language model; `generated` are sentences of a small grammar, which a "
            "small Llama learns if `--pretrained` names no model."
        },
    )
    train_images: int | None = field(default=2000, metadata={"help": "Images or texts to learn from, at most."})
    num_batches: int = field(default=4, metadata={"help": "Batches of them to measure the loss on."})
    steps: int | None = field(
        default=None, metadata={"help": "Steps without noise ahead of it; 200, and 0 for trained weights, if not set."}
    )
    share: float = field(
        default=SHARE, metadata={"help": "Of what was learned, how much the noise may take back, in (0, 1)."}
    )
    draws: int = field(default=4, metadata={"help": "Draws of the noise for each size."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and noise, at least 0."})
    device: str = field(
        default="auto", metadata={"help": "`auto` is a GPU where there is one.", "choices": ("auto", "cpu")}
    )
    output_dir: str = field(default="outputs/gamma", metadata={"help": "Folder for what is written."})
    validate: bool = field(
        default=False, metadata={"help": "Whether to train with each of `--gammas` and compare; without a proposal."}
    )
    gammas: list[float] = field(
        default_factory=lambda: [0.005, 0.01, 0.02, 0.04, 0.08], metadata={"help": "The grid of a validation."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Of the runs of a validation."})
    results: str | None = field(
        default=None, metadata={"help": "File of a validation's records; recipes/results/gamma/MODEL.jsonl if not set."}
    )

    def __post_init__(self) -> None:
        for kind in (MemoryArguments, TimmArguments):
            kind.__post_init__(self)
        for known in fields(TimmArguments):
            if known.name not in USED and getattr(self, known.name) != known.default:
                raise ValueError(f"{known.name}={getattr(self, known.name)!r} has no effect here: leave it out")
        self.name = "small_llama" if self.text_file else self.model
        check_all(
            self,
            ("train_images", self.train_images is None or self.train_images >= 1, "at least 1"),
            ("num_batches", self.num_batches >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 0, "at least 0"),
            ("share", 0 < self.share < 1, "in (0, 1)"),
            ("draws", self.draws >= 1, "at least 1"),
            ("batch_size", self.batch_size % 2 == 0, "even, for RWP to halve it"),
            ("gammas", all(0 < gamma < math.inf for gamma in self.gammas), "finite and above 0"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
        )

    def look_ahead(self) -> None:
        """Raise ValueError or FileNotFoundError for a file or a folder that is not there, or a name."""
        if self.text_file not in (None, "generated") and not Path(str(self.text_file)).is_file():
            raise ValueError(f"text_file={self.text_file!r} is not there: name a file of lines of text")
        super().look_ahead()

    def kept(self) -> str | None:
        """What a run that is stopped has kept, and how to go on; None for nothing."""
        return "runs that ended are recorded, and the same command goes on after them" if self.validate else None


def words(argv: list[str]) -> list[str]:
    """The word ahead of all flags is the model."""
    return ["--pretrained", *argv] if argv and not argv[0].startswith("-") else argv


flags_first("gamma", __name__, Arguments, __doc__, argv=words(sys.argv[1:]))  # ahead of imports that take seconds

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import resolve_data_config
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_rwp import RWP
from hf_rwp.analysis.finder import GammaProposal, NothingLearnedError, find_gamma
from hf_rwp.analysis.plots import loss_over_gamma
from hf_rwp.experiments.texts import TextTask
from hf_rwp.hub.configs import config_of
from hf_rwp.images.data import load_images
from hf_rwp.images.memory import Batches, Images, select_images
from hf_rwp.images.models import create_model, create_optimizer
from hf_rwp.images.orders import in_order_of
from hf_rwp.images.transforms import BatchTransform
from hf_rwp.runs.closing import said_of_files, wrapped
from hf_rwp.runs.determinism import derive_seed, use_fast_kernels
from hf_rwp.runs.files import replacing
from hf_rwp.runs.records import append_record, command_of, environment, read_records, scrub_paths, without_nan
from hf_rwp.runs.steps import accumulate, plain_step

Batch = tuple[Tensor, Tensor] | Mapping[str, Tensor]


class Task(Protocol):
    """A model and its data."""

    learned: bool  # whether the model comes with weights for these labels
    judges: int  # samples that are held out

    def __len__(self) -> int: ...  # samples to learn from

    def create(self, seed: int) -> nn.Module: ...

    def batch(self, number: int, seed: int) -> Batch: ...  # of a step of training

    def batches(self) -> Iterator[Batch]: ...  # to measure on: what is learned, without augmentation

    def accuracy(self, module: nn.Module) -> float: ...  # on what is held out


class ImageTask:
    def __init__(self, args: Arguments, device: torch.device) -> None:
        self.args, self.device = args, device
        splits = in_order_of(load_images(**args.data_options), args.pretrained, config_of)
        self.label_names = splits["train"].features["label"].names
        module, _ = create_model(args, self.label_names, args.img_size)
        self.learned = bool(args.pretrained) and module.pretrained_cfg.get("label_names") == self.label_names
        size = {"img_size": args.img_size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}
        self.config = resolve_data_config(size, model=module)
        if args.train_images is not None:
            args.train_images = min(args.train_images, len(splits["train"]))
        images = select_images(args, splits, self.config, device, held_out=args.validate)
        self.train, self.held_out = images["train"], images["test"]
        if args.validate:  # what is left of the training split judges as well
            more = images["held_out"]
            pixels, labels = (
                torch.cat([self.held_out.pixels, more.pixels]),
                torch.cat([self.held_out.labels, more.labels]),
            )
            self.held_out = Images(pixels, labels)
        self.judges = len(self.held_out)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.normalize = BatchTransform(self.config, device, memory_format=self.memory_format)
        self.orders: dict[int, Batches] = {}

    def __len__(self) -> int:
        return len(self.train)

    def create(self, seed: int) -> nn.Module:
        set_seed(seed)
        module, _ = create_model(self.args, self.label_names, self.args.img_size)
        return module.to(self.device, memory_format=self.memory_format)

    def batch(self, number: int, seed: int) -> Batch:
        if seed not in self.orders:
            self.orders[seed] = Batches(self.train, self.args, self.normalize, self.args.batch_size, seed)
        return self.orders[seed].batch(number, derive_seed(seed, number, 0))

    def batches(self) -> Iterator[Batch]:
        for pixels, labels in parts_of(self.train, self.args.batch_size):
            yield self.normalize(pixels), labels

    @torch.no_grad()
    def accuracy(self, module: nn.Module) -> float:
        module.eval()
        right = 0
        for pixels, labels in parts_of(self.held_out, 512):
            right += int((module(self.normalize(pixels)).argmax(-1) == labels).sum())
        return right / len(self.held_out)


def parts_of(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.pixels.split(size), images.labels.split(size), strict=True)


def main(args: Arguments) -> None:
    accelerator = Accelerator(cpu=args.device == "cpu")
    use_fast_kernels()
    disable_progress_bar()  # of each file that transformers reads
    task: Task = (TextTask if args.text_file else ImageTask)(args, accelerator.device)
    if args.validate:
        validate(task, args, environment(accelerator))
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    steps = (0 if task.learned else 200) if args.steps is None else args.steps
    module = train(task, args, args.seed, steps) if steps else task.create(args.seed)
    batches = list(itertools.islice(task.batches(), args.num_batches))
    options = {"share": args.share, "draws": args.draws, "seed": args.seed, "num_batches": args.num_batches}
    proposals = {mode: find_gamma(module, batches, noise=mode, **options) for mode in MODES}
    facts = scrub_paths(asdict(args))
    facts = {name: value for name, value in facts.items() if name not in PLACES}
    figures = {mode: asdict(found) for mode, found in proposals.items()}
    record = {
        "proposals": figures,
        "steps": steps,
        "command": command_of(f"python recipes/{RECIPE.name}", facts, asdict(Arguments())),
        **environment(accelerator),
    }
    written = output_dir / "gamma.json", output_dir / "gamma.png"
    with replacing(written[0]) as numbers, replacing(written[1]) as picture:
        numbers.write_text(json.dumps(without_nan(record), indent=2, allow_nan=False))
        loss_over_gamma(figures, picture)
    print(said(proposals, steps))
    print(said_of_files(written))


def said(proposals: Mapping[str, GammaProposal], steps: int) -> str:
    """What a person wants to know of the proposals."""
    first = next(iter(proposals.values()))
    state = f"after {steps} steps without noise" if steps else "of the weights as they are"
    lines = [f"Loss {state}: {first.loss:.4g}; of a guess from the labels' frequencies: {first.baseline:.4g}"]
    for mode, found in proposals.items():
        lines += [
            "",
            f"noise {mode}",
            *(f"  gamma {level.gamma:<9.4g} loss {level.rise:+.4g}" for level in found.levels),
        ]
        by_size = sorted(found.sizes.items(), key=lambda pair: pair[1])
        shown = {"least": by_size[0], "median": by_size[len(by_size) // 2], "most": by_size[-1]}
        sizes = ", ".join(f"{rank} {size:.2g} ({name})" for rank, (name, size) in shown.items())
        lines.append(f"  noise relative to the weights, at the proposal: {sizes}")
        flag = "" if mode == MODES[0] else f" --rwp_noise {mode}"
        unreached = "" if found.reached else " (the loss never rose so far: noise of any size will do)"
        lines.append(
            f"  proposal: --rwp_gamma {found.gamma:.2g}{flag}, where the loss rises by {found.allowed:.3g}{unreached}"
        )
    lines += ["", "That is where to begin: try half and twice of it too. How far off it was: recipes/results/README.md"]
    return "\n".join(wrapped(line, indent="    ") for line in lines)


def validate(task: Task, args: Arguments, surroundings: Mapping[str, Any]) -> None:
    """Append what is not there yet: for each seed a plain run with proposals on its way, and a run for each gamma."""
    results = Path(args.results or RECIPE.parent / "results" / "gamma" / f"{args.name}.jsonl")
    steps = args.epochs * (len(task) // args.batch_size)
    facts = {name: value for name, value in scrub_paths(asdict(args)).items() if name not in PLACES}
    facts = {"command": command_of(f"python recipes/{RECIPE.name}", facts, asdict(Arguments())), **surroundings}
    for seed, kind in itertools.product(args.seeds, ("plain", *args.gammas, "proposal")):
        what = {"model": args.name, "seed": seed, "steps": steps, "share": args.share}
        what |= {"kind": "grid", "gamma": kind} if isinstance(kind, float) else {"kind": kind}
        there = read_records(results)
        if any(what.items() <= record.items() for record in there):
            continue
        states: dict[str, Any] = {}

        def look(number: int, module: nn.Module, states: dict[str, Any] = states) -> None:
            for part in STATES:
                if number == round(part * steps):
                    modes = MODES if number == steps else MODES[:1]
                    states[f"{part:g}"] = {mode: proposed(task, args, module, mode) for mode in modes}

        gamma = what.get("gamma")
        if kind == "proposal":
            (plain,) = (record for record in there if (what | {"kind": "plain"}).items() <= record.items())
            found = plain["states"][f"{STATES[-1]:g}"][MODES[0]]
            if found is None:
                raise ValueError(f"{args.name} learned nothing in {steps} steps without noise: set epochs, lr")
            gamma = found["gamma"]
        begin = time.perf_counter()
        module = train(task, args, seed, steps, gamma, look if gamma is None else None)
        record = what | {"gamma": gamma, "top1": task.accuracy(module), "seconds": time.perf_counter() - begin}
        record |= {"states": states} if states else {}
        append_record(results, without_nan(record | {"judges": task.judges, "samples": len(task)} | facts))
        print(f"{args.name}, seed {seed}, {kind}: {record['top1']:.2%} in {record['seconds']:.0f} s", flush=True)


def proposed(task: Task, args: Arguments, module: nn.Module, mode: str) -> dict[str, Any] | None:
    """What `find_gamma` finds, and the mean noise; None where the weights have learned nothing."""
    try:
        found = find_gamma(
            module, task.batches(), noise=mode, share=args.share, draws=args.draws, num_batches=args.num_batches
        )
    except NothingLearnedError:
        return None
    elements = {name: weight.numel() for name, weight in module.named_parameters() if weight.ndim > 1}
    squares = sum(elements[name] * size**2 for name, size in found.sizes.items() if name in elements)
    kept = {name: value for name, value in asdict(found).items() if name not in ("noise", "sizes")}
    return kept | {"mean_size": math.sqrt(squares / sum(elements.values()))}


# Training


def train(
    task: Task,
    args: Arguments,
    seed: int,
    steps: int,
    gamma: float | None = None,
    look: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """A whole schedule, without noise or with RWP's on halves of each batch.

    look: is given the number of steps behind it, and the model, ahead of each step and at the end.
    """
    module = task.create(seed)
    base = optimizer = create_optimizer(args, module)
    if gamma is not None:
        optimizer = RWP(base, module, gamma=gamma, accumulation_steps=2, seed=seed)
    warmup = max(1, round(steps * WARMUP))
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=args.warmup_lr, t_in_epochs=False
    )
    module.train()
    try:
        for number in tqdm(range(steps), desc=f"gamma {gamma or 0:g}, seed {seed}", leave=False, disable=None):
            if look is not None:
                look(number, module)
            scheduler.step_update(number)
            parts = [task.batch(number, seed)] if gamma is None else halves(task.batch(number, seed))
            add = partial(accumulate, module, [(part,) for part in parts], partial(loss_of, module))
            plain_step(optimizer, add)
    finally:
        if gamma is not None:
            optimizer.eval()
    if look is not None:
        look(steps, module)
    return module


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        loss: Tensor = module(**batch).loss
        return loss
    return cross_entropy(module(batch[0]), batch[1])


def halves(batch: Batch) -> list[Batch]:
    if isinstance(batch, Mapping):
        cut = {name: values.chunk(2) for name, values in batch.items()}
        return [{name: values[half] for name, values in cut.items()} for half in (0, 1)]
    return list(zip(*(part.chunk(2) for part in batch), strict=True))


if __name__ == "__main__":
    start(main, Arguments, __doc__, argv=words(sys.argv[1:]))
