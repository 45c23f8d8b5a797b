"""The records of methods side by side: which settings a search found best, what is there already, and tables of it."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn

from hf_rwp.runs.checkpoints import load_checkpoint, newest, read_state
from hf_rwp.runs.methods import METHODS, PROTOCOLS, Settings
from hf_rwp.runs.records import read_records
from hf_rwp.runs.screen import table

Record = Mapping[str, Any]


def comparison_records(results: Path) -> list[dict[str, Any]]:
    """Trials and runs, without notes."""
    return [record for record in read_records(results) if record["kind"] != "note"]


def is_new(what: Record, records: Iterable[Record], results: Path) -> bool:
    """Whether no record is of `what`, a run or trial by all that makes it one.

    Raises ValueError where the file has a run of the method that this one would be no further seed of.
    """
    if any(all(record[key] == what[key] for key in what) for record in records):
        return False
    for record in records:
        alike = all(record[key] == what[key] for key in ("kind", "protocol", "method"))
        for key in ("settings", "steps"):
            if alike and what["kind"] == "run" and record[key] != what[key]:
                raise ValueError(
                    f"{results} has a run of {what['method']} with {key} {record[key]}, to which one with {what[key]} "
                    "is no further seed: set another --name, or --results FILE"
                )
    return True


def refuse_another_comparison(ours: Record, theirs: Record, results: Path) -> None:
    """Raise ValueError where what a file was begun with differs from what this comparison has."""
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        said = ", ".join(f"{key} {theirs.get(key)!r} and not {ours.get(key)!r}" for key in other)
        raise ValueError(f"{results} holds another comparison ({said}): set another --name, or --results FILE")


def lock_output(output_dir: Path, results: Path) -> FileLock:
    """Reserve the output folder for this process. Raises ValueError where another has it, or nothing can be written."""
    lock = FileLock(output_dir / "lock")
    try:
        for folder in (output_dir, results.parent):
            folder.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{output_dir} is in use by another run: wait for it, or set another --output_dir") from None
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} and results={str(results)!r}: {error}. Set others") from error
    return lock


def run_folder(output_dir: Path, what: Record) -> Path:
    """Where the checkpoints of a run or trial are."""
    return output_dir / "checkpoints" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def resume_run(
    accelerator: Accelerator, folder: Path, position: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Where a run goes on: at its last checkpoint, which is loaded, if it was cut; else at `position`. Collective.

    modules: what else a checkpoint holds, by name.
    """
    latest = newest(folder)
    if latest is None:
        return {**position}
    try:
        state = read_state(latest, needed=position)
        load_checkpoint(accelerator, latest, modules)
    except ValueError as error:
        raise ValueError(f"{error}: delete {folder}, and this run begins anew") from error
    return {key: state[key] for key in position}


def best_settings(records: Iterable[Record], name: str, protocol: str) -> Settings | None:
    """The best of this protocol's search for a method, else of that under `images`; None where there was no search."""
    trials = [record for record in records if record["kind"] == "trial" and record["method"] == name]
    for searched in (protocol, "images"):
        found = [record for record in trials if record["protocol"] == searched]
        if found:
            best: Settings = max(found, key=lambda record: record["top1"])["settings"]
            return best
    return None


# What records say.


def paired_gains(ours: Iterable[Record], theirs: Iterable[Record], figure: Callable[[Record], float]) -> list[float]:
    """The differences of a figure between runs of the same seed, in the order of our seeds."""
    there = {run["seed"]: figure(run) for run in theirs}
    return [figure(run) - there[run["seed"]] for run in ours if run["seed"] in there]


def sign_flip_p(differences: Sequence[float]) -> float:
    """The p of the exact two-sided test that paired differences are as likely of either sign (Fisher, 1935).

    The share of all 2^n ways to put signs to them whose sum is at least as far from 0 as the one that was seen; with n
    pairs at least 2^(1 - n), unless all are 0. Raises ValueError for no pair, and for more than 20.
    """
    if not 1 <= len(differences) <= 20:
        raise ValueError(f"an exact test needs 1 to 20 pairs, got {len(differences)}: leave some out ahead of the runs")
    sums = np.zeros(1)
    for size in np.abs(np.asarray(differences, dtype=float)):
        sums = np.concatenate([sums - size, sums + size])
    seen = abs(math.fsum(differences))
    return float((np.abs(sums) >= seen * (1 - 1e-9)).mean())  # sums of the same numbers differ by rounding


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of a family of tests, each raised as Holm (1979) does to cover that there are more of them."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def comparison_table(records: Iterable[Record], markdown: bool = True) -> str:
    """Of runs under one protocol, a row a method: accuracy over seeds, its distance to plain training, the cost.

    markdown: or in aligned columns, for a terminal.
    """
    heads = ("method", "top-1 (%)", "against plain", "seeds", "gradients of an image", "training time", "settings")
    rows: list[Sequence[str]] = [heads, ("---",) * len(heads)]
    runs = by_method(records)
    plain = {record["seed"]: record["top1"] for record in runs.get("base", [])}
    for name, mine in runs.items():
        gains = [100 * (record["top1"] - plain[record["seed"]]) for record in mine if record["seed"] in plain]
        diverged = any(run["history"][-1]["train_loss"] is None for run in mine)
        rows.append(
            (
                METHODS[name].title + (" (some runs diverged)" if diverged else ""),
                mean_and_deviation([100 * record["top1"] for record in mine]),
                "" if name == "base" else mean_and_deviation(gains, sign=True),
                str(len(mine)),
                f"{statistics.mean(record['gradients'] for record in mine):.3g}",
                f"{statistics.mean(record['seconds'] for record in mine):.3g} s",
                ", ".join(f"{value:g}" for value in mine[-1]["settings"].values() if value is not None),
            )
        )
    return markdown_table(rows) if markdown else table([rows[0], *rows[2:]])


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_deviation(values: Sequence[float], sign: bool = False) -> str:
    """`mean ± standard deviation`; of one value without the latter, of none empty."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each method that has some, in the methods' order."""
    records = list(records)
    found = {name: [record for record in records if record["method"] == name] for name in METHODS}
    return {name: mine for name, mine in found.items() if mine}


def by_protocol(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The finished runs under each protocol that has some."""
    runs = [record for record in records if record["kind"] == "run"]
    found = {protocol: [record for record in runs if record["protocol"] == protocol] for protocol in PROTOCOLS}
    return {protocol: mine for protocol, mine in found.items() if mine}


def accuracy_curves(records: Iterable[Record]) -> dict[str, list[list[Record]]]:
    """For the picture: the histories of each method's runs, by its title."""
    return {METHODS[name].title: [record["history"] for record in mine] for name, mine in by_method(records).items()}
