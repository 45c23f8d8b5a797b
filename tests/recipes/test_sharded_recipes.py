"""recipes/imagenet_rwp.py where processes hold the weights together: FSDP2 and HSDP as recipes/accelerate has them."""

import os
import shutil
from pathlib import Path

import imagenet
import pytest
import timm
import torch
from distributed import run, stop
from imagenet import RECIPES, few_digits, load_recipe, results, train, train_on_rank, weights
from launched import train_imagenet, under

from hf_rwp.runs.checkpoints import checkpoints_in
from hf_rwp.runs.parsing import parse_arguments

# A transformer without BatchNorm, three steps an epoch.
FLAGS = ["--model=test_vit", "--checkpointing_steps=2", "--save_total_limit=9", "--clip_grad=1"]
WORLDS = {"fsdp2_8": 2, "hsdp_2x8": 4}
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


@pytest.fixture(autouse=True)
def new_processes():
    """DTensor caches plans with the names of process groups, which a test before this one may have ended."""
    stop(0)


def start(file, folder, *flags, changed=None):
    """A run on the processes of a layout, whose results are those of all of them."""
    world = WORLDS[file]
    flags = [*FLAGS, f"--batch_size={32 // world}", *flags]
    assert run(world, train_imagenet, file, changed, str(folder), *flags, timeout=180) == [""] * world
    return results(folder)


def cut_back(whole, folder, step):
    """A copy of a finished run as if it had been cut after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    for number, checkpoint in checkpoints_in(folder / "checkpoints").items():
        if number > step:
            shutil.rmtree(checkpoint)
    return folder


def evaluated(folder, *flags):
    """What one process finds by itself."""
    recipe = load_recipe()
    recipe.load_images = few_digits
    train(recipe, folder, "--model=test_vit", "--eval_only", *flags)
    return imagenet.evaluated(folder)


@pytest.mark.parametrize(
    ("file", "changed", "flags"),
    [
        ("fsdp2_8", FULL, []),
        pytest.param("hsdp_2x8", None, ["--model_ema", "--model_ema_decay=0.9"], marks=pytest.mark.slow),
    ],
)
def test_a_run_its_checkpoints_and_its_model(file, changed, flags, tmp_path):
    """Both layouts, both ways to save: slots, equal replicas, a resumed run, the model for anybody."""
    whole = start(file, tmp_path / "whole", *flags, changed=changed)
    final, parallel = whole["final"], file == "hsdp_2x8"
    assert final["rwp"]["placement"] == ("parallel" if parallel else "sequential")
    assert final["rwp"]["slots"] == {"clean": 6, "perturbed": 6}
    assert {name: whole["hardware"][name] for name in ("replicas", "processes")} == {
        "replicas": 2 if parallel else 1,
        "processes": WORLDS[file],
    }
    assert len(whole["replicas_sha256"]) == 1
    assert min(layer["size"] for layer in final["rwp"]["relative_noise"].values()) > 0
    assert {"loss_clean", "loss_perturbed", "loss_gap"} <= final.keys()

    resumed = [*flags, "--resume_from_checkpoint=latest"]
    again = start(file, cut_back(tmp_path / "whole", tmp_path / "again", 4), *resumed, changed=changed)
    assert weights(again) == weights(whole)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["final"]["rwp"]["slots"] == final["rwp"]["slots"]

    # The model is whole: what one process, without a mesh, makes of it and of the checkpoint.
    model = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'model'}", pretrained=True)
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    name = "_ema" if flags else ""
    found = evaluated(tmp_path / "eval", f"--pretrained={tmp_path / 'whole' / 'model'}")
    assert found["eval_loss"] == pytest.approx(final[f"eval_loss{name}"], rel=1e-5)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_6"
    found = evaluated(tmp_path / "eval", f"--resume_from_checkpoint={checkpoint}")
    assert found == pytest.approx({key: final[key] for key in found}, rel=1e-5)
    assert ("eval_loss_ema" in found) == bool(flags)


@pytest.mark.slow
def test_plain_training_is_that_of_whole_weights(tmp_path):
    """By DDP and by FSDP2: the same figures, to the rounding of sums."""
    sharded = start("fsdp2_8", tmp_path / "sharded", "--method=base")
    said = run(2, train_on_rank, str(tmp_path / "whole"), *FLAGS, "--batch_size=16", "--method=base", timeout=180)
    assert said == [""] * 2
    for mine, its in zip(sharded["history"], results(tmp_path / "whole")["history"], strict=True):
        for name in ("train_loss", "eval_loss", "top1", "top5", "learning_rate"):
            assert mine[name] == pytest.approx(its[name], rel=1e-4), name


REFUSED = {  # flags, what Accelerate is told, what the error says
    "sam": (["--method=sam"], {}, "--method sam does not work where FSDP2 holds the weights"),
    "channels_last": (["--channels_last"], {}, "--channels_last does not work where FSDP2 holds the weights"),
    "sync_bn": (["--sync_bn"], {}, "--sync_bn does not work where FSDP2 holds the weights"),
    "fsdp1": (
        [],
        {
            "FSDP_VERSION": "1",
            "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
            "FSDP_SYNC_MODULE_STATES": "false",  # which looks for a GPU
            "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
        },
        "take FSDP2 (fsdp_version: 2)",
    ),
    "tp": ([], {"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, "tp_size > 1"),
}


def refusals(file, folder):
    """What each case of `REFUSED` ended with, and whether it wrote anything."""
    return {
        name: (train_imagenet(file, changed, f"{folder}/{name}", *FLAGS, *flags), Path(folder, name).exists())
        for name, (flags, changed, _) in REFUSED.items()
    }


def test_what_sharded_weights_cannot_have_is_refused_at_the_flags(tmp_path):
    for said in run(4, refusals, "hsdp_2x8", str(tmp_path), timeout=120):
        for name, (error, wrote) in said.items():
            assert error.startswith("ValueError"), (name, error)
            assert REFUSED[name][2] in error
            assert not wrote, name


def train_with_fsdp_left_aside(folder):
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    try:
        return train_on_rank(folder, *FLAGS)
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


def test_fsdp_that_accelerate_leaves_aside_is_refused(tmp_path):
    """On a CPU it would train by DDP, without a word."""
    for error in run(2, train_with_fsdp_left_aside, str(tmp_path)):
        assert "MULTI_CPU" in error
        assert "cpu_2.yaml" in error


def compare(file, folder):
    recipe = load_recipe(RECIPES / "compare.py")
    with under(file):
        try:
            recipe.main(parse_arguments(recipe.Arguments, [f"--output_dir={folder}", f"--results={folder}/results"]))
        except ValueError as error:
            return str(error)
    return ""


def test_methods_are_not_compared_where_the_weights_are_sharded(tmp_path):
    for error in run(2, compare, "fsdp2_8", str(tmp_path)):
        assert "FSDP holds the weights, and SAM needs whole ones" in error
        assert "gpu_8.yaml" in error
