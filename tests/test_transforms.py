"""timm's transforms by flags: in two parts they do what timm's own loader does."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate

from hf_rwp.arguments import ImageArguments
from hf_rwp.transforms import BatchTransform, erasings, image_transforms

CONFIG = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
CPU = torch.device("cpu")


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def seed(value=0):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def test_evaluation_is_timms(picture):
    _, transform = image_transforms(ImageArguments(data_dir="pets"), CONFIG)
    ours = BatchTransform(CONFIG, CPU)(torch.as_tensor(transform(picture))[None])
    torch.testing.assert_close(ours[0], create_transform(**CONFIG)(picture), rtol=1e-5, atol=1e-5)
    _, normalized = image_transforms(ImageArguments(data_dir="pets"), CONFIG, normalized=True)
    assert torch.equal(normalized(picture), create_transform(**CONFIG)(picture))


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1"])
def test_training_is_timms_loader(picture, aa):
    args = ImageArguments(data_dir="pets", aa=aa, reprob=0.7, vflip=0.5, scale=[0.3, 1.0], train_interpolation="random")
    training, _ = image_transforms(args, CONFIG)
    options = {"interpolation": "random", "scale": (0.3, 1.0), "vflip": 0.5, "auto_augment": aa, "re_prob": 0.7}
    timms = create_transform(**{**CONFIG, **options}, is_training=True, use_prefetcher=True, color_jitter=0.4)
    seed()
    images = torch.stack([torch.as_tensor(training(picture)) for _ in range(6)])
    assert images.dtype == torch.uint8
    ours = BatchTransform(CONFIG, CPU, erasings(args, CONFIG, CPU))(images)
    seed()
    batch = fast_collate([(timms(picture), 0) for _ in range(6)])
    loader = PrefetchLoader([batch], CONFIG["mean"], CONFIG["std"], device=CPU, re_prob=0.7, re_mode="pixel")
    torch.testing.assert_close(ours, next(iter(loader))[0])


def test_a_batch_keeps_the_memory_format_asked_for():
    transform = BatchTransform(CONFIG, CPU, memory_format=torch.channels_last)
    images = transform(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_crop_padding_shifts_the_image_by_as_much(picture):
    whole = picture.resize((24, 24), PIL.Image.BILINEAR)
    args = ImageArguments(data_dir="cifar", crop_padding=4, hflip=0, color_jitter=0)
    training, _ = image_transforms(args, CONFIG)
    padded = np.pad(np.asarray(whole), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 24, x : x + 24].tobytes() for y in range(9) for x in range(9)}
    seed()
    crops = [np.asarray(training(whole)).transpose(1, 2, 0).tobytes() for _ in range(20)]
    assert len(set(crops)) > 5
    assert set(crops) <= windows


@pytest.mark.parametrize("normalized", [False, True])
def test_cutout_erases_a_square_of_every_image(picture, normalized):
    args = ImageArguments(data_dir="cifar", cutout=8)
    training, _ = image_transforms(args, CONFIG, normalized)
    seed()
    images = torch.stack([torch.as_tensor(training(picture)) for _ in range(10)])
    if not normalized:
        images = BatchTransform(CONFIG, CPU, erasings(args, CONFIG, CPU))(images)
    erased = (images == 0).all(1)
    assert erased.sum((1, 2)).tolist() == [64] * 10
    assert erased.any(1).sum(1).tolist() == erased.any(2).sum(1).tolist() == [8] * 10
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in erased}) > 3


def test_a_cutout_of_the_whole_image_is_refused():
    with pytest.raises(ValueError, match="cutout=24 would erase all of an image of 24 pixels"):
        erasings(ImageArguments(data_dir="cifar", cutout=24), CONFIG, CPU)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="aa='trivial' is no augmentation that timm knows"):
        image_transforms(ImageArguments(data_dir="pets", aa="trivial"), CONFIG)
