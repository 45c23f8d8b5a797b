"""The words of the last screen: what they say of which figures."""

import shlex
from pathlib import Path

import pytest

from hf_rwp.runs.closing import commands, in_words, last_screen, with_comments

LAYER = "layer4.0.conv1.weight"


def results(clean=0.02, perturbed=0.05, size=0.42, classes=10, slots=(220, 220), **arguments):
    losses = {name: loss for name, loss in (("loss_clean", clean), ("loss_perturbed", perturbed)) if loss is not None}
    noise = {"largest": {"name": LAYER, "elements": 9, "size": size}} if size is not None else {}
    rwp = {"slots": dict(zip(("clean", "perturbed"), slots, strict=True)), "relative_noise": noise}
    final = {
        "epoch": 10,
        "top1": 0.99,
        "top5": 1.0,
        "images_per_second": 400.0,
        "rwp": rwp | {"placement": "sequential"},
    }
    counts = {str(number): 10 for number in range(classes)}
    return {
        "final": final | losses,
        "arguments": {"method": "rwp"} | arguments,
        "hardware": {"replicas": 1},
        "seconds": 9.0,
        "found": {"classes": {"train": counts}},
    }


def test_noise_that_raises_the_loss_a_little_means_flat():
    assert in_words(results()) == (
        "RWP took 220 of 440 gradients with noise in the weights. Noise of 42 % of the largest layer's weights "
        f"({LAYER}) raised the training loss by 0.03 in the last epoch, from 0.0200 to 0.0500: flat."
    )


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({"perturbed": 0.07}, ": flat."),
        ({"perturbed": 0.08}, ": neither flat nor sharp."),
        ({"perturbed": 0.51}, ": neither flat nor sharp."),
        ({"perturbed": 0.53}, ": sharp. A smaller --rwp_gamma disturbs less."),
        ({"perturbed": 0.01}, "did not raise the training loss in the last epoch, from 0.0200 to 0.0100: flat."),
        ({"size": 0.04}, "noise too small to tell flat from sharp (usual are 5 to 70 %)."),
        ({"size": 0.04, "perturbed": 0.6}, ": sharp. A smaller --rwp_gamma disturbs less."),
        ({"size": 0.004}, "Noise of 0.4 % of the largest layer's"),
        ({"size": 2.5, "perturbed": 3.0}, "Noise of 2.5 times the largest layer's weights"),
        ({"clean": 2.2, "perturbed": 2.21}, ": little is learned yet (guessing has 2.30), so that this says nothing"),
        ({"clean": 2.2, "perturbed": 2.21, "classes": 1000}, ": flat."),
        ({"bce_loss": True}, ": a mean over classes, which has no scale from flat to sharp."),
        ({"clean": None}, "was in all of the last epoch, so that what it did to the loss was not measured."),
        ({"size": None}, "RWP took 220 of 440 gradients with noise in the weights."),
        ({"slots": (49, 49)}, ": too few gradients to tell flat from sharp."),
        ({"slots": (50, 50)}, ": flat."),
        ({"slots": (440, 0)}, "RWP did nothing: no gradient of 440 was perturbed (a gamma of 0, or --rwp_start"),
        ({"method": "base"}, "Plain training: no weight was perturbed."),
    ],
)
def test_words_follow_the_figures(figures, verdict):
    assert verdict in in_words(results(**figures))


def test_top_5_of_five_classes_is_left_out():
    assert "top-5" in last_screen(results(classes=6), [Path("a")], {})
    assert "top-5" not in last_screen(results(classes=5), [Path("a")], {})
    many = results()
    many["found"]["classes"]["train"] = {"count": 1000, "most": {"cat": 9}, "fewest": {"dog": 1}}
    assert "top-5" in last_screen(many, [Path("a")], {})


