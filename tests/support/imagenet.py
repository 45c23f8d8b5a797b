"""Start a recipe, imagenet_rwp.py if not told so: in this process on a hundred of the digits, or as a user does."""

import copy
import functools
import importlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import forked
from accelerate.state import AcceleratorState
from datasets import DatasetDict

from hf_rwp.analysis.run_plots import CONFUSION, CURVES
from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments

SUPPORT = Path(__file__).parent  # for the import path of other processes
RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "imagenet_rwp.py"
sys.path.append(str(RECIPES))  # as for whoever starts one
SMALL = ["--img_size=16", "--batch_size=32", "--lr=0.02", "--report_to=none"]  # three steps an epoch


def load_recipe(path=RECIPE):
    return importlib.import_module(path.stem)


@functools.cache
def _few_digits():
    sizes = zip(load_images().items(), (100, 41), strict=True)
    return {name: split.select(range(size)) for (name, split), size in sizes}


def few_digits(**_):
    """100 to train on and 41 for evaluation."""
    return DatasetDict({name: copy.copy(split) for name, split in _few_digits().items()})


def train(recipe, folder, *flags, drawn=False):
    """drawn: with its pictures; they take longer than the training."""
    AcceleratorState._reset_state(True)  # a process of its own
    arguments = parse_arguments(recipe.Arguments, [*SMALL, "--epochs=2", *flags, f"--output_dir={folder}"])
    with nullcontext() if drawn else undrawn(recipe):
        recipe.main(arguments)


def undrawn(recipe):
    """A recipe that writes an empty file where it would draw a picture."""
    return mock.patch.object(recipe, "pictures_of_run", empty_pictures)


def empty_pictures(results, folder):
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / CURVES, *([folder / CONFUSION] if "by_class" in results else [])]
    for picture in pictures:
        picture.touch()
    return pictures


def train_on_rank(folder, *flags, few=True):
    """`train` on each of the ranks of `distributed.run`; returns what it ended with, "" for success."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    recipe = load_recipe()
    recipe.load_images = few_digits if few else load_images
    try:
        train(recipe, folder, *flags)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def results_of(recipe, folder, *flags, **options):
    train(recipe, folder, *flags, **options)
    return results(folder)


def weights(results):
    (sha,) = results["replicas_sha256"]
    return sha


def launch(*arguments, **environment):
    return forked.run(*arguments, **environment)


def evaluated(folder):
    """The figures of eval.json in a folder, without those by class."""
    found = json.loads((Path(folder) / "eval.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("by_class")}
