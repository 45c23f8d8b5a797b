"""What noise on a frozen base costs under LoRA: drawn where needed, by a copy, and as Flat-LoRA's trainer has it."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rwp.analysis.timing import peak_bytes, timed
from hf_rwp.core.optimizer import RWP

WIDTH, LAYERS, RANK = 1024, 6, 8
TOKENS = 2048  # of a step: those of a batch of sequences
GAMMA = 0.05  # relative to the weights' rms, as Flat-LoRA's


class Adapted(nn.Module):
    """A frozen linear layer and a product of two small trainable ones."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return nn.functional.silu(y)


def frozen_costs(device: torch.device, rounds: int, tokens: int = TOKENS, width: int = WIDTH) -> dict[str, Any]:
    """Seconds of a step whose gradient is perturbed, and the most bytes that it takes beyond the weights, by kind.

    `plain` has no noise on the base. Every round takes each kind once; a first round is not counted.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = nn.Sequential(*[Adapted(width, RANK) for _ in range(LAYERS)]).to(device, dtype)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    kinds: dict[str, Callable[..., Callable[[], None]]] = {
        "plain": partial(_rwp_step, frozen=False),
        "drawn": partial(_rwp_step, frozen=True),
        "copy": partial(_rwp_step, frozen="copy"),
        "flat_lora": _flat_lora_step,
    }
    steps = {kind: make(copy.deepcopy(model), x) for kind, make in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(rounds + 2):
        for kind, step in steps.items():
            taken = timed(step, device)
            if index >= 2:  # writes are looked for in the first
                seconds[kind].append(taken)
    return {
        "seconds": seconds,
        "peak_bytes": {kind: peak_bytes(make(copy.deepcopy(model), x), device) for kind, make in kinds.items()},
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "layer_bytes": width * width * dtype.itemsize,
        "tokens": tokens,
    }


def run_frozen(_: int, ranks: int, args: Any, folder: str) -> None:
    """Write `frozen_costs` to the folder, measured with the threads of a single process. args: of the benchmark.

    Four of its rounds to one of the benchmark's: they are short, and its kinds are close together.
    """
    torch.set_num_threads(args.threads * args.ranks // ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Path(folder, "0").write_text(json.dumps(frozen_costs(device, 4 * args.rounds)))


def frozen_ratios(found: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """By kind: a step's time over plain LoRA's in every round, and its memory, the weights included, over plain's."""
    weights, plain = found["weights_bytes"], found["seconds"]["plain"]
    ratios = {}
    for kind in ("drawn", "copy", "flat_lora"):
        times = [taken / base for taken, base in zip(found["seconds"][kind], plain, strict=True)]
        memory = (weights + found["peak_bytes"][kind]) / (weights + found["peak_bytes"]["plain"])
        ratios[kind] = times, [memory] * 2
    return ratios


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _rwp_step(model: nn.Module, x: Tensor, frozen: bool | str) -> Callable[[], None]:
    base = torch.optim.SGD(_adapters(model), lr=1e-3)
    optimizer = RWP(base, model, alpha=1.0, noise="filter_normalized", gamma=GAMMA, frozen=frozen)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _flat_lora_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Flat-LoRA's procedure (arXiv 2409.14396), as its trainer has it: noise of the merged weights' filters is added to
    the base in place, drawn again from its seed and subtracted after the backward pass, in the weights' dtype."""
    optimizer = torch.optim.SGD(_adapters(model), lr=1e-3)
    layers: Any = model
    generator, number = torch.Generator(x.device), iter(range(2**62))

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
        model(x).square().mean().backward()
        for layer, seed, norms in drawn:
            layer.base.weight.data.sub_(noise(layer, seed, norms))
        optimizer.step()
        optimizer.zero_grad()

    return step
