"""What a wrapper really did."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_rwp.core.draws import Target
from hf_rwp.core.perturbation import Perturbation
from hf_rwp.core.replicas import Replicas, gathered
from hf_rwp.core.sharding import gathered_dtype

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Micro-steps by kind since construction, and the noise relative to the weights as last measured."""

    slots: dict[str, int] = field(default_factory=lambda: {"clean": 0, "perturbed": 0})
    norms: list[tuple[str, int, float, float]] = field(default_factory=list)  # name, elements, of noise and weight
    measures: bool = True  # at the next perturbed micro-step
    warned: bool = False
    before: int = 0  # windows that earlier wrappers of the model had

    def measure(self, targets: Sequence[Target], perturbation: Perturbation, gatherers: Sequence[Any] = ()) -> None:
        """Measure the noise in the weights, of the largest, the median and the smallest; warn of a strange size.

        gatherers: see `sharding.gatherers`.
        """
        if not (self.measures and targets):
            return
        by_size = sorted(targets, key=lambda target: -target.weight.numel())
        chosen = [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
        norms = [noise_and_weight(*perturbation.values(target.local)) for target in chosen]
        self.norms = [(t.name, t.weight.numel(), *pair.tolist()) for t, pair in zip(chosen, norms, strict=True)]
        self.measures = False
        logger.info("noise and weights (name, elements, ||noise||, ||weight||): %s", self.norms)
        if not self.warned:
            self.warned = True
            dtype = gathered_dtype(gatherers) or chosen[0].weight.dtype
            _warn(chosen[0].name, relative_size([self.norms[0][2:]]), dtype)

    def gathered(self, replicas: Replicas) -> tuple[dict[str, int], dict[str, Any]]:
        """The slots of all replicas, and the sizes of the first that has any. Collective."""
        everyone = gathered((replicas.index, self.slots, self.norms), replicas)
        self.measures = True
        slots = {index: slots for index, slots, _ in everyone}  # whoever holds one replica together had the same
        measured = [index for index, _, norms in everyone if norms]
        parts = [norms for index, _, norms in everyone if norms and index == min(measured)]
        sizes = {
            rank: {
                "name": own[0][0],
                "elements": own[0][1],
                "size": relative_size([norms for _, _, *norms in own]),
            }
            for rank, own in zip(("largest", "median", "smallest"), zip(*parts, strict=True), strict=False)
        }
        return {kind: sum(own[kind] for own in slots.values()) for kind in self.slots}, sizes


def _warn(name: str, size: float, dtype: torch.dtype) -> None:
    """dtype: of the weights that a pass computes with."""
    if size > 1:
        logger.warning(
            "the noise in %s is %.3g times as large as its weights: most networks learn little from that. Usual are "
            "0.05 to 0.7; a smaller gamma makes it so (0.01 is the paper's in mode filter, 0.2 in filter_normalized)",
            name,
            size,
        )
    elif dtype in (torch.bfloat16, torch.float16) and 0 < size < 0.005:
        logger.warning(
            "the noise in %s is %.2g of its weights, which are %s: below 0.005 it is mostly the rounding of the sum, "
            "and no longer gamma's. Take a larger gamma, or keep the weights in float32",
            name,
            size,
            str(dtype).removeprefix("torch."),
        )


def noise_and_weight(noisy: Tensor, clean: Tensor) -> Tensor:
    """||noisy - clean|| and ||clean||, (2,), in float32 or better."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    if clean.ndim == 0:
        noisy, clean = noisy.unsqueeze(0), clean.unsqueeze(0)
    rows = max(1, 2**16 * len(clean) // max(1, clean.numel()))  # some rows at a time: no second copy of a large weight
    pieces = zip(noisy.split(rows), clean.split(rows), strict=True)
    norms = [torch.linalg.vector_norm(some_noisy.to(dtype) - some_clean) for some_noisy, some_clean in pieces]
    noise = torch.linalg.vector_norm(torch.stack(norms))
    return torch.stack([noise, torch.linalg.vector_norm(clean, dtype=dtype).to(noise.dtype)])


def relative_size(norms: Iterable[Sequence[float]]) -> float:
    """||noise|| / ||weight|| of a weight, from both norms of each of its parts; 0 where both are 0."""
    noise, weight = (math.hypot(*own) for own in zip(*norms, strict=True))
    return noise / max(weight, torch.finfo(torch.float32).tiny)
