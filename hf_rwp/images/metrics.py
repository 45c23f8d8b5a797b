"""Top-1 and top-5 accuracy, cross-entropy and which classes are taken for which, over a split: `Accuracy`, exact on
replicas with any number of images. The accuracies as metrics of `evaluate` are in `top_k`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

MOST_CLASSES = 100  # that are told apart one by one, in figures and pictures


def label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes the logits (B, C) put ahead of the labels (B,): (B,), from 0 (top-1 is right) to C.

    Of equal logits the higher class is ahead, as in scikit-learn's top_k_accuracy_score. A NaN is ahead of any number,
    and a label whose own logit is NaN comes last, with rank C: no hit for k up to C, where argmax might make it one.
    """
    own = logits.gather(1, labels[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) > labels[:, None]
    return (~(logits <= own) | ((logits == own) & later)).sum(1)


def predicted_class(logits: Tensor) -> Tensor:
    """The class that `label_rank` puts first, of the logits (B, C): (B,); the last of those that are equal."""
    return logits.shape[1] - 1 - logits.flip(1).argmax(1)


def refuse_nothing_read(count: float) -> None:
    """Raise ValueError where no image was counted."""
    if not count:
        raise ValueError("no image for evaluation could be read: see the warnings above for what is wrong with them")


class Confusion:
    """How often images of each class were taken for each other one, of at most `MOST_CLASSES` classes; of more nothing.

    names: of the classes, by index. device: where `counts` are, (C, C), int64: row i, column j is images of class i
    that were taken for class j.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names) if len(names) <= MOST_CLASSES else []
        self.counts = torch.zeros(len(self.names), len(self.names), dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Count images by the classes that they were taken for (B,), and their own (B,)."""
        if self.names:
            cells = labels.long() * len(self.names) + predicted.long()
            self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def by_class(self) -> dict[str, Any]:
        """What `hf_rwp.runs.records.ByClass` says, {} where there is nothing to say; and begins anew."""
        counts, self.counts = self.counts, torch.zeros_like(self.counts)
        images, right = counts.sum(1).tolist(), counts.diagonal().tolist()
        accuracy = [hits / count if count else None for hits, count in zip(right, images, strict=True)]
        found = {"names": self.names, "images": images, "accuracy": accuracy, "confusion": counts.tolist()}
        return found if self.names else {}


class Accuracy:
    """Top-1 and top-5 accuracy, fractions in [0, 1], and mean cross-entropy over a split, each image counted once.

    Replicas may have any number of images, none of them too, and meet only in `compute`. device: where the sums are.
    names: of the classes, to count each of them by itself as well (`Confusion`).

        accuracy = Accuracy(device)
        accuracy.add(model(images), labels)    # for every batch
        accuracy.compute()                     # {"top1": ..., "top5": ..., "eval_loss": ...}, and begins anew
    """

    def __init__(self, device: torch.device | str = "cpu", names: Sequence[str] = ()) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # right at 1 and at 5, losses; how many images
        self._confusion = Confusion(names, device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,), of which those below 0 do not count."""
        read = labels >= 0
        logits, labels = logits[read].float(), labels[read]
        ranks = label_rank(logits, labels)
        scores = torch.stack([ranks < 1, ranks < 5, cross_entropy(logits, labels, reduction="none")], 1)
        self._sums[:3] += scores.double().sum(0)
        self._sums[3] += len(labels)
        self._confusion.add(predicted_class(logits), labels)

    def compute(self, over_replicas: bool = True) -> dict[str, Any]:
        """Of all images since the last call; with the classes' names also "by_class". Collective, unless
        `over_replicas` is false.

        Raises ValueError, on all replicas, where no image could be read.
        """
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if over_replicas and dist.is_initialized():
            counts = self._confusion.counts
            together = torch.cat([sums, counts.flatten().double()])  # whole numbers are exact up to 2^53
            dist.all_reduce(together)
            sums, self._confusion.counts = together[:4], together[4:].long().view_as(counts)
        *totals, count = sums.tolist()
        by_class = self._confusion.by_class()
        refuse_nothing_read(count)
        figures: dict[str, Any] = dict(
            zip(("top1", "top5", "eval_loss"), (total / count for total in totals), strict=True)
        )
        return figures | ({"by_class": by_class} if by_class else {})
