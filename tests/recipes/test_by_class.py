"""What both recipes say of each class, of the weights they describe: in results.json, in a picture, on the card."""

import json

import distributed
import pytest
import torch
import vit
from datasets import Image
from imagenet import few_digits, load_recipe, results, results_of, train, train_on_rank
from sklearn.metrics import confusion_matrix
from transformers import AutoImageProcessor, AutoModelForImageClassification

DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def recipe(monkeypatch):
    module = load_recipe()
    monkeypatch.setattr(module, "load_images", few_digits)
    return module


def by_model(folder):
    """The confusion matrix of the 41 held-out digits, by scikit-learn, of a folder as a user loads it."""
    split = few_digits()["validation"]
    pictures = [Image().decode_example(image).convert("RGB") for image in split["image"]]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")).logits
    return confusion_matrix(split["label"], logits.argmax(1), labels=range(10)).tolist()


def check(folder, found, model="model"):
    """Against the exported weights, and in itself."""
    by_class = found["by_class"]
    assert by_class["confusion"] == by_model(folder / model)
    assert by_class["names"] == DIGITS
    assert by_class["images"] == [sum(row) for row in by_class["confusion"]]
    right = sum(row[number] for number, row in enumerate(by_class["confusion"]))
    assert sum(by_class["images"]) == 41
    final = found["final"]
    assert right / 41 == pytest.approx(final.get("top1_ema", final["top1"]))
    assert not any("by_class" in key for row in (final, *found["history"]) for key in row)
    for place in (folder, folder / model):
        assert (place / "confusion.png").exists()
    assert json.loads((folder / model / "results.json").read_text())["by_class"] == by_class
    assert "](confusion.png)" in (folder / model / "README.md").read_text()


def are_pictures(folder):
    for place in (folder, folder / "model"):
        assert (place / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [[], ["--model_ema", "--model_ema_decay=0.5"]], ids=["weights", "average"])
def test_a_run_says_how_each_class_fared(recipe, tmp_path, flags):
    check(tmp_path, results_of(recipe, tmp_path, *flags, drawn=True))
    are_pictures(tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "step_6" / "state.json").read_text())["state"]
    best = max(state["history"], key=lambda row: row.get("top1_ema", row["top1"]))
    kept = [row for row in state["history"] if "by_class" in row]
    assert kept == [row for row in state["history"] if row in (best, state["history"][-1])]  # and of no other epoch


def test_two_replicas_count_together(tmp_path):
    assert distributed.run(2, train_on_rank, tmp_path) == ["", ""]
    check(tmp_path, results(tmp_path))


def test_an_evaluation_by_itself_has_them_too(recipe, tmp_path, capsys):
    found = results_of(recipe, tmp_path / "run")
    train(recipe, tmp_path / "eval", "--eval_only", f"--pretrained={tmp_path}/run/model")
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["by_class"] == found["by_class"]
    assert "by_class" not in capsys.readouterr().out


def test_vit_says_how_each_class_fared(tmp_path):
    check(tmp_path, vit.results_of(tmp_path, *vit.SCRATCH, "--learning_rate=1e-2", drawn=True))
    are_pictures(tmp_path)
    log = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_by_class" in entry] == [8]


def test_of_the_best_checkpoint_it_is_the_best_weights_classes(tmp_path):
    flags = ["--load_best_model_at_end", "--metric_for_best_model=eval_loss", "--greater_is_better=true"]
    found = vit.results_of(tmp_path, *vit.SCRATCH, *flags, "--learning_rate=1e-2")
    pushed = json.loads((tmp_path / "model" / "results.json").read_text())
    assert pushed["by_class"]["confusion"] == found["best"]["by_class"]["confusion"] == by_model(tmp_path / "model")
    assert pushed["by_class"] != found["by_class"]  # the last epoch's


def test_two_replicas_of_vit_count_together(tmp_path):
    assert distributed.run(2, vit.train_on_rank, tmp_path, *vit.SCRATCH, timeout=120) == ["", ""]
    check(tmp_path, results(tmp_path))
