"""What the plans in recipes/results/plans claim, as data, and what the records say of each claim.

A claim is one paired comparison that a plan names ahead of its runs. `outcomes` tests all of them, with Holm's
correction inside each family; a claim whose seeds are not all there has no verdict.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_rwp.runs.comparison import by_method, holm, markdown_table, mean_and_deviation, paired_gains, sign_flip_p
from hf_rwp.runs.methods import METHODS

Record = Mapping[str, Any]
Comparisons = Mapping[str, Sequence[Record]]  # the records of each file, by its name

PAIRS = 8  # seeds that a claim needs
LEAST = 0.5  # points: a smaller mean difference is called no effect, whatever its p
LEVEL = 0.05


def _lost(change: str, size: str) -> Callable[[Record], float]:
    return lambda run: 100 * (run["robustness"]["as_they_are"] - run["robustness"][change][size])


@dataclass(frozen=True)
class Figure:
    """What is compared of a run: its unit, the least difference that counts, and whether more of it is better."""

    title: str
    of: Callable[[Record], float]
    unit: str = "points"
    least: float = LEAST
    more_is_better: bool = True


FIGURES = {
    "top1": Figure("last accuracy", lambda run: 100 * run["top1"]),
    "early": Figure("accuracy with early stopping", lambda run: 100 * run["early"]["top1"]),
    "noise": Figure("accuracy lost under noise, gamma 0.03", _lost("noise", "0.03"), more_is_better=False),
    "bits": Figure("accuracy lost at 3 bits", _lost("bits", "3"), more_is_better=False),
    "pruned": Figure("accuracy lost with 30 % pruned", _lost("pruned", "0.3"), more_is_better=False),
    "rise": Figure(
        "rise of the training loss under noise, gamma 0.02",
        lambda run: float(run["robustness"]["rise"]["0.02"]),
        *("nats", 0.0, False),
    ),
}


@dataclass(frozen=True)
class Claim:
    """`ours` against `theirs` on a comparison. rivals: the figure of theirs, where it is another one than ours.

    family: whose tests are corrected together. sentence: of `SENTENCES`, in which it stands.
    """

    family: str
    sentence: str
    task: str
    file: str
    theirs: str = "base"
    figure: str = "top1"
    rivals: str | None = None
    ours: str = "rwp"

    @property
    def rival(self) -> str:
        return METHODS[self.theirs].title + (", stopped early" if self.rivals == "early" else "")


SENTENCES = {
    "wrong": "Wrong labels",
    "controls": "What does it",
    "wide": "Wrong labels, wider grids",
    "shares": "Other shares of wrong labels, and none",
    "weights": "Noise, rounding and pruning",
    "elsewhere": "A small transformer, and training that is over",
}
PLANS = {  # of each family, in the folder plans
    "40 % of labels random": "wrong_labels",
    "a wider grid": "wrong_labels_wide",
    "wrong labels on CIFAR-10": "cifar10_wrong_labels",
    "other shares": "wrong_labels",
    "robust weights": "weight_robustness",
    "small transformer": "small_transformers",
    "late noise": "late_rwp",
}
_AT_40 = ("40 % of labels random", "40 % of labels random", "digits_wrong40")
_CONFIG = "hf-rwp compare --config recipes/configs/compare/"
_SETTINGS = "--search false --settings_from digits_wrong40 digits_wrong40_narrow"
_SHARE = f"{_CONFIG}digits_wrong.yaml {_SETTINGS} --methods base sam rwp"
COMMANDS = {
    "digits_wrong40": f"{_CONFIG}digits_wrong.yaml",
    "digits_wrong_wide": f"{_CONFIG}digits_wrong_wide.yaml",
    "cifar10_wrong": f"{_CONFIG}cifar10_wrong.yaml --dataset uoft-cs/cifar10",
    "digits_wrong0": f"{_SHARE} --label_noise 0 --name digits_wrong0",
    "digits_wrong20": f"{_SHARE} --label_noise 0.2 --name digits_wrong20",
    "digits_wrong60": f"{_SHARE} --label_noise 0.6 --name digits_wrong60",
    "digits_wrong80": f"{_SHARE} --label_noise 0.8 --name digits_wrong80",
    "digits_next40": f"{_SHARE} --label_noise_kind asymmetric --name digits_next40",
    "digits_late": f"{_CONFIG}digits_late.yaml",
    "cifar10_late": f"{_CONFIG}cifar10_late.yaml --dataset uoft-cs/cifar10",
    "cifar10_vit_small": f"{_CONFIG}cifar10_vit_small.yaml --dataset uoft-cs/cifar10",
}
STOPPED = ("digits_wrong40_narrow",)  # begun by a plan, reported, and no ground of a claim


def _claims() -> Iterable[Claim]:
    family, task, file = _AT_40
    for theirs in ("base", "sam", "base_smooth"):
        yield Claim(family, "wrong", task, file, theirs)
    yield Claim(family, "wrong", task, file, "base", rivals="early")
    for theirs in ("base_halves", "rwp_unmixed"):
        yield Claim(family, "controls", task, file, theirs)
    pairs = (("rwp", "base"), ("rwp_unmixed", "base"), ("sam", "base"), ("rwp", "rwp_unmixed"), ("rwp_unmixed", "sam"))
    for ours, theirs in pairs:
        yield Claim("a wider grid", "wide", "digits, 40 % random", "digits_wrong_wide", theirs, ours=ours)
    for ours, theirs in (("rwp", "base"), ("sam", "base"), ("rwp", "sam"), ("rwp", "rwp_unmixed")):
        yield Claim("wrong labels on CIFAR-10", "wide", "CIFAR-10, 30 % random", "cifar10_wrong", theirs, ours=ours)
    shares = {"0": "all labels right", "20": "20 % random", "60": "60 % random", "80": "80 % random"}
    for share, said in shares.items():
        yield Claim("other shares", "shares", said, f"digits_wrong{share}")
    yield Claim("other shares", "shares", "40 % as the next class", "digits_next40")
    for file, said in (("digits_wrong0", "all labels right"), ("digits_wrong40", "40 % of labels random")):
        for figure in ("noise", "bits", "pruned"):
            yield Claim("robust weights", "weights", said, file, figure=figure)
    said = "ViT of 0.34 million weights, 500 images"
    for ours, theirs in (("rwp", "base"), ("sam", "base"), ("rwp", "sam")):
        yield Claim("small transformer", "elsewhere", said, "cifar10_vit_small", theirs, ours=ours)
    lates = (("digits_late", "two epochs more, 40 % random"), ("cifar10_late", "two epochs more, CIFAR-10"))
    for file, said in lates:
        for figure in ("top1", "rise", "noise"):
            yield Claim("late noise", "elsewhere", said, file, figure=figure)


CLAIMS = tuple(_claims())


@dataclass(frozen=True)
class Outcome:
    """Of a claim: means of both, the paired differences, p exact and corrected; None where seeds are missing."""

    claim: Claim
    ours: float
    theirs: float
    gains: Sequence[float]
    p: float | None = None
    corrected: float | None = None

    @property
    def figure(self) -> Figure:
        return FIGURES[self.claim.figure]

    @property
    def gain(self) -> float:
        return statistics.mean(self.gains)

    @property
    def verdict(self) -> str:
        """`better` or `worse` than theirs, `no effect`, or `unfinished`."""
        if self.corrected is None:
            return "unfinished"
        if self.corrected >= LEVEL or abs(self.gain) < self.figure.least:
            return "no effect"
        return "better" if (self.gain > 0) == self.figure.more_is_better else "worse"


def outcomes(comparisons: Comparisons) -> list[Outcome]:
    """What the records say of each claim that has a pair of runs, in the claims' order."""
    found = [outcome for claim in CLAIMS if (outcome := _outcome(claim, comparisons)) is not None]
    tested = []
    for family in dict.fromkeys(outcome.claim.family for outcome in found):
        mine = [outcome for outcome in found if outcome.claim.family == family]
        planned = sum(claim.family == family for claim in CLAIMS)
        finished = [outcome for outcome in mine if len(outcome.gains) >= PAIRS]
        ps = [sign_flip_p(outcome.gains) for outcome in finished]
        corrected = holm([*ps, *([1.0] * (planned - len(ps)))])  # what is unfinished counts as tested
        after = {id(outcome): pair for outcome, *pair in zip(finished, ps, corrected[: len(ps)], strict=True)}
        for outcome in mine:
            p, adjusted = after.get(id(outcome), (None, None))
            tested.append(Outcome(outcome.claim, outcome.ours, outcome.theirs, outcome.gains, p, adjusted))
    return tested