def test_the_screen_is_80_columns_wide_and_its_commands_can_be_copied(tmp_path):
    folder = tmp_path / "my runs" / "digits_rwp_seed0"
    given = {"data_dir": ["my photos"], "epochs": ["2"], "rwp_gamma": ["0.02"], "output_dir": ["x"], "model_ema": []}
    given |= {"push_to_hub": [], "hub_model_id": ["ada/net"]}
    next_commands = commands(folder, "train", results(), given, logs=folder / "logs", processes=2)
    assert [shlex.split(command) for command in next_commands.values()] == [
        ["hf-rwp", "predict", str(folder), "IMAGE"],
        ["tensorboard", "--logdir", str(folder / "logs")],
        ["hf-rwp", "train", "--processes", "2", "--rwp=false", "--data_dir=my photos", "--epochs=2", "--model_ema"],
    ]
    assert list(next_commands) == ["predict", "look", "compare"]
    copied = with_comments(next_commands).replace("\\\n", "")  # as a shell takes it
    for command, line in zip(
        next_commands.values(), [line for line in copied.splitlines() if line[0] != "#"], strict=True
    ):
        assert shlex.split(line, comments=True) == shlex.split(command)


def test_no_line_is_longer_than_the_screen_and_no_path_is_broken():
    folder = Path("runs of mine") / "the pets of last summer, in the garden and house" / "out"
    written = [folder / name for name in ("results.json", "model", "curves.png", "confusion.png", "checkpoints/step_3")]
    given = {"data_dir": ["the photos of mine"], "epochs": ["2"], "lr": ["0.01"], "model": ["resnet18"], "aa": ["v0"]}
    screen = last_screen(results(), written, commands(folder, "train", results(), given, logs=folder / "logs"))
    assert max(map(len, screen.splitlines())) <= 80
    assert f"'{folder}':" in screen
    for name in ("results.json", "model", "curves.png", "confusion.png", "checkpoints/step_3"):
        assert name in screen
    assert "'--data_dir=the photos of mine'" in screen
    short = commands(Path("outputs/digits_rwp_seed0"), "train", results(), given, logs=None)
    lines = with_comments(short).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("  # predict")
    assert lines[2] == "# compare"
    assert lines[3].endswith(" \\")
    assert "".join(lines[3:]).replace(" \\   ", "") == short["compare"]


def test_what_is_compared_or_pushed_depends_on_what_there_is(tmp_path):
    folder, plain = tmp_path / "digits_rwp_seed0" / "2", tmp_path / "digits_base_seed0"
    folder.mkdir(parents=True)
    given = {"data_dir": ["photos"], "lr": ["0.1"]}
    told = commands(folder, "vit", results(), given, logs=None)
    assert "curves" not in told
    assert told["look"] == f"hf-rwp landscape {folder}"
    assert told["compare"] == "hf-rwp vit --rwp=false --data_dir=photos --lr=0.1"
    (plain / "model").mkdir(parents=True)
    (plain / "results.json").touch()
    told = commands(folder, "vit", results(), given, logs=None)
    assert told["compare"] == f"hf-rwp landscape {folder} {plain} --data_dir=photos"
    assert told["curves"] == f"hf-rwp curves {folder} {plain}"
    told = commands(folder, "vit", results(), given, logs=None, repo_id="ada/net")
    assert told["push"] == f"hf-rwp push {folder}/model ada/net"
    assert list(told) == ["predict", "look", "curves", "push"]


def test_curves_are_compared_with_the_run_before_in_the_row(tmp_path):
    first = tmp_path / "digits_rwp_seed0"
    for number, before in ((2, first), (3, first / "2")):
        folder = first / str(number)
        folder.mkdir(parents=True)
        assert "curves" not in commands(folder, "train", results(), {}, logs=None)
        (before / "results.json").touch()
        told = commands(folder, "train", results(), {}, logs=None)
        assert told["curves"] == f"hf-rwp curves {folder} {before}"
        assert told["compare"] == "hf-rwp train --rwp=false"
