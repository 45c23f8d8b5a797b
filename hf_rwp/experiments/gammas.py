"""What the records of `recipes/gamma.py --validate true` say: proposals beside the best gamma of a grid.

A file has the records of one model: `kind` is plain, with what the finder measured on the way (`states`), grid, or
proposal, trained with what the plain run of its seed proposed.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_rwp.runs.comparison import markdown_table

Record = Mapping[str, Any]

SIZE = 0.2  # of the mean noise, relative to the weights
TOLERANCE = 1.0  # points of accuracy
NEAR = 10.0  # points below the best, of gammas that tell how much seeds differ


@dataclass(frozen=True)
class Judged:
    """A model's grid and what rules proposed. Accuracies are means over seeds, in percent.

    proposals: by rule, the geometric mean over seeds, None where one had none. top1: with these; of the finder by runs,
    of the others interpolated over log gamma. tolerance: how much may be lost, in points, for a hit.
    """

    model: str
    seeds: int
    plain: float
    grid: Mapping[float, float]
    tolerance: float
    proposals: Mapping[str, float | None]
    top1: Mapping[str, float | None]

    @property
    def best(self) -> float:
        return max(self.grid, key=lambda gamma: self.grid[gamma])

    def lost(self, rule: str) -> float | None:
        """Points of accuracy, against the best of the grid."""
        found = self.top1[rule]
        return None if found is None else self.grid[self.best] - found

    def ratio(self, rule: str) -> float | None:
        found = self.proposals[rule]
        return None if found is None else found / self.best

    def hit(self, rule: str) -> bool:
        lost = self.lost(rule)
        return lost is not None and lost <= self.tolerance


def _at(state: str) -> Callable[[Record], float | None]:
    def gamma(plain: Record) -> float | None:
        found = plain["states"][state]["filter"]
        return None if found is None else float(found["gamma"])

    return gamma


def _curvature(plain: Record) -> float | None:
    """Where gamma^2, through the smallest noise that was tried first, reaches what is allowed."""
    found = plain["states"]["1"]["filter"]
    (level,) = (level for level in found["levels"] if math.isclose(level["gamma"], 0.0025))
    return level["gamma"] * math.sqrt(found["allowed"] / level["rise"]) if level["rise"] > 0 else None


def _size(plain: Record) -> float | None:
    found = plain["states"]["1"]["filter"]
    return float(found["gamma"] * SIZE / found["mean_size"])


FINDER = "finder"
RULES: dict[str, Callable[[Record], float | None]] = {  # what the plain run of a seed proposes
    FINDER: _at("1"),
    "after half of the steps": _at("0.5"),
    "after a quarter": _at("0.25"),
    "as initialized": _at("0"),
    "curvature": _curvature,
    f"noise of {SIZE:.0%}": _size,
    "always 0.01": lambda plain: 0.01,
}


def judge(records: Sequence[Record]) -> Judged:
    """What the records of one model say."""
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in ("plain", "grid", "proposal")}
    gammas = sorted({record["gamma"] for record in kinds["grid"]})
    seeds = {gamma: [100 * r["top1"] for r in kinds["grid"] if r["gamma"] == gamma] for gamma in gammas}
    grid = {gamma: statistics.mean(top1) for gamma, top1 in seeds.items()}
    near = [top1 for gamma, top1 in seeds.items() if max(grid.values()) - grid[gamma] <= NEAR and len(top1) > 1]
    spread = math.sqrt(statistics.mean(statistics.variance(top1) for top1 in near)) if near else 0.0
    proposals: dict[str, float | None] = {}
    for rule, propose in RULES.items():
        found = [propose(plain) for plain in kinds["plain"]]
        known = [gamma for gamma in found if gamma is not None]
        proposals[rule] = statistics.geometric_mean(known) if len(known) == len(found) else None
    top1 = {rule: None if gamma is None else interpolated(grid, gamma) for rule, gamma in proposals.items()}
    top1[FINDER] = 100 * statistics.mean(record["top1"] for record in kinds["proposal"])
    plain = 100 * statistics.mean(record["top1"] for record in kinds["plain"])
    tolerance = max(TOLERANCE, 2 * spread)
    return Judged(records[0]["model"], len(kinds["plain"]), plain, grid, tolerance, proposals, top1)


def interpolated(grid: Mapping[float, float], gamma: float) -> float:
    """The accuracy between two gammas of the grid, linear in log gamma; that of its end beyond it."""
    if gamma <= min(grid):
        return grid[min(grid)]
    for low, high in pairwise(sorted(grid)):
        if gamma <= high:
            part = math.log(gamma / low) / math.log(high / low)
            return (1 - part) * grid[low] + part * grid[high]
    return grid[max(grid)]


def finder_table(models: Sequence[Judged]) -> str:
    """A row a model: the best of the grid, and the finder's proposal beside it."""
    heads = (
        "model, seeds, plain (%), best of the grid, with it (%), proposal, of the best, with it (%), lost (points), hit"
    )
    rows: list[Sequence[str]] = [heads.split(", ")]
    rows.append(["---"] * len(rows[0]))
    for found in models:
        proposal, ratio, lost = found.proposals[FINDER], found.ratio(FINDER), found.lost(FINDER)
        rows.append(
            (
                found.model,
                str(found.seeds),
                f"{found.plain:.2f}",
                f"{found.best:g}",
                f"{found.grid[found.best]:.2f}",
                f"{proposal:.3g}",
                f"{ratio:.2f}",
                f"{found.top1[FINDER]:.2f}",
                f"{lost:.2f}",
                f"{'yes' if found.hit(FINDER) else 'no'} (≤ {found.tolerance:.2f})",
            )
        )
    return markdown_table(rows)


