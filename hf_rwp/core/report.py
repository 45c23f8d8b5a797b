"""What a wrapper really did."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_rwp.core.draws import Target
from hf_rwp.core.perturbation import Perturbation
from hf_rwp.core.sharding import Replicas

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Micro-steps by kind since construction, and the noise relative to the weights as last measured."""

    slots: dict[str, int] = field(default_factory=lambda: {"clean": 0, "perturbed": 0})
    sizes: list[tuple[str, int, float]] = field(default_factory=list)  # name, elements, size
    measures: bool = True  # at the next perturbed micro-step
    warned: bool = False
    before: int = 0  # windows that earlier wrappers of the model had

    def measure(self, targets: Sequence[Target], perturbation: Perturbation) -> None:
        """Measure the noise in the weights, of the largest, the median and the smallest; warn of a strange size."""
        if not (self.measures and targets):
            return
        by_size = sorted(targets, key=lambda target: -target.weight.numel())
        chosen = [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
        sizes = [relative_size(target.weight.detach(), perturbation.clean(target.weight)) for target in chosen]
        self.sizes = [(t.name, t.weight.numel(), size.item()) for t, size in zip(chosen, sizes, strict=True)]
        self.measures = False
        logger.info("noise relative to the weights (name, elements, size): %s", self.sizes)
        if not self.warned:
            self.warned = True
            _warn(chosen[0], self.sizes[0][2])

    def gathered(self, replicas: Replicas) -> tuple[dict[str, int], dict[str, Any]]:
        """The slots of all replicas, and the sizes of the first that has any. Collective."""
        everyone: list[Any] = [(self.slots, self.sizes)] * replicas.count
        if replicas.count > 1:
            dist.all_gather_object(everyone, (self.slots, self.sizes), group=replicas.group)
        self.measures = True
        sizes: list[tuple[str, int, float]] = next((sizes for _, sizes in everyone if sizes), [])
        named = {
            rank: {"name": name, "elements": elements, "size": size}
            for rank, (name, elements, size) in zip(("largest", "median", "smallest"), sizes, strict=False)
        }
        return {kind: sum(slots[kind] for slots, _ in everyone) for kind in self.slots}, named


def _warn(target: Target, size: float) -> None:
    if size > 1:
        logger.warning(
            "the noise in %s is %.3g times as large as its weights: nothing is learned from such a gradient. Usual are "
            "0.05 to 0.7; a smaller gamma makes it so (0.01 is the paper's in mode filter, 0.2 in filter_normalized)",
            target.name,
            size,
        )
    elif target.weight.dtype in (torch.bfloat16, torch.float16) and 0 < size < 0.005:
        logger.warning(
            "the noise in %s is %.2g of its weights, which are %s: below 0.005 it is mostly the rounding of the sum, "
            "and no longer gamma's. Take a larger gamma, or keep the weights in float32",
            target.name,
            size,
            str(target.weight.dtype).removeprefix("torch."),
        )


def relative_size(noisy: Tensor, clean: Tensor) -> Tensor:
    """||noisy - clean|| / ||clean||, a 0-dim tensor in float32 or better; 0 where both are 0."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    if clean.ndim == 0:
        noisy, clean = noisy.unsqueeze(0), clean.unsqueeze(0)
    rows = max(1, 2**16 * len(clean) // max(1, clean.numel()))  # some rows at a time: no second copy of a large weight
    pieces = zip(noisy.split(rows), clean.split(rows), strict=True)
    norms = [torch.linalg.vector_norm(some_noisy.to(dtype) - some_clean) for some_noisy, some_clean in pieces]
    noise: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return noise.div_(torch.linalg.vector_norm(clean, dtype=dtype).clamp_min_(torch.finfo(dtype).tiny))
