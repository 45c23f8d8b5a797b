"""Which columns hold the images and the labels, by what they are called and by their type."""

import re
from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Features, Image, Value

LABEL_NAMES: tuple[str, ...] = (
    "label",
    "labels",
    "class",
    "classes",
    "target",
    "targets",
    "category",
    "categories",
    "cls",
)
LABEL_NAMES += ("class_label", "class_name", "label_name", "class_id", "label_id", "category_id", "category_name")
_IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
# What an integer stands for that is not a label: an index, an id, a size.
_NO_LABEL = re.compile(r"__index_level_\d+__|unnamed.*|.*index|.*idx|(.*_)?id|width|height|size|.*_size|row|line")


def kind_of(feature: Any) -> str:
    """ "class", "integer" or "text" for what can be a label, else the type."""
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Value):
        if "int" in feature.dtype:
            return "integer"
        return "text" if "string" in feature.dtype or feature.dtype == "bool" else feature.dtype
    return "image" if isinstance(feature, Image) else type(feature).__name__.lower()


def choose_label(where: str, kinds: Mapping[str, str], named: str | None, tip: str = "") -> str:
    """The column of the labels: the one that is named, or called label or the like, or the only one that can be it.

    where: what has the columns, for the error. kinds: of all columns, as `kind_of` gives. tip: a further remedy.
    Raises ValueError where it is missing or a matter of choice.
    """
    possible = [name for name, kind in kinds.items() if kind in ("class", "integer", "text")]
    if named is not None:
        if named in possible:
            return str(named)
        raise ValueError(
            f"label_column={named!r} is not one that can hold labels (a class, an integer or a text): {where} has the "
            f"columns {_described(kinds)}{tip}"
        )
    called = sorted((name for name in possible if _plain(name) in LABEL_NAMES), key=_rank)
    classes = [name for name in possible if kinds[name] == "class"]
    plain = [name for name in possible if kinds[name] == "integer" and not _NO_LABEL.fullmatch(name.lower())]
    texts = [name for name in possible if kinds[name] == "text" and not name.startswith("__")]
    if called:
        return called[0]
    if len(classes) == 1:
        return classes[0]
    if not classes and len(plain) == 1 and not texts:
        return plain[0]
    odd = next((name for name in kinds if _plain(name) in LABEL_NAMES), None)
    if odd is not None:
        raise ValueError(
            f"column {odd!r} of {where} holds {kinds[odd]}, and a label is a class, an integer or a text: write one "
            f"such label for each image, or set label_column to another of {_described(kinds)}{tip}"
        )
    raise ValueError(
        f"which column holds the labels is not clear: {where} has the columns {_described(kinds)}, and none of them is "
        f"called label or the like: set label_column to the one to use{tip}"
    )


def choose_image(where: str, features: Features, named: str | None, tip: str = "") -> str:
    """The column of the images: the one that is named, or the only one of that type, or of bytes and called so."""
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    untyped = [name for name, feature in features.items() if _holds_bytes(feature)]
    if named in typed + untyped:
        return str(named)
    called = [name for name in untyped if name.lower() in _IMAGE_NAMES]
    found: list[str] = typed or called
    if named is None and len(found) == 1:
        return found[0]
    asked = f"image_column={named!r} is not one" if named is not None else "set image_column to the one to use"
    raise ValueError(
        f"one image column is needed, and {where} has these: {', '.join(found) or 'none'} (of "
        f"{_described({name: kind_of(feature) for name, feature in features.items()})}): {asked}{tip}"
    )


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return set(feature) <= {"bytes", "path"} and "bytes" in feature
    return isinstance(feature, Value) and "binary" in feature.dtype


def _rank(name: str) -> int:
    return LABEL_NAMES.index(_plain(name))


def _plain(name: str) -> str:
    return name.lower().removesuffix(".txt")  # as tar shards have it


def _described(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
