"""`hf-rwp curves RUN RUN...`: the curves of runs over one another, in one picture, and their last figures in a table.

A run is a folder that a recipe left, or its results.json. A file of records, RECORDS.jsonl, stands for each run in it,
one of compare.py for each of its methods, in the mean over seeds.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rwp.runs.files import replacing
from hf_rwp.runs.mistakes import Parser
from hf_rwp.runs.screen import fitted

RESULTS = "results.json"
ENDINGS = (".png", ".svg", ".pdf", ".jpg", ".webp")
_FIGURES = ("train_loss", "eval_loss", "eval_loss_ema", "top1", "top1_ema")


@dataclass(frozen=True)
class Curves:
    """place: what a legend calls the run, its folder's name first, then those of the folders around. title: method and
    size of the noise. data: what it was evaluated on and how many images that is, where that is known."""

    place: tuple[str, ...]
    title: str
    data: tuple[str, int | None] | None
    history: Sequence[Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="hf-rwp curves", description=str(__doc__).split("\n\n")[1].replace("\n", " "), allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="outputs/NAME, a results.json, or RECORDS.jsonl")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("outputs/curves.png"),
        help=f"the picture ({', '.join(ENDINGS)}); outputs/curves.png if not set",
    )
    options = parser.parse_args(argv)
    if options.output.suffix not in ENDINGS:
        raise ValueError(f"--output {options.output} must end in one of {', '.join(ENDINGS)}")
    draw(options.runs, options.output)


def draw(runs: Sequence[str], output: Path) -> None:
    """Write the picture, and print a table of what the runs ended with.

    Raises ValueError for what is no run, for runs without curves, and for runs that were evaluated on unlike data.
    """
    once: dict[Path, str] = {}  # however often a run is named, and in whatever way
    for run in runs:
        place = Path(run).expanduser().resolve()
        once.setdefault(place.parent if place.name == RESULTS else place, run)
    found = [curves for run in once.values() for curves in curves_of(run)]
    refuse_unlike_data(found)
    named = dict(zip(names_of(found), (curves.history for curves in found), strict=True))
    from hf_rwp.analysis.run_plots import overlaid_curves

    with replacing(output) as partial:
        overlaid_curves(named, partial, output.suffix[1:])
    print(f"{table(named)}\nWrote {output}")


def curves_of(run: str) -> list[Curves]:
    """Those of a run's folder, a results.json or a file of records."""
    path = Path(run).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        from hf_rwp.runs.records import read_records

        return curves_of_records(path, read_records(path))
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{run} {why_not_a_run(path)}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): name the folder of a run") from error
    if not isinstance(results, dict) or not isinstance(results.get("arguments"), dict):
        raise ValueError(f"{file} is not the {RESULTS} of a run: it has no arguments. Name the folder of a run")
    parts = [part for part in path.resolve().parts if part not in (RESULTS, path.anchor)]
    return [curves_of_results(results, str(file), tuple(reversed(parts)))]


def why_not_a_run(path: Path) -> str:
    """What a path is in place of a run, and what to do."""
    if not path.exists():
        return "does not exist: name the folder of a run, such as outputs/NAME"
    if not path.is_dir():
        return "is neither a folder, a results.json nor a file of records (.jsonl)"
    inside = [item.name for item in sorted(path.iterdir()) if (item / RESULTS).is_file()]
    if inside:
        return f"is not a run, but holds some: name {', '.join(str(path / name) for name in inside[:3])}"
    if (path / "checkpoints").is_dir() or list(path.glob("checkpoint-*")):
        return f"is a run that has not finished: go on with it, --resume_from_checkpoint {path}"
    return f"is not a run, which has a {RESULTS}: name the folder of a run, such as outputs/NAME"


def curves_of_results(results: Mapping[str, Any], file: str, place: tuple[str, ...]) -> Curves:
    """Of what a results.json holds, or a record of it."""
    from hf_rwp.analysis.run_plots import title_of

    arguments, validation = results["arguments"], results.get("data", {}).get("validation", {})
    history = [row for row in results.get("history") or () if any(row.get(name) is not None for name in _FIGURES)]
    if not history:
        raise ValueError(f"{file} has no history, of which curves are made: it was cut, or written by something else")
    data = arguments.get("dataset") or arguments.get("data_dir") or ("digits" if "data_dir" in arguments else None)
    data = data or arguments.get("data_file")
    count = validation.get("images", validation.get("samples"))
    return Curves(place, title_of(results), (str(data), count) if data or count else None, history)


