"""timm's image transforms from the flags, in two parts: for each image in a worker, for each batch on the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, Resize

from hf_rwp.arguments import ImageArguments


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
        raise ValueError(f"aa={args.aa!r} is no augmentation that timm knows: write it like rand-m9-mstd0.5") from error
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
