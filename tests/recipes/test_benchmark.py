"""recipes/benchmark.py: one tiny run on two real ranks, against facts known otherwise."""

import importlib.util
import itertools
import json
import os

import imagenet
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from distributed import night

from hf_rwp.runs.parsing import parse_arguments

UNLIMITED = ("copy", "flat_lora")
FLAGS = ["--models=test_resnet", "--img_size=32", "--batch_size=4", "--rounds=2", "--threads=1"]


@pytest.fixture(scope="module")
def benchmark():
    return imagenet.load_recipe(imagenet.RECIPES / "benchmark.py")


@pytest.fixture(scope="module", params=night(["1", ""], [""]), ids=lambda forks: "forks" * bool(forks) or "processes")
def run(tmp_path_factory, request):
    """The record and what was printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    for split, label in itertools.product(("train", "validation"), ("dark", "light")):
        (folder / "images" / split / label).mkdir(parents=True)
        for index in range(64):
            image = PIL.Image.new("RGB", (32, 32), (index, 2 * index, 255 * (label == "light")))
            image.save(folder / "images" / split / label / f"{index}.png")
    output = folder / "results" / "benchmark.jsonl"
    flags = [*FLAGS, f"--data_dir={folder / 'images'}", f"--output={output}"]
    done = imagenet.launch(imagenet.SUPPORT / "small_costs.py", *flags, FORKS=request.param)
    assert done.returncode == 0, done.stderr
    (line,) = output.read_text().splitlines()
    return json.loads(line), done.stdout


def figure(record, start):
    (row,) = [row for row in record["rows"] if row["what"].startswith(start)]
    return row


def test_every_row_of_the_design_is_measured_and_shown(run):
    record, shown = run
    limits = {row["what"]: row["limit"] for row in record["rows"] if not row["model"].startswith("llama")}
    assert limits == {
        "parallel RWP step / DDP step": None,  # the design sets it for a ResNet-50
        "sequential RWP step / plain step": 1.2,  # of few pixels, of which the draw is a tenth of a step
        "SAM step / parallel RWP step": 1.9,
        "noise + restore / memory floor": None,  # and this for GPUs
        "noise + restore / the reference's, one thread": 0.8,
        "extra memory / (weights + scratch), clean": 0.01,
        "extra memory / (weights + scratch), perturbed": 1.01,
        "peak memory of a rank, parallel RWP / DDP": None,
        "peak memory of a rank, SAM / DDP": None,
        "collectives in a step, RWP - base": 0.0,
        "images/s, imagenet_rwp base / timm's loop": 1.0,
        "step, base noise (drawn) / plain LoRA": 1.15,
        "memory, base noise (drawn) / plain LoRA": pytest.approx(1.05 + 1 / 6, abs=0.01),  # one layer of six
        **{f"{what}, base noise ({kind}) / plain LoRA": None for what in ("step", "memory") for kind in UNLIMITED},
        "host ms of begin + restore, torch": 3.0,
        **({"host ms of begin + restore, kernels": 1.5} if importlib.util.find_spec("triton") else {}),
        "seconds of import hf_rwp after import torch": 0.2,
        "seconds of from hf_rwp import RWP, all in all": None,
    }
    llama = {row["what"]: row["limit"] for row in record["rows"] if row["model"] == "llama_135m, lora"}
    largest = record["llama"]["layer_bytes"] / record["llama"]["weights_bytes"]
    assert llama == {
        "step, base noise (drawn) / plain LoRA": 1.15,
        "memory, base noise (drawn) / plain LoRA": 1.05 + largest,
    }
    for row in record["rows"]:
        assert row["what"] in shown
        assert f"{row['median']:.3f}" in shown


def test_the_record_says_what_ran_and_where_but_not_whose(run):
    record, _ = run
    assert record["command"].startswith("python recipes/benchmark.py --models test_resnet --rounds 2")
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"].items() >= {"replicas": 2, "threads": 1, "threads_alone": 2}.items()
    assert record["load_average"] >= 0
    assert record["arguments"]["output"] == "benchmark.jsonl"
    assert os.path.expanduser("~") + "/" not in json.dumps(record)


def test_ratios_are_the_medians_of_the_rounds(run):
    record, _ = run
    (measured,) = record["measurements"]
    assert {len(times) for times in measured["alone_seconds"].values()} == {2}
    assert {len(times) for times in measured["parallel_seconds"].values()} == {2}
    alone, group = ({k: np.array(v) for k, v in measured[f"{how}_seconds"].items()} for how in ("alone", "parallel"))
    for start, values in (
        ("parallel", group["rwp"] / group["base"]),
        ("sequential", alone["rwp"] / alone["base"]),
        ("SAM", group["sam"] / group["rwp"]),
        ("noise + restore / memory", alone["noise"] / (2.5 * alone["copy"])),
        ("noise + restore / the reference", alone["noise"] / alone["reference"]),
        ("host ms of begin + restore, torch", np.array(record["host_milliseconds"]["torch"])),
        ("images/s", np.divide(*(record["loop_images_per_second"][loop] for loop in ("imagenet_rwp", "timm")))),
    ):
        row = figure(record, start)
        np.testing.assert_allclose([*row["quartiles"], row["median"]], np.percentile(values, [25, 75, 50]))


def test_collectives_and_memory_are_what_ddp_and_the_model_make_them(run):
    """SAM's first pass is under no_sync, so its step exchanges as much as a plain one."""
    (measured,) = run[0]["measurements"]
    collectives = measured["collectives"]
    assert collectives["base"] == collectives["rwp"] == collectives["sam"]
    assert set(collectives["base"]) == {"allreduce", "broadcast"}
    model = timm.create_model("test_resnet")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert measured["weights_bytes"] == weights
    assert measured["scratch_bytes"] == 2**15 * 4
    clean, perturbed = measured["extra_bytes"]
    assert clean < 1000
    assert perturbed > weights + measured["scratch_bytes"]
    peak, page = measured["peak_bytes"], 2**19  # of the whole process, to some hundred pages
    assert max(peak["base"]) > 2 * weights  # gradients and momentum, and more; RWP and SAM have a copy of the weights
    assert peak["rwp"][0] == pytest.approx(peak["base"][0], abs=page)  # whose gradients are clean
    assert peak["rwp"][1] - peak["rwp"][0] == pytest.approx(weights + measured["scratch_bytes"], abs=page)
    assert max(peak["sam"]) - max(peak["base"]) == pytest.approx(weights, abs=page)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet18000", r"cifar_resnet18; not resnet18000"),
        ("--batch_size=3", "batch_size must be even and above 0, got 3"),
        ("--rounds=1", "rounds must be at least 2, got 1"),
        ("--threads=0", "threads must be at least 1, got 0"),
    ],
)
def test_a_flag_out_of_range_is_named(benchmark, flag, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(benchmark.Arguments, [flag])


def test_a_quick_run_leaves_out_what_takes_minutes(benchmark):
    flags = [[*FLAGS, f"--quick={quick}"] for quick in ("false", "true")]
    whole, quick = (benchmark.pieces_of(parse_arguments(benchmark.Arguments, own)) for own in flags)
    assert whole.keys() - quick.keys() == {"LoRA, llama"}


def test_ranks_are_not_to_be_started_for_it(benchmark, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start one, with python"):
        parse_arguments(benchmark.Arguments, [])
