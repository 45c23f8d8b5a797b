"""Pictures of a training run: its curves, its curves beside those of others, and which classes it takes for which."""

import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hf_rwp.analysis.plots import LOOKS, logarithmic_axis, tidy

StrPath = str | os.PathLike[str]

CURVES, CONFUSION = "curves.png", "confusion.png"
_LOSSES: dict[str, dict[str, Any]] = {
    "train_loss": {"label": "training, mean", "color": "#777777", "linestyle": ":", "marker": "."},
    "loss_perturbed": {"label": "training, perturbed weights", "color": "#D55E00", "linestyle": "--", "marker": "s"},
    "loss_clean": {"label": "training, clean weights", "color": "#0072B2", "linestyle": "-", "marker": "o"},
    "eval_loss": {"label": "held-out", "color": "#009E73", "linestyle": "-", "marker": "^"},
    "eval_loss_ema": {"label": "held-out, average of weights", "color": "#CC79A7", "linestyle": "--", "marker": "v"},
    "known_loss": {"label": "text known before", "color": "#E69F00", "linestyle": "-.", "marker": "D"},
}
_TOP1: dict[str, dict[str, Any]] = {
    "top1": {"label": "weights", "color": "#009E73", "linestyle": "-", "marker": "^"},
    "top1_ema": {"label": "average of weights", "color": "#CC79A7", "linestyle": "--", "marker": "v"},
}
_MOST_NUMBERS = 20  # classes up to which each cell of a confusion matrix has its number


