import math

import matplotlib.figure
import PIL.Image
import pytest

from hf_rwp.analysis import plots
from hf_rwp.analysis.plots import (
    accuracy_over_gamma,
    comparison,
    differences,
    landscape,
    loss_over_gamma,
    sharpness_curves,
)


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_a_comparison_shows_means_over_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **o: figures.append(matplotlib.figure.Figure(**o)) or figures[-1])

    def history(*top1, cost):
        return [
            {"epoch": i + 1, "seconds": 10 * cost * (i + 1), "gradients": cost * (i + 1), "top1": value}
            for i, value in enumerate(top1)
        ]

    runs = {"plain": [history(0.5, 0.6, cost=1), history(0.7, 0.8, cost=1)], "SAM": [history(0.5, 0.9, cost=2)]}
    comparison(runs, tmp_path / "comparison.png")
    epochs, seconds, cost = figures[-1].axes
    assert lines(epochs) == {"plain": ([1, 2], [60, 70]), "SAM": ([1, 2], [50, 90])}
    assert lines(seconds)["SAM"] == ([20, 40], [50, 90])
    points = [(bar.lines[0].get_xdata()[0], bar.lines[0].get_ydata()[0]) for bar in cost.containers]
    assert points == [(pytest.approx(2, abs=0.1), 70), (pytest.approx(4, abs=0.1), 90)]
    (whiskers,) = cost.containers[0].lines[2]
    low, high = whiskers.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(math.sqrt(200))
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["plain", "SAM"]
    with PIL.Image.open(tmp_path / "comparison.png") as image:
        assert image.format == "PNG"


COORDINATES = [-1.0, -0.5, 0.0, 0.5, 1.0]


def bowl(scale=1.0, least=0.01):
    return [[least + scale * (a * a + b * b) for b in COORDINATES] for a in COORDINATES]


def figures_of(scale, grid=None):
    """What recipes/landscape.py writes of a model."""
    levels = [
        {
            "gamma": gamma,
            "loss_rise": {"mean": scale * gamma**2, "low": -0.001, "high": scale * gamma},
            "accuracy": {"mean": 0.9 - gamma, "low": 0.8, "high": 1.0},
        }
        for gamma in (0.01, 0.02, 0.1)
    ]
    return {
        "train": {
            "under_noise": levels,
            "coordinates": COORDINATES,
            "line": [0.01 + scale * a * a for a in COORDINATES],
            "largest_eigenvalue": {"value": scale},
            "worst_case": {"rho": 0.05, "rise": scale / 10},
        },
        "held_out": {
            "accuracy": 0.95,
            "under_noise": levels,
            "quantized": {"8": {"accuracy": 0.9}, "4": {"accuracy": 0.8}},
        },
    }


@pytest.fixture
def figure_of(tmp_path, monkeypatch):
    """Draws with one of the plots' functions; gives the figure, and checks that a PNG was written."""
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **o: figures.append(matplotlib.figure.Figure(**o)) or figures[-1])

    def drawn(plot, *arguments):
        plot(*arguments, tmp_path / "picture.png")
        with PIL.Image.open(tmp_path / "picture.png") as image:
            assert image.format == "PNG"
        return figures[-1]

    return drawn


def test_differences_have_a_row_each_with_every_pair_and_their_mean(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **o: figures.append(matplotlib.figure.Figure(**o)) or figures[-1])
    differences({"a over b": [1.0, 2.0, 6.0], "a over c": [-0.5]}, tmp_path / "claims.png", "points")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a over b", "a over c"]
    assert axes.get_xlabel() == "points"
    first, second = (dots.get_offsets() for dots in axes.collections)
    assert first[:, 0].tolist() == [1.0, 2.0, 6.0]
    assert second.tolist() == [[-0.5, 1.0]]
    assert [line.get_xdata()[0] for line in axes.lines] == [0, 3.0, -0.5]
    assert [note.get_text() for note in axes.texts] == ["+3.0", "-0.5"]
    with PIL.Image.open(tmp_path / "claims.png") as image:
        assert image.format == "PNG"


