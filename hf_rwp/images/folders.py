"""Images in folders: which folders are splits, which are classes, and what is neither.

1. Splits are folders called train, val, ... in any case, or as they were named; without any the folder is one split.
2. A split's classes are its folders, or what a file with labels says (`hf_rwp.images.labels`).
3. What is ambiguous is refused by the first odd path; what is left out is counted in `Found`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_rwp.images.files import Tree
from hf_rwp.images.found import Found, listed
from hf_rwp.images.labels import (
    Labels,
    ilsvrc_labels,
    is_ilsvrc,
    metadata_file,
    read_metadata,
    tiny_imagenet_labels,
)

TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")  # the first found is taken
ROLES = ("train", "validation")
_WORDS = {"train": set(TRAIN), "validation": set(VALIDATION)}

HOLD_OUT = "validation_fraction (--validation_fraction 0.2 holds out a fifth of the training images)"
_SORT_THEM = (
    "put each image in the folder of its class, or a metadata.csv beside them, with the columns file_name and label"
)


@dataclass
class Labelled:
    """A split: the paths of its images and the name of each one's class."""

    name: str
    paths: list[str]
    labels: list[str]


def read_images(
    root: Tree, asked: Mapping[str, str | None], label_column: str | None, fraction: float | None, found: Found
) -> dict[str, Labelled]:
    """The splits "train" and "validation", or only "train" where a part of it will be held out.

    asked: the names of the folders to take for them, None where they must be found. fraction: to be held out of the
    training images, None if not said. Raises ValueError for what is ambiguous or missing.
    """
    found.source = "class folders"
    tree = _unwrapped(root, asked, found)
    splits = _find_splits(tree, asked)
    if fraction is not None and "validation" in splits:
        del splits["validation"]
        found.note("validation_fraction is set: the split for evaluation was not used")
    labels = _metadata(tree, list(splits.values()) or [tree], label_column, found)
    if labels is not None:
        read = _divided(_by_labels(root, tree, labels, found), splits)
    elif not splits and not _has_splits(tree):
        read = {"train": _labelled(root, tree, "train", label_column, found, deep=False)}
    else:
        read = {role: _labelled(root, splits[role], role, label_column, found) for role in ROLES if role in splits}
    if "train" not in read:
        alone = f" (only to evaluate, validation_split={read['validation'].name!r})" if "validation" in read else ""
        _refuse_missing("train", tree, asked, f"set train_split to the folder that holds it{alone}")
    if "validation" not in read and splits and fraction is None:
        _refuse_missing("validation", tree, asked, f"set validation_split to a folder there, or {HOLD_OUT}")
    _count_ignored(root, splits, read, found)
    return read


def _find_splits(tree: Tree, asked: Mapping[str, str | None]) -> dict[str, Tree]:
    """The folders of the splits there are. Raises ValueError for one that was named and is not there."""
    splits = {}
    for role, words in zip(ROLES, (TRAIN, VALIDATION), strict=True):
        name = asked[role]
        if name is None:
            named = [name for word in words for name in tree.folders if name.lower() == word]
            named = [name for name in named if metadata_file(tree) or _is_split(tree.folders[name])]
            if len(named) > 1 and named[0].lower() == named[1].lower():
                raise ValueError(f"{tree.path} holds {named[0]} and {named[1]}: set {role}_split to one of them")
            name = next(iter(named), None)
        elif name not in tree.folders and set(asked.values()) != {"train"}:  # that is all images of a single split
            raise ValueError(
                f"no {role} split among {listed(tree.folders)}, of {name}: set {role}_split to one of these folders"
            )
        if name in tree.folders:
            splits[role] = tree.folders[name]
    if len(splits) == 2 and splits["train"] is splits["validation"] and asked["train"] != asked["validation"]:
        refuse_same_split(splits["train"].path.name)
    return splits


