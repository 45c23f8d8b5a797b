"""ARWP's damping (arXiv 2404.00357): less noise where gradients are large."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from hf_rwp.core.checks import check
from hf_rwp.core.draws import Target
from hf_rwp.core.noise import filter_norms
from hf_rwp.core.sharding import block_of


class Damping:
    """ARWP's F of every weight, from the gradients that the steps use: the same on all replicas.

    eta: >= 0, 0 for no damping. beta: F's decay, in [0, 1). fisher: F by parameter name, (rows,).
    """

    def __init__(self, eta: float, beta: float) -> None:
        check("eta", eta, Real, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        check("beta", beta, Real, lambda value: 0 <= value < 1, "a number in [0, 1)")
        self.eta, self.beta = eta, beta
        self.fisher: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def factors(self, targets: Sequence[Target]) -> list[Tensor | None] | None:
        """What each target's standard deviations are multiplied by; None: nothing."""
        if not (self.eta and self.fisher):
            return None
        found = [(self.fisher.get(target.name), target.weight.device) for target in targets]
        return [None if f is None else arwp_damping(f.to(device), self.eta) for f, device in found]

    @torch.no_grad()
    def note(self, targets: Sequence[Target]) -> None:
        """Take the gradients of a step that is about to be made; F moves once it is, by `commit`."""
        self._next = dict(self.fisher)
        for target in targets if self.eta else ():
            if target.weight.grad is not None:
                gradient = target.weight.grad.to_dense() if target.weight.grad.is_sparse else target.weight.grad
                before = self.fisher.get(target.name)
                before = None if before is None else before.to(gradient.device)
                self._next[target.name] = arwp_fisher(before, gradient, self.beta)

    def commit(self) -> None:
        self.fisher, self._next = self._next or self.fisher, {}


def arwp_fisher(fisher: Tensor | None, gradient: Tensor, beta: float) -> Tensor:
    """ARWP's F after a step with `gradient`, (rows,): beta * F + (sum over the filter of g^2), arXiv 2404.00357.

    fisher: F before it; None at the start, as 0. beta: in [0, 1).
    """
    squared = filter_norms(block_of(gradient)).square_()
    return squared if fisher is None else fisher.mul(beta).add_(squared)


def arwp_damping(fisher: Tensor, eta: float) -> Tensor:
    """ARWP's factor on the standard deviation of every filter: 1 / sqrt(1 + eta * F), in (0, 1]. eta: >= 0."""
    return fisher.mul(eta).add_(1).rsqrt_()
