"""How many classes the data of some results have."""

from collections.abc import Mapping
from typing import Any


def class_count(results: Mapping[str, Any]) -> int | None:
    """Of the training images; None where it is not known."""
    counts = results.get("found", {}).get("classes", {}).get("train")
    return (counts["count"] if isinstance(counts.get("most"), Mapping) else len(counts)) if counts else None


def few_classes(results: Mapping[str, Any]) -> bool:
    """Whether top-5 is always right."""
    return (class_count(results) or 6) <= 5