def refuse_same_split(name: str) -> None:
    """Raise ValueError for one split that would both train and evaluate."""
    raise ValueError(
        f"train_split and validation_split would both be {name}, and evaluation on what trains says nothing: set "
        f"{HOLD_OUT} in place of them"
    )


def _is_split(tree: Tree) -> bool:
    return any(folder.total for folder in tree.folders.values()) or bool(tree.labels) or is_ilsvrc(tree)


def _has_splits(tree: Tree) -> bool:
    """Whether folders are called like splits and hold all images, so that they are not classes."""
    holding = [name for name, folder in tree.folders.items() if folder.total]
    return bool(holding) and all(name.lower() in TRAIN + VALIDATION for name in holding)


def _unwrapped(tree: Tree, asked: Mapping[str, str | None], found: Found) -> Tree:
    """The folder itself, or the one in it that holds all of its images, and so on."""
    root, named = tree, {*filter(None, asked.values())}
    while not any(name in named or name.lower() in TRAIN + VALIDATION for name in tree.folders):
        holding = [folder for folder in tree.folders.values() if folder.total]
        if metadata_file(tree) or len(holding) != 1 or holding[0].images or len(tree.images) > holding[0].total // 100:
            break
        tree = holding[0]
    if tree is not root:
        found.note(f"all images are in {_shown(root, tree.path)}, which was taken for the folder")
    return tree


def _refuse_missing(role: str, tree: Tree, asked: Mapping[str, str | None], remedy: str) -> None:
    usual = TRAIN if role == "train" else VALIDATION
    words = [str(asked[role])] if asked[role] else list(usual)
    holding = {name: folder for name, folder in tree.folders.items() if folder.total}
    flat = next((folder for name, folder in holding.items() if name.lower() in words and folder.images), None)
    table = _table_beside(tree)
    head = f"no {role} split among {listed(holding)} in {tree.path}, of {', '.join(words)}"
    if flat is None:
        raise ValueError(f"{head}: {remedy}")
    raise ValueError(
        f"{head}. {flat.path.name} holds images without class folders ({flat.images[0]}): {_SORT_THEM}{table}. "
        f"Or {remedy}"
    )


# Labels.


def _labelled(root: Tree, tree: Tree, role: str, label_column: str | None, found: Found, deep: bool = True) -> Labelled:
    """A split's images. deep: whether classes may lie in folders of folders, as taxonomies do."""
    labels = tiny_imagenet_labels(tree) or ilsvrc_labels(tree)
    if labels is None:
        labels = _metadata(tree, [tree], label_column, found)
    if labels is not None:
        return _by_labels(root, tree, labels, found)
    paths: list[str] = []
    names: list[str] = []
    for name, folders in _classes(root, tree, role, found, deep):
        for folder in folders:
            paths += [f"{folder.path}/{image}" for image in folder.images]
            names += [name] * len(folder.images)
    return Labelled(tree.path.name, paths, names)


def _metadata(tree: Tree, splits: Sequence[Tree], label_column: str | None, found: Found) -> Labels | None:
    """The labels that metadata.csv gives; None where there is none, or where the class folders tell as much.

    splits: what may hold class folders.
    """
    file = metadata_file(tree)
    if file is None:
        return None
    by_folders = max(sum(folder.total > 0 for folder in split.folders.values()) for split in splits) > 1
    try:
        labels, column = read_metadata(file, label_column)
    except ValueError:
        if label_column is not None or not by_folders:
            raise
        found.note(f"{file.name} gives no labels that could be taken: they are the class folders")
        return None
    if by_folders and label_column is None:
        _refuse_contradiction(file, column, labels)
        found.note(f"the labels are the class folders, with which column {column!r} of {file.name} agrees")
        return None
    found.source, found.columns = f"a folder with {file.name}", {"image": "file_name", "label": column}
    return labels