def test_landscapes_of_several_models_have_the_same_axes_and_colours(figure_of):
    *panels, bar = figure_of(landscape, {"flat": bowl(1.0), "sharp": bowl(50.0)}, COORDINATES).axes
    assert [panel.get_title() for panel in panels] == ["flat", "", "sharp", ""]
    (flat, raised), (flat_2, raised_2) = panels[:2], panels[2:]
    for one, other in ((flat, flat_2), (raised, raised_2)):
        assert one.get_xlim() == other.get_xlim()
        assert one.get_ylim() == other.get_ylim()
    assert raised.get_zlim() == raised_2.get_zlim()
    one, other = (panel.collections[0] for panel in (flat, flat_2))
    assert one.norm is other.norm
    assert one.levels.tolist() == other.levels.tolist()
    assert (one.norm.vmin, one.norm.vmax) == pytest.approx((0.01, 100.01))
    assert bar.get_ylabel() == "loss"
    assert bar.get_yscale() == "log"


@pytest.mark.parametrize(
    "grid",
    [
        bowl(-1.0, least=0.0),  # below 0: no logarithm
        bowl(0.0),  # flat
        [[1e30 if a == b else math.nan for b in COORDINATES] for a in COORDINATES],
        [[math.inf] * 5 for _ in COORDINATES],
    ],
)
def test_any_landscape_can_be_drawn(figure_of, grid):
    figure_of(landscape, {"one": grid, "other": bowl()}, COORDINATES)
    figure_of(landscape, {"one": grid}, COORDINATES)


def test_the_first_direction_runs_along_x(figure_of):
    ramp = [[1.0 + a for _ in COORDINATES] for a in COORDINATES]
    flat, *_ = figure_of(landscape, {"ramp": ramp}, COORDINATES).axes
    lines = flat.collections[1]
    drawn = [(path.vertices[:, 0], level) for path, level in zip(lines.get_paths(), lines.levels, strict=True)]
    assert any(0 < level < 2 for _, level in drawn)
    assert all(x == pytest.approx(level - 1) for x, level in drawn)


def test_sharpness_of_several_models_is_in_six_panels(figure_of):
    figure = figure_of(sharpness_curves, {"base": figures_of(2.0), "rwp": figures_of(1.0)})
    rise, accuracy, line, rounded, eigenvalue, step = figure.axes
    assert [drawn.get_ydata().tolist() for drawn in rise.lines] == [
        pytest.approx([2e-4, 8e-4, 2e-2]),
        pytest.approx([1e-4, 4e-4, 1e-2]),
    ]
    assert rise.get_yscale() == "log"
    assert accuracy.lines[0].get_xdata().tolist() == [0.0, 0.01, 0.02, 0.1]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([95.0, 89.0, 88.0, 80.0])
    assert line.lines[1].get_ydata().tolist() == figures_of(1.0)["train"]["line"]
    assert [bar.get_height() for bar in rounded.patches] == pytest.approx([95, 90, 80] * 2)
    assert [text.get_text() for text in rounded.get_xticklabels()] == ["as it is", "int8", "int4"]
    assert [text.get_text() for text in eigenvalue.texts] == ["2", "1"]
    assert [bar.get_height() for bar in step.patches] == [0.2, 0.1]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "rwp"]


def test_models_are_apart_in_colour_and_in_grey(figure_of):
    names = [f"model {number}" for number in range(7)]
    rise, *_, rounded, _, _ = figure_of(sharpness_curves, {name: figures_of(1.0) for name in names}).axes
    for look in ("get_color", "get_linestyle", "get_marker"):
        looks = {str(getattr(drawn, look)()) for drawn in rise.lines}
        assert len(looks) == (7 if look != "get_linestyle" else len(looks))
    assert len({bar.get_hatch() for bar in rounded.patches}) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_sharpness_of_a_diverged_model_can_be_drawn(figure_of, value):
    figures = figures_of(1.0)
    for level in figures["train"]["under_noise"]:
        level["loss_rise"] = dict.fromkeys(("mean", "low", "high"), value)
    figures["train"]["line"] = [value] * 5
    figures["train"]["largest_eigenvalue"]["value"] = figures["train"]["worst_case"]["rise"] = value
    figure_of(sharpness_curves, {"diverged": figures})
    figure_of(sharpness_curves, {"base": figures_of(1.0), "diverged": figures})


