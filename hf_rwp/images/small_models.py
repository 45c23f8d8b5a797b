"""Models for images of few pixels, as papers on CIFAR have them."""

from typing import Any

import timm
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

SMALL = 64  # pixels of a side, at most


def create_small_model(
    name: str, num_classes: int, img_size: int, small_stem: bool = True, /, **options: Any
) -> nn.Module:
    """A timm model, or `wrn16_8`; for images of at most 64 pixels a ResNet has a small stem, unless told otherwise.

    options: of the model. With a small stem a ResNet's `output_stride` is left out: it would make up for the other one.
    """
    if name == "wrn16_8":
        return wide_resnet(num_classes, **options)
    small = small_stem and img_size <= SMALL
    if small and name.startswith("resnet"):
        options.pop("output_stride", None)
    model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    if small and isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d):
        make_stem_small(model)
    return model


def make_stem_small(model: Any) -> None:
    """Give timm's ResNet CIFAR's stem in place of ImageNet's: a 3x3 convolution, without pooling."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions


def wide_resnet(num_classes: int, **options: Any) -> ResNetV2:
    """WideResNet-16-8 (arXiv 1605.07146). options: of timm's ResNetV2."""
    model = ResNetV2(
        [2, 2, 2],
        channels=(128, 256, 512),
        num_classes=num_classes,
        stem_chs=16,
        basic=True,
        bottle_ratio=1.0,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
        **options,
    )
    model.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)  # type: ignore[assignment]
    return model
