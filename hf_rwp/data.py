"""Images for training: `datasets` splits in one form, plain PyTorch loaders over them, and the embedded digits."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")  # the first found is taken


def load_digits(seed: int = 0) -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits: 1,437 to train, 360 for validation, stratified.

    Columns: image (8x8, grayscale, the 17 levels spread over 0 to 255) and label ("0" to "9"). seed: of the split.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    pixels, labels = sklearn_digits(return_X_y=True)
    images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    digits = Dataset.from_dict(
        {"image": [PIL.Image.fromarray(image) for image in images], "label": labels},
        features=Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)])),
    )
    parts = digits.train_test_split(test_size=0.2, stratify_by_column="label", seed=seed)
    return DatasetDict(train=parts["train"], validation=parts["test"])


def load_images(data_dir: str | None = None, dataset: str | None = None) -> DatasetDict:
    """Images and labels as splits "train" and "validation", each with the columns image (Image), label (ClassLabel).

    data_dir: a folder, either train/CLASS/IMAGE and validation/CLASS/IMAGE (or val, test, ...), or parquet files with
    the split in their name. dataset: an id on the Hub. Neither: the digits. Columns are found by type, not by name.
    Raises ValueError for splits, columns and labels that are missing, empty, ambiguous or out of range.
    """
    if data_dir is not None and dataset is not None:
        raise ValueError(f"both data_dir={data_dir!r} and dataset={dataset!r} are set: set only one of them")
    if data_dir is not None:
        return _normalized(_load_folder(Path(data_dir).expanduser()))
    if dataset is not None:
        hint = "Check the id, your access (`hf auth login`) and the connection, or set data_dir to a folder with a copy"
        return _normalized(_load(dataset, hint))
    return load_digits()


def build_loader(
    split: Dataset,
    *,
    transform: Callable[[PIL.Image.Image], Tensor],
    batch_size: int,
    training: bool,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of images (B, 3, H, W), float, and labels (B,), int64, from a split that `load_images` gave.

    transform: from an RGB image to (3, H, W), as timm.data.create_transform makes. training: shuffled by `seed`, anew
    every epoch and alike on all ranks, a short last batch dropped; else in order, with all images. Accelerate's
    use_seedable_sampler ignores `seed` and shuffles by its data_seed: set that, or ranks seeded apart shuffle apart.
    Random transforms draw from the global generators, in workers too: seed those by rank, or all ranks draw alike.
    Raises ValueError if `training` would drop every image.
    """
    if training and len(split) < batch_size:
        raise ValueError(f"{len(split)} images make no whole batch of {batch_size}: set a batch_size of at most that")
    # The sampler has a generator to itself: Accelerate makes its state alike on all ranks.
    sampler = RandomSampler(split, generator=torch.Generator().manual_seed(seed)) if training else None
    return DataLoader(
        split.with_transform(functools.partial(_transformed, transform=transform)),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=torch.cuda.is_available(),
        drop_last=training,
    )


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """`image` in mode RGB; transparency is dropped, 16-bit grayscale is scaled (Pillow alone clips it to white)."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _transformed(batch: dict[str, Any], transform: Callable[[PIL.Image.Image], Tensor]) -> dict[str, Any]:
    return {"image": [transform(to_rgb(image)) for image in batch["image"]], "label": batch["label"]}


def _collated(examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([example["image"] for example in examples])
    return images, torch.tensor([example["label"] for example in examples])


def _load_folder(folder: Path) -> DatasetDict:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir={str(folder)!r} is not a folder: set the one that holds train and validation"
        )
    # Named here: `datasets` alone takes a class folder called train or test for a split, and gives no labels at all if
    # an unlabelled test folder lies beside the others.
    present = [path.name for path in folder.iterdir() if path.is_dir()]
    names = [name for name in (_first(_TRAIN, present), _first(_VALIDATION, present)) if name]
    hint = "It needs train/CLASS/IMAGE and validation/CLASS/IMAGE, or parquet files, with images for both splits"
    return _load(str(folder.resolve()), hint, data_files={name: f"{name}/**" for name in names} or None)


def _load(path: str, hint: str, **options: Any) -> DatasetDict:
    try:
        return load_dataset(path, **options)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path!r} could not be loaded: {error}. {hint}") from error


def _normalized(found: DatasetDict) -> DatasetDict:
    splits = DatasetDict(train=_split(found, _TRAIN), validation=_split(found, _VALIDATION))
    columns = splits["train"].features.items()
    classes = [name for name, feature in columns if isinstance(feature, ClassLabel)]
    integers = [name for name, feature in columns if isinstance(feature, Value) and "int" in feature.dtype]
    image = _only("image", [name for name, feature in columns if isinstance(feature, Image)], splits)
    label = _only("ClassLabel or integer", classes or integers, splits)
    names = _class_names(splits, label)
    splits = splits.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    return splits if classes else DatasetDict({name: _with_names(split, names) for name, split in splits.items()})


def _first(names: Sequence[str], present: Iterable[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _split(found: DatasetDict, names: Sequence[str]) -> Dataset:
    name = _first(names, found)
    if name is None:
        raise ValueError(f"no {names[0]} split among {', '.join(found)}: give it one of the names {', '.join(names)}")
    return found[name]


def _only(kind: str, candidates: list[str], splits: DatasetDict) -> str:
    if len(candidates) != 1:
        raise ValueError(
            f"one {kind} column is needed, and these are: {', '.join(candidates) or 'none'} (of "
            f"{', '.join(splits['train'].features)}). Keep one; an image folder needs class folders of equal depth"
        )
    return candidates[0]


def _class_names(splits: DatasetDict, column: str) -> list[str]:
    """The classes' names ("0", "1", ... where the labels are plain integers), once every label is one of them."""
    labels = {label for split in splits.values() for label in split.unique(column)}
    feature = splits["train"].features[column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(label) for label in range(len(labels))]
    strays = sorted(labels - set(range(len(names))), key=str)
    if strays:
        raise ValueError(
            f"column {column!r} holds {', '.join(map(str, strays[:5]))}, but its {len(names)} classes are 0 to "
            f"{len(names) - 1}: relabel these rows, or drop them"
        )
    return names


def _with_names(split: Dataset, names: list[str]) -> Dataset:
    # Set beside the images: `cast_column` would write the images anew.
    labels = Dataset.from_dict({"label": split["label"][:]}, features=Features(label=ClassLabel(names=names)))
    return concatenate_datasets([split.select_columns("image"), labels], axis=1)
