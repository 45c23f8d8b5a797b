"""Top-1 and top-5 accuracy as metrics of `evaluate` that need neither the Hub nor files, for evaluate.combine.

They are by themselves since `evaluate` takes a second to import.
"""

from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value

from hf_rwp.images.metrics import label_rank


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
