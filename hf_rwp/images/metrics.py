"""Top-1 and top-5 accuracy and cross-entropy over a split: `Accuracy`, exact on replicas with any number of images.

`Top1` and `Top5` are the same accuracies as `evaluate` metrics that need neither the Hub nor files, for
evaluate.combine.
"""

from typing import Any

import evaluate
import numpy as np
import torch
import torch.distributed as dist
from datasets import Features, Value
from torch import Tensor
from torch.nn.functional import cross_entropy


def label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes the logits (B, C) put ahead of the labels (B,): (B,), from 0 (top-1 is right) to C.

    Of equal logits the higher class is ahead, as in scikit-learn's top_k_accuracy_score. A NaN is ahead of any number,
    and a label whose own logit is NaN comes last, with rank C: no hit for k up to C, where argmax might make it one.
    """
    own = logits.gather(1, labels[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) > labels[:, None]
    return (~(logits <= own) | ((logits == own) & later)).sum(1)


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """What `Accuracy` counts of each image: whether top-1 and top-5 are right, and the cross-entropy: (B, 3), float32.

    logits: (B, C). labels: (B,); one below 0 stands for an image that could not be read, and its scores for nothing.
    """
    known, logits = labels.clamp(min=0), logits.float()
    ranks = label_rank(logits, known)
    return torch.stack([ranks < 1, ranks < 5, cross_entropy(logits, known, reduction="none")], 1)


def refuse_nothing_read(count: float) -> None:
    """Raise ValueError where no image was counted."""
    if not count:
        raise ValueError("no image for evaluation could be read: see the warnings above for what is wrong with them")


class Accuracy:
    """Top-1 and top-5 accuracy, fractions in [0, 1], and mean cross-entropy over a split, each image counted once.

    Replicas may have any number of images, none of them too, and meet only in `compute`. device: where the sums are.

        accuracy = Accuracy(device)
        accuracy.add(model(images), labels)    # for every batch
        accuracy.compute()                     # {"top1": ..., "top5": ..., "eval_loss": ...}, and begins anew
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # of the scores, and how many images

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,), of which those below 0 do not count."""
        self.add_scores(scores(logits, labels), labels)

    def add_scores(self, scores: Tensor, labels: Tensor) -> None:
        """`add`, of what the function `scores` made of the logits."""
        read = scores[labels >= 0].double()
        self._sums[:3] += read.sum(0)
        self._sums[3] += len(read)

    def compute(self, over_replicas: bool = True) -> dict[str, float]:
        """Of all images since the last call. Collective, unless `over_replicas` is false.

        Raises ValueError, on all replicas, where no image could be read.
        """
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if over_replicas and dist.is_initialized():
            dist.all_reduce(sums)
        *totals, count = sums.tolist()
        refuse_nothing_read(count)
        return dict(zip(("top1", "top5", "eval_loss"), (total / count for total in totals), strict=True))


class _TopK(evaluate.Metric):
    # An image is kept as the rank of its label, not as C logits: those of ImageNet's validation set would take
    # `evaluate` gigabytes.

    k: int

    def __init__(self, **options: Any) -> None:
        # In memory: the runs of one user would share, and lock, the files of a cache.
        super().__init__(**{"keep_in_memory": True, **options})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"The fraction of images whose label is among the {self.k} classes with the highest logits.",
            citation="",
            inputs_description="predictions: logits (B, C), or label ranks (B,). references: labels (B,).",
            features=Features(predictions=Value("int64"), references=Value("int64")),
            format="numpy",
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Add logits (B, C), or what `label_rank` made of them (B,), and labels (B,)."""
        predictions = torch.as_tensor(predictions)
        labels = torch.as_tensor(references, dtype=torch.int64, device=predictions.device)
        ranks = label_rank(predictions, labels) if predictions.ndim > 1 else predictions
        super().add_batch(predictions=ranks, references=labels, **others)

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Add the logits (C,) and the label of one image."""
        example = {"predictions": prediction, "references": reference, **others}  # evaluate.combine adds in the plural
        self.add_batch(**{name: torch.as_tensor(value)[None] for name, value in example.items()})

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {f"top{self.k}": float((predictions < self.k).mean())}


class Top1(_TopK):
    """Top-1 accuracy as "top1", a fraction in [0, 1], of logits (B, C) and labels (B,)."""

    k = 1


class Top5(_TopK):
    """Top-5 accuracy as "top5", a fraction in [0, 1], of logits (B, C) and labels (B,); 1 for C <= 5."""

    k = 5
