"""The classes of tables: two columns of one form in all splits, whatever the labels are kept as."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value
from timm.utils.misc import natural_key  # type: ignore[attr-defined]

from hf_rwp.images.columns import choose_image, choose_label, kind_of
from hf_rwp.images.found import Found, listed
from hf_rwp.images.numbering import labels_of, renumbered, with_column

_ENCODED = Image(decode=False)
_SHARDS = ". A shard has a file with the label beside each image, 0001.jpg and 0001.cls; unpack one of class folders"


def choose_columns(role: str, split: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the columns with the images and the labels."""
    features = split.features or {}
    where, kinds = f"the {role} split", {name: kind_of(feature) for name, feature in features.items()}
    image = choose_image(where, features, image, _SHARDS if "__key__" in kinds else "")
    tip = _SHARDS if "__key__" in kinds else ""
    return image, choose_label(where, {name: kind for name, kind in kinds.items() if name != image}, label, tip)


def two_columns(split: Any, image: str, label: str) -> Any:
    """`split` with its images, not decoded, as "image" and its labels as "label", and nothing else."""
    if isinstance(split, Dataset):
        split = split.cast_column(image, _ENCODED).select_columns([image, label])
        return split.rename_columns({image: "image", label: "label"})
    if kind_of(split.features[label]) == "text":
        raise ValueError(
            f"column {label!r} holds text, and a stream does not tell which classes there are: leave out streaming, or "
            "set label_column to a column of classes or integers"
        )
    # Not `cast_column` for a column of images: a remote stream comes with a step that decodes, which this takes away.
    typed = isinstance(split.features[image], Image)
    split = split.decode(False) if typed else split.cast_column(image, _ENCODED)
    split = with_plain_labels(split, label).select_columns([image, label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return split.rename_columns(renamed) if renamed else split


def with_plain_labels(split: IterableDataset, column: str) -> IterableDataset:
    """A stream that gives labels out of range too: as a ClassLabel, one would end it."""
    # Class folders of the Hub give names, all in range.
    return split if split.info.builder_name == "imagefolder" else split.cast_column(column, Value("int64"))


def with_classes(
    splits: Mapping[str, Any],
    features: Mapping[str, Any],
    columns: Mapping[str, str],
    num_classes: int | None,
    found: Found,
) -> dict[str, Any]:
    """`splits` with a ClassLabel of the same names as "label" in all of them.

    features, columns: of the labels in their source. The names are those of the ClassLabels, of the texts, in natural
    order, or "0", "1", ... of plain integers. Raises ValueError for a label that is not one of them.
    """
    kinds = {role: kind_of(feature) for role, feature in features.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{columns[role]!r} of {role} holds {kind}" for role, kind in kinds.items())
        raise ValueError(f"the labels are of different kinds: {told}. Set label_column to a column of one kind in both")
    for role, split in splits.items():
        _refuse_no_rows(role, split)
    if kinds["train"] == "text":
        return _classes_of_texts(splits, columns)
    if kinds["train"] == "class":
        names = features["train"].names
        splits = dict(splits) | _in_order_of_train(splits, features, columns, found)
    else:
        names = None
    if num_classes is not None and names is not None and num_classes != len(names):
        raise ValueError(
            f"num_classes={num_classes}, but column {columns['train']!r} has {len(names)} classes: leave it out"
        )
    tables = {role: split for role, split in splits.items() if isinstance(split, Dataset)}
    if names is None and num_classes is None and not tables:
        raise ValueError(
            f"column {columns['train']!r} holds plain integers, and a stream does not tell how many classes they stand "
            "for: set num_classes"
        )
    seen = {role: set(split.unique("label")) for role, split in tables.items()}
    if names is None:
        names = [str(label) for label in range(num_classes or len(set().union(*seen.values())))]
    for role, labels in seen.items():
        strays = sorted(labels - set(range(len(names))), key=str)
        if strays:
            raise ValueError(
                f"column {columns[role]!r} holds {', '.join(map(str, strays[:5]))} in the {role} split, but its "
                f"{len(names)} classes are 0 to {len(names) - 1}: relabel these rows, or drop them"
            )
    unlearned = sorted(seen.get("validation", set()) - seen.get("train", set()))
    if unlearned and "train" in seen:
        found.note(f"validation has images of class {listed(names[label] for label in unlearned)}, and train has none")
    feature = ClassLabel(names=names)
    return {role: _with_feature(split, feature) for role, split in splits.items()}


def refuse_unlearned(names: Sequence[str], labels: Mapping[str, set[str]]) -> None:
    """Raise ValueError for classes that only evaluation has, and for names that differ in case only.

    names: of the classes of training. labels: by split.
    """
    same = _twins(names)
    if same:
        raise ValueError(f"the classes {' and '.join(same)} of train differ only in case: rename one of them")
    unlearned = sorted(labels.get("validation", set()) - labels["train"])
    if not unlearned:
        return
    twin = next((pair for name in unlearned[:100] if (pair := _twins([*names, name]))), None)
    if twin:
        raise ValueError(
            f"the classes {' and '.join(twin)} of train and validation differ only in case: give them one name"
        )
    raise ValueError(
        f"validation has images of class {listed(unlearned)}, and train has none (it has {listed(names)}): the class "
        "folders must have the same names"
    )


def _twins(names: Sequence[str]) -> list[str]:
    """Names that are one but for case and the form of their accents, the first such group."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name).casefold(), set()).add(name)
    return next((sorted(group) for group in groups.values() if len(group) > 1), [])


def _refuse_no_rows(role: str, split: Any) -> None:
    streaming = isinstance(split, IterableDataset)
    if (next(iter(split), None) is None) if streaming else len(split) == 0:
        raise ValueError(f"the {role} split holds no rows: it needs some, or set {role}_split to another one")


def _classes_of_texts(splits: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    texts = {}
    for role, split in splits.items():
        values = split["label"][:]
        empty = next((row for row, value in enumerate(values) if value is None or str(value).strip() == ""), None)
        if empty is not None:
            raise ValueError(
                f"column {columns[role]!r} holds {values[empty]!r} in row {empty} of the {role} split: drop the row"
            )
        texts[role] = [unicodedata.normalize("NFC", str(value)) for value in values]
    names = sorted(set(texts["train"]), key=natural_key)
    refuse_unlearned(names, {role: set(values) for role, values in texts.items()})
    numbers = {name: number for number, name in enumerate(names)}
    return {
        role: with_column(split, "label", [numbers[text] for text in texts[role]], ClassLabel(names=names))
        for role, split in splits.items()
    }


def _in_order_of_train(
    splits: Mapping[str, Any], features: Mapping[str, Any], columns: Mapping[str, str], found: Found
) -> dict[str, Any]:
    """The split for evaluation in the order of the classes of the training split, where it has another one."""
    ours, theirs = features["train"].names, features.get("validation", features["train"]).names
    if ours == theirs:
        return {}
    place = next(i for i in range(max(len(ours), len(theirs))) if ours[i : i + 1] != theirs[i : i + 1])
    told = (
        f"where train (column {columns['train']!r}) has {listed(ours[place : place + 1])!r}, validation has "
        f"{listed(theirs[place : place + 1])!r} ({len(ours)} and {len(theirs)} names)"
    )
    split = splits["validation"]
    if not isinstance(split, Dataset):
        raise ValueError(f"the label names differ: {told}: bring both into one order, or leave out streaming")
    labels = labels_of(split)
    used = [theirs[label] for label in np.unique(labels) if 0 <= label < len(theirs)]
    refuse_unlearned(ours, {"train": set(ours), "validation": set(used)})
    found.note(f"the label names differ: {told}. They were brought into one order by name")
    return {"validation": with_column(split, "label", renumbered(labels, theirs, ours), ClassLabel(names=ours))}


def _with_feature(split: Any, feature: ClassLabel) -> Any:
    if not isinstance(split, Dataset):
        return split.cast_column("label", feature)
    if isinstance(split.features["label"], ClassLabel):
        return split
    return with_column(split, "label", split["label"][:], feature)  # `cast_column` would write the images anew
