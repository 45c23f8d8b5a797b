"""The labels of a table as numbers, and from one order of the classes to another."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features


def labels_of(split: Dataset, column: str = "label") -> np.ndarray:
    """The labels of all rows, (rows,), int64."""
    return np.asarray(split.with_format("numpy")[column][:], dtype=np.int64)


def renumbered(labels: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Labels that number the names in `old`, as numbers of the same names in `new`; -1 for what is not in both."""
    places = {name: place for place, name in enumerate(new)}
    table = np.array([*(places.get(name, -1) for name in old), -1])
    return table[np.where((labels >= 0) & (labels < len(old)), labels, -1)]


def with_column(split: Dataset, column: str, values: Any, feature: Any) -> Dataset:
    """`split` with other values in a column, set beside the others: they are not written anew."""
    order = split.column_names
    new = Dataset.from_dict({column: values}, features=Features({column: feature}))
    others = split.remove_columns(column)
    joined = datasets.concatenate_datasets([others, new], axis=1, split=split.split)
    return joined.select_columns(order)
