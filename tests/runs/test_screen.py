"""What a terminal shows has no line wider than it; a pipe gets lines whole."""

import io
import os
import sys

import pytest
from terminal import opened

from hf_rwp.hub import curves
from hf_rwp.runs import comparison, screen
from hf_rwp.runs.closing import summary

WIDE = "train: 1,437 images, 10 classes: 0 142, 1 145, 2 142, 3 146, 4 145, 5 146, 6 145, 7 143, 8 139, 9 144"


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(screen, "columns", lambda: 80)


def widest(text):
    return max(map(len, text.splitlines()))


def test_the_width_is_that_of_a_terminal_and_a_pipe_has_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    with opened(72) as (_, theirs), os.fdopen(os.dup(theirs), "w") as stream:
        for out, width in ((stream, 72), (io.StringIO(), None)):
            monkeypatch.setattr(sys, "stdout", out)
            assert screen.columns() == width


def test_a_line_goes_on_in_indented_ones_and_loses_no_word(terminal):
    shown = screen.fitted(f"{WIDE}\n\nnext")
    first, second, *rest = shown.splitlines()
    assert widest(shown) <= 80
    assert rest == ["", "next"]
    assert second.startswith("  ")
    assert f"{first} {second.strip()}" == WIDE


def test_a_pipe_gets_lines_and_tables_whole():
    assert screen.fitted(WIDE) == WIDE
    rows = [["", "x" * 60, "y" * 60], ["a", "1", "2"]]
    assert len(screen.table(rows).splitlines()) == 2


def test_columns_that_a_terminal_cannot_hold_come_below_with_the_names_again(terminal):
    rows = [["", "loss", "rise at gamma 0.01", "rise at rho 0.05", "eigenvalue", "accuracy", "int8"]]
    rows.append(["digits_rwp_seed0", "0.0148", "0.0313 (-0.0539 to 0.117)", "0.0965", "46.4", "100.00%", "96.88%"])
    shown = screen.table(rows)
    assert widest(shown) <= 80
    assert shown.count("digits_rwp_seed0") == 2
    assert all(cell in shown for row in rows for cell in row)


def test_a_comparison_is_a_table_for_a_terminal_and_markdown_for_files(terminal):
    row = {"method": "rwp_normalized", "top1": 0.5, "gradients": 1.92, "seconds": 0.3, "history": [{"train_loss": 1}]}
    records = [row | {"seed": seed, "settings": {"lr": 0.1, "weight_decay": 5e-4, "strength": 0.2}} for seed in (0, 1)]
    assert widest(comparison.comparison_table(records, markdown=False)) <= 80
    assert comparison.comparison_table(records).startswith("| method |")


def test_the_table_of_curves_fits_with_long_names(terminal):
    history = [{"epoch": 8, "top1": 1.0, "eval_loss": 0.0168, "train_loss": 0.0812}]
    name = "digits_rwp_seed0: test_resnet, RWP, gamma 0.01, alpha 0.5"
    shown = curves.table({name: history, "a" * 100: history})
    assert widest(shown) <= 80
    assert all(word in shown for word in name.split())


def test_figures_of_a_layer_with_a_long_name_fit(terminal):
    layer = {"name": "vit.embeddings.patch_embeddings.projection.weight", "size": 0.14}
    rwp = {"placement": "sequential", "slots": {"clean": 6, "perturbed": 6}, "relative_noise": {"largest": layer}}
    results = {
        "final": {"epoch": 3, "top1": 0.5, "images_per_second": 28, "rwp": rwp},
        "arguments": {"method": "rwp"},
        "hardware": {"replicas": 1},
        "seconds": 8.6,
    }
    shown = summary(results)
    assert widest(shown) <= 80
    assert layer["name"] in shown
    assert "noise / weights, largest layer" in shown