def pictures_of_run(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write curves.png and, where there are figures by class, confusion.png; returns their paths.

    results: what results.json holds, see `hf_rwp.runs.records.Results`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [folder / CURVES]
    training_curves(results["history"], drawn[0], title_of(results))
    if "by_class" in results:
        drawn.append(folder / CONFUSION)
        confusion_matrix(results["by_class"], drawn[1], title_of(results))
    return drawn


def title_of(results: Mapping[str, Any]) -> str:
    """A run in a few words: the model, the method and the size of its noise, or SAM's radius."""
    arguments, final = results["arguments"], results.get("final", {})
    model = results.get("model", {}).get("name") or arguments.get("model")
    method = arguments.get("method") or ("rwp" if arguments.get("rwp") else "base")
    words = [model] if isinstance(model, str) else []
    if method == "rwp":
        done = final.get("rwp", {})
        gamma, alpha = (done.get(name, arguments.get(f"rwp_{name}")) for name in ("gamma", "alpha"))
        words += [
            "RWP",
            *(f"{name} {value:g}" for name, value in (("gamma", gamma), ("alpha", alpha)) if value is not None),
        ]
    elif method == "sam":
        words += ["SAM", *([f"rho {arguments['sam_rho']:g}"] if arguments.get("sam_rho") is not None else [])]
    else:
        words.append("plain training" if method == "base" else method)
    return ", ".join(words)


def training_curves(
    history: Sequence[Mapping[str, Any]],
    path: StrPath,
    title: str = "",
    accuracy_title: str = "Held-out top-1 accuracy (%)",
) -> None:
    """Write a PNG: losses on the left, held-out top-1 accuracy in percent on the right, over the epochs.

    history: one mapping an epoch with epoch, train_loss and, where they exist, loss_clean, loss_perturbed, eval_loss
    and eval_loss_ema (held-out), known_loss (on text that the model knew before), top1 and top1_ema (fractions in
    [0, 1]); other keys are ignored. Losses that span more than a factor of ten get a logarithmic axis. The last
    accuracy is written out beside its curve, top1_ema's if there is one. title: of the whole, such as `title_of` a run.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    figure.suptitle(title, parse_math=False)

    for key, style in _LOSSES.items():
        _plot(losses, history, key, style)
    _finish(losses, "Loss", _span(history, _LOSSES))
    if losses.lines:
        losses.legend(frameon=False, reverse=True, fontsize=9)

    for key, style in _TOP1.items():
        _plot(accuracy, history, key, style, scale=100)
    if len(accuracy.lines) > 1:
        accuracy.legend(frameon=False)
    _finish(accuracy, accuracy_title)
    for last in [y for line in accuracy.lines for _, y in line.get_xydata()][-1:]:  # beside the panel: no curve there
        where = ("axes fraction", "data")
        accuracy.annotate(f"{last:.2f} %", (1, last), (4, 0), where, "offset points", ha="left", va="center")
    figure.savefig(path, format="png", dpi=150)


def overlaid_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: StrPath, kind: str | None = None) -> None:
    """Write a picture, of the kind that the path's ending says if none is given: runs over one another.

    runs: by what the legend calls them, their histories as `training_curves` takes them. The panels are training loss,
    held-out loss and held-out top-1 accuracy, the last two of averaged weights where a run has those. A run has one
    look in all of them.
    """
    figure = Figure(figsize=(13, 4 + 0.22 * -(-len(runs) // 2)), layout="constrained")
    panels = figure.subplots(1, 3)
    empty = [{**look, "markerfacecolor": "white"} for look in LOOKS]  # for the ninth run and those after it
    looks = list(itertools.islice(itertools.cycle([*LOOKS, *empty]), len(runs)))
    shown = (("train_loss",), ("eval_loss_ema", "eval_loss"), ("top1_ema", "top1"))
    titles = ("Training loss", "Held-out loss", "Held-out top-1 accuracy (%)")
    for axes, keys, title in zip(panels, shown, titles, strict=True):
        for (name, history), look in zip(runs.items(), looks, strict=True):
            key = next((key for key in keys if any(row.get(key) is not None for row in history)), keys[-1])
            _plot(axes, history, key, {**look, "label": name}, scale=100 if "top1" in key else 1)
        spans = [_span(history, keys) for history in runs.values()] if "loss" in title else []
        _finish(axes, title, max(spans, default=1.0))
    handles = [matplotlib.lines.Line2D([], [], linewidth=2, markersize=5, **look) for look in looks]
    legend = figure.legend(handles, list(runs), loc="outside lower center", ncols=2, handlelength=3, frameon=False)
    _plain_text(legend.get_texts())
    _save(figure, path, format=kind)


def confusion_matrix(by_class: Mapping[str, Any], path: StrPath, title: str = "") -> None:
    """Write a PNG: for the images of each class the shares that are taken for each class, and the class's accuracy.

    by_class: `hf_rwp.runs.records.ByClass`, of up to 100 classes. Up to 20 of them each cell has its number of images.
    title: as of `training_curves`.
    """
    counts = np.asarray(by_class["confusion"], dtype=float)
    totals, count = counts.sum(1), len(counts)
    shares = np.divide(counts, totals[:, None], out=np.zeros_like(counts), where=totals[:, None] > 0)
    names = [_short(name, 24 if count <= _MOST_NUMBERS else 18) for name in by_class["names"]]
    side, font = max(2.6, min(0.5 * count, 3 + 0.11 * count)), 9 if count <= 30 else 7 if count <= 60 else 6
    figure = Figure(figsize=(side + 4.2, side + 1.9), layout="constrained")
    matrix, accuracy = figure.subplots(1, 2, width_ratios=(side, 1.6), sharey=True)

    # The root of the shares: a mistake in one image of a hundred must show beside a class that is nearly right.
    image = matrix.imshow(
        np.ma.masked_equal(shares, 0), cmap=_colors(), norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest"
    )
    for row, column in itertools.product(range(count), repeat=2) if count <= _MOST_NUMBERS else ():
        if counts[row, column]:
            color = "white" if shares[row, column] > 0.3 else "black"
            text = f"{counts[row, column]:.0f}"
            matrix.text(column, row, text, ha="center", va="center", color=color, fontsize=font)
    upright = count <= 3 and max(map(len, names)) <= 12
    matrix.set_xticks(range(count), names, rotation=0 if upright else 90, fontsize=font)
    matrix.set_yticks(range(count), names, fontsize=font)
    matrix.set_xlabel("taken for")
    matrix.set_ylabel("is", rotation=0, ha="right", va="center")
    for axis in (matrix.xaxis, matrix.yaxis):
        axis.set_minor_locator(matplotlib.ticker.FixedLocator([row + 0.5 for row in range(count - 1)]))
    matrix.grid(which="minor", color="#E5E5E5", linewidth=0.5)
    matrix.tick_params(which="both", length=0)
    matrix.set_title("Held-out images", loc="left")
    _plain_text([*matrix.get_xticklabels(), *matrix.get_yticklabels()])
    bar = figure.colorbar(
        image, ax=matrix, location="top", shrink=0.6, aspect=10 * side, pad=0.01, ticks=(0.01, 0.1, 0.5, 1)
    )
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.set_label("share of the class's images", fontsize=9)

    right = [100 * value if value is not None else 0.0 for value in by_class["accuracy"]]
    bars = accuracy.barh(range(count), right, 0.8, color="#56B4E9")
    texts = [
        f"{value:.1f}" if known is not None else "no images"
        for value, known in zip(right, by_class["accuracy"], strict=True)
    ]
    accuracy.bar_label(bars, texts, padding=2, fontsize=font)
    accuracy.set_xlim(0, 135)  # room for the numbers
    accuracy.set_xticks((0, 50, 100))
    accuracy.tick_params(axis="y", which="both", left=False, labelleft=False)
    tidy(accuracy, "Accuracy (%)", "")
    accuracy.grid(visible=False)
    total = np.trace(counts) / counts.sum() if counts.sum() else 0.0
    figure.suptitle(f"{title + ': ' if title else ''}top-1 {total:.2%}".replace("%", " %"), parse_math=False)
    _save(figure, path, format="png")


def _colors() -> Any:
    """From a blue that is seen on white, so that no mistake is lost, to a dark one."""
    return matplotlib.colors.ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.2, 1, 256)))


def _short(name: Any, most: int) -> str:
    """In one line; what is longer is cut in its middle, since names often begin alike."""
    line = " ".join(str(name).split())
    half = (most - 1) // 2
    return line if len(line) <= most else f"{line[: most - 1 - half]}…{line[len(line) - half :]}"


def _plain_text(texts: Iterable[Any]) -> None:
    """Names are no formulas, whatever dollars they hold."""
    for text in texts:
        text.set_parse_math(False)


def _save(figure: Figure, path: StrPath, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # names in any script
        figure.savefig(path, dpi=150, **options)


def _plot(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, style: dict[str, Any], scale: float = 1) -> None:
    points = [(row["epoch"], scale * row[key]) for row in history if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=2, markersize=5 if len(points) <= 30 else 0, **style)


def _span(history: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> float:
    """The largest loss over the smallest; 1 where no loss is above 0."""
    losses = [row[key] for row in history for key in keys if (row.get(key) or 0) > 0]
    return max(losses) / min(losses) if losses else 1.0


def _finish(axes: Axes, title: str, span: float = 1.0) -> None:
    tidy(axes, title, "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if span > 10:
        logarithmic_axis(axes)
