"""The figures of a benchmark beside their limits, as rows of a record and as text."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hf_rwp.analysis.frozen_cost import frozen_ratios

PASSES = 5  # over the weights' bytes: read and write them, write and read the snapshot, write them back; a copy has 2


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each row's figure in every round, as median and quartiles, beside its limit. record: what benchmark.py measured,
    all of it or what it came to.

    A limit is None where none is set. holds: whether the median is on the right side of it; clear: whether the limit
    is outside of the quartiles.
    """
    gpu, found = record["device_type"] == "cuda", []

    def add(model: str, what: str, values: Sequence[float], limit: float | None, at_least: bool = False) -> None:
        several = [*values] * 2 if len(values) == 1 else values
        first, median, third = statistics.quantiles(several, n=4, method="inclusive")
        found.append(
            {
                "model": model,
                "what": what,
                "median": median,
                "quartiles": [first, third],
                "limit": limit,
                "at_least": at_least,
                "holds": None if limit is None else median >= limit if at_least else median <= limit,
                "clear": None if limit is None else not first <= limit <= third or first == third,
            }
        )

    for measured in record["measurements"]:
        on_row = partial(add, measured.get("model", ""))
        _step_rows(on_row, record, measured)
        if "extra_bytes" in measured:
            copied = sum(measured[f"{what}_bytes"] for what in ("weights", "buffers", "scratch"))
            for role, first in (("clean", 0), ("perturbed", 1)):
                most = max(measured["extra_bytes"][first::2]) / copied
                # A filter's std takes one number for all its weights, which is less than a percent.
                on_row(f"extra memory / (weights + scratch), {role}", [most] * 2, 0.01 + first)
        peak = {kind: max(ranks) for kind, ranks in measured["peak_bytes"].items()}  # beyond weights and DDP's buckets
        for kind, title in (("rwp", "parallel RWP"), ("sam", "SAM")):
            if {kind, "base"} <= peak.keys():
                on_row(f"peak memory of a rank, {title} / DDP", [peak[kind] / peak["base"]] * 2, None)
        if "collectives" in measured:
            counts = {kind: sum(calls.values()) for kind, calls in measured["collectives"].items()}
            on_row("collectives in a step, RWP - base", [counts["rwp"] - counts["base"]] * 2, 0.0)
    if "loop_images_per_second" in record:
        loops = record["loop_images_per_second"]
        speeds = _ratios(loops["imagenet_rwp"], loops["timm"])
        add("", "images/s, imagenet_rwp base / timm's loop", speeds, 1.0, at_least=True)
    for key, model in (("frozen", "lora"), ("llama", "llama_135m, lora")):
        if key in record:
            more = 1.05 + record[key]["layer_bytes"] / record[key]["weights_bytes"]
            limits = {"drawn": (None if gpu else 1.15, more)}
            for kind, (times, memory) in frozen_ratios(record[key]).items():
                time_limit, memory_limit = limits.get(kind, (None, None))
                add(model, f"step, base noise ({kind}) / plain LoRA", times, time_limit)
                add(model, f"memory, base noise ({kind}) / plain LoRA", memory, memory_limit)
    for path, limit in (("torch", 3.0), ("kernels", 1.5)):
        if path in record.get("host_milliseconds", {}):  # no kernels without Triton
            add("", f"host ms of begin + restore, {path}", record["host_milliseconds"][path], limit)
    if "import_seconds" in record:
        add("", "seconds of import hf_rwp after import torch", record["import_seconds"]["hf_rwp"], 0.2)
        add("", "seconds of from hf_rwp import RWP, all in all", record["import_seconds"]["RWP"], None)
    return found


def _step_rows(on_row: Callable[..., None], record: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """The rows of what steps take, as far as they were measured, on ranks and in a single process."""
    gpu, group, alone = record["device_type"] == "cuda", measured.get("parallel_seconds"), measured.get("alone_seconds")
    together, how = None, "parallel RWP step / DDP step"
    if record["shared_gpu"]:
        how = "1 + (noise + restore) / step"
        if alone:
            parallel = [base + noise for base, noise in zip(alone["base"], alone["noise"], strict=True)]
            together = alone["base"], parallel, alone["sam"]
    elif group:
        together = group["base"], group["rwp"], group["sam"]
    if together:
        base, parallel, sam = together
        as_in_design = gpu or (measured["model"], measured["img_size"], measured["batch_size"]) == ("resnet50", 224, 16)
        on_row(how, _ratios(parallel, base), (1.01 if gpu else 1.05) if as_in_design else None)
    if alone:  # of few pixels the draw is a tenth of a step
        limit = 1.05 if gpu else 1.10 if measured["img_size"] >= 224 else 1.20
        on_row("sequential RWP step / plain step", _ratios(alone["rwp"], alone["base"]), limit)
    if together:
        on_row("SAM step / parallel RWP step", _ratios(sam, parallel), 1.9, at_least=True)
    if alone:
        floor = [PASSES / 2 * copied for copied in alone["copy"]]
        on_row("noise + restore / memory floor", _ratios(alone["noise"], floor), 3.0 if gpu else None)
        reference = _ratios(alone["noise"], alone["reference"])
        on_row("noise + restore / the reference's, one thread", reference, 0.1 if gpu else 0.8)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: median and quartiles, the limit, and whether it holds."""
    lines = [f"{'':24} {'':46} median (quartiles)      limit"]
    for row in rows:
        first, third = row["quartiles"]
        limit = "" if row["limit"] is None else f"{'>=' if row['at_least'] else '<='} {row['limit']:g}"
        verdict = {None: "", True: "holds", False: "missed"}[row["holds"]]
        doubt = ", within the spread" if row["clear"] is False else ""
        figures = f"{row['median']:.3f} ({first:.3f} to {third:.3f})"
        lines.append(f"{row['model']:24} {row['what']:46} {figures:23} {limit:8} {verdict}{doubt}".rstrip())
    return "\n".join(lines)


def _ratios(dividends: Sequence[float], divisors: Sequence[float]) -> list[float]:
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]