def curves_of_records(path: Path, records: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Of each record that `hf-rwp record` wrote, and of each method and terms that compare.py did."""
    runs = [record for record in records if record.get("kind") == "run" and record.get("history")]
    if runs:
        return curves_of_comparison(path, runs)
    found = [record for record in records if isinstance(record.get("arguments"), dict)]
    if not found:
        raise ValueError(f"{path} holds no runs, but {len(records)} records of something else")
    numbered = len(found) > 1
    return [
        curves_of_results(record, f"{path}, line {number},", (f"{path.stem} {number}" if numbered else path.stem,))
        for number, record in enumerate(found, start=1)
    ]


def curves_of_comparison(path: Path, runs: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """The means over seeds. Where runs were cut short, because they diverged, only the whole ones count."""
    from hf_rwp.runs.comparison import by_method, by_protocol

    found, protocols = [], by_protocol(runs)
    for protocol, of_protocol in protocols.items():
        for name, mine in by_method(of_protocol).items():
            histories: list[Any] = [record["history"] for record in mine]
            whole = [history for history in histories if len(history) == max(map(len, histories))]
            rows = [mean_of(rows) for rows in zip(*whole, strict=True)]
            task, seeds = mine[0]["task"], f"{len(whole)} seed{'s' if len(whole) > 1 else ''}"
            data = str(task.get("dataset") or task.get("data_dir") or "digits")
            terms = f", equal {protocol}" if len(protocols) > 1 else ""
            title = f"{_title(name, mine[0]['settings'])}{terms}, {seeds}"
            found.append(Curves((path.stem,), title, (data, mine[0]["images"]["evaluated"]), rows))
    return found


def _title(name: str, settings: Mapping[str, Any]) -> str:
    from hf_rwp.runs.methods import METHODS

    strength = settings.get("strength")
    symbol = "gamma" if METHODS[name].rwp is not None else "rho"
    return METHODS[name].title + (f", {symbol} {strength:g}" if strength is not None else "")


def mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean row of runs; without a figure that one of them lacks."""
    kept = [name for name in ("epoch", *_FIGURES) if all(row.get(name) is not None for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in kept}


def refuse_unlike_data(found: Sequence[Curves]) -> None:
    """Raise ValueError where two runs were evaluated on other images, as far as that is known."""
    known = [curves for curves in found if curves.data is not None]
    for curves in known[1:]:
        if curves.data != known[0].data:
            first, other = (f"{c.place[0]} on {c.data[0]}, {_counted(c.data[1])}" for c in (known[0], curves) if c.data)
            raise ValueError(
                f"the runs were evaluated on unlike data ({first}; {other}), whose curves say nothing over one "
                "another: name runs on the same held-out images"
            )


def _counted(count: int | None) -> str:
    return "of an unknown number" if count is None else f"{count:,} held out"


def names_of(found: Sequence[Curves]) -> list[str]:
    """What a legend calls the runs: as much of their folders' names as tells them apart, and what they are."""
    depths = [1 + (curves.place[0].isdigit() and len(curves.place) > 1) for curves in found]  # outputs/NAME/2 is NAME/2
    while True:
        names = ["/".join(reversed(curves.place[:depth])) for curves, depth in zip(found, depths, strict=True)]
        full = [f"{name}: {curves.title}" for name, curves in zip(names, found, strict=True)]
        twice = {name for name, count in Counter(full).items() if count > 1}
        deeper = [
            min(depth + (name in twice), len(curves.place))
            for name, depth, curves in zip(full, depths, found, strict=True)
        ]
        if deeper == depths:
            return [f"{name} ({number})" if name in twice else name for number, name in enumerate(full, start=1)]
        depths = deeper


def table(named: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The last figures of each run, and the best accuracy of its epochs."""
    rows = [("epochs", "top-1", "best", "held-out loss", "training loss", "run")]
    for name, history in named.items():
        top1 = [value for row in history if (value := row.get("top1_ema", row.get("top1"))) is not None]
        last = history[-1]
        losses = (last.get("eval_loss_ema", last.get("eval_loss")), last.get("train_loss"))
        percents = [f"{value:.2%}" for value in ((top1[-1], max(top1)) if top1 else ())] or ["-", "-"]
        shown = [f"{loss:.4f}" if loss is not None else "-" for loss in losses]
        rows.append((f"{last['epoch']:.4g}", *percents, *shown, name))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)) for row in rows)
    return fitted(
        "\n".join(f"{line}  {row[-1]}" for line, row in zip(lines, rows, strict=True)),
        indent=" " * (sum(widths[:-1]) + 2 * len(widths[:-1])),
    )
