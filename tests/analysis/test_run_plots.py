"""analysis/run_plots.py: what the pictures of a run show."""

import itertools
import math
import warnings

import matplotlib.figure
import numpy as np
import PIL.Image
import pytest
from distributed import night
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_rwp.analysis import run_plots
from hf_rwp.analysis.run_plots import (
    confusion_matrix,
    overlaid_curves,
    pictures_of_run,
    title_of,
    training_curves,
)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    seen = []
    monkeypatch.setattr(run_plots, "Figure", lambda **o: seen.append(matplotlib.figure.Figure(**o)) or seen[-1])
    return seen


@pytest.fixture
def draw(tmp_path, figures):
    """Draws a history; gives the figure's two panels and the pixels of the PNG."""

    def panels(history, *titles):
        training_curves(history, tmp_path / "curves.png", *titles)
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
    eval_loss=[1.3, 0.9, 0.8],
    top1=[0.5, 0.8, 0.875],
    learning_rate=[0.1, 0.1, 0.01],
    seconds=[5.0, 5.0, 5.0],
)


def test_losses_are_on_the_left_and_percent_on_the_right(draw):
    losses, accuracy, _ = draw(RUN)
    found = lines(losses)
    assert found["training, clean weights"] == ([1, 2, 3], [1.0, 0.5, 0.3])
    assert found["training, perturbed weights"] == ([1, 2, 3], [1.2, 0.7, 0.4])
    assert found["training, mean"] == ([1, 2, 3], [1.1, 0.6, 0.35])
    assert found["held-out"] == ([1, 2, 3], [1.3, 0.9, 0.8])
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[50.0, 80.0, 87.5]]
    assert [text.get_text() for text in accuracy.texts] == ["87.50 %"]


@pytest.mark.parametrize("top1", [[0.5], [0.2278, 0.9194], [0.9, 0.3]])
def test_no_curve_crosses_the_accuracy_that_is_written_out(draw, figures, top1):
    _, accuracy, _ = draw(epochs(len(top1), train_loss=[1.0] * len(top1), top1=top1))
    figures[-1].draw_without_rendering()  # in the figure's own resolution, not in the file's
    text, panel = accuracy.texts[0].get_window_extent(), accuracy.get_window_extent()
    assert panel.x1 <= text.x0
    assert text.x1 <= figures[-1].bbox.x1
    ends_at = accuracy.transData.transform((len(top1), 100 * top1[-1]))[1]
    assert text.y0 < ends_at < text.y1


def test_clean_perturbed_and_held_out_are_apart_in_colour_and_in_grey(draw):
    losses, _, pixels = draw(RUN)
    shown = {line.get_label(): line for line in losses.lines}
    names = ("training, clean weights", "training, perturbed weights", "held-out")
    assert len({(shown[name].get_linestyle(), shown[name].get_marker()) for name in names}) == 3
    assert len({shown[name].get_marker() for name in names}) == 3
    for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00], [0x00, 0x9E, 0x73]):
        assert (pixels == color).all(-1).sum() > 500


def test_an_average_of_the_weights_has_curves_of_its_own(draw):
    losses, accuracy, _ = draw(
        epochs(2, train_loss=[1, 1], eval_loss=[2, 1], eval_loss_ema=[3, 2], top1=[0.1, 0.2], top1_ema=[0.1, 0.3])
    )
    assert lines(losses)["held-out, average of weights"] == ([1, 2], [3, 2])
    assert [text.get_text() for text in accuracy.texts] == ["30.00 %"]


def test_the_title_stands_above_and_is_no_formula(draw, figures):
    draw(RUN, "a $5 model, RWP, gamma 0.01")
    assert figures[-1].get_suptitle() == "a $5 model, RWP, gamma 0.01"


def test_the_base_method_has_two_losses(draw):
    losses, _, _ = draw(epochs(2, train_loss=[1.0, 0.5], eval_loss=[1.0, 0.7], top1=[0.5, 0.6]))
    assert list(lines(losses)) == ["training, mean", "held-out"]


def test_what_an_epoch_lacks_is_left_out(draw):
    losses, accuracy, _ = draw(
        epochs(3, train_loss=[3.0, 2.0, 1.5], loss_clean=[None, 1.9, 1.4], top1=[None, 0.0, None])
    )
    assert lines(losses)["training, clean weights"] == ([2, 3], [1.9, 1.4])
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[2]]


@pytest.mark.parametrize(("last", "scale"), [(0.3, "linear"), (0.01, "log")])
def test_a_wide_range_of_losses_gets_a_logarithmic_axis(draw, last, scale):
    losses, _, _ = draw(epochs(2, train_loss=[2.0, last], top1=[0.1, 0.2]))
    assert losses.get_yscale() == scale


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_diverged_run_can_be_drawn(draw, loss):
    draw(epochs(2, train_loss=[2.0, loss], top1=[0.1, 0.1]))
    draw(epochs(1, train_loss=[loss], top1=[0.1]))


@pytest.mark.parametrize(
    ("arguments", "final", "said"),
    [
        ({"method": "rwp", "rwp_gamma": None}, {"rwp": {"gamma": 0.01, "alpha": 0.5}}, "RWP, gamma 0.01, alpha 0.5"),
        ({"rwp": True, "rwp_gamma": 0.2, "rwp_alpha": 1.0}, {}, "RWP, gamma 0.2, alpha 1"),
        ({"method": "sam", "sam_rho": 0.05}, {}, "SAM, rho 0.05"),
        ({"method": "base", "sam_rho": 0.05, "rwp_gamma": 0.1}, {}, "plain training"),
        ({"rwp": False, "model": "resnet18"}, {}, "resnet18, plain training"),
    ],
)
def test_a_title_says_method_and_size_of_the_noise(arguments, final, said):
    assert title_of({"arguments": arguments, "final": final}) == said
    model = {"name": "test_vit", "weights": 3}
    assert title_of({"arguments": arguments, "model": model}).startswith("test_vit, ")


