"""timm's image transforms from the flags, in two parts: for each image in a worker, for each batch on the device.

`augmented` is for small images that are on the device already: all of it in batches, where they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad
from torchvision.transforms import Compose, RandomCrop, Resize

from hf_rwp.images.arguments import ImageArguments


def image_transforms(
    args: ImageArguments, data_config: Mapping[str, Any], normalized: bool = False
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The transforms of one RGB image in training and in evaluation.

    data_config: as `timm.data.resolve_data_config` gives. Both give a (3, H, W) array of uint8, to be normalized and
    erased in batches by `BatchTransform`; with `normalized` a float tensor that is so already.
    """
    options = {**data_config, "use_prefetcher": not normalized}
    augmentation = {
        "interpolation": args.train_interpolation or data_config["interpolation"],
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }
    try:
        training: Any = create_transform(**{**options, **augmentation}, is_training=True)
    except AssertionError as error:
        raise ValueError(
            f"aa={args.aa!r} is not an augmentation that timm knows: write it like rand-m9-mstd0.5"
        ) from error
    size = tuple(data_config["input_size"][-2:])
    if args.crop_padding is not None:  # in place of timm's random resized crop
        training.transforms[0] = Compose([Resize(size), RandomCrop(size, padding=args.crop_padding)])
    if args.cutout and normalized:
        training.transforms.append(_cutout(args.cutout, size, torch.device("cpu")))
    return training, create_transform(**options)


def erasings(args: ImageArguments, data_config: Mapping[str, Any], device: torch.device) -> list[RandomErasing]:
    """What `BatchTransform` erases in training: timm's random erasing, and cutout as a case of it."""
    found = []
    if args.reprob:
        found.append(
            RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)  # as in timm's loader
        )
    if args.cutout:
        found.append(_cutout(args.cutout, data_config["input_size"][-2:], device))
    return found


class BatchTransform:
    """Normalizes a batch of uint8 images (B, 3, H, W) on the device, and erases boxes in it; float32 comes out.

    Chance comes from Python's and the device's global generators at the moment of the call: timm's PrefetchLoader does
    the same a batch ahead, where seeding a step no longer reaches it.

    nothing: a batch of one image that counts for nothing, its label -1.
    """

    def __init__(
        self,
        data_config: Mapping[str, Any],
        device: torch.device,
        erasings: Sequence[RandomErasing] = (),
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._mean, self._std = (
            torch.tensor([value * 255 for value in data_config[name]], device=device).view(1, 3, 1, 1)
            for name in ("mean", "std")
        )
        self._device, self._erasings, self._memory_format = device, erasings, memory_format
        self.nothing = torch.zeros(1, *data_config["input_size"]), torch.tensor([-1])

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self._device, non_blocking=True).float().sub_(self._mean).div_(self._std)
        for erase in self._erasings:
            images = erase(images)
        return images.contiguous(memory_format=self._memory_format)


def _cutout(side: int, size: Sequence[int], device: torch.device) -> RandomErasing:
    if side >= min(size):
        raise ValueError(f"cutout={side} would erase all of an image of {min(size)} pixels: set less")
    area = side**2 / (size[0] * size[1])
    return RandomErasing(1.0, min_area=area, max_area=area, min_aspect=1, max_aspect=1, mode="const", device=device)


def augmented(images: Tensor, args: ImageArguments, generator: torch.Generator) -> Tensor:
    """A random crop and a random flip of each of the images (B, C, H, W), on their device; sizes stay.

    Crops as in `image_transforms`: after padding by `crop_padding`, with the pixels as they are, else of a random size
    and resized. generator: on that device; all chance comes from it.
    """
    count, device = len(images), images.device
    if args.crop_padding is not None:
        images = _padded_crops(images, args.crop_padding, generator)
    else:
        images = _resized_crops(images, args.scale or (1, 1), args.ratio or (3 / 4, 4 / 3), generator)
    for probability, dim in ((args.hflip, 3), (args.vflip, 2)):
        if probability:
            flips = torch.rand(count, 1, 1, 1, generator=generator, device=device) < probability
            images = torch.where(flips, images.flip(dim), images)
    return images


def cut_out_(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of each of the images (B, C, H, W) to 0, in place; it may hang over the edge (arXiv 1708.04552).

    side: of the square, in pixels. generator: on the images' device.
    """
    count, _, *size = images.shape
    masks = []
    for dim, pixels in zip((2, 3), size, strict=True):
        centre = torch.randint(pixels, (count, 1), generator=generator, device=images.device)
        first = centre - side // 2
        place = torch.arange(pixels, device=images.device)
        inside = (place >= first) & (place < first + side)
        masks.append(inside.unflatten(1, (1, pixels, 1) if dim == 2 else (1, 1, pixels)))
    return images.masked_fill_(masks[0] & masks[1], 0)


def _padded_crops(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    device = images.device
    corners = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=device)
    rows, columns = corners[0] + torch.arange(height, device=device), corners[1] + torch.arange(width, device=device)
    channels_last = pad(images, [padding] * 4).permute(0, 2, 3, 1)
    which = torch.arange(count, device=device)[:, None, None]
    return channels_last[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resized_crops(
    images: Tensor, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Crops of a share `scale` of the area and an aspect ratio in `ratio`, at most the image, resized bilinearly."""
    count, _, height, width = images.shape
    area, aspect, x, y = torch.rand(4, count, generator=generator, device=images.device)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
    # Shares of the image's sides; a box too wide or too high for the image is cut to it.
    box_width = (area * aspect * height / width).sqrt().clamp(max=1)
    box_height = (area / aspect * width / height).sqrt().clamp(max=1)
    zero = torch.zeros_like(area)
    to_x = torch.stack([box_width, zero, (1 - box_width) * (2 * x - 1)], 1)
    to_y = torch.stack([zero, box_height, (1 - box_height) * (2 * y - 1)], 1)
    grid = affine_grid(torch.stack([to_x, to_y], 1), list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
