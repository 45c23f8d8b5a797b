"""What was found where the images come from: said before training, and kept in a run's results and on its card."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_rwp.images.numbering import labels_of


@dataclass
class Found:
    """The facts of the images, as `load_images` fills them in; all is JSON.

    source: what they come from ("class folders", "parquet files", ...). images, classes: by split, "train" and
    "validation"; None and {} for a stream, which is not counted. splits: what they are called in their source.
    columns: those taken as "image" and "label", where there are columns. ignored: files that were left out, by the
    reason; firsts: one of each. notes: what was decided where the data leaves a choice, a sentence each. held_out:
    whether evaluation is on other images than training, by the way that the splits were made.
    """

    source: str = ""
    images: dict[str, int | None] = field(default_factory=dict)
    splits: dict[str, str | None] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    held_out: bool = True

    def ignore(self, reason: str, first: str, count: int = 1) -> None:
        """Count files that are left out. first: one of them, relative to the folder."""
        if count:
            self.ignored[reason] = self.ignored.get(reason, 0) + count
            self.firsts.setdefault(reason, first)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def count(self, splits: Mapping[str, Any]) -> None:
        """Count the images and classes of splits with a column label, a ClassLabel."""
        self.images = {role: getattr(split, "num_rows", None) for role, split in splits.items()}
        self.classes = {role: _class_counts(split) for role, split in splits.items()}
        names = {role: str(split.split) if split.split else None for role, split in splits.items()}
        self.splits = names | self.splits

    def lines(self) -> list[str]:
        """The facts in words, a line each, for a person."""
        lines = [f"images: {self.source}"] if self.source else []
        for role, images in self.images.items():
            name = f" ({self.splits[role]})" if self.splits.get(role) not in (None, role) else ""
            counts = self.classes.get(role, {})
            lines.append(f"{role}{name}: {_counted(images)}" + (f", {_spread(counts)}" if counts else ""))
        if self.columns:
            lines.append("columns: " + ", ".join(f"{kind} from {name!r}" for kind, name in self.columns.items()))
        for reason, count in self.ignored.items():
            lines.append(f"ignored: {count:,} {reason}, {self.firsts[reason]}" + (" ..." if count > 1 else ""))
        return lines + [f"note: {note}" for note in self.notes]

    def facts(self) -> dict[str, Any]:
        """The same for a file: as the fields, with the fewest and the most of the classes where there are many."""
        classes = {role: _few(counts) for role, counts in self.classes.items()}
        return asdict(self) | {"classes": classes}


class ImageSplits(DatasetDict):
    """Splits "train" and "validation" as tables, and what was found on the way to them."""

    found: Found


class ImageStreams(IterableDatasetDict):
    """Splits "train" and "validation" as streams, and what was found on the way to them."""

    found: Found


def found_in(splits: Mapping[str, Any]) -> Found:
    """What `load_images` found beside the splits that it gave; of other splits what can be counted."""
    found = getattr(splits, "found", None)
    if found is None:
        found = Found()
        found.count(splits)
    return found


def listed(names: Iterable[Any], most: int = 6) -> str:
    """The first names in words, for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "") or "nothing"


def _class_counts(split: Any) -> dict[str, int]:
    if not isinstance(split, Dataset):
        return {}
    names = split.features["label"].names
    return dict(zip(names, np.bincount(labels_of(split), minlength=len(names)).tolist(), strict=True))


_MANY = 20


def _few(counts: Mapping[str, int]) -> dict[str, Any]:
    if len(counts) <= _MANY:
        return dict(counts)
    (most, largest), (fewest, smallest) = max(counts.items(), key=_second), min(counts.items(), key=_second)
    return {"count": len(counts), "fewest": {fewest: smallest}, "most": {most: largest}}


def _spread(counts: Mapping[str, int]) -> str:
    if len(counts) <= 10:
        return f"{len(counts)} classes: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    ranked = Counter(counts).most_common()
    (most, largest), (fewest, smallest) = ranked[0], ranked[-1]
    if smallest == largest:
        return f"{len(counts):,} classes of {smallest:,} images"
    return f"{len(counts):,} classes of {smallest:,} ({fewest}) to {largest:,} ({most}) images"


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def _counted(images: int | None) -> str:
    return "a stream" if images is None else f"{images:,} images"