def _divided(everything: Labelled, splits: Mapping[str, Tree]) -> dict[str, Labelled]:
    """One table of paths by the folders of the splits that they are in; all of it for training where there are none."""
    if not splits:
        return {"train": everything}
    pairs = list(zip(everything.paths, everything.labels, strict=True))
    read = {}
    for role, split in splits.items():
        inside = f"{split.path}/"
        rows = [(path, label) for path, label in pairs if path.startswith(inside)]
        if rows:
            read[role] = Labelled(split.path.name, [path for path, _ in rows], [label for _, label in rows])
    return read


def _classes(root: Tree, tree: Tree, role: str, found: Found, deep: bool) -> list[tuple[str, list[Tree]]]:
    """The classes of a split, each with the folders of its images."""
    where = _where(root, tree)
    holding = {name: folder for name, folder in tree.folders.items() if folder.total}
    if not tree.total:
        raise ValueError(f"{where} holds no images ({tree.others_below()}): set {role}_split to a folder with some")
    _refuse_strays(where, tree, sum(folder.total for folder in holding.values()))
    direct = {name: folder for name, folder in holding.items() if folder.images}
    nested = {name: folder for name, folder in holding.items() if not folder.images}
    below = (folder for outer in direct.values() for folder in outer.folders.values() if folder.total)
    deeper = next(iter(nested.values()), None) or next(below, None)
    if direct and deeper:
        first = next(iter(direct.values()))
        raise ValueError(
            f"{where} has images at two depths, {_shown(root, first.first_image())} and "
            f"{_shown(root, deeper.first_image())}. Class folders must have equal depth: move the deeper up, or away"
        )
    classes = _nested(root, tree, nested, found, deep) if nested else {name: [part] for name, part in direct.items()}
    if len(classes) < 2 and role == "train":
        raise ValueError(
            f"{where} holds a single class folder, {next(iter(classes))}, and a classifier needs two or more: set "
            f"data_dir to the folder that holds all of them. Or, where that one holds all images, {_SORT_THEM}"
        )
    _refuse_empty(root, tree, role, found)
    return list(classes.items())


def _nested(root: Tree, tree: Tree, nested: Mapping[str, Tree], found: Found, deep: bool) -> dict[str, list[Tree]]:
    inner = {name: [part for part in folder.folders.values() if part.total] for name, folder in nested.items()}
    leaves = [leaf for folders in inner.values() for leaf in folders]
    names = {leaf.path.name for leaf in leaves}
    flat = all(leaf.total == len(leaf.images) for leaf in leaves)
    if flat and len(names) == 1 and len(nested) > 1:  # CLASS/images/IMAGE, as Tiny-ImageNet has it
        found.note(f"each class folder holds its images in {names.pop()}")
        return inner
    if deep and flat and len(names) == len(leaves) > 1:
        found.note(
            f"the classes are the inner folders ({listed(sorted(names))}), not those around them ({listed(nested)})"
        )
        return {leaf.path.name: [leaf] for leaf in leaves}
    holds = "; ".join(f"{name} holds {listed(part.path.name for part in inner[name])}" for name in list(nested)[:5])
    head = f"{_where(root, tree)} holds no class folders, but folders of folders: {holds}"
    named = {
        role: next((name for name in nested if words & set(words_of(name))), None) for role, words in _WORDS.items()
    }
    if not deep and all(named.values()):
        raise ValueError(f"{head}. Set train_split={named['train']!r} and validation_split={named['validation']!r}")
    raise ValueError(
        f"{head}. Set data_dir to one of them, such as {next(iter(nested.values())).path}; or put the class folders "
        "side by side, and the images of each directly in it"
    )


def words_of(name: str) -> list[str]:
    """The words in a name, in lower case."""
    return re.split(r"[^a-z]+", name.lower())


def _table_beside(tree: Tree) -> str:
    folders = (tree.path, tree.path.parent)
    table = next((file.name for folder in folders for file in sorted(folder.glob("*.csv"))), None)
    return f" (from {table}, if that has the labels)" if table else ""


