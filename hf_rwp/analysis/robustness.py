"""What is left of a model's accuracy when its weights are noisy, rounded or cut away."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_rwp.analysis.batches import Batches
from hf_rwp.analysis.sharpness import Measured, loss_under_noise, measure, quantized, replaced

GAMMAS = (0.01, 0.02, 0.03)
BITS = (8, 4, 3, 2)
PRUNED = (0.3, 0.5, 0.7)


def pruned(model: nn.Module, batches: Batches, share: float) -> Measured:
    """Loss and accuracy with the smallest weights of each layer set to 0.

    share: of the elements of each weight of two and more dimensions, in [0, 1), rounded down; of equal magnitudes any.
    Raises ValueError for another share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), for something to be left of a layer, got {share}")
    return replaced(model, batches, lambda weight: _without_smallest(weight, int(share * weight.numel())))


def robustness(model: nn.Module, judges: Batches, learned: Batches, *, draws: int = 3, seed: int = 0) -> dict[str, Any]:
    """Accuracies, fractions in [0, 1], on `judges`, and how sharp the loss is on `learned`, of the training images.

    Under `noise` of RWP's law by gamma (means over draws); with weights rounded to `bits`, symmetric for each filter;
    with a share of them `pruned`; and `as_they_are`. `train` is accuracy and loss on `learned`, `rise` by how much
    noise raises that loss. Keys of the inner mappings are strings, as in JSON. Equal seeds give equal draws.
    """
    options: dict[str, Any] = {"draws": draws, "seed": seed}
    on_judges, on_learned = (loss_under_noise(model, batches, GAMMAS, **options) for batches in (judges, learned))
    train = measure(model, learned)
    return {
        "as_they_are": measure(model, judges).accuracy,
        "noise": {str(level.gamma): level.accuracy.mean for level in on_judges},
        "bits": {str(bits): quantized(model, judges, bits).accuracy for bits in BITS},
        "pruned": {str(share): pruned(model, judges, share).accuracy for share in PRUNED},
        "train": {"accuracy": train.accuracy, "loss": train.loss},
        "rise": {str(level.gamma): level.loss_rise.mean for level in on_learned},
    }


def _without_smallest(weight: Tensor, count: int) -> Tensor:
    flat = weight.flatten().clone()
    flat[torch.topk(flat.abs(), count, largest=False).indices] = 0
    return flat.view_as(weight)