def test_runs_lie_over_one_another_each_with_a_look_of_its_own(figures, tmp_path):
    averaged = [row | {"top1_ema": 0.25, "eval_loss_ema": 7.0} for row in RUN]
    runs = {"one $1": RUN, "two $2": averaged, "of text": epochs(2, train_loss=[9.0, 8.0])}
    overlaid_curves(runs, tmp_path / "curves.png")
    loss, held_out, accuracy = figures[-1].axes
    assert lines(loss)["one $1"] == ([1, 2, 3], [1.1, 0.6, 0.35])
    assert lines(held_out) == {"one $1": ([1, 2, 3], [1.3, 0.9, 0.8]), "two $2": ([1, 2, 3], [7.0] * 3)}
    assert lines(accuracy) == {"one $1": ([1, 2, 3], [50.0, 80.0, 87.5]), "two $2": ([1, 2, 3], [25.0] * 3)}
    (legend,) = figures[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    for axes in (loss, held_out, accuracy):
        for line, handle in zip(axes.lines, legend.legend_handles, strict=False):
            assert line.get_color() == handle.get_color()
    assert len({line.get_marker() for line in loss.lines}) == 3


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_kind_of_picture_is_that_of_its_name(tmp_path, ending):
    overlaid_curves({"one": RUN}, tmp_path / f"curves.{ending}")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert (tmp_path / f"curves.{ending}").read_bytes().startswith(start)


# Confusion matrices


def by_class(confusion, names=None):
    counts = np.asarray(confusion)
    totals = counts.sum(1)
    return {
        "names": names or [f"class {number}" for number in range(len(counts))],
        "images": totals.tolist(),
        "accuracy": [float(counts[i, i] / total) if total else None for i, total in enumerate(totals)],
        "confusion": counts.tolist(),
    }


def test_rows_are_classes_and_columns_what_they_are_taken_for(figures, tmp_path):
    confusion_matrix(by_class([[3, 1], [0, 8]], ["cat", "dog"]), tmp_path / "confusion.png", "a model")
    matrix, accuracy, _ = figures[-1].axes
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["cat", "dog"]
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["cat", "dog"]
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("is", "taken for")
    assert matrix.yaxis.get_label().get_rotation() == 0
    (image,) = matrix.images
    assert image.get_array().filled(0).tolist() == [[0.75, 0.25], [0.0, 1.0]]  # of each class
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in matrix.texts}
    assert numbers == {(0, 0): "3", (0, 1): "1", (1, 1): "8"}
    assert [bar.get_width() for bar in accuracy.patches] == [75.0, 100.0]
    assert [text.get_text() for text in accuracy.texts] == ["75.0", "100.0"]
    assert figures[-1].get_suptitle() == "a model: top-1 91.67 %"


@pytest.mark.parametrize(("classes", "widest"), night([(2, 1300), (10, 1600), (100, 3000)], [(100, 3000)]))
def test_a_confusion_matrix_has_room_for_its_names(figures, tmp_path, classes, widest):
    """No label hides its neighbor, and every mistake is seen, one image in fifty too."""
    counts = 49 * np.eye(classes, dtype=int)
    counts[np.arange(classes), (np.arange(classes) + 1) % classes] = 1
    names = [f"a class with a long name, number {number}" for number in range(classes)]
    confusion_matrix(by_class(counts, names), tmp_path / "confusion.png")
    matrix, *_ = figures[-1].axes
    renderer = FigureCanvasAgg(figures[-1]).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in matrix.get_yticklabels()]
    assert len(boxes) == classes
    for above, below in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 1
    boxes = [label.get_window_extent(renderer) for label in matrix.get_xticklabels()]
    for left, right in itertools.pairwise(boxes):
        assert left.x1 <= right.x0 + 1
    with PIL.Image.open(tmp_path / "confusion.png") as image:
        assert max(image.size) <= widest
        assert min(boxes[0].height, boxes[0].width) * image.width / figures[-1].bbox.width >= 9  # pixels of a letter
        width, height = image.size
        scale = image.width / figures[-1].bbox.width
        for row in range(classes):
            x, y = matrix.transData.transform(((row + 1) % classes + 0.3, row + 0.3)) * scale
            color = image.convert("RGB").getpixel((min(int(x), width - 1), height - int(y)))
            assert min(color) < 225, (row, color)


@pytest.mark.parametrize("name", ["$5 & $6 {x", "貓", "🧀", "_a^b", "", "x\ny"])
def test_any_name_of_a_class_can_be_drawn_without_a_warning(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(by_class([[1, 0], [0, 1]], [name, "other"]), tmp_path / "confusion.png")


def test_a_class_without_images_is_named_as_such(figures, tmp_path):
    confusion_matrix(by_class([[2, 0], [0, 0]]), tmp_path / "confusion.png")
    assert [text.get_text() for text in figures[-1].axes[1].texts] == ["100.0", "no images"]
    confusion_matrix(by_class([[0, 0], [0, 0]]), tmp_path / "confusion.png")


def test_a_run_has_its_curves_and_where_classes_are_known_its_mistakes(figures, tmp_path):
    results = {"arguments": {"method": "base"}, "history": RUN, "final": RUN[-1]}
    assert pictures_of_run(results, tmp_path) == [tmp_path / "curves.png"]
    assert figures[-1].get_suptitle() == "plain training"
    drawn = pictures_of_run(results | {"by_class": by_class([[1, 0], [0, 1]])}, tmp_path / "new")
    assert [path.name for path in drawn] == ["curves.png", "confusion.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