def test_a_demonstration_shows_accuracy_cost_and_the_loss_around(figure_of):
    def run(top1, cost, depth):
        history = [{"epoch": i + 1, "top1": value} for i, value in enumerate(top1)]
        around = {"coordinates": COORDINATES, "losses": [depth + a * a for a in COORDINATES]}
        return {"history": history, "gradients": 2 * cost, "seconds": 9 * cost, "landscape": around}

    runs = {
        "plain": [run([0.1, 0.6, 0.7], 1, 1.0), run([0.3, 0.8, 0.9], 1, 2.0)],
        "RWP": [run([0.2, 0.8, 0.9], 2, 0.5), run([0.2], 2, math.nan)],  # the second diverged in its first epoch
    }
    figure = figure_of(lambda *given: plots.demonstration(*given, title="two seeds"), runs)
    accuracy, losses, gradients, seconds = figure.axes
    assert figure.get_suptitle() == "two seeds"
    found = lines(accuracy)
    assert found["plain"] == ([1, 2, 3], pytest.approx([20, 70, 80]))
    assert found["RWP"] == ([1, 2, 3], pytest.approx([20, 80, 90]))
    assert accuracy.get_ylim()[0] == pytest.approx(59)  # the first epoch would squeeze all others
    assert lines(losses)["plain"] == (COORDINATES, pytest.approx([1.5 + a * a for a in COORDINATES]))
    assert lines(losses)["RWP"] == (COORDINATES, pytest.approx([0.5 + a * a for a in COORDINATES]))
    (band,) = accuracy.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((20 - math.sqrt(200), 80 + math.sqrt(200)))
    assert [bar.get_height() for bar in gradients.patches] == [2, 4]
    assert [bar.get_height() for bar in seconds.patches] == [9, 18]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "RWP"]


# gamma


@pytest.fixture
def figures(monkeypatch):
    made = []
    monkeypatch.setattr(plots, "Figure", lambda **o: made.append(matplotlib.figure.Figure(**o)) or made[-1])
    return made


def test_the_loss_over_gamma_has_a_panel_for_each_mode_with_the_proposal_in_it(figures, tmp_path):
    levels = [{"gamma": g, "rise": 100 * g**2, "low": -g, "high": 200 * g**2} for g in (0.01, 0.02, 0.04)]
    levels.append({"gamma": 0.08, "rise": math.inf, "low": math.inf, "high": math.inf})
    found = {"levels": levels, "gamma": 0.03, "allowed": 0.09}
    loss_over_gamma({"filter": found, "filter_normalized": found}, tmp_path / "gamma.png")
    (figure,) = figures
    assert [axes.get_title("left") for axes in figure.axes] == ["noise filter", "noise filter_normalized"]
    for axes in figure.axes:
        rise, proposal = axes.lines
        assert rise.get_xdata().tolist() == [0.01, 0.02, 0.04, 0.08]
        assert rise.get_ydata()[:3].tolist() == pytest.approx([0.01, 0.04, 0.16])
        assert (proposal.get_xdata()[0], proposal.get_ydata()[0]) == (0.03, 0.09)
        assert [text.get_text() for text in axes.texts] == ["gamma 0.03"]
        assert axes.get_xscale() == axes.get_yscale() == "log"
    assert (tmp_path / "gamma.png").stat().st_size > 1000


def test_accuracy_over_gamma_has_a_panel_for_each_model_with_all_seeds_and_rules(figures, tmp_path):
    model = {"gammas": [0.01, 0.02], "top1": [[0.8, 0.9], [0.5, 0.6]], "plain": [0.7, 0.8], "proposals": {"a": 0.015}}
    accuracy_over_gamma({"one": model, "two": model | {"proposals": {"a": 0.01}}}, tmp_path / "grid.png")
    (figure,) = figures
    assert [axes.get_title("left") for axes in figure.axes] == ["one", "two"]
    found = lines(figure.axes[0])
    assert found["RWP"] == ([0.01, 0.02], pytest.approx([85, 55]))
    assert found["plain"][1] == pytest.approx([75, 75])
    assert found["a"][0] == [0.015, 0.015]
    seeds = [list(line.get_ydata()) for line in figure.axes[0].lines if line.get_marker() == "."]
    assert seeds == [pytest.approx([80, 90]), pytest.approx([50, 60])]
    assert [text.get_text() for text in figure.legends[0].texts] == ["RWP", "plain", "a"]
