"""Write what the records say into README.md and recipes/results/README.md, with pictures.

```bash
python recipes/report.py
```

Every figure comes from a line of `recipes/results/*/*.jsonl`, the words about them too: a difference between two
methods is called one where the 95 % interval of the paired differences over seeds (Student's t) leaves out 0. It covers
only seeds: not which settings the one search happened to choose, and not that many differences are looked at.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_rwp.cli import refuse_missing

refuse_missing("report", __name__)  # ahead of the imports that would fail
from hf_rwp.runs.mistakes import Parser, told_in_a_line

if __name__ == "__main__":  # ahead of the slow imports
    with told_in_a_line():
        Parser(description=__doc__.splitlines()[0], epilog="It has no other flags.").parse_args()

from hf_rwp.analysis.plots import (
    accuracy_over_gamma,
    comparison,
    demonstration,
    differences,
    landscape,
    sharpness_curves,
)
from hf_rwp.analysis.sharpness import Estimate, estimate
from hf_rwp.experiments import forgetting
from hf_rwp.experiments.claims import (
    COMMANDS,
    SENTENCES,
    STOPPED,
    claims_table,
    in_favour,
    in_short,
    no_help,
    outcomes,
    plans_of,
    robustness_table,
    stopped_table,
    without_runs,
)
from hf_rwp.experiments.claims import (
    sentence as conclusion,
)
from hf_rwp.experiments.demonstration import pairs_table, search_table, title, words
from hf_rwp.experiments.gammas import for_picture, is_finished
from hf_rwp.experiments.gammas import section as gamma_section
from hf_rwp.runs.comparison import (
    accuracy_curves,
    by_method,
    by_protocol,
    comparison_table,
    markdown_table,
    mean_and_deviation,
)
from hf_rwp.runs.methods import METHODS, PROTOCOLS
from hf_rwp.runs.records import read_records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
SHOWN = ("base", "sam", "sam10", "rwp", "rwp_1x")  # in README.md
IN_README = ("wide", "shares")
RIVALS = ("base", "sam", "sam10")
SEARCH_SEEDS = (100, 101)  # of the demonstration, by its plan
UNDECIDED = "not to be told apart"
AXIS = "percentage points in favour of the first, a dot a seed"
BEGIN, END = "<!-- results: python recipes/report.py -->", "<!-- end of results -->"


def main() -> None:
    comparisons, benchmarks = read_comparisons(RESULTS), read_benchmarks(RESULTS)
    for name, runs in comparisons.items():
        for protocol, mine in by_protocol(runs).items():
            comparison(accuracy_curves(mine), RESULTS / "compare" / f"{name}_{protocol}.png")
    shown = read_demonstration(RESULTS)
    if shown:
        runs = by_method(record for record in shown if record["kind"] == "run")
        demonstration(
            {METHODS[name].title: mine for name, mine in runs.items()}, RESULTS / "demo" / "digits.png", title(runs)
        )
    landscapes = read_landscapes(RESULTS)
    for name, record in landscapes.items():
        planes = {model: found["train"]["plane"] for model, found in record["models"].items()}
        coordinates = next(iter(record["models"].values()))["train"]["plane_coordinates"]
        landscape(planes, coordinates, RESULTS / "landscape" / f"{name}.png")
        sharpness_curves(record["models"], RESULTS / "landscape" / f"{name}_sharpness.png")
    tested = outcomes(comparisons)
    for key in SENTENCES:
        gains = in_favour(key, tested)
        if gains:
            (RESULTS / "claims").mkdir(exist_ok=True)
            differences(gains, RESULTS / "claims" / f"{key}.png", AXIS)
    gammas = read_gammas(RESULTS)
    drawn = {name: for_picture(records) for name, records in gammas.items() if is_finished(records)}
    if drawn:
        accuracy_over_gamma(drawn, RESULTS / "gamma" / "grid.png")
    (RESULTS / "README.md").write_text(page(RESULTS), encoding="utf-8")
    readme = ROOT / "README.md"
    section = brief(comparisons, benchmarks)
    readme.write_text(with_section(readme.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(f"Wrote {RESULTS / 'README.md'}, pictures beside it, and the results in {readme}")


def read_comparisons(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each comparison, by its name."""
    found = {file.stem: read_records(file) for file in sorted((folder / "compare").glob("*.jsonl"))}
    return {name: records for name, records in found.items() if any(record["kind"] == "run" for record in records)}


