"""The classes of the data in the order of the weights that are evaluated on them."""

import json

import PIL.Image
import pytest

from hf_rwp.hub.configs import config_of
from hf_rwp.images.data import load_images
from hf_rwp.images.orders import class_names, in_order_of


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("0", "1", "2", "10")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            PIL.Image.new("L", (2, 2), number).save(tmp_path / "data" / split / name / "0.png")
    return str(tmp_path / "data")


def weights(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def ordered(splits, place):
    return in_order_of(splits, place, config_of)


def numbers(splits):
    """Which class each image of the validation split is numbered as, by the folder that it is in."""
    split = splits["validation"]
    return {row["image"]["path"].split("/")[-2]: row["label"] for row in split}


def test_weights_that_name_no_classes_are_taken_in_natural_order_if_they_are_timms(tmp_path, data):
    splits = ordered(load_images(data), weights(tmp_path / "w", architecture="resnet18", num_classes=4))
    assert numbers(splits) == {"0": 0, "1": 1, "2": 2, "10": 3}
    assert "natural order, as timm sorts folders (0, 1, 2, 10)" in splits.found.notes[-1]
    assert "natural order" in in_order_of(load_images(data), "timm", config_of).found.notes[-1]


def test_weights_that_name_no_classes_are_taken_in_plain_order_if_they_are_transformers(tmp_path, data):
    config = {"model_type": "vit", "id2label": {str(number): f"LABEL_{number}" for number in range(4)}}
    splits = ordered(load_images(data), weights(tmp_path / "w", **config))
    assert numbers(splits) == {"0": 0, "1": 1, "10": 2, "2": 3}
    assert any("plain order" in note for note in splits.found.notes)


def test_weights_that_name_a_class_twice_are_matched_by_place(tmp_path, data):
    """ImageNet's class names in transformers have two cranes."""
    config = {"model_type": "vit", "id2label": {"0": "0", "1": "crane", "2": "2", "3": "crane"}}
    splits = ordered(load_images(data), weights(tmp_path / "w", **config))
    assert numbers(splits) == {"0": 0, "1": 1, "2": 2, "10": 3}
    assert any("name crane more than once" in note for note in splits.found.notes)


def test_data_with_a_class_that_weights_name_twice_among_more_is_refused(tmp_path, data):
    config = {"architecture": "resnet18", "label_names": ["0", "1", "2", "10", "2"]}
    with pytest.raises(ValueError, match=r"has no class 2, of the 4 in the data"):
        ordered(load_images(data), weights(tmp_path / "w", **config))


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "resnet18", "pretrained_cfg": {"label_names": ["10", "2", "7", "1", "0"]}},
        {"model_type": "vit", "id2label": {"0": "10", "1": "2", "2": "7", "3": "1", "4": "0"}},
    ],
)
def test_names_of_the_weights_decide_and_the_data_may_have_a_part_of_them(tmp_path, data, config):
    folder = weights(tmp_path / "run/model", **config)
    for place in (folder, str(tmp_path / "run")):
        splits = ordered(load_images(data), place)
        assert numbers(splits) == {"10": 0, "2": 1, "1": 3, "0": 4}
        assert splits["train"].features["label"].names == ["10", "2", "7", "1", "0"]
        assert str(splits["train"].split) == "train"
        assert splits.found.classes["train"]["7"] == 0


def test_the_same_order_changes_nothing(tmp_path, data):
    splits = load_images(data)
    assert in_order_of(splits, None, config_of) is splits
    assert ordered(splits, weights(tmp_path / "w", label_names=["0", "1", "2", "10"])) is splits
    assert ordered(load_images(data, streaming=True), weights(tmp_path / "v", label_names=["0", "1", "2", "10"]))


def test_a_stream_in_another_order_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match=r"a stream cannot be renumbered"):
        ordered(load_images(data, streaming=True), weights(tmp_path / "w", label_names=["10", "2", "1", "0"]))


def test_classes_that_the_weights_do_not_have_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match=r"has no class 2, 10, of the 4 in the data: it has 0, 1, cat, dog"):
        ordered(load_images(data), weights(tmp_path / "w", label_names=["0", "1", "cat", "dog"]))


def test_classes_of_other_names_altogether_are_matched_by_place_and_told(tmp_path, data):
    splits = ordered(load_images(data), weights(tmp_path / "w", label_names=["tench", "shark", "ray", "hen"]))
    assert numbers(splits) == {"0": 0, "1": 1, "2": 2, "10": 3}
    assert "have other names (tench, shark, ray, ...)" in splits.found.notes[-1]


def test_weights_without_a_configuration_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert config_of(str(tmp_path)) == {}
    assert config_of("nobody/nothing-at-all") == {}
    assert class_names({}) is None
