"""What a demonstration says at its end: a table, and sentences whose figures are those of the runs that it is given.

runs, here: for the name of each method, `base`, `rwp` and perhaps `sam`, its runs, one for each of the same seeds, as
recipes/demo.py records them: mappings with task, seed, top1, gradients, seconds, images (`evaluated`) and landscape.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_rwp.runs.comparison import markdown_table, mean_and_deviation, paired_gains, sign_flip_p
from hf_rwp.runs.methods import METHODS, Settings

_Settings = tuple[tuple[str, float | None], ...]
Runs = Mapping[str, Sequence[Mapping[str, Any]]]
FEWEST_SEEDS = 6  # of fewer, no sign-flip test ends below 0.05
STEP = 0.25  # from the weights, in norms of their filters: where the words look at the landscape
ONE_SEED = "One seed is one draw, and another may end otherwise: --seeds 0 1 2 3 4 5 trains with six."
CAVEAT = (
    "This is a task where flat minima are said to help: many labels are wrong, and training lasts long enough to fit "
    "some of them. Where labels are right expect no gain. What ten seeds say is in recipes/results/README.md."
)
_NAMES = {"base": "plain training", "sam": "SAM", "rwp": "RWP"}


def table(runs: Runs) -> list[str]:
    """A row for each method under one of heads, in aligned columns of at most 80 characters; means over seeds."""
    rows = [("", "top-1 (%)", "errors", "gradients", "seconds", "loss rise nearby")]
    for name, mine in runs.items():
        rows.append(
            (
                METHODS[name].title,
                mean_and_deviation([100 * run["top1"] for run in mine]),
                _mean_count(errors(mine)),
                f"{_mean(mine, 'gradients'):.3g}",
                f"{_mean(mine, 'seconds'):.3g}",
                f"{loss_rise(mine):.2g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def words(runs: Runs) -> list[str]:
    """A sentence or two on RWP against plain training, against SAM where it ran, on flatness, and on the task."""
    rwp, seeds = runs["rwp"], len(runs["rwp"])
    over = f", on average over {seeds} seeds" if seeds > 1 else ""
    made = f"RWP made {_mean_count(errors(rwp))} errors on {rwp[0]['images']['evaluated']:,} held-out images{over}"
    said = [f"{made}; {_against(rwp, runs['base'], 'base')}"]
    if "sam" in runs:
        made = _against(rwp, runs["sam"], "sam")
        said.append(made)
    said += [_flatness(runs), *([ONE_SEED] if seeds == 1 else []), CAVEAT]
    return said


def title(runs: Runs) -> str:
    """The task and the seeds, for the picture."""
    first, count = runs["rwp"][0], len(runs["rwp"])
    seeds = f"mean ± standard deviation over {count} seeds" if count > 1 else f"seed {first['seed']}"
    noise, epochs = f"{100 * first['task']['label_noise']:g} %", first["task"]["epochs"]
    return f"Digits, {noise} of the training labels random, {epochs} epochs: {seeds}"


def pairs_table(runs: Runs) -> str:
    """In Markdown, for each pair of methods: the difference of their accuracies over the same seeds, and its p."""
    rows = [("difference", "points of top-1, mean ± standard deviation", "seeds for, against", "p"), ("---",) * 4]
    for ours, theirs in (("rwp", "base"), ("rwp", "sam"), ("sam", "base")):
        if {ours, theirs} <= set(runs):
            gains = _gains(runs[ours], runs[theirs])
            points = [100 * gain / runs[ours][0]["images"]["evaluated"] for gain in gains]
            counts = f"{sum(gain > 0 for gain in gains)}, {sum(gain < 0 for gain in gains)}"
            said = mean_and_deviation(points, sign=True), counts, f"{sign_flip_p(gains):.2g}"
            rows.append((f"{METHODS[ours].title} over {METHODS[theirs].title}", *said))
    return markdown_table(rows)


def search_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: for each method and settings that were tried the mean accuracy over the seeds of the search, in
    percent, bold where it is the method's best."""
    rows = [("method", "lr, weight decay, rho or gamma", "held-out top-1 (%)"), ("---",) * 3]
    tried = _tried(trials)
    best = {name: best_of_search(trials, name) for name, _ in tried}
    for (name, settings), found in tried.items():
        shown = ", ".join(f"{value:g}" for _, value in settings if value is not None)
        accuracy = mean_and_deviation([100 * top1 for top1 in found])
        rows.append((METHODS[name].title, shown, f"**{accuracy}**" if dict(settings) == best[name] else accuracy))
    return markdown_table(rows)


