"""timm's transforms by flags: in two parts they do what timm's own loader does."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate

from hf_rwp.images.arguments import ImageArguments
from hf_rwp.images.transforms import BatchTransform, augmented, cut_out_, erasings, image_transforms

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
    with pytest.raises(ValueError, match="aa='trivial' is not an augmentation that timm knows"):
        image_transforms(ImageArguments(data_dir="pets", aa="trivial"), CONFIG)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**options):
    return ImageArguments(data_dir="cifar", color_jitter=0, **options)


def test_padded_crops_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (200, 3, 6, 5), dtype=torch.uint8, generator=generator())
    crops = augmented(images, small(crop_padding=2, hflip=0), generator())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = padded.unfold(2, 6, 1).unfold(3, 5, 1)  # (B, C, 5, 5, 6, 5)
    found = (windows == crops[:, :, None, None]).flatten(4).all(-1).all(1)  # where each crop is from
    assert crops.dtype == torch.uint8
    assert found.flatten(1).sum(1).tolist() == [1] * 200
    assert found.sum(0).min() > 0  # from everywhere
    assert torch.equal(crops, augmented(images, small(crop_padding=2, hflip=0), generator()))
    assert not torch.equal(crops, augmented(images, small(crop_padding=2, hflip=0), generator(1)))


def test_flips_come_as_often_as_asked():
    images = torch.arange(1000 * 6, dtype=torch.uint8).view(1000, 1, 2, 3)
    flipped = augmented(images, small(crop_padding=0, hflip=0.25), generator())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert mirrored.float().mean().item() == pytest.approx(0.25, abs=0.05)
    upside_down = augmented(images, small(crop_padding=0, hflip=0, vflip=1), generator())
    assert torch.equal(upside_down, images.flip(2))


def test_resized_crops_are_linear_maps_onto_parts_of_the_image():
    """On an image whose pixels are their own coordinates a crop shows its box."""
    size = 32
    place = (torch.arange(size) + 0.5) / size
    images = torch.stack([place[None].expand(size, size), place[:, None].expand(size, size)]).expand(500, 2, size, size)
    crops = augmented(images, small(scale=[0.25, 0.5], ratio=[0.5, 2.0], hflip=0), generator())
    assert crops.shape == images.shape
    x, y = crops[:, 0, size // 2], crops[:, 1, :, size // 2]
    # At the image's edge half a pixel is clamped: look at the inner part.
    width = (x[:, -4] - x[:, 3]) * size / (size - 7)
    height = (y[:, -4] - y[:, 3]) * size / (size - 7)
    area, aspect = width * height, width / height
    assert 0.24 < area.min() < 0.27
    assert 0.48 < area.max() < 0.51
    assert 0.5 < aspect.min() < 0.55
    assert 1.85 < aspect.max() < 2.01
    assert crops.min() > 0
    assert crops.max() < 1
    torch.testing.assert_close(crops[:, 0, 0, 4:-4], crops[:, 0, -1, 4:-4])  # no shear
    whole = augmented(images, small(scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0), generator())
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-5)


def test_cutout_may_hang_over_the_edge():
    images = cut_out_(torch.ones(2000, 3, 16, 16), 8, generator())
    holes = (images == 0).all(1)
    assert torch.equal(holes, (images == 0).any(1))  # all channels alike
    sizes = holes.flatten(1).sum(1)
    assert sizes.max() == 64
    assert sizes.min() == 16  # of a corner: a quarter of it
    assert torch.equal(holes.any(1).sum(1) * holes.any(2).sum(1), sizes)  # rectangles
    assert holes.float().mean(0).min() > 0.05


def test_batch_augmentation_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    cut_out_(augmented(torch.ones(2, 3, 8, 8), small(), generator()), 4, generator())
    assert torch.equal(torch.random.get_rng_state(), before)
