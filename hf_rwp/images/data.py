"""Images for training: a folder, tar shards, parquet files, a Hub dataset or the embedded digits as splits in one form.

What is wrong with splits, columns and labels is refused here, before training; images are not looked into.
"""

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    NamedSplit,
    SplitDict,
    SplitInfo,
)
from timm.utils.misc import natural_key  # type: ignore[attr-defined]

from hf_rwp.images.arguments import folder_of
from hf_rwp.images.classes import choose_columns, refuse_unlearned, two_columns, with_classes
from hf_rwp.images.files import Tree, scan
from hf_rwp.images.folders import HOLD_OUT, ROLES, TRAIN, VALIDATION, Labelled, read_images, refuse_same_split
from hf_rwp.images.found import Found, ImageSplits, ImageStreams, listed
from hf_rwp.images.numbering import labels_of
from hf_rwp.images.tables import is_saved, load_hub, load_saved, load_tables

_ENCODED = Image(decode=False)
_FLAT_FRACTION = 0.2  # held out of a folder that has no split for evaluation


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


def load_images(
    data_dir: str | None = None,
    dataset: str | None = None,
    *,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    validation_fraction: float | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
) -> ImageSplits | ImageStreams:
    """Images and labels as splits "train" and "validation", each with the columns image and label (ClassLabel).

    image holds {"path", "bytes"}, not decoded: a broken file is met where it can be counted, not here.
    data_dir: a folder: train/CLASS/IMAGE and validation/CLASS/IMAGE (or val, test, ..., in any case), or CLASS/IMAGE,
    of which a fifth is held out; or parquet files or WebDataset tar shards with the split in their name or folder; or
    what `save_to_disk` wrote. dataset: an id on the Hub, dataset_config and dataset_revision its configuration and
    revision; or a folder too. Neither: the digits. Splits and columns that are not named are found by name and type.
    validation_fraction: of each class of the training images, held out for evaluation, always the same ones.
    num_classes: of plain integer labels; a ClassLabel, or a scan of all labels without streaming, tells it too.
    streaming: rows are read when used, from disk or the Hub; then only the first row of each split is looked at.
    What was found is in `found` of the result. Raises ValueError for splits, columns and labels that are missing,
    empty, ambiguous or out of range.
    """
    if data_dir is not None and dataset is not None:
        raise ValueError(f"both data_dir={data_dir!r} and dataset={dataset!r} are set: set only one of them")
    if dataset is not None and Path(dataset).expanduser().is_dir():
        data_dir, dataset = dataset, None
    found, asked = Found(), {"train": train_split, "validation": validation_split}
    if data_dir is None and dataset is None:
        digits = load_digits().cast_column("image", _ENCODED)
        found.source = "the handwritten digits of scikit-learn"
        return _finished(dict(digits), found, streaming)
    options: dict[str, Any] = {"name": dataset_config, "streaming": streaming, "found": found}
    if data_dir is not None:
        folder = folder_of(data_dir)
        saved = is_saved(folder) or any(is_saved(part) for part in folder.iterdir() if part.is_dir())
        tree = Tree(folder) if saved else scan(folder.resolve())
        if not saved and _are_images(tree):
            read = read_images(tree, asked, label_column, validation_fraction, found)
            return _of_paths(read, asked, validation_fraction, found, streaming)
        loaded = load_saved(folder, streaming, found) if saved else load_tables(tree, asked, **options)
    else:
        loaded = load_hub(str(dataset), revision=dataset_revision, **options)
    if (first := _first(loaded, (train_split,) if train_split else TRAIN)) is not None:
        choose_columns("train", loaded[first], image_column, label_column)  # what holds no labels needs no more splits
    splits = _roles(loaded, asked, validation_fraction, found)
    columns = {role: choose_columns(role, split, image_column, label_column) for role, split in splits.items()}
    image, label = columns["train"]
    found.columns = {"image": image, "label": label}
    features = {role: splits[role].features[label] for role, (_, label) in columns.items()}
    splits = {role: two_columns(split, *columns[role]) for role, split in splits.items()}
    splits = with_classes(splits, features, {role: label for role, (_, label) in columns.items()}, num_classes, found)
    if "validation" not in splits:
        splits = _held_out(splits["train"], validation_fraction or _FLAT_FRACTION, found)
    return _finished(splits, found, streaming)


def _finished(splits: dict[str, Any], found: Found, streaming: bool) -> ImageSplits | ImageStreams:
    found.count(splits)
    made: ImageSplits | ImageStreams
    if streaming:
        made = ImageStreams({role: _streamed(split) for role, split in splits.items()})
    else:
        made = ImageSplits(splits)
    made.found = found
    return made


def _streamed(split: Any) -> IterableDataset:
    """A split as a stream that knows how many images it has, if a table does."""
    if isinstance(split, IterableDataset):
        return split
    stream: IterableDataset = split.to_iterable_dataset(num_shards=max(1, min(64, len(split))))
    name = str(split.split or "train")
    stream.info.splits = SplitDict({name: SplitInfo(name, num_examples=len(split))})
    return stream


# A folder of images.