def _outcome(claim: Claim, comparisons: Comparisons) -> Outcome | None:
    runs = by_method(record for record in comparisons.get(claim.file, ()) if record["kind"] == "run")
    ours, theirs = ([*runs.get(name, ())] for name in (claim.ours, claim.theirs))
    figure, rival = FIGURES[claim.figure].of, FIGURES[claim.rivals or claim.figure].of
    seeds = {run["seed"] for run in ours} & {run["seed"] for run in theirs}
    if not seeds:
        return None
    ours, theirs = ([run for run in some if run["seed"] in seeds] for some in (ours, theirs))
    before = {run["seed"]: rival(run) for run in theirs}
    gains = [figure(run) - before[run["seed"]] for run in ours]
    return Outcome(claim, statistics.mean(map(figure, ours)), statistics.mean(before.values()), gains)


# In words


def said_of(outcome: Outcome) -> str:
    """One claim's part of a sentence: the figures, p, and the verdict."""
    claim, figure = outcome.claim, outcome.figure
    what = f"{METHODS[claim.ours].title} against {claim.rival}"
    amounts = f"{outcome.ours:.3g} against {outcome.theirs:.3g} %, {outcome.gain:+.1f} points"
    if figure.unit != "points":
        amounts = f"{outcome.ours:.3g} against {outcome.theirs:.3g}"
    if outcome.corrected is None:
        return f"{what}: {amounts}, {len(outcome.gains)} of {PAIRS} seeds, no claim"
    about = "" if claim.figure == "top1" else f" ({figure.title})"
    return f"{what}{about}: {amounts}, p {outcome.p:.2g}, {outcome.corrected:.2g} corrected: {emphasised(outcome)}"