def _refuse_strays(where: str, tree: Tree, inside: int) -> None:
    if not tree.images or (inside and len(tree.images) <= max(1, inside // 10)):
        return
    count, first = len(tree.images), tree.images[0]
    lie = f"{count:,} image{'s lie' if count > 1 else ' lies'} directly in {where} ({first}, ...)"
    if is_ilsvrc(tree):
        raise ValueError(
            f"{lie}, without a class: put LOC_val_solution.csv, which comes with them on Kaggle, in this folder or one "
            "around it, or the development kit ILSVRC2012_devkit_t12"
        )
    beside = f", beside class folders with {inside:,}" if inside else ", and a label takes a class folder"
    raise ValueError(f"{lie}{beside}: {_SORT_THEM}{_table_beside(tree)}")


def _refuse_empty(root: Tree, tree: Tree, role: str, found: Found) -> None:
    for folder in tree.folders.values():
        if folder.total:
            continue
        name, holds = _shown(root, folder.path), folder.others_below()
        if role == "train" or holds != "no files":
            raise ValueError(
                f"the class folder {name} holds no image that can be read ({holds}): fill it, or remove it"
            )
        found.note(f"the class folder {name} is empty")


def _by_labels(root: Tree, tree: Tree, labels: Labels, found: Found) -> Labelled:
    """The images that `labels` names, by their paths relative to `tree`."""
    there = {path.relative_to(tree.path).as_posix(): path for path in _images_of(tree)}
    gone = [file for file in labels if file not in there]
    if gone:
        raise ValueError(
            f"the labels of {_where(root, tree)} name {len(gone):,} images that are not there, such as {gone[0]}: the "
            "paths must be relative to that folder"
        )
    extra = [path for path in there if path not in labels]
    found.ignore("images without a label", _shown(root, tree.path / extra[0]) if extra else "", len(extra))
    return Labelled(tree.path.name, [str(there[file]) for file in labels], list(labels.values()))


def _refuse_contradiction(file: Path, column: str, labels: Labels) -> None:
    """The class folders and the labels must be two names of the same classes."""
    by_folder: dict[str, tuple[str, str]] = {}
    by_label: dict[str, tuple[str, str]] = {}
    for path, label in labels.items():
        folder = Path(path).parent.name
        for key, other, seen in ((folder, label, by_folder), (label, folder, by_label)):
            known, first = seen.setdefault(key, (other, path))
            if known != other:
                raise ValueError(
                    f"the class folders and column {column!r} of {file} contradict each other: {first} and {path} are "
                    f"of one class by one of them only. Set label_column={column!r} to go by that, or remove the file"
                )


# What is left out.


def _images_of(tree: Tree) -> Iterable[Path]:
    return (folder.path / image for folder in tree.walk() for image in folder.images)


def _count_ignored(root: Tree, splits: Mapping[str, Tree], read: Mapping[str, Labelled], found: Found) -> None:
    used = {path for split in read.values() for path in split.paths}
    for folder in root.walk():
        for reason, (count, first) in folder.others.items():
            found.ignore(reason, _shown(root, folder.path / first), count)
        for table in folder.tables:
            found.ignore("tables beside the images", _shown(root, folder.path / table))
        left = [image for image in folder.images if f"{folder.path}/{image}" not in used]
        if left and "images without a label" not in found.ignored:
            inside = not splits or any(folder.path.is_relative_to(split.path) for split in splits.values())
            reason = "images beside the class folders" if inside else "images outside of the splits"
            found.ignore(reason, _shown(root, folder.path / left[0]), len(left))


def _where(root: Tree, tree: Tree) -> str:
    return str(root.path) if tree is root else f"{_shown(root, tree.path)} of {root.path}"


def _shown(root: Tree, path: Path | None) -> str:
    return "" if path is None else path.relative_to(root.path).as_posix() or root.path.name