def read_benchmarks(folder: Path) -> list[dict[str, Any]]:
    """The last record of each file of benchmarks."""
    return [read_records(file)[-1] for file in sorted((folder / "benchmark").glob("*.jsonl"))]


def read_landscapes(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of each file of landscapes, by its name."""
    return {file.stem: read_records(file)[-1] for file in sorted((folder / "landscape").glob("*.jsonl"))}


def read_demonstration(folder: Path) -> list[dict[str, Any]]:
    """The runs of the demonstration, and the trials of its search that chose; none where it has not run."""
    runs = read_records(folder / "demo" / "digits.jsonl")
    files = sorted((folder / "demo").glob("search_*.jsonl"))
    searched = [record for file in files for record in read_records(file) if record["kind"] == "trial"]
    return runs and [*runs, *(trial for trial in searched if trial["seed"] in SEARCH_SEEDS)]


def read_gammas(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each model on which the gamma finder was validated, by its name."""
    return {file.stem: read_records(file) for file in sorted((folder / "gamma").glob("*.jsonl"))}


def with_section(text: str, section: str) -> str:
    """`text` with `section` between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}: put them where the results belong")
    return f"{before}{BEGIN}\n{section}\n{end}{after}"


def brief(comparisons: Mapping[str, Sequence[Mapping[str, Any]]], benchmarks: Sequence[Mapping[str, Any]]) -> str:
    """For README.md, a line each: what a step costs, and what was planned and found."""
    lines = []
    for record in benchmarks:
        medians: dict[str, list[float]] = {}
        for row in step_rows(record):
            medians.setdefault(row["what"], []).append(row["median"])
        ratios = ", ".join(f"{what} {min(found):.3g} to {max(found):.3g}" for what, found in medians.items())
        models = len({row["model"] for row in step_rows(record)})
        lines.append(f"- Costs ({models} models on {record['hardware']['device']}): {ratios}.")
    tested = outcomes(comparisons)
    lines += [f"- {line}" for key in IN_README if (line := in_short(key, tested))]
    return "\n".join(lines)


def conclusions(comparisons: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What the plans' runs say: a sentence and a picture for each part, where nothing helps, a row for each claim."""
    tested = outcomes(comparisons)
    if not tested:
        return []
    parts = [
        "## Conclusions",
        (
            "Planned ahead of the runs ([plans](plans)), eight paired seeds a claim, exact two-sided sign-flip tests; "
            "corrected: by Holm, inside a plan's family. Better, worse: corrected p under 0.05, at least 0.5 points. "
            "What is called no effect may be one that eight seeds cannot show."
        ),
    ]
    for key in SENTENCES:
        said = conclusion(key, tested)
        if said:
            parts.append(f"- {said}")
    unfinished = without_runs(tested)
    if unfinished:
        parts.append(f"Planned, and not run to the end: {'; '.join(unfinished)}.")
    for key, topic in SENTENCES.items():
        if in_favour(key, tested):
            plans = ", ".join(f"[{plan}](plans/{plan}.md)" for plan in plans_of(key))
            parts.append(f"![{topic}: paired differences](claims/{key}.png)\n\n{topic}; planned in {plans}.")
    parts.append("## Where it does not help")
    titles = {file: described(comparisons[file]) for file in COMMANDS if file in comparisons}
    for name, where in no_help(comparisons, titles).items():
        said = "; ".join(where) or "none of the tasks that were planned: try it on yours ahead of believing that"
        parts.append(f"> **{METHODS[name].title}** does not help (not clearly above plain training) on: {said}.")
    return [*parts, "## Every claim, and the command that makes its runs", claims_table(tested)]


def step_rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a benchmark that compare whole steps."""
    return [row for row in record["rows"] if "step /" in row["what"] or "/ step" in row["what"]]


def summary(comparisons: Mapping[str, Sequence[Mapping[str, Any]]], benchmarks: Sequence[Mapping[str, Any]]) -> str:
    """What a step costs; on each task, under each of its terms, top-1 of the methods and RWP's gain."""
    parts = []
    for record in benchmarks:
        parts.append(
            f"What a step costs, on {machine(record)}; medians over rounds of the ratio within a round (quartiles):"
        )
        parts.append(costs(step_rows(record)))
    rows = [
        (
            "task",
            "terms",
            "seeds",
            *(METHODS[name].title for name in SHOWN),
            *(f"RWP over {METHODS[name].title}" for name in RIVALS),
        )
    ]
    rows.append(("---",) * len(rows[0]))
    for records in comparisons.values():
        for number, (protocol, runs) in enumerate(by_protocol(records).items()):
            found = by_method(runs)
            task = "" if number else described(records)
            accuracies = [mean_and_deviation([100 * run["top1"] for run in found.get(name, [])]) for name in SHOWN]
            gains = [gain_cell(found.get("rwp", []), found.get(name, [])) for name in RIVALS]
            rows.append((task, PROTOCOLS[protocol], str(max(map(len, found.values()))), *accuracies, *gains))
    if comparisons:
        parts.append(
            "Top-1 accuracy (%), mean ± standard deviation over seeds; more methods are in the full tables. At equal "
            "images SAM computes two gradients of each, SAM every 10th step 1.1, and the others one. Differences are "
            "in points, bold where their 95 % interval over seeds leaves out 0 (not corrected for their number). With "
            "wrong labels the search ended at a weight decay that all chose; with a wider grid, planned ahead, RWP's "
            "lead was no longer more than chance ([plan](plans/cifar10_wrong_labels.md)):"
        )
        parts.append(markdown_table(rows))
    return "\n\n".join(["", *parts, ""])


def gain_cell(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """The mean difference in points, bold where it is one; empty where there are fewer than three seeds of both."""
    kind, gain = verdict(ours, theirs)
    if gain is None:
        return ""
    points = f"{round(gain.mean, 2) + 0.0:+.2f}"  # no -0.00
    return points if kind == UNDECIDED else f"**{points}**"


def page(folder: Path) -> str:
    """All of recipes/results/README.md, from the records in a folder."""
    records = read_comparisons(folder), read_benchmarks(folder), read_landscapes(folder), read_demonstration(folder)
    return details(*records) + gamma_section(read_gammas(folder))


def details(
    comparisons: Mapping[str, Sequence[Mapping[str, Any]]],
    benchmarks: Sequence[Mapping[str, Any]],
    landscapes: Mapping[str, Mapping[str, Any]],
    shown: Sequence[Mapping[str, Any]] = (),
) -> str:
    """For recipes/results/README.md: every table and picture, and what stood behind it."""
    parts = [
        "# Results",
        "Rendered from the records in this folder by `python recipes/report.py`; do not edit. A record is one run: its "
        "command, settings, seed, versions, hardware, commit, date and figures. Accuracy is that of the last epoch on "
        "images that chose nothing; ± is the standard deviation over seeds. `against plain` is the mean of the "
        "differences seed by seed. Settings are learning rate, weight decay, and rho or gamma. Intervals cover only "
        "seeds: not which settings the search happened to choose, and not that many differences are looked at.",
    ]
    parts += conclusions(comparisons)
    if comparisons or benchmarks:
        unplanned = {name: records for name, records in comparisons.items() if name not in (*COMMANDS, *STOPPED)}
        parts += ["## Costs, and comparisons without a plan", summary(unplanned, benchmarks).strip()]
    if shown:
        parts += demonstrated(shown)
    for name, records in comparisons.items():
        parts.append(f"## {described(records)}")
        parts.append(conditions(records))
        if name in COMMANDS:
            parts.append(f"Planned; claims are made above. Repeat all of it: `{COMMANDS[name]}`")
        for protocol, runs in by_protocol(records).items():
            parts.append(f"### {PROTOCOLS[protocol].capitalize()}")
            parts += [comparison_table(runs), *filter(None, (stopped_table(runs), robustness_table(runs)))]
            parts.append(f"![accuracy over epochs, time and cost](compare/{name}_{protocol}.png)")
            if name not in (*COMMANDS, *STOPPED):
                parts.append(sentence(described(records), by_method(runs)))
    for record in benchmarks:
        parts.append(f"## What a step costs, on {machine(record)}")
        parts.append(
            f"`{record['command']}`, {record['date']}, torch {record['versions']['torch']}, load average "
            f"{record['load_average']:.2f} when it began. Medians over rounds, and quartiles; ratios are taken within "
            "rounds. Limits are the project's own. `lora` are adapted linear layers and nothing else, the case in "
            "which a draw costs most; `llama_135m, lora` has the shape of SmolLM2-135M."
        )
        parts.append(costs(record["rows"]))
    parts += forgetting.section(RESULTS / "lora")
    for name, record in landscapes.items():
        parts.append(f"## The loss around {' and '.join(record['models'])}")
        parts.append(
            f"`{record['command']}`, {record['date']}: {record['data']['train']['images']} images to train on, and "
            f"{record['data']['validation']['images']} held out. One seed each: what it looks like, not what to expect."
        )
        parts.append(f"![the loss on a plane through the weights](landscape/{name}.png)")
        parts.append(f"![weight noise, rounding, curvature](landscape/{name}_sharpness.png)")
    return "\n\n".join(parts) + "\n"


def demonstrated(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `hf-rwp demo` shows, over seeds: records as `read_demonstration` gives."""
    runs = by_method(record for record in records if record["kind"] == "run")
    trials = [record for record in records if record["kind"] == "trial"]
    first, seeds = runs["rwp"][0], sorted(run["seed"] for run in runs["rwp"])
    busy = [record["load_average"] for mine in runs.values() for record in mine]
    hardware = f"{first['hardware']['device']}, {first['hardware']['threads']} thread(s)"
    return [
        "## The demonstration",
        f"What `hf-rwp demo` shows with one seed, by its [plan](plans/demo.md): {described(records)}, seeds {seeds[0]} "
        f"to {seeds[-1]}, each with wrong labels of its own. `{first['command']}`, {first['date']}, {hardware}, load "
        f"average when the runs began {min(busy):.1f} to {max(busy):.1f}; the methods took turns, so that it was alike "
        "for all. Accuracy is that of the last epoch.",
        comparison_table(record for mine in runs.values() for record in mine),
        "![accuracy, cost, and the loss around the weights](demo/digits.png)",
        " ".join(words(runs)),
        f"p is that of a two-sided exact sign-flip test over the {len(seeds)} seeds; the plan's test is the first:",
        pairs_table(runs),
        f"Settings were chosen by accuracy on {trials[0]['images']['evaluated']} held-out training images, the mean "
        f"over seeds {' and '.join(map(str, SEARCH_SEEDS))}, which judge nothing:",
        search_table(trials),
    ]


def machine(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    ranks = f"{hardware['replicas']} ranks of {hardware['threads']} thread(s) each"
    return f"{hardware['device']}, {ranks}, and one process of {hardware.get('threads_alone', hardware['threads'])}"


def costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each figure of a benchmark, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["what"], row["model"]): row for row in rows}
    lines = [("", *(model or "any model" for model in models)), ("---",) * (len(models) + 1)]
    for what in dict.fromkeys(row["what"] for row in rows):
        lines.append((what, *(cost_cell(found.get((what, model))) for model in models)))
    return markdown_table(lines)


def cost_cell(row: Mapping[str, Any] | None) -> str:
    """The median with its quartiles, and the limit, where there is one, with whether it holds."""
    if row is None:
        return ""
    low, high = row["quartiles"]
    said = f"{row['median']:.3g}" + ("" if low == high else f" ({low:.3g} to {high:.3g})")
    if row["limit"] is None:
        return said
    verdict = f"{'≥' if row['at_least'] else '≤'} {row['limit']:g} {'holds' if row['holds'] else 'missed'}"
    return f"{said}; {verdict}{'' if row['clear'] else ', within the spread'}"


def described(records: Sequence[Mapping[str, Any]]) -> str:
    """A comparison's task in a few words."""
    first = next(record for record in records if record["kind"] != "note")
    task, replicas = first["task"], first.get("replicas", 1)
    data = task["data_dir"] or task.get("dataset") or "digits"
    data = {"cifar10": "CIFAR-10", "uoft-cs/cifar10": "CIFAR-10"}.get(data, data)
    images = f", {task['train_images']:,} images" if "train_images" in task else ""
    wrong = "the next class" if task.get("label_noise_kind") == "asymmetric" else "random"
    noise = f", {task['label_noise']:.0%} of labels {wrong}" if "label_noise" in task else ""
    before = f" after {task['pretrain_epochs']} plain ones" if "pretrain_epochs" in task else ""
    ranks = f", {replicas} replicas" if replicas > 1 else ""
    return f"{data}, {task['model']}{images}, {task['epochs']} epochs{before}{noise}{ranks}"


def conditions(records: Sequence[Mapping[str, Any]]) -> str:
    """What a reader must know to believe a table."""
    task, runs = records[0]["task"], [record for record in records if record["kind"] == "run"]
    hardware, versions = runs[-1]["hardware"], runs[-1]["versions"]
    settings = ", ".join(f"{key} {value}" for key, value in task.items() if key not in ("data_dir", "dataset", "model"))
    busy = [run["load_average"] for run in runs]
    said = [
        f"{task['model']}; {settings}; evaluated on {runs[0]['images']['evaluated']:,} images. {hardware['device']}, "
        f"{hardware['threads']} thread(s) a process, torch {versions['torch']}, load average when the runs began "
        f"{min(busy):.1f} to {max(busy):.1f}: on a busy machine compare costs by gradients, not by time."
    ]
    trials = [record for record in records if record["kind"] == "trial"]
    if trials:
        tried = len({str(trial["settings"]) for trial in trials if trial["method"] == trials[0]["method"]})
        searched = dict.fromkeys(trial["protocol"] for trial in trials)
        others = any(run["protocol"] not in searched for run in runs)
        said.append(
            f"Each method's settings are the best of {tried} by accuracy on {trials[0]['images']['evaluated']:,} "
            f"held-out training images, at {' and, apart, at '.join(PROTOCOLS[name] for name in searched)}, with one "
            f"seed{'; other protocols use the same' if others else ''}."
        )
    else:
        said.append("Settings were given, not searched.")
    return " ".join(said + [record["text"] for record in records if record["kind"] == "note"])


def sentence(task: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the runs of a task say of RWP against each of its rivals."""
    if len(runs) < 2 or "rwp" not in runs:
        return f"{task}: RWP has not been run beside another method."
    said = []
    for rival in RIVALS:
        if rival in runs:
            kind, gain = verdict(runs["rwp"], runs[rival])
            interval = "" if gain is None else f" ({gain.mean:+.2f}, 95 % interval {gain.low:+.2f} to {gain.high:+.2f})"
            said.append(f"{kind}{interval} {'from' if kind == UNDECIDED else 'than'} {METHODS[rival].title}")
    best = max(runs, key=lambda name: statistics.mean(run["top1"] for run in runs[name]))
    return f"{task}: RWP is {', '.join(said)}. The best mean has {METHODS[best].title}."


def verdict(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[str, Estimate | None]:
    """Whether accuracies differ, by the 95 % interval of their paired differences over seeds, in points.

    Of two seeds or fewer no interval is made.
    """
    there = {run["seed"]: run["top1"] for run in theirs}
    gains = [100 * (run["top1"] - there[run["seed"]]) for run in ours if run["seed"] in there]
    if len(gains) < 3:
        return UNDECIDED, None
    gain = estimate(gains)
    return ("better" if gain.low > 0 else "worse" if gain.high < 0 else UNDECIDED), gain


if __name__ == "__main__":
    with told_in_a_line():
        main()
