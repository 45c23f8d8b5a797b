"""What noise on a frozen base does under LoRA: what is learned, and what is forgotten at the same accuracy.

Its questions, arms, tests and what counts as no effect are in recipes/results/plans/lora_frozen.md, which is older than
the records: `recipes/lora_rwp.py --records FILE.jsonl` appends one a run.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rwp.analysis.sharpness import Estimate, estimate
from hf_rwp.runs.comparison import holm, markdown_table, mean_and_deviation, paired_gains, sign_flip_p
from hf_rwp.runs.records import read_records

Record = Mapping[str, Any]

ARMS = {"plain": "plain LoRA", "adapters": "noise on the adapters", "frozen": "noise on base and adapters"}
PAIRS = (("frozen", "plain"), ("adapters", "plain"), ("frozen", "adapters"))
LEVEL, OF_LOWEST, FEWEST = 0.05, 0.8, 6  # of a test; of the lowest accuracy in the search; seeds for a test
POINTS, NATS = 2.0, 0.1  # what is of no size that matters, if a 95 % interval lies within


def known_loss_at(run: Record, accuracy: float) -> float | None:
    """The loss on text that the base knew as a run first reaches an accuracy; None if it never does.

    Linear in accuracy between the evaluation before, the base's own ahead of the first, and the one that reaches it.
    """
    final, history = run["final"], run["history"]
    path = [(final["accuracy_before"], final["known_loss_before"])]
    path += [(row["accuracy"], row["known_loss"]) for row in history]
    if path[0][0] >= accuracy:
        return float(path[0][1])
    for (low, before), (high, after) in itertools.pairwise(path):
        if high >= accuracy:
            share = (accuracy - low) / (high - low)
            return float(before + (after - before) * share)
    return None


def chosen(search: Sequence[Record]) -> dict[str, Record]:
    """By arm, the run of a search whose settings are taken: of the highest accuracy, then of the lowest loss."""
    return {
        arm: min(own, key=lambda run: (-run["final"]["accuracy"], run["final"]["eval_loss"]))
        for arm in ARMS
        if (own := [run for run in search if run["arm"] == arm])
    }


def set_accuracy(search: Sequence[Record]) -> float:
    """Where forgetting is compared: of the lowest accuracy that settings were chosen by, 0.8, in whole percents."""
    lowest: float = min(run["final"]["accuracy"] for run in chosen(search).values())
    return math.floor(100 * OF_LOWEST * lowest + 1e-9) / 100


@dataclass(frozen=True)
class Difference:
    """Of two arms, seed by seed. p: of the exact sign-flip test, None for fewer than six seeds. left_out: seeds on
    which a run never reaches the set accuracy."""

    pairs: int
    mean: Estimate | None
    p: float | None
    left_out: int


def difference(
    ours: Sequence[Record], theirs: Sequence[Record], figure: Callable[[Record], float | None]
) -> Difference:
    """ours - theirs, of runs of the same seeds for which there is a figure."""
    seeds = {run["seed"] for run in ours} & {run["seed"] for run in theirs}
    have = seeds - {run["seed"] for run in (*ours, *theirs) if figure(run) is None}
    kept, others = ([run for run in runs if run["seed"] in have] for runs in (ours, theirs))
    gains = paired_gains(kept, others, lambda run: float(figure(run)))  # type: ignore[arg-type]
    mean = estimate(gains) if len(gains) >= 3 else None
    p = sign_flip_p(gains) if len(gains) >= FEWEST else None
    return Difference(len(gains), mean, p, len(seeds) - len(have))


def figures(accuracy: float) -> dict[str, tuple[Callable[[Record], float | None], float]]:
    """What is compared, by its name: of a run, and within which differences do not matter, in its unit."""
    return {
        "held-out accuracy (points)": (lambda run: 100 * run["final"]["accuracy"], POINTS),
        f"known text at {accuracy:.0%} (nats)": (lambda run: known_loss_at(run, accuracy), NATS),
        "known text at the end (nats)": (lambda run: run["final"]["known_loss"], NATS),
        "held-out loss (nats)": (lambda run: run["final"]["eval_loss"], NATS),
    }


def section(folder: Path) -> list[str]:
    """The paragraphs and tables of the results page; none where nothing was run."""
    search, runs = read_records(folder / "search.jsonl"), read_records(folder / "sums.jsonl")
    if not runs:
        return []
    by_arm = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    accuracy = set_accuracy(search)
    last, seeds = runs[-1], sorted({run["seed"] for run in runs})
    hours = sum(run["cpu_seconds"] for run in (*search, *runs)) / 3600
    busy = [run["load_average"] for run in (*search, *runs)]
    return [
        "## Noise on a frozen base under LoRA",
        "The plan is older than the runs: [plans/lora_frozen.md](plans/lora_frozen.md). A small Llama that the recipe "
        f"makes learns sums in words, seeds {seeds[0]} to {seeds[-1]}; the settings of each arm are the best of "
        f"{len(search) // len(ARMS)} on a seed that judges nothing. {last['hardware']['device']}, "
        f"{last['hardware']['threads']} thread, torch {last['versions']['torch']}, {last['date']}, load average when "
        f"runs ended {min(busy):.1f} to {max(busy):.1f}, {hours:.2f} CPU hours in training, the search included. The "
        f"last run of an arm, as a command: `{by_arm['frozen'][-1]['command'] if by_arm['frozen'] else ''}`",
        _arms(by_arm, accuracy),
        "Differences seed by seed, with 95 % intervals (Student's t) and the p of the exact two-sided sign-flip test. "
        f"Known text is what the base had learned (loss before: {last['final']['known_loss_before']:.3f}), compared "
        f"where a run first reaches {accuracy:.0%} of the held-out sums, and at the end:",
        _differences(by_arm, accuracy),
        verdict(by_arm, accuracy),
        _not_in_the_plan(by_arm),
    ]


def verdict(by_arm: Mapping[str, Sequence[Record]], accuracy: float) -> str:
    """The two tests of the plan in words."""
    names = list(figures(accuracy))[:2]
    found = {name: difference(by_arm["frozen"], by_arm["plain"], figures(accuracy)[name][0]) for name in names}
    tested = {name: own.p for name, own in found.items() if own.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    said = []
    for name, own in found.items():
        if own.p is None or own.mean is None:
            said.append(f"{name}: no test, seeds: {own.pairs}")
            continue
        within = -figures(accuracy)[name][1] < own.mean.low and own.mean.high < figures(accuracy)[name][1]
        if adjusted[name] < LEVEL:
            what = f"{'more' if own.mean.mean > 0 else 'less'} by {abs(own.mean.mean):.2f}"
        else:
            what = "not told apart, " + ("and no difference of a size that matters" if within else "and it is open")
        said.append(f"{name}: {what} (p {own.p:.3g}, with Holm's correction {adjusted[name]:.3g})")
    return "Noise on the base against plain LoRA, the two tests of the plan. " + "; ".join(said) + "."


def at_accuracies_of_their_own(ours: Sequence[Record], theirs: Sequence[Record]) -> list[float]:
    """Differences of the loss on known text, each where both runs of a seed reach 0.8 of the lower accuracy at the
    end."""
    there, gains = {run["seed"]: run for run in theirs}, []
    for run in ours:
        if (other := there.get(run["seed"])) is not None:
            accuracy = OF_LOWEST * min(run["final"]["accuracy"], other["final"]["accuracy"])
            own, its = known_loss_at(run, accuracy), known_loss_at(other, accuracy)
            if own is not None and its is not None:
                gains.append(own - its)
    return gains


def _not_in_the_plan(by_arm: Mapping[str, Sequence[Record]]) -> str:
    """What was looked at after the runs, since the set accuracy may be one that few of them reach."""
    said = []
    for ours, theirs in PAIRS:
        gains = at_accuracies_of_their_own(by_arm[ours], by_arm[theirs])
        if len(gains) >= FEWEST:
            mean = estimate(gains)
            said.append(
                f"{ARMS[ours]} - {ARMS[theirs]} {mean.mean:+.2f} ({mean.low:+.2f} to {mean.high:+.2f}), "
                f"p {sign_flip_p(gains):.3g}, {len(gains)} seeds"
            )
    return (
        "Not in the plan, and no claim: the loss on known text where both runs of a seed reach 0.8 of the lower of "
        f"their accuracies at the end: {'; '.join(said) or 'too few seeds'}."
    )


def _arms(by_arm: Mapping[str, Sequence[Record]], accuracy: float) -> str:
    rows: list[Sequence[str]] = [("arm", "settings", "seeds", "held-out accuracy (%)")]
    rows[0] = (*rows[0], *list(figures(accuracy))[1:], "CPU seconds of a run")
    rows.append(("---",) * len(rows[0]))
    for arm, runs in by_arm.items():
        if not runs:
            continue
        cells = []
        for figure, _ in figures(accuracy).values():
            values = [value for run in runs if (value := figure(run)) is not None]
            few = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
            cells.append((_mean(values) if values else "never") + few)
        rows.append((ARMS[arm], settings(runs[-1]), str(len(runs)), *cells, _mean([r["cpu_seconds"] for r in runs])))
    return markdown_table(rows)


def _differences(by_arm: Mapping[str, Sequence[Record]], accuracy: float) -> str:
    rows: list[Sequence[str]] = [("difference", *figures(accuracy))]
    rows.append(("---",) * len(rows[0]))
    for ours, theirs in PAIRS:
        cells = []
        for figure, _ in figures(accuracy).values():
            own = difference(by_arm[ours], by_arm[theirs], figure)
            if own.mean is None:
                cells.append(f"seeds: {own.pairs}")
                continue
            tested = "no test" if own.p is None else f"p {own.p:.3g}"
            few = f", {own.left_out} left out" if own.left_out else ""
            cells.append(f"{own.mean.mean:+.2f} ({own.mean.low:+.2f} to {own.mean.high:+.2f}), {tested}{few}")
        rows.append((f"{ARMS[ours]} - {ARMS[theirs]}", *cells))
    return markdown_table(rows)


def settings(run: Record) -> str:
    """The flags of a run's command that its arm chose."""
    names = {"learning_rate": "lr", "lora_dropout": "dropout", "rwp_gamma": "gamma"}
    words = [word.removeprefix("--").partition("=") for word in run["command"].split()]
    found = {name: value for name, _, value in words if name in names}
    return ", ".join(f"{names[name]} {found[name]}" for name in names if name in found)


def _mean(values: Sequence[float]) -> str:
    return mean_and_deviation(list(values))
