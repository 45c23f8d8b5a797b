"""Pictures of methods side by side, and of how flat the loss is around what they ended in."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

StrPath = str | os.PathLike[str]

# Okabe and Ito's palette, apart for every kind of color vision; lines and markers are apart in gray, too.
# One look for each model or method, in every panel.
LOOKS: list[dict[str, Any]] = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#E69F00", "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (1, 1)), "marker": "X"},
    {"color": "#F0E442", "linestyle": "-", "marker": "*", "markeredgecolor": "#777777"},
]
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
_HATCHES = ["", "//", "..", "xx", "\\\\", "++", "oo"]


def comparison(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: StrPath) -> None:
    """Write a PNG that sets training methods side by side: accuracy over epochs, over time, and at the end over cost.

    runs: for the name of each method the histories of its runs, one a seed: mappings with epoch, seconds,
    gradients (gradient evaluations of each image so far) and top1 (a fraction in [0, 1]). Lines are means over seeds;
    bars at the end span a standard deviation either way.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    epochs, seconds, cost = figure.subplots(1, 3, sharey=True)
    costs = [float(np.mean([history[-1]["gradients"] for history in histories])) for histories in runs.values()]
    for index, ((name, histories), style) in enumerate(zip(runs.items(), itertools.cycle(LOOKS), strict=False)):
        length = max(map(len, histories))
        whole = [history for history in histories if len(history) == length]  # the others diverged on the way
        top1 = np.array([[100 * row["top1"] for row in history] for history in whole])
        for axes, key in ((epochs, "epoch"), (seconds, "seconds")):
            places = np.array([[row[key] for row in history] for history in whole]).mean(0)
            axes.plot(places, top1.mean(0), label=name, linewidth=1.5, markersize=4, **style)
        last = np.array([100 * history[-1]["top1"] for history in histories])
        beside = (index - (len(runs) - 1) / 2) * max(costs) / 80  # methods of equal cost would hide each other
        deviation = last.std(ddof=1) if len(last) > 1 else None
        cost.errorbar(
            costs[index] + beside,
            last.mean(),
            yerr=deviation,
            capsize=3,
            markersize=8,
            **{**style, "linestyle": "none"},
        )
    for axes, title, unit in (
        (epochs, "Accuracy over epochs", "epoch"),
        (seconds, "Accuracy over training time", "seconds of training"),
        (cost, "Accuracy at the end, over cost", "gradient evaluations of each image"),
    ):
        tidy(axes, title, unit)
    epochs.set_ylabel("top-1 accuracy (%)")
    cost.margins(x=0.15)
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, format="png", dpi=150)


def loss_over_gamma(proposals: Mapping[str, Mapping[str, Any]], path: StrPath) -> None:
    """Write a PNG: how much the loss rises under noise, over gamma; a panel for each mode of noise.

    proposals: for each mode what `find_gamma` found, as a mapping: levels with gamma, rise, low and high, and gamma and
    allowed, which are marked.
    """
    figure = Figure(figsize=(4.5 * len(proposals), 3.6), layout="constrained")
    for axes, (mode, found) in zip(
        figure.subplots(1, len(proposals), squeeze=False)[0], proposals.items(), strict=True
    ):
        gammas = [level["gamma"] for level in found["levels"]]
        rise, low, high = (_finite(level[key] for level in found["levels"]) for key in ("rise", "low", "high"))
        axes.plot(gammas, rise, linewidth=2, markersize=5, **LOOKS[0])
        axes.fill_between(gammas, low, high, color=LOOKS[0]["color"], alpha=0.15, linewidth=0)
        axes.plot(found["gamma"], found["allowed"], "o", color="#D55E00", markersize=9, zorder=3)
        axes.annotate(f"gamma {found['gamma']:.2g}", (found["gamma"], found["allowed"]), (-8, 6), **_BESIDE)
        tidy(axes, f"noise {mode}", "gamma")
        axes.set_xscale("log")
        axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas], rotation=45)
        axes.set_xticks([], minor=True)
        _logarithmic_if_positive(axes)
    figure.axes[0].set_ylabel("rise of the loss")
    figure.savefig(path, format="png", dpi=150)


