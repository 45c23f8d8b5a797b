"""The folder that timm and transformers load; test_imagenet_runs.py loads one in both after training."""

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config

from hf_rwp.hub import save_model

NAMES = ["bee", "crab", 'd"og', "ėel"]


@pytest.fixture
def model():
    return timm.create_model("test_convnext", num_classes=4)


def save(model, folder, **config):
    config = resolve_data_config({"img_size": 48, "crop_pct": 0.8}, model=model) | config
    save_model(model, folder, label_names=NAMES, data_config=config)


def test_preprocessing_and_labels_are_those_of_the_run(model, tmp_path):
    save(model, tmp_path / "model", mean=(0.1, 0.2, 0.3))
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    config = resolve_data_config({}, model=again, use_test_size=True)
    assert (config["input_size"], config["crop_pct"], list(config["mean"])) == ((3, 48, 48), 0.8, [0.1, 0.2, 0.3])
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["label_names"] == NAMES
    assert not {"tag", "origin_url", "paper_ids", "license"} & set(written["pretrained_cfg"])


def test_the_model_itself_is_left_as_it_was(model, tmp_path):
    before = dict(model.pretrained_cfg)
    save(model.to(memory_format=torch.channels_last), tmp_path / "model")
    assert model.pretrained_cfg == before
    assert any(not parameter.is_contiguous() for parameter in model.parameters())


def test_a_folder_is_replaced_as_a_whole(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_text("of another run")
    (tmp_path / "model.partial").mkdir()
    save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_the_earlier_model(model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(model, folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm.models._hub.save_config_for_hf", full)
    with pytest.raises(OSError, match="No space left"):
        save(timm.create_model("test_convnext", num_classes=4), folder)
    assert (folder / "model.safetensors").read_bytes() == before
