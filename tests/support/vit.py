"""Run recipes/vit_rwp.py in this process: a tiny ViT on a hundred of the digits, four steps an epoch."""

import os
import shutil
from contextlib import nullcontext

import numpy as np
import PIL.Image
import torch
from imagenet import RECIPES, few_digits, load_recipe, results, undrawn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments

RECIPE = RECIPES / "vit_rwp.py"
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = ["--per_device_train_batch_size=32", "--num_train_epochs=2", "--img_size=16", "--report_to=none"]
SCRATCH = [*SMALL, f"--model_kwargs={TINY}"]


def load_vit_recipe():
    return load_recipe(RECIPE)


def train(folder, *flags, few=True, drawn=False):
    """drawn: with its pictures; they take longer than the training."""
    recipe = load_vit_recipe()
    recipe.load_images = few_digits if few else load_images
    with nullcontext() if drawn else undrawn(recipe):
        recipe.main(parse_arguments(recipe.Arguments, [*flags, f"--output_dir={folder}"]))


def train_on_rank(folder, *flags):
    """`train` on each of the ranks of `distributed.run`; returns what it ended with, "" for success.

    On a hundred digits, unless a flag names other data.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        train(folder, *flags, few=not any(flag.startswith("--data_dir") for flag in flags))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def results_of(folder, *flags, **options):
    train(folder, *flags, **options)
    return results(folder)


def cut_back(whole, folder, step):
    """A copy of a finished run as if it had been cut after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return folder


def trained_vit(folder):
    """A folder with a ViT for three classes, as transformers' own tools write it."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, image_size=16, patch_size=4, num_labels=3)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, resample=3).save_pretrained(folder)
    return folder


def write_pictures(folder):
    """40 images of two classes to train on, 10 for evaluation."""
    generator = np.random.default_rng(0)
    for number in range(50):
        path = folder / ("train" if number < 40 else "validation") / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return folder
