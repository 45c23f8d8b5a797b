"""What noise on a frozen base costs under LoRA: drawn where needed, by a copy, and as Flat-LoRA's trainer has it."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rwp.analysis.pieces import round_done
from hf_rwp.analysis.timing import peak_bytes, timed
from hf_rwp.core.optimizer import RWP

WIDTH, LAYERS, RANK = 1024, 6, 8
TOKENS, LENGTH = 2048, 512  # of a step, and of one of its sequences
GAMMA = 0.05  # relative to the weights' rms, as Flat-LoRA's
LLAMA = {  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
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


def llama(tokens: int = TOKENS, **shape: Any) -> tuple[nn.Module, Loss]:
    """A Llama of SmolLM2-135M's shape whose linear layers, its head aside, are adapted; and the loss of a step.

    shape: what else its configuration has. Needs transformers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **shape})).requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in [*block.named_children()]:
                if isinstance(linear, nn.Linear):
                    setattr(block, name, Adapted(linear, RANK))
    ids = torch.randint(model.config.vocab_size, (max(tokens // LENGTH, 1), min(tokens, LENGTH)))

    def loss(model: nn.Module) -> Tensor:
        own = ids.to(next(model.parameters()).device)
        return model(input_ids=own, labels=own).loss  # type: ignore[no-any-return]

    return model, loss


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Loss]], int, Sequence[str]]] = {  # rounds to one of the benchmark
    "frozen": (linear_layers, 4, KINDS),  # they are short, and its kinds are close together
    "llama": (llama, 1, ("plain", "drawn", "flat_lora")),
}


def frozen_costs(
    model: nn.Module,
    loss: Loss,
    rounds: int,
    kinds: Sequence[str] = KINDS,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of a step whose gradient is perturbed, and the most bytes that it takes beyond the weights, by kind.

    `plain` has no noise on the base. Every round takes each kind once; the first two are not counted. tell: is called
    after each.
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
    for index in range(rounds + 2):
        for kind, step in steps.items():
            taken = timed(step, device)
            if index >= 2:  # writes are looked for in the first
                seconds[kind].append(taken)
        tell()
    del steps
    return {
        "seconds": seconds,
        "peak_bytes": {kind: peak_bytes(makers[kind](copy.deepcopy(model), loss), device) for kind in kinds},
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "layer_bytes": max(weight.nbytes for weight in model.parameters() if not weight.requires_grad),
    }


def run_frozen(name: str, _: int, ranks: int, args: Any, folder: str) -> None:
    """Write `frozen_costs` of one of MODELS to the folder, measured with the threads of a single process.

    args: of the benchmark.
    """
    torch.set_num_threads(args.threads * args.ranks // ranks)
    torch.manual_seed(0)
    build, times, kinds = MODELS[name]
    model, loss = build()
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
    found = frozen_costs(model, loss, times * args.rounds, kinds, partial(round_done, folder))
    Path(folder, "0").write_text(json.dumps(found))


def rounds_of(name: str, rounds: int) -> int:
    """How many rounds `run_frozen` tells of, by those of the benchmark."""
    return MODELS[name][1] * rounds + 2


def frozen_ratios(found: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """By kind: a step's time over plain LoRA's in every round, and its memory, the weights included, over plain's."""
    weights, plain = found["weights_bytes"], found["seconds"]["plain"]
    ratios = {}
    for kind in [kind for kind in found["seconds"] if kind != "plain"]:
        times = [taken / base for taken, base in zip(found["seconds"][kind], plain, strict=True)]
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
