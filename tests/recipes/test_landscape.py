"""recipes/landscape.py on small untrained models and a few digits."""

import io
import json
import math
import re

import imagenet
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import IterableDatasetDict
from timm.data import create_transform, resolve_data_config
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel
from transformers.utils.logging import enable_progress_bar

from hf_rwp.hub.export import save_model
from hf_rwp.hub.push import add_card

DIGITS = [str(digit) for digit in range(10)]
SMALL = ["--grid=3", "--num_images=9", "--batch_size=4", "--draws=3", "--gammas", "0.01", "0.02", "--iterations=2"]


@pytest.fixture
def recipe(monkeypatch):
    loaded = imagenet.load_recipe(imagenet.RECIPES / "landscape.py")
    monkeypatch.setattr(loaded, "load_images", imagenet.few_digits)
    return loaded


@pytest.fixture
def run(recipe, tmp_path):
    """Runs the recipe; gives what it wrote as numbers."""

    def record(*models, flags=()):
        recipe.main(recipe.parsed([*map(str, models), *SMALL, *flags, f"--output_dir={tmp_path / 'out'}"]))
        return json.loads((tmp_path / "out/landscape.json").read_text())

    return record


@pytest.fixture
def undrawn(recipe, monkeypatch):
    """Pictures take longer than the numbers."""
    monkeypatch.setattr(recipe, "landscape", lambda losses, coordinates, path, label: path.touch())
    monkeypatch.setattr(recipe, "sharpness_curves", lambda figures, path: path.touch())


def timm_model(folder, seed=0, label_names=DIGITS):
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=len(label_names))
    config = resolve_data_config({"img_size": 16, "crop_pct": 1.0}, model=model)
    save_model(model, folder, label_names=label_names, data_config=config)
    return folder


