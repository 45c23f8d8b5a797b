"""The rows of a benchmark: medians of ratios, their limits, and what is said where the spread is large."""

import pytest

from hf_rwp.analysis import costs


def figure(rows, start):
    (row,) = [row for row in rows if row["what"].startswith(start)]
    return row


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


def test_peak_memory_is_that_of_the_rank_that_needs_most():
    rows = costs.rows(record_with([1.0] * 4))
    assert figure(rows, "peak memory of a rank, parallel RWP")["median"] == 1.5
    assert figure(rows, "peak memory of a rank, SAM")["median"] == 1.3


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
def test_a_verdict_says_where_the_spread_is_larger_than_the_margin(ratio, holds, clear, verdict):
    rows = costs.rows(record_with(ratio))
    row = figure(rows, "parallel")
    assert (row["limit"], row["holds"], row["clear"]) == (1.05, holds, clear)
    (line,) = [line for line in costs.table(rows).splitlines() if "parallel RWP step / DDP" in line]
    assert line.endswith(f"<= 1.05  {verdict}")


def test_with_one_gpu_the_parallel_step_is_a_plain_one_with_noise():
    rows = costs.rows(record_with([9.0] * 4, shared_gpu=True))
    assert figure(rows, "1 + (noise")["median"] == 1.25
    assert figure(rows, "SAM")["median"] == 2 / 1.25
    assert figure(rows, "noise + restore / memory floor")["limit"] == 3
    assert figure(rows, "noise + restore / the reference")["limit"] == 0.1
    assert not figure(rows, "collectives")["holds"]


def test_a_record_that_was_cut_has_the_rows_of_what_it_has():
    whole = record_with([1.0] * 4)
    every = [row["what"] for row in costs.rows(whole)]
    for key in ("loop_images_per_second", "host_milliseconds", "import_seconds"):
        assert [row["what"] for row in costs.rows({name: whole[name] for name in whole if name != key})] == [
            what for what in every if not what.startswith({"l": "images/s", "h": "host", "i": "seconds of"}[key[0]])
        ]
    (measured,) = whole["measurements"]
    cut = {name: measured[name] for name in ("model", "img_size", "batch_size", "parallel_seconds")} | {
        "peak_bytes": {}
    }
    rows = costs.rows({"device_type": "cpu", "shared_gpu": False, "measurements": [cut]})
    assert [row["what"] for row in rows] == ["parallel RWP step / DDP step", "SAM step / parallel RWP step"]
    assert costs.rows({"device_type": "cpu", "shared_gpu": False, "measurements": []}) == []