def emphasised(outcome: Outcome) -> str:
    return f"**{outcome.verdict}**" if outcome.corrected is not None else outcome.verdict


def sentence(key: str, tested: Iterable[Outcome]) -> str:
    """A conclusion: all claims of a sentence, task by task, each task with its record; empty without runs."""
    mine = [outcome for outcome in tested if outcome.claim.sentence == key]
    tasks = dict.fromkeys((outcome.claim.task, outcome.claim.file) for outcome in mine)
    parts = []
    for task, file in tasks:
        some = "; ".join(said_of(outcome) for outcome in mine if outcome.claim.file == file)
        parts.append(f"{task[0].upper()}{task[1:]} ([record](compare/{file}.jsonl)): {some}")
    return f"**{SENTENCES[key]}.** {'. '.join(parts)}." if parts else ""


def in_short(key: str, tested: Iterable[Outcome]) -> str:
    """What a sentence's finished claims say of RWP's and SAM's accuracy in one line for README.md, rival by rival.

    Bold, and with its p, is what is more than chance.
    """
    finished = (outcome for outcome in tested if outcome.claim.sentence == key and outcome.corrected is not None)
    mine = [one for one in finished if one.figure.more_is_better and one.claim.ours in ("rwp", "sam")]
    tasks = list(dict.fromkeys(one.claim.task for one in mine))
    rivals: dict[str, list[str]] = {}
    for one in mine:
        gain = f"{round(one.gain, 1) + 0:+.1f}"
        told = gain if one.verdict == "no effect" else f"**{gain}**, p {one.p:.2g}"
        where = f" ({one.claim.task})" if len(tasks) > 1 else ""
        rivals.setdefault(f"{METHODS[one.claim.ours].title} over {one.claim.rival}", []).append(told + where)
    about = f" ({tasks[0]})" if len(tasks) == 1 else ""
    said = "; ".join(f"{pair} {', '.join(some)}" for pair, some in rivals.items())
    return f"{SENTENCES[key]}{about}, points: {said}." if mine else ""


def without_runs(tested: Iterable[Outcome]) -> list[str]:
    """The tasks of claims that have no pair of runs yet, or too few pairs for a claim."""
    tested = list(tested)
    there = {outcome.claim for outcome in tested if outcome.corrected is not None}
    pairs = {outcome.claim: len(outcome.gains) for outcome in tested}
    tasks = {
        claim.task: f"{claim.task} ({pairs.get(claim, 0)} of {PAIRS} pairs)" for claim in CLAIMS if claim not in there
    }
    return list(tasks.values())


def plans_of(key: str) -> list[str]:
    """The plans of a sentence's claims."""
    return list(dict.fromkeys(PLANS[claim.family] for claim in CLAIMS if claim.sentence == key))


def in_favour(key: str, tested: Iterable[Outcome]) -> dict[str, Sequence[float]]:
    """For a sentence's picture: of each claim in points the paired differences, above 0 where ours is better."""
    return {
        f"{outcome.claim.task}: {METHODS[outcome.claim.ours].title} over {outcome.claim.rival}"
        + ("" if outcome.claim.figure == "top1" else f"\n{outcome.figure.title}"): [
            gain if outcome.figure.more_is_better else -gain for gain in outcome.gains
        ]
        for outcome in tested
        if outcome.claim.sentence == key and outcome.figure.unit == "points"
    }


