"""The folder that timm and transformers load; test_imagenet_runs.py loads one in both after training."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config

from hf_rwp.hub.card import render_card
from hf_rwp.hub.export import save_any, save_model
from hf_rwp.hub.facts import build_facts

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


def test_any_model_comes_out_of_its_wrappings(model, tmp_path):
    wrapped = torch.nn.DataParallel(torch.compile(model))
    assert save_any(wrapped, tmp_path / "model", label_names=NAMES)["library"] == "timm"
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_model_that_no_library_knows_is_its_weights(tmp_path):
    linear = torch.nn.Linear(2, 1)
    assert save_any(linear, tmp_path / "linear") == {"library": "pytorch", "architecture": "Linear"}
    linear.load_state_dict(load_file(tmp_path / "linear" / "model.safetensors"))
    card = render_card(build_facts({"arguments": {}}, library="pytorch", architecture="Linear"))
    assert "load_state_dict" in card
    assert "AutoModel" not in card


def test_labels_that_do_not_fit_the_model_are_numbers_instead(model, tmp_path):
    save_any(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["label_names"] == ["0", "1", "2", "3"]


def test_a_folder_of_something_else_is_not_replaced(model, tmp_path):
    for name in ("outputs/run/checkpoints/step_1", "notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "results.json").write_text("{}")
    (tmp_path / "notes" / "todo.txt").write_text("")
    for name in ("outputs/run", "notes"):
        with pytest.raises(FileExistsError, match="is not part of a model, and would be replaced"):
            save(model, tmp_path / name)
    assert (tmp_path / "outputs" / "run" / "checkpoints" / "step_1").is_dir()


def test_label_names_are_one_for_each_class(model, tmp_path):
    with pytest.raises(ValueError, match="2 label_names for a model of 4 classes"):
        save_any(model, tmp_path / "model", label_names=["a", "b"])
