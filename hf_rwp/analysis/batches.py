"""What losses are measured on: batches as a DataLoader gives them, and how many of their labels count."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor] | Mapping[str, Any]
Batches = Iterable[Batch]


def check_batch(batch: Any) -> None:
    """Raise ValueError for what is no batch: a sample by itself, or one batch in place of many."""
    if isinstance(batch, Mapping):
        if batch.get("labels") is None:
            raise ValueError(f"batches gave a mapping with {', '.join(map(str, batch))}: it needs `labels`")
        labels = batch["labels"]
        alone = not (_holds_many(labels, 1) and ("input_ids" not in batch or _holds_many(batch["input_ids"], 2)))
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
        alone = not _holds_many(labels, 1)
    else:
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise ValueError(
            f"batches gave a {type(batch).__name__}{shape}: pass many batches, each a pair of inputs and labels or a "
            "mapping, as a DataLoader gives them; a single one as [(inputs, labels)]"
        )
    if alone:
        got = f"a tensor of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(
            f"batches gave a sample by itself (its label is {got}): pass batches of samples, tensors whose first "
            "dimension counts them, as torch.utils.data.DataLoader(samples, batch_size=64) gives them"
        )


def _holds_many(labels: Any, dimensions: int) -> bool:
    return isinstance(labels, Tensor) and labels.ndim >= dimensions


def counted_labels(labels: Tensor) -> Tensor:
    """Those that a model's own loss is the mean over: not -100, nor the first of each text, which nothing predicts."""
    labels = labels[:, 1:] if labels.ndim > 1 else labels
    return labels[labels != -100]