def rules_table(models: Sequence[Judged]) -> str:
    """A row a rule: how far it is from the best, on the whole, and for each model the ratio and the points lost."""
    rows: list[Sequence[str]] = [
        ("rule", "hits", "lost on average", "off by a factor of", *(found.model for found in models))
    ]
    rows.append(("---",) * len(rows[0]))
    for rule in RULES:
        ratios = [ratio for found in models if (ratio := found.ratio(rule)) is not None]
        factor = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in ratios)) if ratios else None
        cells = []
        for found in models:
            ratio, points = found.ratio(rule), found.lost(rule)
            cells.append("no proposal" if ratio is None or points is None else f"{ratio:.2f}, {points:+.2f}")
        hits = f"{sum(found.hit(rule) for found in models)} of {len(models)}"
        lost = mean_lost(models, rule)
        rows.append((rule, hits, *("" if n is None else f"{n:.2f}" for n in (lost, factor)), *cells))
    return markdown_table(rows)


def is_finished(records: Sequence[Record]) -> bool:
    """Whether all seeds have a run with the proposal, which is their last."""
    seeds = {record["seed"] for record in records}
    return {record["seed"] for record in records if record["kind"] == "proposal"} == seeds != set()


def section(gammas: Mapping[str, Sequence[Record]]) -> str:
    """For recipes/results/README.md: proposals of `find_gamma` beside the best of a grid. gammas: records by model."""
    done = {name: records for name, records in gammas.items() if is_finished(records)}
    if not done:
        return ""
    models = [judge(records) for records in done.values()]
    first, others = next(iter(done.values()))[0], [name for name in gammas if name not in done]
    parts = [
        "## How far off the gamma finder is",
        f"The plan is [plans/gamma_finder.md](plans/gamma_finder.md); {first['date']}, torch "
        f"{first['versions']['torch']}, {first['hardware']['device']}. `hf-rwp gamma --validate true --config "
        "recipes/configs/gamma/NAME.yaml` repeats a model's runs."
        + (f" Not finished, and not here: {', '.join(others)}." if others else ""),
        finder_table(models),
        words(models),
        "![accuracy over the gamma of training](gamma/grid.png)",
        "The same measurements by other rules: the proposal over the best of the grid, and the points lost (for other "
        "rules than the finder interpolated between the grid's points):",
        rules_table(models),
    ]
    return "\n" + "\n\n".join(parts) + "\n"


def words(models: Sequence[Judged]) -> str:
    """What came out, whichever rule it favors."""
    hits = {rule: sum(found.hit(rule) for found in models) for rule in RULES}
    lost = {rule: mean_lost(models, rule) for rule in RULES}
    worst = max(models, key=lambda found: found.lost(FINDER) or 0.0)
    better = [rule for rule, points in lost.items() if points is not None and points < (lost[FINDER] or 0.0)]
    simpler = f"On average less is lost by: {', '.join(better)}" if better else "No other rule loses less"
    return (
        f"The finder hits {hits[FINDER]} of {len(models)}, and loses {lost[FINDER]:.2f} points on average, the most, "
        f"{worst.lost(FINDER):.2f}, on {worst.model}. {simpler}. Where seeds differ much a hit says little."
    )


def mean_lost(models: Sequence[Judged], rule: str) -> float | None:
    """Points, over models; None where a rule had no proposal for some."""
    lost = [points for found in models if (points := found.lost(rule)) is not None]
    return statistics.mean(lost) if len(lost) == len(models) else None


def for_picture(records: Sequence[Record]) -> dict[str, Any]:
    """What `plots.accuracy_over_gamma` takes of a model."""
    found = judge(records)
    shown = (FINDER, f"noise of {SIZE:.0%}", "always 0.01")
    return {
        "gammas": sorted(found.grid),
        "top1": [
            [r["top1"] for r in records if r["kind"] == "grid" and r["gamma"] == gamma] for gamma in sorted(found.grid)
        ],
        "plain": [record["top1"] for record in records if record["kind"] == "plain"],
        "proposals": {rule: gamma for rule in shown if (gamma := found.proposals[rule]) is not None},
    }
