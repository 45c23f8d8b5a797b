"""Models for images of few pixels are those of the papers."""

import pytest
import torch

from hf_rwp.images.small_models import create_small_model


def made(name, small_stem=True, **options):
    model = create_small_model(name, 10, 32, small_stem, **options)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    return model


def test_models_for_small_images():
    resnet = made("resnet18", output_stride=8)
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962  # the CIFAR ResNet-18 of every SAM paper
    assert resnet.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    wide = made("wrn16_8")
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(10.96e6, rel=0.002)  # arXiv 1605.07146
    assert wide.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (8, 8)
    stem = made("resnet18", small_stem=False).conv1
    assert (stem.kernel_size, stem.stride) == ((7, 7), (2, 2))


def test_options_of_a_model_may_have_any_name():
    model = create_small_model("test_vit", 10, 32, True, img_size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
