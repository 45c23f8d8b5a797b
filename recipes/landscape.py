"""How flat is the loss around trained weights? Image classifiers side by side, in one picture and in numbers.

# What the recipes trained, base against RWP, on the digits: a minute on one core
```bash
python recipes/landscape.py outputs/digits_base_seed0/model outputs/digits_rwp_seed0/model
```

# From the Hub, timm's and transformers' alike, on images of the classes that they know
```bash
python recipes/landscape.py timm/resnet18.a1_in1k google/vit-base-patch16-224 --dataset ILSVRC/imagenet-1k --streaming
```

# A finer picture, nearer to the weights, of more images
```bash
python recipes/landscape.py outputs/pets_rwp_seed0/model --data_dir path/to/pets --span 0.3 --grid 41 --num_images 1024
```

It writes landscape.png (the loss on a plane through the weights), sharpness.png (weight noise, a line, rounding, the
Hessian, SAM's step) and landscape.json (all of it in numbers) to `--output_dir`, when all is done, and puts a picture
of its own into the model card of each local MODEL that has one. Losses are of images to train on, accuracies of
held-out ones; images are prepared as each model's own configuration says, without augmentation. Models of one
architecture move along the same random directions and bear the same noise.
"""

import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("landscape", __name__)  # ahead of the imports that would fail

from hf_rwp.core.checks import check_all
from hf_rwp.core.gamma import DEFAULT_GAMMA, MODES
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.runs.parsing import flags_first, parse_arguments, start

# The flags of images that mean something here; the others are those of training, or each model's own affair.
USED = {"data_dir", "dataset", "dataset_config", "train_split", "validation_split", "image_column", "label_column"}
USED |= {
    "dataset_revision",
    "validation_fraction",
    "num_classes",
    "streaming",
    "shuffle_buffer",
    "max_bad_images",
    "workers",
}


