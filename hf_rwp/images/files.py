"""What a folder holds: images, tables and other files. Links are followed, hidden files are left out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hf_rwp.images.pixels import begins_like_an_image, ending_of, image_endings

TABLES = (".parquet", ".tar", ".arrow")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LABEL_FILES = (*METADATA, "val_annotations.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
_HEIC = (".heic", ".heif", ".hif")
_ARCHIVES = (".zip", ".tgz", ".gz", ".7z", ".rar", ".xz", ".bz2")
_HIDDEN = ("__macosx", "__pycache__", "@eadir", "thumbs.db", "desktop.ini")
_TEXTS = (".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".html", ".py", ".mat")


@dataclass
class Tree:
    """A folder: the names of its images, tables and files with labels, its folders, and how many other files it has, by
    what they are, with the first of each."""

    path: Path
    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    folders: dict[str, "Tree"] = field(default_factory=dict)
    others: dict[str, tuple[int, str]] = field(default_factory=dict)

    @cached_property
    def total(self) -> int:
        """Images in it and below."""
        return len(self.images) + sum(folder.total for folder in self.folders.values())

    def walk(self) -> Iterator["Tree"]:
        """The folder and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def first_image(self) -> Path | None:
        """The path of an image in it or below."""
        return next((tree.path / tree.images[0] for tree in self.walk() if tree.images), None)

    def leave_out(self, reason: str, name: str) -> None:
        """Count another file. reason: what it is, as in "3 .txt files"."""
        count, first = self.others.get(reason, (0, name))
        self.others[reason] = count + 1, first

    def others_below(self) -> str:
        """The other files in it and below, in words: "3 .txt files, 1 .pdf files"."""
        counts: dict[str, int] = {}
        for tree in self.walk():
            for reason, (count, _) in tree.others.items():
                counts[reason] = counts.get(reason, 0) + count
        return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "no files"


def scan(folder: Path, around: frozenset[str] = frozenset()) -> Tree:
    """What `folder` holds. around: the real paths of the folders that it lies in, for links that lead back to them."""
    tree, around = Tree(folder), around | {os.path.realpath(folder)}
    endings = image_endings()
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name, ending = entry.name, ending_of(entry.name)
        if name.startswith(".") or name.lower() in _HIDDEN:
            tree.leave_out("hidden files", name)
        elif entry.is_dir():
            if entry.is_symlink() and os.path.realpath(entry.path) in around:
                tree.leave_out("links to a folder around them", name)
            else:
                tree.folders[name] = scan(Path(entry.path), around)
        elif not entry.is_file():
            tree.leave_out("broken links", name)
        elif ending in endings or (not ending and begins_like_an_image(entry.path)):
            tree.images.append(name)
        elif name in LABEL_FILES:
            tree.labels.append(name)
        elif ending in TABLES:
            tree.tables.append(name)
        else:
            tree.leave_out(_reason(ending), name)
    return tree


def _reason(ending: str) -> str:
    if not ending:
        return "files without an ending that are not images"
    if ending in _HEIC:
        return f"{ending} files (to read them: pip install pillow-heif)"
    if ending == ".avif":
        return f"{ending} files (to read them: pip install 'pillow>=11.3')"
    if ending in _ARCHIVES:
        return f"{ending} files (unpack them first)"
    return f"{ending} files" if ending in _TEXTS else f"{ending} files, which Pillow does not read"
