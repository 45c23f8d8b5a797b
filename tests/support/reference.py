"""The paper's loop (arXiv 2211.11489, algorithm 1), written down once more as plainly as possible: the tests' oracle.

    g = alpha * mean of grad L(w + eps_s; batch_s) over the perturbed slots s
      + (1 - alpha) * mean of grad L(w; batch_s) over the clean slots s

In float64, out of place, through `torch.func.functional_call`, with nothing from hf_rwp. The noises are given, not
drawn: a test reads them off the weights that a forward pass saw (`seen_weights`) and asks whether the gradient fits.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Loss = Callable[[Any, Any], Tensor]


def gradient(model: nn.Module, weights: Tensors, batch: tuple[Any, Any], loss: Loss) -> Tensors:
    """The gradient of loss(model(inputs), targets) at `weights`, float64, by parameter name; zeros where unused.

    weights: by the names of `named_parameters()`. The model itself, its weights and its buffers are not touched: a copy
    without any hooks is called, in training mode.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    leaves = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    buffers = {name: _double(buffer) for name, buffer in model.named_buffers()}
    inputs, targets = (_double(value) for value in batch)
    value = loss(torch.func.functional_call(model, {**leaves, **buffers}, (inputs,)), targets)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def mixed_gradient(
    model: nn.Module,
    weights: Tensors,
    noises: Sequence[Tensors | None],
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    alpha: float,
) -> Tensors:
    """The paper's mixed gradient over the slots of one optimizer step, float64, by parameter name.

    weights: the clean ones, by the names of `named_parameters()`. noises: one entry a slot, in the order of `batches`;
    None for a clean slot, otherwise eps by name (parameters left out have none). Where all slots are of one kind, it
    is that kind's mean: alpha = 1, or an ordinary step.
    """
    of_kind: dict[bool, list[Tensors]] = {False: [], True: []}
    for noise, batch in zip(noises, batches, strict=True):
        moved = {
            name: weight.detach().double() + (noise[name].double() if noise and name in noise else 0.0)
            for name, weight in weights.items()
        }
        of_kind[noise is not None].append(gradient(model, moved, batch, loss))
    clean, perturbed = of_kind[False], of_kind[True]
    if not (clean and perturbed):
        return _mean(clean or perturbed)
    mean_clean, mean_perturbed = _mean(clean), _mean(perturbed)
    return {name: alpha * mean_perturbed[name] + (1 - alpha) * mean_clean[name] for name in weights}


def snapshot(model: nn.Module) -> Tensors:
    """A copy of the model's parameters as they are now, by the names of `named_parameters()`."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def seen_weights(model: nn.Module) -> Iterator[list[Tensors]]:
    """The weights that each forward pass of `model` in training mode sees: a list that grows with every pass.

    Enter it once the wrapper is on the model, so that this hook runs after the wrapper's. What a pass saw minus the
    clean weights is its noise, see `noises`.
    """
    seen: list[Tensors] = []

    @torch.compiler.disable
    def record(module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(snapshot(module))

    handle = model.register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def noises(seen: Sequence[Tensors], clean: Tensors) -> list[Tensors | None]:
    """eps of every recorded pass, float64, by name; None for a pass that saw the clean weights."""
    result: list[Tensors | None] = []
    for weights in seen:
        noise = {name: weights[name].double() - weight.double() for name, weight in clean.items()}
        result.append(noise if any(bool(eps.any()) for eps in noise.values()) else None)
    return result


def _mean(gradients: list[Tensors]) -> Tensors:
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
