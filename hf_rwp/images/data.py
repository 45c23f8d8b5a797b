"""Images for training: a folder, tar shards, parquet files, a Hub dataset or the embedded digits as splits in one form.

What is wrong with splits, columns and labels is refused here, before training; images are not looked into.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
)

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")  # the first found is taken
_ENCODED = Image(decode=False)


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
    train_split: str | None = None,
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """Images and labels as splits "train" and "validation", each with the columns image and label (ClassLabel).

    image holds {"path", "bytes"}, not decoded: a broken file is met where it can be counted, not here.
    data_dir: a folder, either train/CLASS/IMAGE and validation/CLASS/IMAGE (or val, test, ...), or parquet files or
    WebDataset tar shards with the split in their name or folder. dataset: an id on the Hub, dataset_config its
    configuration. Neither: the digits. Splits are found by name, columns by type, where they are not named.
    num_classes: of plain integer labels; a ClassLabel, or a scan of all labels without streaming, tells it too.
    streaming: rows are read when used, from disk or the Hub; then only the first row of each split is looked at.
    Raises ValueError for splits, columns and labels that are missing, empty, ambiguous or out of range.
    """
    if data_dir is not None and dataset is not None:
        raise ValueError(f"both data_dir={data_dir!r} and dataset={dataset!r} are set: set only one of them")
    if data_dir is None and dataset is None:
        digits = load_digits().cast_column("image", _ENCODED)
        return IterableDatasetDict({n: s.to_iterable_dataset() for n, s in digits.items()}) if streaming else digits
    names = {
        "train": _TRAIN if train_split is None else (train_split,),
        "validation": _VALIDATION if validation_split is None else (validation_split,),
    }
    if data_dir is not None:
        found = _load_folder(Path(data_dir).expanduser(), names, name=dataset_config, streaming=streaming)
    else:
        hint = "Check the id, your access (`hf auth login`) and the connection, or set data_dir to a folder with a copy"
        found = _load(str(dataset), hint, name=dataset_config, streaming=streaming)
    splits = {role: _split(found, role, candidates) for role, candidates in names.items()}
    columns = {role: _columns(role, split, image_column, label_column) for role, split in splits.items()}
    features = {role: splits[role].features[label] for role, (_, label) in columns.items()}
    splits = {role: _two_columns(split, *columns[role]) for role, split in splits.items()}
    classes = _class_names(splits, features, {role: label for role, (_, label) in columns.items()}, num_classes)
    if streaming:
        return IterableDatasetDict({k: s.cast_column("label", ClassLabel(names=classes)) for k, s in splits.items()})
    return DatasetDict({role: _with_classes(split, classes) for role, split in splits.items()})


def _load_folder(folder: Path, names: Mapping[str, Sequence[str]], **options: Any) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir={str(folder)!r} is not a folder: set the one that holds train and validation"
        )
    if set("[]*?") & set(str(folder.resolve())):
        raise ValueError(f"data_dir={str(folder)!r}: `datasets` takes [ ] * ? for a pattern, rename the folder")
    # Named here: `datasets` by itself takes a class folder called train or test for a split, and gives no labels at all
    # if an unlabelled test folder lies beside the others.
    present = [path.name for path in folder.iterdir() if path.is_dir()]
    files = {name: f"{name}/**" for name in (_first(wanted, present) for wanted in names.values()) if name}
    hint = (
        "It needs train/CLASS/IMAGE and validation/CLASS/IMAGE, or parquet files or tar shards, with images for both "
        "splits"
    )
    return _load(str(folder.resolve()), hint, data_files=files or None, **options)


def _load(path: str, hint: str, **options: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = load_dataset(path, **options)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path!r} could not be loaded: {error}. {hint}") from error
    return found


def _first(names: Iterable[str], present: Iterable[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _split(found: Mapping[str, Any], role: str, names: Sequence[str]) -> Any:
    name = _first(names, found)
    if name is None:
        raise ValueError(
            f"no {role} split among {', '.join(found)}, of {', '.join(names)}: set {role}_split to one there is"
        )
    return found[name]


def _columns(role: str, split: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the columns with the images and the labels."""
    features = split.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    integers = [name for name, feature in features.items() if isinstance(feature, Value) and "int" in feature.dtype]

    def only(kind: str, argument: str, named: str | None, possible: list[str], preferred: list[str]) -> str:
        if named in possible:
            return str(named)
        if named is not None or len(preferred) != 1:
            asked = f"{argument}={named!r} is not one" if named is not None else f"set {argument} to the one to use"
            raise ValueError(
                f"one {kind} column is needed, and the {role} split has these: {', '.join(preferred) or 'none'} (of "
                f"{', '.join(features)}): {asked}. An image folder needs class folders of equal depth"
            )
        return preferred[0]

    return (
        only("image", "image_column", image, images, images),
        only("ClassLabel or integer", "label_column", label, classes + integers, classes or integers),
    )