def accuracy_over_gamma(models: Mapping[str, Mapping[str, Any]], path: StrPath) -> None:
    """Write a PNG: accuracy after training over the gamma it was trained with, a panel for each model.

    models: for each name `gammas`, ascending; `top1`, fractions, for each gamma one a seed; `plain`, those without
    noise; `proposals`, gammas by the name of the rule that gave them. Lines are means over seeds, dots the seeds.
    """
    rows = -(-len(models) // 3)
    figure = Figure(figsize=(13, 3.4 * rows), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(rows, 3, squeeze=False).flat, models.items(), strict=False):
        top1 = [[100 * value for value in seeds] for seeds in found["top1"]]
        axes.plot(found["gammas"], [np.mean(seeds) for seeds in top1], linewidth=2, color="#0072B2", label="RWP")
        for gamma, seeds in zip(found["gammas"], top1, strict=True):
            axes.plot([gamma] * len(seeds), seeds, ".", color="#0072B2")
        axes.axhline(100 * np.mean(found["plain"]), color="#777777", linestyle=":", label="plain")
        for look, (rule, gamma) in zip(itertools.cycle(LOOKS[1:]), found["proposals"].items(), strict=False):
            axes.axvline(gamma, color=look["color"], linestyle=look["linestyle"], label=rule)
        tidy(axes, name, "gamma")
        axes.set_xscale("log")
        axes.set_xticks(found["gammas"], [f"{gamma:g}" for gamma in found["gammas"]])
        axes.set_xticks([], minor=True)
    figure.axes[0].set_ylabel("held-out accuracy (%)")
    handles = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    for axes in figure.axes[len(models) :]:
        axes.remove()
    figure.savefig(path, format="png", dpi=150)


def demonstration(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: StrPath, title: str = "") -> None:
    """Write a PNG of methods on one task: accuracy over the epochs, what it cost, and the loss around the weights.

    runs: for the name of each method its runs, one a seed: mappings with `history` as `comparison` takes it, gradients
    and seconds at the end, and `landscape`: `losses` at `coordinates`, steps from the weights in norms of the filters.
    Lines and bars are means over seeds, bands a standard deviation either way. Accuracies start where those of the
    second half of the training do.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    places = figure.add_gridspec(2, 3, width_ratios=(1.3, 0.8, 1.3))
    accuracy, losses = figure.add_subplot(places[:, 0]), figure.add_subplot(places[:, 2])
    gradients, seconds = (figure.add_subplot(places[row, 1]) for row in (0, 1))
    looks = dict(zip(runs, itertools.cycle(LOOKS), strict=False))
    lowest = 100.0
    for name, mine in runs.items():
        length = max(len(run["history"]) for run in mine)
        whole = [run["history"] for run in mine if len(run["history"]) == length]  # the others diverged on the way
        epochs = [row["epoch"] for row in whole[0]]
        top1 = np.array([[100 * row["top1"] for row in history] for history in whole])
        _mean_and_deviation(accuracy, epochs, top1, name, looks[name])
        lowest = min(lowest, top1[:, length // 2 :].min())
        around = np.array([_finite(run["landscape"]["losses"]) for run in mine])
        around = around[np.isfinite(around).all(1)]
        if len(around):
            _mean_and_deviation(losses, mine[0]["landscape"]["coordinates"], around, name, looks[name])
    accuracy.set_ylim(lowest - 1, min(100, accuracy.get_ylim()[1]) + 0.5)
    tidy(accuracy, "Held-out accuracy (%)", "epoch")
    tidy(losses, "Training loss on lines through the weights", "step in random directions, in norms of the filters")
    for axes, key, what in (
        (gradients, "gradients", "Gradients of each image"),
        (seconds, "seconds", "Seconds of training"),
    ):
        _bars(axes, {name: [float(np.mean([run[key] for run in mine]))] for name, mine in runs.items()}, looks)
        tidy(axes, what, "")
    if title:
        figure.suptitle(title)
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _mean_and_deviation(axes: Axes, at: Sequence[float], values: Any, name: str, look: dict[str, Any]) -> None:
    """A line through the means of `values` (seeds, len(at)), in a band of their standard deviation."""
    mean = values.mean(0)
    axes.plot(at, mean, label=name, linewidth=2, markersize=4, **look)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(at, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)


def differences(gains: Mapping[str, Sequence[float]], path: StrPath, label: str) -> None:
    """Write a PNG: paired differences as dots, a row for each name, with their mean as a bar through it.

    gains: at least one each. label: of the axis, with its unit.
    """
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(gains)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#777777", linewidth=1)
    for row, (values, style) in enumerate(zip(gains.values(), itertools.cycle(LOOKS), strict=False)):
        color, marker = style["color"], style["marker"]
        spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]  # equal ones would hide each other
        axes.scatter(values, row + np.asarray(spread), s=18, color=color, marker=marker, alpha=0.75)
        mean = float(np.mean(values))
        axes.plot([mean, mean], [row - 0.35, row + 0.35], color=color, linewidth=2.5)
        axes.annotate(f"{mean:+.1f}", (mean, row - 0.36), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(gains)), gains, fontsize=8)
    axes.set_ylim(len(gains) - 0.4, -0.7)
    axes.margins(x=0.08)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=110)


def landscape(losses: Mapping[str, Any], coordinates: Sequence[float], path: StrPath, label: str = "loss") -> None:
    """Write a PNG: the loss on a plane through the weights, as contours above and as a surface below, for each model.

    losses: for each model's name an array (len(coordinates), len(coordinates)), first index along the first direction.
    All models share axes, levels and colors. Losses above 0 that span more than a factor of ten are drawn on a
    logarithmic scale; what is infinite or no number is left out. label: of the colors.
    """
    grids = {name: np.ma.masked_invalid(np.asarray(grid, dtype=float)) for name, grid in losses.items()}
    known = np.concatenate([grid.compressed() for grid in grids.values()])
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    logarithmic = bool(low > 0 and high > 10 * low)
    high = max(high, low + 1e-12 * max(1.0, abs(low)))  # a flat plane has a color too
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    levels = (np.geomspace if logarithmic else np.linspace)(low, high, 41)
    levels[[0, -1]] = low, high  # to the bit: rounding must not leave the extremes out
    marks = _decades(low, high) if logarithmic else MaxNLocator(6).tick_values(low, high)
    first, second = np.meshgrid(coordinates, coordinates, indexing="ij")

    alone = len(grids) == 1
    figure = Figure(figsize=(9, 4.4) if alone else (3.5 * len(grids) + 1.3, 7.2), layout="constrained")
    places = figure.add_gridspec(1, 2) if alone else figure.add_gridspec(2, len(grids), height_ratios=(1, 1.1))
    for column, (name, grid) in enumerate(grids.items()):
        flat = figure.add_subplot(places[0, column], aspect="equal", xlabel="direction 1")
        flat.set_title(name, fontsize=11 if len(name) < 34 else 8)
        flat.set_ylabel("direction 2" if column == 0 else "")
        flat.set_xlim(coordinates[0], coordinates[-1])
        flat.set_ylim(coordinates[0], coordinates[-1])
        place = places[0, 1] if alone else places[1, column]
        raised = figure.add_subplot(place, projection="3d", xlabel="direction 1", ylabel="direction 2")
        raised.view_init(elev=30, azim=-60)
        raised.set_box_aspect((1, 1, 0.8), zoom=1.0 if alone else 1.2)
        raised.tick_params(labelsize=8, pad=0)
        height = np.ma.log10(grid) if logarithmic else grid
        raised.set_zlim(*(np.log10([low, high]) if logarithmic else (low, high)))
        if logarithmic:
            raised.zaxis.set_major_locator(MaxNLocator(integer=True))
            raised.zaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"{10.0**exponent:g}"))
        for axis in (flat.xaxis, flat.yaxis, raised.xaxis, raised.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
        if grid.count():
            flat.contourf(first, second, grid, levels, norm=norm, cmap="viridis")
            lines = flat.contour(first, second, grid, marks, colors="white", linewidths=0.8)
            flat.clabel(lines, fmt=lambda level: f"{level:g}", fontsize=8)
            colors = matplotlib.colormaps["viridis"](norm(grid))
            raised.plot_surface(
                first,
                second,
                height.filled(np.nan),
                facecolors=colors,
                rcount=100,
                ccount=100,
                shade=False,
                edgecolor=(1, 1, 1, 0.25),
                linewidth=0.3,
            )
        flat.plot(0, 0, "+", color="#D55E00", markersize=10, markeredgewidth=2)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=figure.axes, label=label, shrink=0.7, format="{x:g}")
    figure.savefig(path, format="png", dpi=150)


def sharpness_curves(models: Mapping[str, Mapping[str, Any]], path: StrPath) -> None:
    """Write a PNG with six panels: what weight noise, a line through the weights, and rounding do to some models.

    models: for each model's name what recipes/landscape.py writes to landscape.json: `train` with under_noise,
    coordinates, line, largest_eigenvalue and worst_case, `held_out` with accuracy, under_noise and quantized. A band is
    the 95 % confidence interval. Losses above 0 get logarithmic axes.
    """
    figure = Figure(figsize=(13, 7.6), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    (rise, accuracy, line), (rounded, eigenvalue, step) = figure.subplots(2, 3)
    looks = dict(zip(models, itertools.cycle(LOOKS), strict=False))

    for name, figures in models.items():
        train, held_out = figures["train"], figures["held_out"]
        _band(rise, train["under_noise"], "loss_rise", name, looks[name])
        clean = {"gamma": 0.0, "accuracy": dict.fromkeys(("mean", "low", "high"), held_out["accuracy"])}
        _band(accuracy, [clean, *held_out["under_noise"]], "accuracy", name, looks[name], scale=100)
        line.plot(train["coordinates"], _finite(train["line"]), linewidth=2, **looks[name] | {"marker": ""})
    for axes, title, label in (
        (rise, "Rise of the training loss under weight noise", "gamma, size of the noise"),
        (accuracy, "Held-out accuracy under weight noise (%)", "gamma, size of the noise"),
        (line, "Training loss along a random direction", "step, in norms of the filters"),
    ):
        tidy(axes, title, label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in (rise, line):
        _logarithmic_if_positive(axes)

    held_out = {name: figures["held_out"] for name, figures in models.items()}
    trained = {name: figures["train"] for name, figures in models.items()}
    bits = next(iter(held_out.values()))["quantized"]
    accuracies = {
        name: [100 * level["accuracy"] for level in (figures, *figures["quantized"].values())]
        for name, figures in held_out.items()
    }
    _bars(rounded, accuracies, looks, ["as it is", *(f"int{number}" for number in bits)])
    tidy(rounded, "Held-out accuracy, rounded weights (%)", "")
    _bars(eigenvalue, {name: [figures["largest_eigenvalue"]["value"]] for name, figures in trained.items()}, looks)
    tidy(eigenvalue, "Largest eigenvalue of the Hessian", "")
    _bars(step, {name: [figures["worst_case"]["rise"]] for name, figures in trained.items()}, looks)
    rho = next(iter(trained.values()))["worst_case"]["rho"]
    tidy(step, f"Loss rise by SAM's step, rho = {rho:g}", "")
    handles, names = rise.get_legend_handles_labels()
    columns = min(4, len(names))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, handlelength=3, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _band(
    axes: Axes, levels: Sequence[Mapping[str, Any]], key: str, name: str, look: dict[str, Any], scale: float = 1
) -> None:
    """An estimate over gamma with its interval."""
    gammas = [level["gamma"] for level in levels]
    mean, low, high = (
        [scale * v for v in _finite(level[key][part] for level in levels)] for part in ("mean", "low", "high")
    )
    axes.plot(gammas, mean, linewidth=2, markersize=5, label=name, **look)
    axes.fill_between(gammas, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _bars(
    axes: Axes,
    values: Mapping[str, Sequence[float | None]],
    looks: Mapping[str, dict[str, Any]],
    groups: Sequence[str] = (),
) -> None:
    """A bar for each model in each group, with its number on top; a single group needs no name."""
    width = 0.8 / len(values)
    for index, (name, heights) in enumerate(values.items()):
        at = [group + (index - (len(values) - 1) / 2) * width for group in range(len(heights))]
        hatch = _HATCHES[index % len(_HATCHES)]
        heights = _finite(heights)
        drawn = axes.bar(at, heights, 0.9 * width, color=looks[name]["color"], hatch=hatch, edgecolor="white")
        numbers = [f"{height:.3g}" for height in heights]
        axes.bar_label(drawn, numbers, padding=2, fontsize=8, rotation=90 if len(values) * len(heights) > 9 else 0)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.13)  # room for the numbers


def tidy(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(label)
    axes.grid(axis="y", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finite(values: Iterable[float | None]) -> list[float]:
    """The values, nan in place of what is infinite or None: a gap in a picture."""
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]


def _logarithmic_if_positive(axes: Axes) -> None:
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size and drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axes.set_ylim(drawn.min() / 2, drawn.max() * 2)  # a band may reach below 0
        logarithmic_axis(axes)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, and threefold ones where they are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = high < 300 * low
    return [f * 10.0**e for e in exponents for f in ((1, 3) if few else (1,)) if low < f * 10.0**e < high]


def logarithmic_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
