"""Pictures of a training run."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's palette, apart for every kind of colour vision; lines and markers are apart in grey, too.
_LOSSES: dict[str, dict[str, Any]] = {
    "train_loss": {"label": "mean", "color": "#777777", "linestyle": ":", "marker": "."},
    "loss_perturbed": {"label": "perturbed weights", "color": "#D55E00", "linestyle": "--", "marker": "s"},
    "loss_clean": {"label": "clean weights", "color": "#0072B2", "linestyle": "-", "marker": "o"},
}
_TOP1: dict[str, dict[str, Any]] = {
    "top1": {"label": "weights", "color": "#009E73", "linestyle": "-", "marker": "o"},
    "top1_ema": {"label": "average of weights", "color": "#CC79A7", "linestyle": "--", "marker": "s"},
}


def training_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a PNG: losses on the left, held-out top-1 accuracy in percent on the right, over the epochs.

    history: one mapping an epoch with epoch, train_loss and, where they exist, loss_clean, loss_perturbed, top1 and
    top1_ema (fractions in [0, 1]); other keys are ignored. Losses that span more than a factor of ten get a
    logarithmic axis. The last accuracy is written out, top1_ema where there is one.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)

    for key, style in _LOSSES.items():
        _plot(losses, history, key, style)
    _finish(losses, "Training loss")
    if len(losses.lines) > 1:
        losses.legend(frameon=False, reverse=True)
    if _span(history) > 10:
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        losses.yaxis.set_minor_formatter(NullFormatter())

    for key, style in _TOP1.items():
        _plot(accuracy, history, key, style, scale=100)
    if len(accuracy.lines) > 1:
        accuracy.legend(frameon=False)
    _finish(accuracy, "Held-out top-1 accuracy (%)")
    for point in [(x, y) for line in accuracy.lines for x, y in line.get_xydata()][-1:]:
        accuracy.annotate(f"{point[1]:.2f} %", point, (0, -8), textcoords="offset points", ha="right", va="top")
    figure.savefig(path, format="png", dpi=150)


def _plot(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, style: dict[str, Any], scale: float = 1) -> None:
    points = [(row["epoch"], scale * row[key]) for row in history if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=2, markersize=5 if len(points) <= 30 else 0, **style)


def _span(history: Sequence[Mapping[str, Any]]) -> float:
    """The largest loss over the smallest; 1 where no loss is above 0."""
    losses = [row[key] for row in history for key in _LOSSES if (row.get(key) or 0) > 0]
    return max(losses) / min(losses) if losses else 1.0


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# Okabe and Ito's eight colours, each with a marker and a line of its own.
_SERIES: list[dict[str, Any]] = [
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    {"color": "#56B4E9", "marker": "^", "linestyle": "-."},
    {"color": "#009E73", "marker": "v", "linestyle": ":"},
    {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    {"color": "#CC79A7", "marker": "P", "linestyle": "--"},
    {"color": "#0072B2", "marker": "X", "linestyle": "-."},
    {"color": "#F0E442", "marker": "*", "linestyle": ":", "markeredgecolor": "#777777"},
]


def comparison(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: str | os.PathLike[str]) -> None:
    """Write a PNG that sets training methods side by side: accuracy over epochs, over time, and at the end over cost.

    runs: for the name of each method (at most 8) the histories of its runs, one a seed: mappings with epoch, seconds,
    gradients (gradient evaluations of each image so far) and top1 (a fraction in [0, 1]). Lines are means over seeds;
    bars at the end span a standard deviation either way.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    epochs, seconds, cost = figure.subplots(1, 3, sharey=True)
    for (name, histories), style in zip(runs.items(), _SERIES, strict=False):
        length = min(map(len, histories))
        top1 = np.array([[100 * row["top1"] for row in history[:length]] for history in histories])
        for axes, key in ((epochs, "epoch"), (seconds, "seconds")):
            places = np.array([[row[key] for row in history[:length]] for history in histories]).mean(0)
            axes.plot(places, top1.mean(0), label=name, linewidth=1.5, markersize=4, **style)
        last = np.array([100 * history[-1]["top1"] for history in histories])
        gradients = float(np.mean([history[-1]["gradients"] for history in histories]))
        deviation = last.std(ddof=1) if len(last) > 1 else None
        cost.errorbar(gradients, last.mean(), yerr=deviation, capsize=3, markersize=8, **{**style, "linestyle": "none"})
    for axes, title, unit in (
        (epochs, "Accuracy over epochs", "epoch"),
        (seconds, "Accuracy over training time", "seconds of training"),
        (cost, "Accuracy at the end, over cost", "gradient evaluations of each image"),
    ):
        axes.set_title(title, loc="left")
        axes.set_xlabel(unit)
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    epochs.set_ylabel("top-1 accuracy (%)")
    cost.margins(x=0.15)
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, format="png", dpi=150)
