"""Labels that lie in a file beside the images: metadata.csv, Tiny-ImageNet's, and those of ILSVRC's validation images.

Each function gives the class of each labelled image by its path relative to the folder, or None where there is no such
file.
"""

import csv
import re
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hf_rwp.images.columns import choose_label
from hf_rwp.images.files import METADATA, Tree

Labels = dict[str, str]

_ILSVRC = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def metadata_file(tree: Tree) -> Path | None:
    """The folder's metadata.csv, or what stands for it."""
    return next((tree.path / name for name in METADATA if name in tree.labels), None)


def read_metadata(file: Path, label_column: str | None) -> tuple[Labels, str]:
    """What metadata.csv (or .jsonl, .parquet) says of the images, and the column that says it.

    Raises ValueError where it is not a table with a column file_name, or has no clear column of labels.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda path: pd.read_csv(path, sep=_separator(path), keep_default_na=False, na_values=[""]),
        ".jsonl": lambda path: pd.read_json(path, lines=True),
        ".parquet": pd.read_parquet,
    }
    try:
        table = readers[file.suffix](file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} could not be read as a table: {error}") from error
    if "file_name" not in table.columns:
        raise ValueError(
            f"{file} has the columns {', '.join(map(str, table.columns))}, and needs file_name, the image's path "
            "relative to it, and one with the labels: rename the columns"
        )
    kinds = {str(name): _kind(table[name]) for name in table.columns if name != "file_name"}
    column = choose_label(str(file), kinds, label_column)
    missing = table[table[column].isna() | table["file_name"].isna()]
    if len(missing):
        raise ValueError(f"{file} has a row without a file_name or {column}: {missing.iloc[0].to_dict()}")
    names = (Path(str(name)).as_posix() for name in table["file_name"])
    return dict(zip(names, map(str, table[column]), strict=True)), column


def _separator(file: Path) -> str:
    """What stands between the columns: a comma, or what a spreadsheet puts in its place."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        head = lines.readline()
    return next((mark for mark in ",;\t" if "file_name" in head.strip().split(mark)), ",")


def _kind(column: Any) -> str:
    if pd.api.types.is_bool_dtype(column) or pd.api.types.infer_dtype(column, skipna=True) == "string":
        return "text"
    return "integer" if pd.api.types.is_integer_dtype(column) else str(column.dtype)


def tiny_imagenet_labels(tree: Tree) -> Labels | None:
    """Tiny-ImageNet's val as it is downloaded: val/images and val/val_annotations.txt."""
    if "val_annotations.txt" not in tree.labels:
        return None
    file = tree.path / "val_annotations.txt"
    lines = (line.split("\t") for line in file.read_text().splitlines() if line.strip())
    labels = {line[0]: line[1] for line in lines}
    folder = "images/" if "images" in tree.folders else ""
    return {folder + name: label for name, label in labels.items()}


def ilsvrc_labels(tree: Tree) -> Labels | None:
    """ILSVRC 2012's validation images in one folder: by LOC_val_solution.csv and Annotations/CLS-LOC/val, as Kaggle has
    them, or the ground truth of the development kit, in the folder or one around it."""
    if not tree.images or not all(_ILSVRC.fullmatch(name) for name in tree.images):
        return None
    around = [tree.path, *list(tree.path.resolve().parents)[:4]]
    labels = _first_not_none(around, _kaggles) or _first_not_none(around, _devkits) or _first_not_none(around, _xmls)
    return labels and {name: labels[name.split(".")[0]] for name in tree.images if name.split(".")[0] in labels}


def is_ilsvrc(tree: Tree) -> bool:
    """Whether the folder holds ILSVRC 2012's validation images, by the name of the first."""
    return bool(tree.images) and bool(_ILSVRC.fullmatch(tree.images[0]))


def _first_not_none(folders: list[Path], read: Callable[[Path], Labels | None]) -> Labels | None:
    return next((labels for labels in map(read, folders) if labels), None)


def _kaggles(folder: Path) -> Labels | None:
    file = folder / "LOC_val_solution.csv"
    if not file.is_file():
        return None
    with open(file, newline="") as rows:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(rows)}


def _xmls(folder: Path) -> Labels | None:
    files = sorted((folder / "Annotations" / "CLS-LOC" / "val").glob("ILSVRC2012_val_*.xml"))
    roots = ((file, xml.etree.ElementTree.parse(file)) for file in files)
    return {file.stem: str(root.findtext("object/name")) for file, root in roots} or None


def _devkits(folder: Path) -> Labels | None:
    """The development kit numbers the classes in its own order, which meta.mat tells."""
    kit = next((path for path in (folder, *folder.glob("ILSVRC2012_devkit*")) if (path / "data").is_dir()), folder)
    truth, meta = kit / "data" / _GROUND_TRUTH, kit / "data" / "meta.mat"
    if not (truth.is_file() and meta.is_file()):
        return None
    from scipy.io import loadmat

    synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    numbers = [int(line) for line in truth.read_text().split()]
    return {f"ILSVRC2012_val_{place:08d}": wnids[number] for place, number in enumerate(numbers, start=1)}
