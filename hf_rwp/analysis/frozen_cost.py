"""What noise on a frozen base costs under LoRA: drawn where needed, by a copy, and as Flat-LoRA's trainer has it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_rwp.analysis.timing import WARM_UP, peak_bytes, timed
from hf_rwp.core.optimizer import RWP

WIDTH, LAYERS, RANK = 1024, 6, 8
TOKENS = 2048  # of a step: those of a batch of sequences
GAMMA = 0.05  # relative to the weights' rms, as Flat-LoRA's
KINDS = ("plain", "drawn", "copy", "flat_lora")

Loss = Callable[[nn.Module], Tensor]


class Adapted(nn.Module):
    """A frozen linear layer and a product of two small trainable ones."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def linear_layers(tokens: int = TOKENS, width: int = WIDTH) -> tuple[nn.Module, Loss]:
    """Adapted linear layers and nothing else, the case in which a draw costs most; and the loss of a step."""
    pairs = [[Adapted(nn.Linear(width, width, bias=False), RANK), nn.SiLU()] for _ in range(LAYERS)]
    x = torch.randn(tokens, width)

    def loss(model: nn.Module) -> Tensor:
        y: Tensor = model(x.to(next(model.parameters())))
        return y.square().mean()

    return nn.Sequential(*[module for pair in pairs for module in pair]), loss


def frozen_costs(
    model: nn.Module,
    loss: Loss,
    rounds: int,
    kinds: Sequence[str] = KINDS,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of a step whose gradient is perturbed, and the most bytes that it takes beyond the weights, by kind.

    `plain` has no noise on the base. Every round takes each kind once; WARM_UP of them are not counted. tell: is called
    after each round.
    """
    device = next(model.parameters()).device
    makers: dict[str, Callable[[nn.Module, Loss], Callable[[], None]]] = {
        "plain": partial(_rwp_step, frozen=False),
        "drawn": partial(_rwp_step, frozen=True),
        "copy": partial(_rwp_step, frozen="copy"),
        "flat_lora": _flat_lora_step,
    }
    steps = {kind: makers[kind](copy.deepcopy(model), loss) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(WARM_UP + rounds):
        for kind, step in steps.items():
            taken = timed(step, device)
            if index >= WARM_UP:
                seconds[kind].append(taken)
        tell()
    del steps
    return {
        "seconds": seconds,
        "peak_bytes": {kind: peak_bytes(makers[kind](copy.deepcopy(model), loss), device) for kind in kinds},
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "layer_bytes": max(weight.nbytes for weight in model.parameters() if not weight.requires_grad),
    }


def frozen_ratios(found: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """By kind: a step's time over plain LoRA's in every round, and its memory, the weights included, over plain's."""
    weights, plain = found["weights_bytes"], found["seconds"]["plain"]
    ratios = {}
    for kind, seconds in found["seconds"].items():
        if kind == "plain":
            continue
        times = [taken / base for taken, base in zip(seconds, plain, strict=True)]
        memory = (weights + found["peak_bytes"][kind]) / (weights + found["peak_bytes"]["plain"])
        ratios[kind] = times, [memory] * 2
    return ratios


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _rwp_step(model: nn.Module, loss: Loss, frozen: bool | str) -> Callable[[], None]:
    base = torch.optim.SGD(_adapters(model), lr=1e-3)
    optimizer = RWP(base, model, alpha=1.0, noise="filter_normalized", gamma=GAMMA, frozen=frozen)

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _flat_lora_step(model: nn.Module, loss: Loss) -> Callable[[], None]:
    """Flat-LoRA's procedure (arXiv 2409.14396), as its trainer has it: noise of the merged weights' filters is added to
    the base of each adapted layer in place, drawn again from its seed and subtracted after the backward pass, in the
    weights' dtype."""
    optimizer = torch.optim.SGD(_adapters(model), lr=1e-3)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Adapted)]
    generator, number = torch.Generator(layers[0].base.weight.device), iter(range(2**62))

    @torch.no_grad()
    def noise(layer: Any, seed: int, norms: Tensor) -> Tensor:
        normal = torch.empty_like(layer.base.weight).normal_(generator=generator.manual_seed(seed))
        return normal.mul_(norms)

    @torch.no_grad()
    def perturb() -> list[tuple[Any, int, Tensor]]:
        drawn = []
        for layer in layers:
            merged = layer.base.weight + layer.up.weight @ layer.down.weight
            norms = merged.norm(dim=1, keepdim=True) * (GAMMA / merged.shape[1] ** 0.5)
            drawn.append((layer, next(number), norms))
            layer.base.weight.data.add_(noise(*drawn[-1]))
        return drawn

    def step() -> None:
        drawn = perturb()
        loss(model).backward()
        for layer, seed, norms in drawn:
            layer.base.weight.data.sub_(noise(layer, seed, norms))
        optimizer.step()
        optimizer.zero_grad()

    return step
