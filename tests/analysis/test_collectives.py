"""The formula of what processes send each other is what the profiler counts, and what RWP adds to plain training."""

from pathlib import Path

import pytest
from distributed import run, stop

from hf_rwp.analysis.collectives import (
    KINDS,
    LAYOUTS,
    METHODS,
    Traffic,
    foretold,
    formula,
    padded,
    perturbed_bytes,
    sent,
    traffic_rows,
)


@pytest.fixture(autouse=True)
def new_processes():
    """DTensor caches plans with the names of process groups, which a test before this one may have ended."""
    stop()


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_formula_is_what_the_profiler_counts(world):
    rows = [row for ranks in run(world, traffic_rows, 2, timeout=120) for row in ranks]
    assert {(row["layout"], row["method"]) for row in rows} == {
        (layout, method) for layout, worlds in LAYOUTS.items() if world in worlds for method in METHODS
    }
    assert [row for row in rows if [row["calls"], row["size"]] != row["formula"]] == []
    assert any(row["size"] for row in rows)


def test_a_process_alone_sends_nothing():
    assert set(formula("ddp", "rwp", 1, 0).values()) == {Traffic(0, 0)}


UNITS = [[(10, 6), (6,), (6,)], [(10, 6), (6,), (6,)], [(3, 6), (3,)]]


@pytest.mark.parametrize("replicas", [2, 128])
def test_a_perturbed_replica_adds_one_small_message_however_many_there_are(replicas):
    plain = foretold(UNITS, replicas=replicas, shards=8)
    noisy = foretold(UNITS, replicas=replicas, shards=8, perturbed=1)
    assert [noisy[kind].calls - plain[kind].calls for kind in KINDS] == [0, 0, 1]
    assert [noisy[kind].size - plain[kind].size for kind in KINDS] == [0, 0, 5 * 8]


def test_halves_on_one_replica_of_many_processes_double_what_is_gathered_and_scattered():
    plain = foretold(UNITS, replicas=1, shards=8)
    halves = foretold(UNITS, replicas=1, shards=8, micro_steps=2)
    assert {kind: (halves[kind].calls, halves[kind].size) for kind in KINDS} == {
        kind: (2 * plain[kind].calls, 2 * plain[kind].size) for kind in KINDS
    }


def test_what_replicas_average_shrinks_with_the_shards():
    of = {shards: foretold(UNITS, replicas=2, shards=shards)["all_reduce"].size for shards in (2, 4)}
    padding = {shards: sum(padded(shape, shards) for unit in UNITS for shape in unit) for shards in (2, 4)}
    assert {shards: size * shards for shards, size in of.items()} == {
        s: 4 * elements for s, elements in padding.items()
    }


def test_a_ring_sends_less_than_twice_what_is_averaged():
    traffic = foretold(UNITS, replicas=128, shards=1)
    assert sent(traffic, replicas=128, shards=1) == 2 * 127 / 128 * traffic["all_reduce"].size


def giant_vit() -> list[list[tuple[int, ...]]]:
    """timm's vit_giant_patch14_224, a billion weights: forty blocks, then the rest."""
    width, hidden = 1408, 6144
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    rest = [(1, 257, width), (1, 1, width), (width, 3, 14, 14), (width,), (width,), (width,), (1000, width), (1000,)]
    return [block] * 40 + [rest]


def test_the_manuals_figures_for_1024_gpus_are_the_formulas():
    manual = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
    units, layout = giant_vit(), {"replicas": 128, "shards": 8}
    options = {**layout, "gathered_bytes": 2, "reduced_bytes": 2}
    plain, noisy = foretold(units, **options), foretold(units, **options, perturbed=1)
    rows = [
        f"| all-gather, within 8 | {plain['all_gather'].calls} | {plain['all_gather'].size / 1e9:.2f} GB |",
        f"| reduce-scatter, within 8 | {plain['reduce_scatter'].calls} | {plain['reduce_scatter'].size / 1e9:.2f} GB |",
        f"| all-reduce, between 128 | {plain['all_reduce'].calls} | {plain['all_reduce'].size / 1e9:.2f} GB |",
    ]
    calls, size = (more - less for more, less in zip(noisy["all_reduce"], plain["all_reduce"], strict=True))
    rows.append(f"| RWP: all-reduce of norms, within 8 | {calls} | {size / 1e3:.1f} kB |")
    rows.append(f"| RWP: own memory, read and written | | {perturbed_bytes(units, 8) / 1e9:.2f} GB |")
    assert [row for row in rows if row not in manual] == []
