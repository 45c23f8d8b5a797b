import math

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

from hf_rwp.plots import comparison, training_curves


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a history; gives the figure's two panels and the pixels of the PNG."""
    figures = []
    monkeypatch.setattr("hf_rwp.plots.Figure", lambda **o: figures.append(matplotlib.figure.Figure(**o)) or figures[-1])

    def panels(history):
        training_curves(history, tmp_path / "curves.png")
        with PIL.Image.open(tmp_path / "curves.png") as image:
            assert image.format == "PNG"
            return *figures[-1].axes, np.asarray(image.convert("RGB"))

    return panels


def epochs(count, **columns):
    return [{"epoch": e + 1, **{key: values[e] for key, values in columns.items()}} for e in range(count)]


def lines(axes):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}


RUN = epochs(
    3,
    train_loss=[1.1, 0.6, 0.35],
    loss_clean=[1.0, 0.5, 0.3],
    loss_perturbed=[1.2, 0.7, 0.4],
    top1=[0.5, 0.8, 0.875],
    learning_rate=[0.1, 0.1, 0.01],
    seconds=[5.0, 5.0, 5.0],
)


def test_losses_are_on_the_left_and_percent_on_the_right(draw):
    losses, accuracy, _ = draw(RUN)
    found = lines(losses)
    assert found["clean weights"] == ([1, 2, 3], [1.0, 0.5, 0.3])
    assert found["perturbed weights"] == ([1, 2, 3], [1.2, 0.7, 0.4])
    assert found["mean"] == ([1, 2, 3], [1.1, 0.6, 0.35])
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[50.0, 80.0, 87.5]]
    assert [text.get_text() for text in accuracy.texts] == ["87.50 %"]


def test_clean_and_perturbed_are_apart_in_colour_and_in_grey(draw):
    losses, _, pixels = draw(RUN)
    clean, perturbed = (
        next(line for line in losses.lines if line.get_label() == f"{n} weights") for n in ("clean", "perturbed")
    )
    assert clean.get_linestyle() != perturbed.get_linestyle()
    assert clean.get_marker() != perturbed.get_marker()
    for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]):
        assert (pixels == color).all(-1).sum() > 500


def test_the_base_method_has_one_loss(draw):
    losses, _, _ = draw(epochs(2, train_loss=[1.0, 0.5], top1=[0.5, 0.6]))
    assert list(lines(losses)) == ["mean"]
    assert losses.get_legend() is None


def test_what_an_epoch_lacks_is_left_out(draw):
    losses, accuracy, _ = draw(
        epochs(3, train_loss=[3.0, 2.0, 1.5], loss_clean=[None, 1.9, 1.4], top1=[None, 0.0, None])
    )
    assert lines(losses)["clean weights"] == ([2, 3], [1.9, 1.4])
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[2]]


@pytest.mark.parametrize(("last", "scale"), [(0.3, "linear"), (0.01, "log")])
def test_a_wide_range_of_losses_gets_a_logarithmic_axis(draw, last, scale):
    losses, _, _ = draw(epochs(2, train_loss=[2.0, last], top1=[0.1, 0.2]))
    assert losses.get_yscale() == scale


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_diverged_run_can_be_drawn(draw, loss):
    draw(epochs(2, train_loss=[2.0, loss], top1=[0.1, 0.1]))
    draw(epochs(1, train_loss=[loss], top1=[0.1]))


def test_a_comparison_shows_means_over_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("hf_rwp.plots.Figure", lambda **o: figures.append(matplotlib.figure.Figure(**o)) or figures[-1])

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
    assert points == [(2, 70), (4, 90)]
    (whiskers,) = cost.containers[0].lines[2]
    low, high = whiskers.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(math.sqrt(200))
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == ["plain", "SAM"]
    with PIL.Image.open(tmp_path / "comparison.png") as image:
        assert image.format == "PNG"