@dataclass
class Arguments(ImageArguments):
    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders or ids on the Hub; also the words ahead of all flags."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images that those of a stream are chosen among."})
    num_images: int = field(default=256, metadata={"help": "Images of each split to measure on, at most."})
    batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    grid: int = field(default=17, metadata={"help": "Points along each side of the plane, odd, at least 3."})
    span: float = field(
        default=1.0,
        metadata={
            "help": "How far the plane reaches from the weights, above 0; a step of 1 is as long as the filters."
        },
    )
    noise: str = field(
        default="filter", metadata={"help": "The noise, as `--rwp_noise` in training.", "choices": MODES}
    )
    gammas: list[float] | None = field(
        default=None, metadata={"help": "Sizes of the noise, above 0; around RWP's default if not set."}
    )
    draws: int = field(default=8, metadata={"help": "Draws of the noise for each size, at least 3."})
    rho: float = field(default=0.05, metadata={"help": "Length of SAM's step, above 0."})
    iterations: int = field(default=50, metadata={"help": "Hessian-vector products for the eigenvalue, at most."})
    seed: int = field(default=0, metadata={"help": "Seed of directions, noise and choice of images, at least 0."})
    device: str = field(
        default="auto", metadata={"help": "`auto` is a GPU where there is one.", "choices": ("auto", "cpu")}
    )
    output_dir: str = field(default="outputs/landscape", metadata={"help": "Folder for what is written."})

    def __post_init__(self) -> None:
        for known in fields(ImageArguments):
            if known.name not in USED and getattr(self, known.name) != known.default:
                raise ValueError(
                    f"{known.name}={getattr(self, known.name)!r} has no effect here, where images are prepared as each "
                    "model's own configuration says: leave it out"
                )
        super().__post_init__()
        if self.gammas is None:
            self.gammas = [DEFAULT_GAMMA[self.noise] * factor for factor in (0.25, 0.5, 1.0, 1.5, 2.0)]
        check_all(
            self,
            ("models", len(self.models) > 0, "one or more folders or ids: landscape.py MODEL [MODEL ...] [--flags]"),
            ("num_images", self.num_images >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("grid", self.grid >= 3 and self.grid % 2 == 1, "odd, for the weights to be in the middle, and at least 3"),
            ("span", 0 < self.span < math.inf, "finite and above 0"),
            ("gammas", all(0 < gamma < math.inf for gamma in self.gammas), "finite and above 0"),
            ("draws", self.draws >= 3, "at least 3"),
            ("rho", 0 < self.rho < math.inf, "finite and above 0"),
            ("iterations", self.iterations >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
        )


def words(argv: list[str]) -> list[str]:
    """The words ahead of all flags are models."""
    models = list(takewhile(lambda word: not word.startswith("-"), argv))
    return ["--models", *models, *argv[len(models) :]] if models else argv


flags_first("landscape", __name__, Arguments, __doc__, words(sys.argv[1:]))  # ahead of the slow imports

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from hf_rwp.analysis.batches import Batches
from hf_rwp.analysis.plots import landscape, sharpness_curves
from hf_rwp.analysis.sharpness import (
    largest_eigenvalue,
    loss_slice,
    loss_under_noise,
    measure,
    quantized,
    random_directions,
    worst_case,
)
from hf_rwp.hub.card import with_picture
from hf_rwp.images.data import load_images
from hf_rwp.images.loaders import build_loader
from hf_rwp.runs.closing import said_of_files
from hf_rwp.runs.files import replacing
from hf_rwp.runs.progress import Progress
from hf_rwp.runs.records import command_of, environment, scrub_paths, without_nan
from hf_rwp.runs.screen import table as table_of
from hf_rwp.trainer.classifiers import classes_of, load_classifier, prepared

BITS = (8, 4)
PLACES = {"models", "device", "output_dir"}


def main(args: Arguments) -> None:
    accelerator = Accelerator(cpu=args.device == "cpu")
    disable_progress_bar()  # of each file that transformers reads
    surroundings = environment(accelerator)
    output_dir = Path(args.output_dir)
    folders = {name_of(place): place for place in map(model_folder, args.models)}
    if len(folders) < len(args.models):
        raise ValueError(f"the models are called {', '.join(map(name_of, args.models))} in the pictures: rename some")
    splits = load_images(**args.data_options)
    label_names = splits["train"].features["label"].names
    chosen = {role: choose(args, split) for role, split in splits.items()}
    # All of them first, that none is refused after others have been measured.
    models = {name: load_model(place, label_names) for name, place in folders.items()}

    figures, progress = {}, Progress(0, unit="batches", step=None)
    for name, (model, processor) in models.items():
        batches = {role: read(args, split, processor, accelerator.device) for role, split in chosen.items()}
        model.to(accelerator.device)
        progress.part = passes(args) * len(batches["train"])  # about as many for every model
        progress.steps = progress.part * len(models)
        progress.begin(name)
        train, held_out = (Shown(batches[role], progress) for role in ("train", "validation"))
        figures[name] = {"train": on_train(args, model, train), "held_out": on_held_out(args, model, held_out)}
        progress.skip(progress.part * len(figures) - progress.done)
        model.cpu()
    progress.close()

    images = {role: sum(len(labels) for _, labels in some) for role, some in batches.items()}
    own = {known.name for known in fields(Arguments)} - {known.name for known in fields(ImageArguments)} | USED
    facts = {name: scrub_paths(value) for name, value in asdict(args).items() if name in own - PLACES}
    shown = [name if Path(place).is_absolute() else place for name, place in folders.items()]
    record = {
        "models": figures,
        "data": {role: {"images": images[role], "split": str(split.split or role)} for role, split in splits.items()},
        "arguments": facts,
        "command": command_of(
            shlex.join(["python", f"recipes/{Path(__file__).name}", *shown]),
            facts,
            asdict(Arguments(models=["-"], noise=args.noise)),
        ),
        **surroundings,
    }
    label = f"loss on {images['train']:,} images of the split {record['data']['train']['split']}"
    planes = {name: found["train"]["plane"] for name, found in figures.items()}
    coordinates = next(iter(figures.values()))["train"]["plane_coordinates"]
    written = [output_dir / name for name in ("landscape.json", "landscape.png", "sharpness.png")]
    with replacing(written[0]) as numbers, replacing(written[1]) as picture, replacing(written[2]) as curves:
        numbers.write_text(json.dumps(without_nan(record), indent=2, allow_nan=False))
        landscape(planes, coordinates, picture, label)
        sharpness_curves(figures, curves)
    print(table(figures, args))
    print(said_of_files(written))
    for name, place in folders.items():
        card = Path(place) / "README.md"
        if card.is_file():
            with replacing(card.with_name("landscape.png")) as picture, replacing(card) as text:
                landscape({name: planes[name]}, coordinates, picture, label)
                text.write_text(with_picture(card.read_text(encoding="utf-8"), "landscape.png"), encoding="utf-8")
            print(f"{card} shows its landscape")


def on_train(args: Arguments, model: nn.Module, batches: Batches) -> dict[str, Any]:
    """What the loss on images to train on does around the weights."""
    half = torch.linspace(0, args.span, args.grid, dtype=torch.float64).tolist()
    line = [-value for value in half[:0:-1]] + half  # with the weights themselves in the middle
    directions = random_directions(model, 2, args.seed)
    eigenvalue = largest_eigenvalue(model, batches, iterations=args.iterations, seed=args.seed)
    return {
        **asdict(measure(model, batches)),
        "under_noise": under_noise(args, model, batches),
        "worst_case": {"rho": args.rho, "rise": worst_case(model, batches, args.rho)},
        "largest_eigenvalue": asdict(eigenvalue),
        "coordinates": line,
        "line": loss_slice(model, batches, directions[:1], line).tolist(),
        "plane_coordinates": line[::2],
        "plane": loss_slice(model, batches, directions, line[::2]).tolist(),
    }


def on_held_out(args: Arguments, model: nn.Module, batches: Batches) -> dict[str, Any]:
    """What is left of the accuracy on held-out images when weights are noisy or rounded."""
    return {
        **asdict(measure(model, batches)),
        "under_noise": under_noise(args, model, batches),
        "quantized": {str(bits): asdict(quantized(model, batches, bits)) for bits in BITS},
    }


def under_noise(args: Arguments, model: nn.Module, batches: Batches) -> list[dict[str, Any]]:
    options = {"draws": args.draws, "noise": args.noise, "seed": args.seed}
    return [asdict(level) for level in loss_under_noise(model, batches, args.gammas, **options)]


def passes(args: Arguments) -> int:
    """About how often a model sees the images, those held out included."""
    return 2 * (2 + len(args.gammas) * args.draws) + 3 + args.iterations + 2 * args.grid - 1 + args.grid**2 + len(BITS)


class Shown:
    """Batches that tell each time that one is read."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], progress: Progress) -> None:
        self.batches, self.progress = batches, progress

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            yield batch
            self.progress.advance()


def model_folder(model: str) -> str:
    """Where the model is: a run's folder holds it in one called model."""
    inside = Path(model) / "model"
    return str(inside) if (inside / "config.json").is_file() else model


def name_of(model: str) -> str:
    """A short name: the id on the Hub, or that of the folder; of its run, where the folder is called model."""
    folder = Path(model_folder(model))
    if not folder.is_dir():
        return model
    return folder.resolve().parent.name if folder.resolve().name == "model" else folder.resolve().name


def choose(args: Arguments, split: Dataset | IterableDataset) -> Dataset:
    """The images to measure on, not decoded, alike for all models."""
    if isinstance(split, Dataset):
        return split.shuffle(args.seed).select(range(min(args.num_images, len(split))))
    rows = split.shuffle(args.seed, buffer_size=args.shuffle_buffer).take(args.num_images)
    return Dataset.from_list(list(rows), features=split.features)


def read(
    args: Arguments, split: Dataset, processor: BaseImageProcessor, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The images of a split as a model takes them, on the device."""
    options = {"batch_size": args.batch_size, "workers": args.workers, "max_bad_images": args.max_bad_images}
    loader = build_loader(split, transform=partial(prepared, processor), training=False, **options)
    batches = [(images[labels >= 0], labels[labels >= 0]) for images, labels in loader]  # -1: could not be read
    unreadable = len(loader.unreadable.slots)
    if unreadable > args.max_bad_images or unreadable == len(split):
        raise ValueError(
            f"{unreadable} of {len(split)} images could not be read, and max_bad_images is {args.max_bad_images}: the "
            "warnings above name them. Repair or remove them, or raise max_bad_images"
        )
    return [(images.to(device), labels.to(device)) for images, labels in batches if len(labels)]


def load_model(place: str, label_names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier, timm's or transformers', and its preprocessing. Raises ValueError where it has other classes."""
    model, processor = load_classifier(place, "models")
    check_classes(place, classes_of(model), label_names)
    return model, processor


def check_classes(place: str, theirs: list[str], ours: list[str]) -> None:
    """Raise ValueError unless the model's classes are the data's, as far as their names tell.

    Names of one class differ between libraries ("tench", "tench, Tinca tinca", "n01440764"): what they are called is
    not compared, but a name that both have, once ("crane" is a bird and a machine), must be at the same index.
    """
    if len(theirs) != len(ours):
        raise ValueError(
            f"{place} tells {len(theirs)} classes apart and the data has {len(ours)}: take the data that it was "
            "trained for (--data_dir or --dataset), or a model that was trained on this one"
        )
    first, second = ([name.split(",")[0].strip().lower() for name in names] for names in (theirs, ours))
    times = Counter(first), Counter(second)
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other and times[0][one] == times[1][one] == 1:
            raise ValueError(
                f"{place} has class {theirs[index]!r} at index {index}, where the data has {ours[index]!r}: the same "
                "classes must be in the same order. Take the data that it was trained for"
            )


def table(figures: dict[str, Any], args: Arguments) -> str:
    """A row for each model."""
    middle = len(args.gammas) // 2
    head = ["", "loss", f"rise at gamma {args.gammas[middle]:g}", f"rise at rho {args.rho:g}", "eigenvalue", "accuracy"]
    rows = [[*head, *(f"int{bits}" for bits in BITS)]]
    for name, found in figures.items():
        train, held_out = found["train"], found["held_out"]
        rise = train["under_noise"][middle]["loss_rise"]
        accuracies = [held_out["accuracy"], *(level["accuracy"] for level in held_out["quantized"].values())]
        rows.append(
            [
                name,
                f"{train['loss']:.4g}",
                f"{rise['mean']:.3g} ({rise['low']:.3g} to {rise['high']:.3g})",
                f"{train['worst_case']['rise']:.3g}",
                f"{train['largest_eigenvalue']['value']:.4g}",
                *(f"{accuracy:.2%}" for accuracy in accuracies),
            ]
        )
    return table_of(rows)


def parsed(argv: list[str]) -> Arguments:
    return parse_arguments(Arguments, words(argv), description=__doc__)


if __name__ == "__main__":
    start(main, Arguments, __doc__, argv=words(sys.argv[1:]))
