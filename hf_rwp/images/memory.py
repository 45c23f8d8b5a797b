"""Small images that lie on the device: decoded once, augmented in batches, and each batch a function of its number."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from hf_rwp.images.arguments import ImageArguments, MemoryArguments
from hf_rwp.images.loaders import ImageDataset
from hf_rwp.images.transforms import BatchTransform, augmented, cut_out_, image_transforms


@dataclass
class Images:
    """Images (N, 3, H, W) in uint8 and labels (N,), on the device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def decoded(split: Dataset, transform: Callable[..., Any], device: torch.device, title: str) -> Images:
    """All images of a split. transform: as `image_transforms` gives for evaluation. title: of the progress bar.

    Raises ValueError where one cannot be read.
    """
    dataset = ImageDataset(split, transform, training=False, max_bad_images=0)
    blocks = range(0, len(dataset), 256)
    shown = tqdm(blocks, desc=f"decoding {title}", unit_scale=256, unit="img", leave=False, disable=None)
    items = [item for start in shown for item in dataset.__getitems__(range(start, min(start + 256, len(dataset))))]
    if dataset.unreadable.slots:
        raise ValueError(
            f"{len(dataset.unreadable.slots)} of the {title} images could not be read, and none may be missing here: "
            "repair or remove those that the lines above name"
        )
    pixels, labels = zip(*items, strict=True)
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in pixels]))
    return Images(stacked.to(device), torch.tensor(labels, device=device))


def select_images(
    args: MemoryArguments,
    splits: Mapping[str, Dataset],
    data_config: Mapping[str, Any],
    device: torch.device,
    held_out: bool = False,
) -> dict[str, Images]:
    """`train` and `test`, as the flags say; `held_in`, of `train`, and `held_out`, of the training split without it.

    data_config: as `timm.data.resolve_data_config` gives. held_out: whether to make those as well. Raises ValueError
    for more images than there are.
    """
    rows, test_rows = len(splits["train"]), len(splits["validation"])
    validation = rows // 5 if args.validation_images is None else args.validation_images
    for name, wanted, there in (
        ("train_images", args.train_images, rows),
        ("validation_images", validation if held_out else None, rows - 1),
        ("test_images", args.test_images, test_rows),
    ):
        if wanted is not None and not 1 <= wanted <= there:
            raise ValueError(f"{name} must be in [1, {there}], as many as the split has for it, got {wanted}")
    seed, classes = args.data_seed, splits["train"].features["label"].num_classes
    order = np.random.default_rng(seed).permutation(rows)
    test = np.random.default_rng(seed).permutation(test_rows)[: args.test_images]
    _, transform = image_transforms(args, data_config)
    train = decoded(splits["train"].select(order[: args.train_images]), transform, device, "train")
    train.labels = with_wrong_labels(train.labels, args.label_noise, classes, seed, args.label_noise_kind)
    images = {"train": train, "test": decoded(splits["validation"].select(test), transform, device, "validation")}
    images["held_in"] = Images(train.pixels[: rows - validation], train.labels[: rows - validation])
    if held_out:
        images["held_out"] = decoded(splits["train"].select(order[rows - validation :]), transform, device, "train")
    return images


def with_wrong_labels(labels: Tensor, share: float, classes: int, seed: int, kind: str = "symmetric") -> Tensor:
    """`labels` with a share of them drawn anew, evenly from all classes, the right one among them.

    kind: or, where `asymmetric`, that share with class k as k + 1, and the last class as 0.
    """
    chance = np.random.default_rng([seed, 1])
    noisy = chance.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.clone()
    rows = torch.from_numpy(noisy).to(labels.device)
    if kind == "asymmetric":
        labels[rows] = (labels[rows] + 1) % classes
    else:
        labels[rows] = torch.from_numpy(chance.integers(classes, size=len(noisy))).to(labels)
    return labels


def images_digest(*parts: Images) -> str:
    """SHA-256 of all pixels and labels."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.pixels, part.labels):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class Batches:
    """A replica's share of the images of any step, augmented and normalized.

    The shares take turns in one order of all images, shuffled anew each time that it has gone through them. args: of
    the augmentation. size: images of a batch.
    """

    def __init__(self, images: Images, args: ImageArguments, normalize: BatchTransform, size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, size, seed
        self._args, self._normalize = args, normalize
        self._generator = torch.Generator(images.pixels.device)
        self._order: tuple[int, Tensor] | None = None

    def batch(self, position: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels (B,). position: how many batches are before it. seed: of the augmentation."""
        first = position * self.size
        rows = torch.cat(list(self.rows(first, first + self.size)))
        self._generator.manual_seed(seed)
        images = self._normalize(augmented(self.images.pixels[rows], self._args, self._generator))
        if self._args.cutout:
            images = cut_out_(images, self._args.cutout, self._generator)
        return images, self.images.labels[rows]

    def rows(self, start: int, stop: int) -> Iterator[Tensor]:
        """Places `start` to `stop` of the order that goes through all images again and again."""
        while start < stop:
            epoch, offset = divmod(start, len(self.images))
            if self._order is None or self._order[0] != epoch:
                # Apart from the draws of select_images, which are seeded by [seed] and [seed, 1].
                shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.images))
                self._order = epoch, torch.from_numpy(shuffled).to(self.images.labels.device)
            rows = self._order[1][offset : offset + stop - start]
            yield rows
            start += len(rows)
