"""recipes/benchmark.py: one tiny run on two real ranks, and its parts, against facts known otherwise."""

import contextlib
import copy
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

from hf_rwp.runs.parsing import parse_arguments

FLAGS = ["--models=test_resnet", "--img_size=32", "--batch_size=4", "--rounds=2", "--threads=1"]


@pytest.fixture(scope="module")
def benchmark():
    return imagenet.load_recipe(imagenet.RECIPES / "benchmark.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The record and what was printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    for split, label in itertools.product(("train", "validation"), ("dark", "light")):
        (folder / "images" / split / label).mkdir(parents=True)
        for index in range(64):
            image = PIL.Image.new("RGB", (32, 32), (index, 2 * index, 255 * (label == "light")))
            image.save(folder / "images" / split / label / f"{index}.png")
    output = folder / "results" / "benchmark.jsonl"
    flags = [*FLAGS, f"--data_dir={folder / 'images'}", f"--output={output}"]
    done = imagenet.launch(imagenet.RECIPES / "benchmark.py", *flags)
    assert done.returncode == 0, done.stderr
    (line,) = output.read_text().splitlines()
    return json.loads(line), done.stdout


def figure(record, start):
    (row,) = [row for row in record["rows"] if row["what"].startswith(start)]
    return row


def test_every_row_of_the_design_is_measured_and_shown(run):
    record, shown = run
    limits = {row["what"]: row["limit"] for row in record["rows"]}
    assert limits == {
        "parallel RWP step / DDP step": None,  # the design sets it for a ResNet-50
        "sequential RWP step / plain step": 1.1,
        "SAM step / parallel RWP step": 1.9,
        "noise + restore / memory floor": None,  # and this for GPUs
        "noise + restore / the reference's, one thread": 0.8,
        "extra memory / (weights + scratch), clean": 0.01,
        "extra memory / (weights + scratch), perturbed": 1.01,
        "peak memory of a rank, parallel RWP / DDP": None,
        "peak memory of a rank, SAM / DDP": None,
        "collectives in a step, RWP - base": 0.0,
        "images/s, imagenet_rwp base / timm's loop": 1.0,
        "host ms of begin + restore, torch": 3.0,
        **({"host ms of begin + restore, kernels": 1.5} if importlib.util.find_spec("triton") else {}),
        "seconds of import hf_rwp after import torch": 0.2,
        "seconds of from hf_rwp import RWP, all in all": None,
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
    peak = measured["peak_bytes"]  # under load the profiler may miss an allocation: less than a copy more
    assert max(peak["base"]) > 2 * weights  # gradients and momentum, and more; RWP and SAM have a copy of the weights
    assert peak["rwp"][0] < peak["rwp"][1]
    assert max(peak["base"]) < peak["rwp"][1]
    assert max(peak["base"]) < max(peak["sam"])


def test_peak_memory_is_that_of_the_rank_that_needs_most(benchmark):
    rows = benchmark.rows(record_with([1.0] * 4))
    assert figure({"rows": rows}, "peak memory of a rank, parallel RWP")["median"] == 1.5
    assert figure({"rows": rows}, "peak memory of a rank, SAM")["median"] == 1.3


def test_the_reference_code_adds_noise_by_filter_and_takes_it_off_up_to_rounding(benchmark):
    torch.manual_seed(0)
    wide, bias = torch.nn.Parameter(torch.randn(3, 50, 200)), torch.nn.Parameter(torch.randn(9000))
    before = copy.deepcopy([wide, bias])
    noises = benchmark.reference_noise([wide, bias])
    for weight, clean, noise in zip((wide, bias), before, noises, strict=True):
        assert not torch.equal(weight, clean)
        torch.testing.assert_close(weight - clean, noise, atol=1e-5, rtol=0)
    for clean, noise in (*zip(before[0], noises[0], strict=True), (before[1], noises[1])):
        assert noise.std().item() == pytest.approx(0.01 * clean.norm().item(), rel=0.05)
    benchmark.reference_restore([wide, bias], noises)
    torch.testing.assert_close([wide, bias], before, atol=1e-5, rtol=0)


def test_noise_and_restore_go_over_every_weight_and_leave_it(benchmark, monkeypatch):
    made, seen = [], []

    class Seen(benchmark.Idle):
        def __init__(self, module):
            super().__init__(module)
            made.append(self)

        def forward(self):
            seen.append([weight.detach().clone() for weight in self.module.parameters()])
            return super().forward()

    monkeypatch.setattr(benchmark, "Idle", Seen)
    module = timm.create_model("test_resnet")
    window = benchmark.noise_and_restore(module, torch.device("cpu"), accumulation_steps=2)
    assert window() > 0
    clean, perturbed = seen
    for weight, before, noisy, after in zip(
        module.parameters(), clean, perturbed, made[0].module.parameters(), strict=True
    ):
        assert torch.equal(before, weight)
        assert torch.equal(after, weight)
        assert torch.equal(noisy, weight) != bool(weight.any())


@pytest.mark.parametrize("path", ["torch", "kernels"])
def test_host_time_is_that_of_every_small_weight_on_either_path(benchmark, path):
    """By the kernels' path norms and noise of all of them are asked for in one launch each, and none is written."""
    launched = []

    class Counted(benchmark.Launches):
        def __getitem__(self, grid):
            launched.append(grid)
            return super().__getitem__(grid)

    module, seen = torch.nn.ParameterList(torch.ones(2) for _ in range(benchmark.HOST_WEIGHTS)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "Launches", Counted)
        patch.setattr(
            benchmark.Idle, "forward", lambda self: (seen.append(torch.cat([*self.module])), self.output * 1)[1]
        )
        if path == "kernels":
            pytest.importorskip("triton")
        with benchmark.kernels_without_launches() if path == "kernels" else contextlib.nullcontext():
            step = benchmark.noise_and_restore(module, torch.device("cpu"), accumulation_steps=1, alpha=1.0)
            for _ in range(4):
                assert step() > 0
    assert len(seen) == 4
    assert all((weights != 1).all() == (path == "torch") for weights in seen)
    assert len(launched) >= 8 if path == "kernels" else launched == []


def test_noise_and_restore_alone_are_timed_on_one_thread(benchmark):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert benchmark.on_one_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    variants = benchmark.noise_variants(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert {variant.func for variant in variants.values()} == {benchmark.on_one_thread}
    assert all(variant() > 0 for variant in variants.values())


def test_peak_memory_is_what_a_function_holds_at_once(benchmark):
    peak = benchmark.peak_bytes(lambda: [torch.empty(1000) for _ in range(3)], torch.device("cpu"))
    assert peak == 3 * 4000


def record_with(ratio, shared_gpu=False):
    seconds = {"base": 1.0, "sam": 2.0, "noise": 0.25, "reference": 1.0, "copy": 0.1}
    times = {kind: [value] * len(ratio) for kind, value in seconds.items()} | {"rwp": ratio}
    measured = {"model": "resnet50", "img_size": 224, "batch_size": 16, "parallel_seconds": times}
    measured |= {"weights_bytes": 90, "buffers_bytes": 4, "scratch_bytes": 6, "extra_bytes": [0, 100]}
    measured |= {"peak_bytes": {"base": [100, 100], "rwp": [100, 150], "sam": [130, 120]}}
    measured |= {"alone_seconds": times, "collectives": {"base": {"allreduce": 3}, "rwp": {"allreduce": 4}}}
    imports = {"hf_rwp": [0.1] * 2, "RWP": [1.0] * 2}
    gpu = {"device_type": "cuda" if shared_gpu else "cpu", "shared_gpu": shared_gpu}
    loops = {"imagenet_rwp": [20.0] * 2, "timm": [10.0] * 2}
    record = {**gpu, "measurements": [measured], "import_seconds": imports, "loop_images_per_second": loops}
    return {**record, "host_milliseconds": {"torch": [2.0] * 2}}


@pytest.mark.parametrize(
    ("ratio", "holds", "clear", "verdict"),
    [
        ([1.0, 1.01, 1.02, 1.03], True, True, "holds"),
        ([1.0, 1.01, 1.02, 1.03, 2.0], True, True, "holds"),
        ([1.0, 1.04, 1.05, 1.07], True, False, "holds, within the spread"),
        ([1.0, 1.05, 1.06, 1.1], False, False, "missed, within the spread"),
        ([1.1, 1.2, 1.3, 1.4], False, True, "missed"),
    ],
)
def test_a_verdict_says_where_the_spread_is_larger_than_the_margin(benchmark, ratio, holds, clear, verdict):
    rows = benchmark.rows(record_with(ratio))
    row = figure({"rows": rows}, "parallel")
    assert (row["limit"], row["holds"], row["clear"]) == (1.05, holds, clear)
    (line,) = [line for line in benchmark.table(rows).splitlines() if "parallel RWP step / DDP" in line]
    assert line.endswith(f"<= 1.05  {verdict}")


def test_with_one_gpu_the_parallel_step_is_a_plain_one_with_noise(benchmark):
    rows = benchmark.rows(record_with([9.0] * 4, shared_gpu=True))
    assert figure({"rows": rows}, "1 + (noise")["median"] == 1.25
    assert figure({"rows": rows}, "SAM")["median"] == 2 / 1.25
    assert figure({"rows": rows}, "noise + restore / memory floor")["limit"] == 3
    assert figure({"rows": rows}, "noise + restore / the reference")["limit"] == 0.1
    assert not figure({"rows": rows}, "collectives")["holds"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet18000", r"cifar_resnet18; not resnet18000"),
        ("--batch_size=3", r"batch_size=3 .* even"),
        ("--rounds=1", r"rounds=1 .* at least 2"),
        ("--threads=0", r"threads=0 .* at least 1"),
    ],
)
def test_a_flag_out_of_range_is_named(benchmark, flag, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(benchmark.Arguments, [flag])


def test_ranks_are_not_to_be_started_for_it(benchmark, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start one, with python"):
        parse_arguments(benchmark.Arguments, [])
