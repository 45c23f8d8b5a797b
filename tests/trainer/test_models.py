"""Models for Trainer on images: trained weights that fit, and preprocessing that transformers repeats."""

import importlib.util

import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from vit import trained_vit, write_pictures

from hf_rwp.images.transforms import image_transforms
from hf_rwp.trainer.model_arguments import ModelArguments
from hf_rwp.trainer.models import create_model, image_processor, preprocessing

DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_vit(tmp_path_factory.mktemp("trained"))


def test_trained_weights_get_a_new_head(trained):
    model, _ = create_model(ModelArguments(model_name_or_path=str(trained)), DIGITS)
    assert model.classifier.out_features == 10
    kept = AutoModelForImageClassification.from_pretrained(trained).state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items() if not k.startswith("classifier."))


def test_weights_that_do_not_fit_are_refused(trained):
    given = {"model_name_or_path": str(trained), "model_kwargs": "{hidden_size: 32}"}
    with pytest.raises(ValueError, match=r"random weights beside a new head: vit\.embeddings"):
        create_model(ModelArguments(**given), DIGITS)
    with pytest.raises(ValueError, match="img_size=32, and the position embeddings"):
        create_model(ModelArguments(model_name_or_path=str(trained), img_size=32), DIGITS)


@pytest.mark.parametrize("flags", [{}, {"crop_pct": 0.8, "interpolation": "bicubic"}])
def test_the_processor_does_what_evaluation_does(trained, flags, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    args = ModelArguments(data_dir=str(pictures), model_name_or_path=str(trained), **flags)
    config = preprocessing(args, create_model(args, ["a", "b"])[0])
    assert config["mean"] == (0.4, 0.4, 0.4)
    image = PIL.Image.open(next(pictures.rglob("*.png")))
    _, transform = image_transforms(args, config, normalized=True)
    (ours,) = image_processor(config)(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == (3, 16, 16)
    torch.testing.assert_close(ours, transform(image), atol=0.02, rtol=0)  # the two round pixels differently
    if not flags:
        (own,) = AutoImageProcessor.from_pretrained(trained)(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(ours, own)


def test_lora_without_peft_is_refused(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "peft" else find(name, *_))
    with pytest.raises(ValueError, match="pip install peft"):
        ModelArguments(lora_r=4, model_name_or_path="a/b")
