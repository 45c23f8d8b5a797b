"""What noise and restore cost by themselves: RWP's own part of a step, and the reference code's."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hf_rwp.analysis.timing import on_one_thread, timed
from hf_rwp.core import draws
from hf_rwp.core.gamma import DEFAULT_GAMMA
from hf_rwp.core.optimizer import RWP


class Idle(nn.Module):
    """The weights and buffers of a model without its work: all that is left of a micro-step is noise and restore."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.output = nn.Parameter(torch.ones((), device=next(module.parameters()).device))

    def forward(self) -> Tensor:
        return self.output * 1


def noise_and_restore(
    module: nn.Module, device: torch.device, accumulation_steps: int, alpha: float = 0.5
) -> Callable[[], float]:
    """RWP's own part of a step: seconds that the window's last micro-step takes, which on one rank is perturbed."""
    idle = Idle(copy.deepcopy(module))
    base = torch.optim.SGD(idle.parameters(), lr=0.0)
    optimizer = RWP(base, idle, alpha=alpha, accumulation_steps=accumulation_steps)

    def window() -> float:
        seconds = [timed(lambda: idle().backward(), device) for _ in range(accumulation_steps)]
        optimizer.step()
        optimizer.zero_grad()
        return seconds[-1]

    return window


class Launches:
    """In place of a Triton kernel: takes a launch's arguments, and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def kernels_without_launches() -> Iterator[None]:
    """Let weights on a CPU go the way of the kernels, whose launches do nothing: no noise comes.

    Raises ImportError where torch has no Triton.
    """
    from hf_rwp.core import kernels

    with (
        patch.object(draws, "_fuses", lambda *_: True),
        patch.multiple(kernels, supports=lambda _: True, _norms_kernel=Launches(), _noise_kernel=Launches()),
    ):
        yield


def noise_variants(module: nn.Module, device: torch.device) -> dict[str, Callable[[], float]]:
    """Noise and restore by themselves, on one thread: RWP's, the reference code's, and a copy of as many bytes."""
    parameters = list(copy.deepcopy(module).parameters())
    source = torch.ones(sum(parameter.numel() for parameter in parameters), device=device)
    target = torch.empty_like(source)

    def reference() -> None:
        noises = reference_noise(parameters)
        reference_restore(parameters, noises)

    variants: dict[str, Callable[[], float]] = {
        "noise": noise_and_restore(module, device, accumulation_steps=2),
        "reference": partial(timed, reference, device),
        "copy": partial(timed, lambda: target.copy_(source), device),
    }
    return {kind: partial(on_one_thread, variant) for kind, variant in variants.items()}


@torch.no_grad()
def reference_noise(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Add noise as the reference code does (github.com/nblt/RWP): one parameter, one tensor of std at a time."""
    gamma, noises = DEFAULT_GAMMA["filter"], []
    for weight in parameters:
        if weight.ndim > 1:
            norms = weight.reshape(len(weight), -1).norm(dim=1, keepdim=True)
            std = norms.repeat(1, weight[0].numel()).view(weight.shape)
            noise = torch.normal(0, gamma * std)
        else:
            noise = torch.empty_like(weight).normal_(0, gamma * (weight.norm().item() + 1e-16))
        noises.append(noise)
        weight.add_(noise)
    return noises


@torch.no_grad()
def reference_restore(parameters: Sequence[nn.Parameter], noises: Sequence[Tensor]) -> None:
    for weight, noise in zip(parameters, noises, strict=True):
        weight.sub_(noise)