def _two_columns(split: Any, image: str, label: str) -> Any:
    if isinstance(split, Dataset):
        split = split.cast_column(image, _ENCODED).select_columns([image, label])
        return split.rename_columns({image: "image", label: "label"})
    # Not `cast_column`: a remote stream comes with a step that decodes, which this takes away.
    split = with_plain_labels(split.decode(False), label).select_columns([image, label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return split.rename_columns(renamed) if renamed else split


def with_plain_labels(split: IterableDataset, column: str) -> IterableDataset:
    """A stream that gives labels out of range too: as a ClassLabel, one would end it."""
    # Class folders give names, all in range.
    return split if split.info.builder_name == "imagefolder" else split.cast_column(column, Value("int64"))


def _labels_seen(role: str, split: Any) -> set[Any] | None:
    """The split's labels; None for a stream, of which one row is read. Raises ValueError if it is empty."""
    streaming = isinstance(split, IterableDataset)
    if (next(iter(split), None) is None) if streaming else len(split) == 0:
        raise ValueError(f"the {role} split holds no rows: it needs some, or set {role}_split to another one")
    return None if streaming else set(split.unique("label"))


def _class_names(
    splits: Mapping[str, Any], features: Mapping[str, Any], columns: Mapping[str, str], num_classes: int | None
) -> list[str]:
    """The classes' names ("0", "1", ... where the labels are plain integers), once every label is one of them."""
    seen = {role: _labels_seen(role, split) for role, split in splits.items()}
    named = {role: feature.names for role, feature in features.items() if isinstance(feature, ClassLabel)}
    if len(named) == 2 and named["train"] != named["validation"]:
        ours, theirs = next(pair for pair in itertools.zip_longest(*named.values()) if pair[0] != pair[1])
        raise ValueError(
            f"the label names differ: where train (column {columns['train']!r}) has {ours!r}, validation has {theirs!r}"
            f" ({len(named['train'])} and {len(named['validation'])} names): bring both into one order"
        )
    known = next(iter(named.values()), None)
    if known is not None and num_classes not in (None, len(known)):
        raise ValueError(
            f"num_classes={num_classes}, but column {columns['train']!r} has {len(known)} classes: leave it out"
        )
    if known is None and num_classes is None and seen["train"] is None:
        raise ValueError(
            f"column {columns['train']!r} holds plain integers, and a stream does not tell how many classes they stand "
            "for: set num_classes"
        )
    labels = set().union(*(some or () for some in seen.values()))
    names: list[str] = known or [str(label) for label in range(num_classes or len(labels))]
    for role, some in seen.items():
        strays = sorted((some or set()) - set(range(len(names))), key=str)
        if strays:
            raise ValueError(
                f"column {columns[role]!r} holds {', '.join(map(str, strays[:5]))} in the {role} split, but its "
                f"{len(names)} classes are 0 to {len(names) - 1}: relabel these rows, or drop them"
            )
    unlearned = sorted((seen["validation"] or set()) - (seen["train"] or set()))
    if unlearned and seen["train"] and splits["train"].info.builder_name == "imagefolder":
        raise ValueError(
            f"validation has images of class {', '.join(names[label] for label in unlearned[:5])}, and train has none: "
            "the class folders must have the same names"
        )
    return names


def _with_classes(split: Dataset, names: list[str]) -> Dataset:
    if isinstance(split.features["label"], ClassLabel):
        return split
    # Set beside the images: `cast_column` would write the images anew.
    labels = Dataset.from_dict({"label": split["label"][:]}, features=Features(label=ClassLabel(names=names)))
    return concatenate_datasets([split.select_columns("image"), labels], axis=1)


def describe_splits(splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How many images each split of `load_images` has, None for a stream, and the name that it has in its source."""
    return {
        role: {"images": getattr(split, "num_rows", None), "split": str(split.split) if split.split else None}
        for role, split in splits.items()
    }