def claims_table(tested: Iterable[Outcome]) -> str:
    """A row a claim, with the command that makes its runs."""
    heads = ("task", "figure", "RWP, or the first", "against", "difference", "seeds", "p", "corrected", "", "repeat")
    rows: list[Sequence[str]] = [heads, ("---",) * len(heads)]
    for outcome in tested:
        claim, precise = outcome.claim, ".1f" if outcome.figure.unit == "points" else ".3f"
        rows.append(
            (
                claim.task,
                outcome.figure.title,
                f"{METHODS[claim.ours].title} {outcome.ours:{precise}}",
                f"{claim.rival} {outcome.theirs:{precise}}",
                f"{outcome.gain:+{precise}}",
                str(len(outcome.gains)),
                "" if outcome.p is None else f"{outcome.p:.3g}",
                "" if outcome.corrected is None else f"{outcome.corrected:.3g}",
                emphasised(outcome),
                f"`{COMMANDS[claim.file]}`",
            )
        )
    return markdown_table(rows)


def robustness_table(runs: Iterable[Record]) -> str:
    """Of runs that measured it, a row a method: accuracy (%) as they are, noisy, rounded, pruned, and sharpness."""
    found = {name: [run for run in mine if "robustness" in run] for name, mine in by_method(runs).items()}
    found = {name: mine for name, mine in found.items() if mine}
    if not found:
        return ""
    first = next(iter(found.values()))[0]["robustness"]
    columns = [("noise", size, f"gamma {size}") for size in first["noise"]]
    columns += [("bits", size, f"{size} bits") for size in first["bits"]]
    columns += [("pruned", size, f"{float(size):.0%} pruned") for size in first["pruned"]]
    heads = ("method", "as it is", *(title for *_, title in columns), "loss rise, gamma 0.02", "training loss")
    rows: list[Sequence[str]] = [heads, ("---",) * len(heads)]
    for name, mine in found.items():
        measured = [run["robustness"] for run in mine]
        cells = [f"{100 * statistics.mean(each[kind][size] for each in measured):.1f}" for kind, size, _ in columns]
        whole = f"{100 * statistics.mean(each['as_they_are'] for each in measured):.1f}"
        rise = f"{statistics.mean(each['rise']['0.02'] for each in measured):.3f}"
        loss = f"{statistics.mean(each['train']['loss'] for each in measured):.3f}"
        rows.append((METHODS[name].title, whole, *cells, rise, loss))
    return markdown_table(rows)


def no_help(comparisons: Comparisons, titles: Mapping[str, str]) -> dict[str, list[str]]:
    """For each method where it was not above plain training, in planned comparisons: its difference and plain p.

    titles: of the comparisons that are looked at. Methods without a finished comparison are left out.
    """
    found: dict[str, list[str]] = {}
    for file, title in titles.items():
        runs = by_method(record for record in comparisons.get(file, ()) if record["kind"] == "run")
        for name, mine in runs.items():
            gains = paired_gains(mine, runs.get("base", ()), FIGURES["top1"].of)
            if name == "base" or len(gains) < PAIRS:
                continue
            p, gain = sign_flip_p(gains), statistics.mean(gains)
            where = found.setdefault(name, [])
            if gain < LEAST or p >= LEVEL:
                where.append(f"{title} ({gain:+.1f} points, p {p:.2g})")
    return found


def stopped_table(runs: Iterable[Record]) -> str:
    """Of runs that were watched on held-out images: last, early-stopped and peak accuracy (%) of each method."""
    found = {name: [run for run in mine if "early" in run] for name, mine in by_method(runs).items()}
    heads = ("method", "last", "stopped early, by held-out images", "peak, in hindsight", "last over plain, p")
    rows: list[Sequence[str]] = [heads, ("---",) * len(heads)]
    for name, mine in found.items():
        gains = paired_gains(mine, found.get("base", ()), FIGURES["top1"].of)
        if mine:
            rows.append(
                (
                    METHODS[name].title,
                    *(mean_and_deviation([100 * value(run) for run in mine]) for value in _STOPS),
                    "" if name == "base" or not gains else f"{sign_flip_p(gains):.3g}",
                )
            )
    return markdown_table(rows) if len(rows) > 2 else ""


_STOPS: tuple[Callable[[Record], float], ...] = (
    lambda run: float(run["top1"]),
    lambda run: float(run["early"]["top1"]),
    lambda run: float(run["peak"]),
)