def vit(folder, kind=ViTForImageClassification):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(DIGITS)), "label2id": {name: i for i, name in enumerate(DIGITS)}}
    kind(ViTConfig(image_size=16, patch_size=8, **sizes, **names)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_timm_and_transformers_models_are_set_side_by_side(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_rwp.runs.progress.LATEST", 0.0)  # a line after every batch
    models = timm_model(tmp_path / "digits_base_seed0/model"), vit(tmp_path / "vit")
    enable_progress_bar()
    capsys.readouterr()
    record = run(*models)
    assert leftovers(tmp_path / "out") == ["landscape.json", "landscape.png", "sharpness.png"]
    with PIL.Image.open(tmp_path / "out/landscape.png") as picture:
        assert picture.format == "PNG"
    assert list(record["models"]) == ["digits_base_seed0", "vit"]
    for found in record["models"].values():
        train, held_out = found["train"], found["held_out"]
        assert train["plane"][1][1] == train["line"][2] == train["loss"]
        assert np.shape(train["plane"]) == (3, 3)
        assert train["coordinates"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
        assert [level["gamma"] for level in train["under_noise"]] == [0.01, 0.02]
        assert train["largest_eigenvalue"]["iterations"] == 2
        assert set(held_out["quantized"]) == {"8", "4"}
        assert held_out["accuracy"] * 9 == pytest.approx(round(held_out["accuracy"] * 9))
    assert record["data"]["train"]["images"] == record["data"]["validation"]["images"] == 9
    assert record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(record)
    assert record["command"].startswith("python recipes/landscape.py digits_base_seed0 vit --")
    assert "--grid 3" in record["command"]
    assert "--seed" not in record["command"]
    said, bars = capsys.readouterr()
    assert "it/s" not in bars  # of weights that are loaded
    assert "\ndigits_base_seed0 " in said  # in the table
    lines = re.findall(r"^(digits_base_seed0|vit), (\d+)%: .*batches/s, \S+ left$", said, re.MULTILINE)
    assert list(dict.fromkeys(name for name, _ in lines)) == ["digits_base_seed0", "vit"]
    assert min(int(percent) for name, percent in lines if name == "vit") in (50, 51)


def test_models_of_one_architecture_move_along_the_same_directions(run, undrawn, tmp_path):
    record = run(timm_model(tmp_path / "one"), timm_model(tmp_path / "same"), timm_model(tmp_path / "other", seed=1))
    one, same, other = record["models"].values()
    assert one == same
    assert one["train"]["plane"] != other["train"]["plane"]


def test_images_are_prepared_as_each_model_was_evaluated(recipe, tmp_path):
    model, processor = recipe.load_model(str(timm_model(tmp_path / "timm")), DIGITS)
    split = imagenet.few_digits()["train"].select([3])
    ((pixels, labels),) = recipe.read(recipe.parsed(["x"]), split, processor, torch.device("cpu"))
    prepare = create_transform(**resolve_data_config({}, pretrained_cfg=model.config.pretrained_cfg))
    with PIL.Image.open(io.BytesIO(split[0]["image"]["bytes"])) as image:
        torch.testing.assert_close(pixels, prepare(image.convert("RGB"))[None])
    assert pixels.shape == (1, 3, 16, 16)
    assert labels.tolist() == [split[0]["label"]]


def test_a_card_shows_its_own_landscape_and_keeps_what_was_edited(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "sharpness_curves", lambda figures, path: path.touch())  # no card shows them
    folder = timm_model(tmp_path / "digits_rwp_seed0/model")
    add_card(folder, {"arguments": {"method": "rwp", "model": "test_resnet", "data_dir": None}})
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Limits", "My own words.\n\n## Limits"))
    run(tmp_path / "digits_rwp_seed0", timm_model(tmp_path / "other"))  # the run's folder stands for its model
    text = card.read_text()
    assert "My own words." in text
    assert text.count("](landscape.png)\n\n## Training\n") == 1
    with PIL.Image.open(folder / "landscape.png") as mine, PIL.Image.open(tmp_path / "out/landscape.png") as both:
        assert mine.height < both.height  # a single model
    run(folder)
    assert card.read_text() == text
    assert [name for name in leftovers(folder) if name.endswith(".partial")] == []
    assert not (tmp_path / "other/landscape.png").exists()  # it has no card


@pytest.mark.parametrize("moment", ["loss_slice", "sharpness_curves", "landscape"])
def test_an_interrupt_leaves_nothing_half_written(run, recipe, tmp_path, monkeypatch, moment):
    folder = timm_model(tmp_path / "run/model")
    add_card(folder, {"arguments": {"method": "base"}})
    before = (folder / "README.md").read_text()

    def interrupt(*arguments):
        if moment != "loss_slice":
            arguments[-1 if moment == "sharpness_curves" else 2].write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert leftovers(tmp_path / "out") == []
    assert (folder / "README.md").read_text() == before
    assert not (folder / "landscape.png").exists()


def test_a_diverged_model_is_drawn_and_recorded(run, tmp_path):
    folder = timm_model(tmp_path / "diverged")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.nn.init.constant_(model.fc.weight, math.nan)
    save_model(model, folder, label_names=DIGITS, data_config=resolve_data_config({"img_size": 16}, model=model))
    found = run(folder, timm_model(tmp_path / "fine"))["models"]
    assert found["diverged"]["train"]["loss"] is None
    assert found["fine"]["train"]["loss"] > 0


def test_other_classes_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"tells 3 classes apart and the data has 10: .*--data_dir or --dataset"):
        recipe.load_model(str(timm_model(tmp_path / "three", label_names=["a", "b", "c"])), DIGITS)
    with pytest.raises(ValueError, match="has class '1' at index 0, where the data has '0'"):
        recipe.load_model(str(timm_model(tmp_path / "swapped", label_names=["1", "0", *DIGITS[2:]])), DIGITS)


def test_names_of_the_same_classes_may_differ(recipe):
    theirs = ["tench", "Goldfish, Carassius auratus", "n01484850", "crane", "crane"]
    recipe.check_classes("model", theirs, ["tench, Tinca tinca", "goldfish", "great white shark", "bird", "crane"])


def test_what_is_no_classifier_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"no trained weights for classifier.*not a backbone"):
        recipe.load_model(str(vit(tmp_path / "backbone", kind=ViTModel)), DIGITS)
    with pytest.raises(ValueError, match=r"nowhere. does not exist"):
        recipe.load_model(str(tmp_path / "nowhere"), DIGITS)


def test_models_with_one_name_are_refused(run, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
    with pytest.raises(ValueError, match="called run, run in the pictures"):
        run(tmp_path / "a/run", tmp_path / "b/run")


def test_words_ahead_of_flags_are_models(recipe):
    args = recipe.parsed(["timm/resnet18.a1_in1k", "outputs/run/model", "--grid", "5"])
    assert args.models == ["timm/resnet18.a1_in1k", "outputs/run/model"]
    assert args.grid == 5
    assert recipe.parsed(["--models", "a", "b"]).models == ["a", "b"]
    assert args.gammas == pytest.approx([0.0025, 0.005, 0.01, 0.015, 0.02])
    assert recipe.parsed(["a", "--noise", "filter_normalized"]).gammas[2] == 0.2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], r"models must be one or more .*MODEL.*got \[\]"),
        (["a", "--grid=4"], "grid must be odd.*got 4"),
        (["a", "--img_size=32"], "img_size=32 has no effect here"),
        (["a", "--hflip=0.5"], "hflip=0.5 has no effect here"),
        (["a", "--draws=2"], "draws must be at least 3, got 2"),
        (["a", "--span=0"], "span must be finite and above 0, got 0"),
    ],
)
def test_flags_out_of_range_are_refused(recipe, flags, said):
    with pytest.raises(ValueError, match=said):
        recipe.parsed(flags)


def test_a_stream_gives_images_as_well(run, undrawn, recipe, tmp_path, monkeypatch):
    def stream(**_):
        return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in imagenet.few_digits().items()})

    monkeypatch.setattr(recipe, "load_images", stream)
    record = run(timm_model(tmp_path / "one"))
    assert record["data"]["train"]["images"] == 9


def test_unreadable_images_are_left_out_up_to_a_limit(recipe, tmp_path):
    split = imagenet.few_digits()["train"].select(range(6))
    broken = split.map(lambda row, i: {"image": {"path": None, "bytes": b"?"}} if i < 2 else row, with_indices=True)
    _, processor = recipe.load_model(str(timm_model(tmp_path / "one")), DIGITS)
    batches = recipe.read(recipe.parsed(["x", "--batch_size=2"]), broken, processor, torch.device("cpu"))
    assert [len(labels) for _, labels in batches] == [2, 2]
    with pytest.raises(ValueError, match="2 of 6 images could not be read, and max_bad_images is 1"):
        recipe.read(recipe.parsed(["x", "--max_bad_images=1"]), broken, processor, torch.device("cpu"))