def _are_images(tree: Tree) -> bool:
    """Whether the folder is one of images, or else of tables. Raises ValueError where it is neither, or may be both."""
    tables = [folder.path / table for folder in tree.walk() for table in folder.tables]
    if tree.total and tables:
        folders = [folder.path for folder in tree.walk() if folder.images and folder is not tree]
        if len(folders) < 2:
            return False
        raise ValueError(
            f"{tree.path} holds images, in {listed(folders, 2)}, and {len(tables):,} tables, such as {tables[0].name}: "
            "keep one of both in it"
        )
    if not tree.total and not tables:
        raise ValueError(
            f"{tree.path} holds no images ({tree.others_below()}). It needs train/CLASS/IMAGE and "
            "validation/CLASS/IMAGE, or CLASS/IMAGE, or parquet files or tar shards, with images for both splits"
        )
    return not tables


def _of_paths(
    read: dict[str, Labelled], asked: Mapping[str, str | None], fraction: float | None, found: Found, streaming: bool
) -> ImageSplits | ImageStreams:
    for part in read.values():
        part.labels = [unicodedata.normalize("NFC", label) for label in part.labels]
    names = sorted(set(read["train"].labels), key=natural_key)
    if asked["validation"] is not None and asked["validation"] == asked["train"]:
        read["validation"] = read["train"]
        _on_training(found)
    refuse_unlearned(names, {role: set(part.labels) for role, part in read.items()})
    tables = {role: _table(part, names) for role, part in read.items()}
    if "validation" not in tables:
        tables = _held_out(tables["train"], fraction or _FLAT_FRACTION, found)
    return _finished(tables, found, streaming)


def _table(part: Labelled, names: list[str]) -> Dataset:
    """The images by their paths; nothing is copied or written."""
    paths, numbers = pa.array(part.paths, pa.string()), {name: number for number, name in enumerate(names)}
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    labels = pa.array([numbers[label] for label in part.labels], pa.int64())
    info = DatasetInfo(features=Features(image=_ENCODED, label=ClassLabel(names=names)))
    return Dataset(pa.table({"image": images, "label": labels}), info=info, split=NamedSplit(_split_name(part.name)))


def _split_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name) or "train"


# Splits.


def _roles(
    loaded: Mapping[str, Any], asked: Mapping[str, str | None], fraction: float | None, found: Found
) -> dict[str, Any]:
    """The splits for training and evaluation; only the first where a part of it will be held out."""
    train, validation = (
        _first(loaded, (asked[role],) if asked[role] else usual)
        for role, usual in zip(ROLES, (TRAIN, VALIDATION), strict=True)
    )
    there = listed(loaded)
    if train is None:
        words = asked["train"] or listed(TRAIN)
        raise ValueError(f"no train split among {there}, of {words}: set train_split to one there is")
    if fraction is not None:
        if validation is not None:
            found.note(f"validation_fraction is set: the split {validation} was not used")
        return {"train": _refuse_stream(loaded[train])}
    if validation is None:
        words = asked["validation"] or listed(VALIDATION, 9)
        raise ValueError(
            f"no validation split among {there}, of {words}: set validation_split to one there is, or {HOLD_OUT}"
        )
    if train == validation:
        if asked["train"] != asked["validation"]:
            refuse_same_split(train)
        _on_training(found)
    found.splits = {"train": train, "validation": validation}
    return {"train": loaded[train], "validation": loaded[validation]}


def _on_training(found: Found) -> None:
    found.held_out = False
    found.note("both splits are the same images: they are held-out ones only for weights that were trained on others")


def _first(loaded: Mapping[str, Any], words: Any) -> str | None:
    return next((name for word in words for name in loaded if word in (name, name.lower())), None)


def _refuse_stream(split: Any) -> Any:
    if isinstance(split, IterableDataset):
        raise ValueError("a part of a stream cannot be held out: leave out streaming, or set validation_split")
    return split


def _held_out(split: Dataset, fraction: float, found: Found) -> dict[str, Dataset]:
    """`split` in two: of each class a fraction, at least one image where it has two, for validation."""
    labels, chance = labels_of(split), np.random.default_rng(0)
    held: list[int] = []
    alone = 0
    for label in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == label))
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        alone += count == 0
        held += rows[:count].tolist()
    if not held:
        raise ValueError("no class has two images, so that none can be held out: set validation_split to other images")
    kept = np.setdiff1d(np.arange(len(labels)), held)
    lone = f"; {alone:,} class{'es' * (alone > 1)} of one image only to train on" if alone else ""
    found.note(
        f"{len(held):,} of {len(labels):,} images, {fraction:.0%} of each class or one of it, were held out for "
        f"evaluation, always the same ones{lone}"
    )
    found.splits = {"train": found.splits.get("train"), "validation": "held out of the training images"}
    return {"train": split.select(kept), "validation": split.select(sorted(held))}


def describe_splits(splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How many images each split of `load_images` has, None for a stream, and the name that it has in its source."""
    return {
        role: {"images": getattr(split, "num_rows", None), "split": str(split.split) if split.split else None}
        for role, split in splits.items()
    }