def best_of_search(trials: Sequence[Mapping[str, Any]], name: str) -> Settings:
    """The settings of a method whose mean accuracy over the seeds of the search is the highest; of equal ones the
    first."""
    tried = {settings: found for (method, settings), found in _tried(trials).items() if method == name}
    best = max(tried, key=lambda settings: statistics.mean(tried[settings]))
    return dict(best)


def errors(mine: Sequence[Mapping[str, Any]]) -> list[int]:
    """Held-out images that each run got wrong."""
    return [round((1 - run["top1"]) * run["images"]["evaluated"]) for run in mine]


def loss_rise(mine: Sequence[Mapping[str, Any]]) -> float:
    """How much higher the training loss is at `STEP` from the weights than at them, the mean of both ways and of seeds.

    nan where a loss is not a finite number.
    """
    rises = []
    for run in mine:
        found = zip(run["landscape"]["coordinates"], run["landscape"]["losses"], strict=True)
        losses = {place: math.nan if loss is None else loss for place, loss in found}
        rises.append((losses[-STEP] + losses[STEP]) / 2 - losses[0.0])
    return statistics.mean(rises)


def _against(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], rival: str) -> str:
    mine, other = statistics.mean(errors(ours)), statistics.mean(errors(theirs))
    if mine == other:
        made = f"{_NAMES[rival]} made as many"
    else:
        share = f" ({100 * abs(mine - other) / other:.0f} %)" if other else ""
        made = f"{_NAMES[rival]} made {_mean_count(errors(theirs))}, so that RWP made "
        made += f"{abs(mine - other):.3g} {'fewer' if mine < other else 'more'}{share}"
    gradients, seconds = (_mean(ours, key) / _mean(theirs, key) for key in ("gradients", "seconds"))
    cost = f"RWP took {_factor(gradients, 'as many')} gradients and {_factor(seconds, 'about the same')} time"
    return f"{made}. {cost}.{_chance(ours, theirs)}"


def _chance(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """Of more than one seed: on how many of them RWP made fewer errors, and whether that is more than chance."""
    gains = _gains(ours, theirs)
    if len(gains) < 2:
        return ""
    fewer, more = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    seeds = f" Fewer with RWP on {fewer} seed{'s' * (fewer != 1)}, more on {more}"
    if len(gains) < FEWEST_SEEDS:
        return f"{seeds}: too few seeds to tell that from chance."
    p = sign_flip_p(gains)
    verdict = "which is more than chance" if p < 0.05 else "which is no more than chance"
    return f"{seeds}, {verdict} (p = {p:.2g}, exact sign-flip test)."


def _gains(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each seed, how many errors fewer ours made than theirs."""
    return paired_gains(ours, theirs, lambda run: -errors([run])[0])


def _tried(trials: Sequence[Mapping[str, Any]]) -> dict[tuple[str, _Settings], list[float]]:
    """The accuracies of each method's settings, one a seed: of those that were tried with all seeds of the search."""
    tried: dict[tuple[str, _Settings], dict[int, float]] = {}
    for trial in trials:  # the same trial in two grids counts once
        tried.setdefault((trial["method"], tuple(trial["settings"].items())), {})[trial["seed"]] = trial["top1"]
    seeds = {trial["seed"] for trial in trials}
    return {key: list(found.values()) for key, found in tried.items() if set(found) == seeds}


def _flatness(runs: Runs) -> str:
    rises = {name: loss_rise(mine) for name, mine in runs.items()}
    if not all(map(math.isfinite, rises.values())):
        return "Around some of the weights the training loss is not a finite number."
    ours, rivals = rises["rwp"], [name for name in runs if name != "rwp"]
    shown = ", ".join(f"{rises[name]:.2g} from {_NAMES[name]}'s" for name in rivals)
    places = " and ".join(f"{_place(ours, rises[name])} {_NAMES[name]}'s" for name in rivals)
    return (
        f"A step of {STEP:g} norms of a filter in a random direction raises the training loss by {ours:.2g} from RWP's "
        f"weights, {shown}: RWP's place is {places}."
    )


def _place(ours: float, theirs: float) -> str:
    if f"{ours:.2g}" == f"{theirs:.2g}":
        return "as flat as"
    return "flatter than" if ours < theirs else "steeper than"


def _factor(ratio: float, same: str) -> str:
    """`half the`, `1.4 times the`; `same` within a twentieth."""
    if abs(ratio - 1) < 0.05:
        return same
    return "half the" if abs(ratio - 0.5) < 0.01 else f"{ratio:.2g} times the"


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(float(run[key]) for run in runs)


def _mean_count(counts: Sequence[float]) -> str:
    """Of one count it is itself; of more their mean with one decimal."""
    return f"{counts[0]:g}" if len(counts) == 1 else f"{statistics.mean(counts):.1f}"
