"""ARWP's damping (arXiv 2404.00357): less noise where gradients are large."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hf_rwp.core.checks import check
from hf_rwp.core.draws import Target, cut_squares
from hf_rwp.core.noise import filter_norms
from hf_rwp.core.sharding import block_of, filters_like, is_sharded, local_of

_KEY = "rwp_fisher"


class Damping:
    """ARWP's F of every weight, from the gradients that the steps use: the same on all replicas.

    eta: >= 0, 0 for no damping. beta: F's decay, in [0, 1). fisher: F by parameter name, (rows,),
    of the rows in this process's memory.
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
        own = [target for target in targets if target.weight.grad is not None] if self.eta else []
        for target, squared in zip(own, _squared_norms([_gradient(target.weight) for target in own]), strict=True):
            before = self.fisher.get(target.name)
            self._next[target.name] = arwp_fisher(
                None if before is None else before.to(squared.device), squared, self.beta
            )

    def put(self, state_dict: dict[str, Any], named: Sequence[tuple[str | None, Tensor]]) -> dict[str, Any]:
        """The base's `state_dict`, with F in the state of each weight where a mesh holds the weights: whoever saves
        and cuts these (DCP) does the same to F. named: the parameters of the base's groups."""
        if not (self.eta and any(is_sharded(weight) for _, weight in named)):
            return state_dict
        state = dict(state_dict["state"])
        for key, (name, weight) in zip(_keys(state_dict), named, strict=True):
            if name is not None and weight.requires_grad:
                block = block_of(weight)
                none = torch.zeros(block.memory.shape[0], dtype=_dtype(weight), device=block.memory.device)
                state[key] = {**state.get(key, {}), _KEY: filters_like(weight, self.fisher.get(name, none))}
        return {**state_dict, "state": state}

    def commit(self) -> None:
        self.fisher, self._next = self._next or self.fisher, {}


def taken(
    state_dict: dict[str, Any], named: Sequence[tuple[str | None, Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`state_dict` without what `Damping.put` added, and the F that this was."""
    found: dict[str, Tensor] = {}
    state = dict(state_dict["state"])
    names = {key: name for key, (name, _) in zip(_keys(state_dict), named, strict=False)}
    for key in [key for key, own in state.items() if isinstance(own, dict) and _KEY in own]:
        own = dict(state.pop(key))
        values, name = local_of(own.pop(_KEY)).reshape(-1).clone(), names.get(key)
        found |= {} if name is None else {name: values}
        state |= {key: own} if own else {}
    return {**state_dict, "state": state}, found


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def _dtype(weight: Tensor) -> torch.dtype:
    """Of F."""
    return torch.promote_types(block_of(weight).memory.dtype, torch.float32)


def _gradient(weight: Any) -> Tensor:
    """The gradient, dense, and cut as its weight is."""
    gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    if is_sharded(gradient) and gradient.placements != weight.placements:
        gradient = gradient.redistribute(placements=weight.placements)
    return gradient  # type: ignore[no-any-return]


def _squared_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Of every filter, (rows,) each. Collective where filters are cut: one for each group of processes."""
    blocks = [block_of(gradient) for gradient in gradients]
    cut = [index for index, block in enumerate(blocks) if block.groups]
    totals = dict(zip(cut, cut_squares([blocks[index] for index in cut]), strict=True))
    return [
        totals[index].to(_dtype(gradients[index])) if index in totals else filter_norms(block).square_()
        for index, block in enumerate(blocks)
    ]


def arwp_fisher(fisher: Tensor | None, squared: Tensor, beta: float) -> Tensor:
    """ARWP's F after a step, (rows,): beta * F + (sum over the filter of g^2), arXiv 2404.00357.

    fisher: F before it; None at the start, as 0. squared: those sums, (rows,). beta: in [0, 1).
    """
    return squared if fisher is None else fisher.mul(beta).add_(squared)


def arwp_damping(fisher: Tensor, eta: float) -> Tensor:
    """ARWP's factor on the standard deviation of every filter: 1 / sqrt(1 + eta * F), in (0, 1]. eta: >= 0."""
    return fisher.mul(eta).add_(1).rsqrt_()
