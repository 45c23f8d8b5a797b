"""Noise on frozen weights without a copy of them: drawn where something computes with a weight, and again in backward.

In the passes of a perturbed micro-step a `Noisy` stands in its modules for each such weight. It holds no values. The
weight itself is never written to, so that there is nothing to restore, whatever raises. One weight is noisy at a time.
The noise is the one that `Perturbation` would have added to the weight, bit for bit. Of a weight that FSDP2 shards the
stand-in takes the place of the whole one, from each gather to the end of its use.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.noisy import Noisy
from hf_rwp.core.quantized import Quantized, quantized_layers
from hf_rwp.core.sharding import (
    after_each_put,
    block_of,
    gathered_as_held,
    gatherers,
    whole_of_gathered,
)


class Gathered:
    """A frozen weight that FSDP2 shards, with a noise that is drawn for the whole of it wherever that is gathered.

    held: FSDP2's own of it. target, factor, seed: of its shards. homes: the modules that it is put in, its name there.
    """

    def __init__(
        self,
        held: Any,
        target: Target,
        factor: float,
        seed: int,
        homes: Sequence[tuple[nn.Module, str]],
        writes: list[str],
    ) -> None:
        self.target, self._held, self._homes, self._writes = target, held, homes, writes
        self._noise = factor, seed
        self._noisy: Noisy | None = None
        self._end: Callable[[], None] | None = None

    def show(self) -> None:
        """Put the stand-in in the whole weight's place, now and whenever it is gathered."""
        if self._end is None:
            self._end = after_each_put(self._held, self._put)
        self._put()

    def hide(self) -> None:
        """Put the whole weight back, where it is gathered."""
        if self._end is not None:
            self._end()
            self._end = None
        for module, name in self._homes:
            shown: Any = module._parameters.get(name)
            if shown is not None and shown is self._noisy:
                module._parameters[name] = whole_of_gathered(self._held)

    def drawn(self) -> Tensor:
        """The noisy values of the shards."""
        return _drawer(self.target, *self._noise)()

    def _put(self) -> None:
        weight = whole_of_gathered(self._held)
        for module, name in self._homes:
            if weight is not None and module._parameters.get(name) is weight:
                if self._noisy is None:
                    own = weight.detach()
                    whole = self.target._replace(weight=weight, local=own, block=block_of(own))
                    self._noisy = Noisy.of(own, _drawer(whole, *self._noise), self.target.name, self._writes)
                module._parameters[name] = self._noisy  # type: ignore[assignment]


class Layers:
    """The frozen weights of a model whose noise is drawn where it is needed; at most one noise at a time.

    model: None for one in which all noise is added to the weights. Linear layers whose stored weights cannot take any
    (`quantized`) get it beside.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._quantized = {} if model is None else {id(layer.weight): layer for layer in quantized_layers(model)}
        self._given: Sequence[Target] = ()  # and who holds each that this takes, by its index there; and the others
        self._homes: dict[int, list[tuple[nn.Module, str]]] = {}
        self._held: Mapping[int, Any] = {}
        self._besides: list[int] = []
        self._rest: list[int] = []
        self._others: list[Target] = []
        self._places: list[tuple[nn.Module, str, Tensor, Noisy]] = []  # and the weight that a stand-in stands for
        self._gathered: list[Gathered] = []
        self._beside: list[tuple[Quantized, float, int]] = []  # whose noise has this factor and seed
        self._handles: list[RemovableHandle] = []
        self._writes: list[str] = []

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of a model, with one of the right shape for all that a quantized layer has in place of its weight."""
        ours = {layer.name: layer.weight for layer in self._quantized.values()}
        left = dict(ours)
        for name, parameter in model.named_parameters():
            layer, _, own = name.rpartition(".")
            if layer not in ours or own == "bias":
                yield name, parameter
            elif layer in left:
                yield name, left.pop(layer)
        yield from left.items()

    def take(
        self,
        targets: Sequence[Target],
        factors: Sequence[float],
        seeds: Sequence[int],
        dampings: Sequence[Tensor | None] | None,
    ) -> tuple[Sequence[Target], Sequence[float], Sequence[int], Sequence[Tensor | None] | None]:
        """Begin a noise, which `show` shows, of the weights that this works for; the arguments of all others."""
        if self._model is None:
            return targets, factors, seeds, dampings
        if targets is not self._given:
            _keep_from_compilation()
            self._held = gathered_as_held(gatherers(self._model))
            self._homes = _homes(self._model, targets, self._held)
            self._besides = [index for index, target in enumerate(targets) if id(target.weight) in self._quantized]
            self._rest = [i for i in range(len(targets)) if i not in self._homes and i not in set(self._besides)]
            self._others = [targets[index] for index in self._rest]
            self._given = targets
        places: list[tuple[nn.Module, str, Tensor, Noisy]] = []
        gathered = []
        for index, homes in self._homes.items():
            target, own = targets[index], (factors[index], seeds[index])
            if id(target.weight) in self._held:
                gathered.append(Gathered(self._held[id(target.weight)], target, *own, homes, self._writes))
                continue
            draw = _drawer(target, *own)
            noisy = Noisy.of(target.weight.detach(), draw, target.name, self._writes)
            places += [(module, name, target.weight, noisy) for module, name in homes]
        self._places, self._gathered = places, gathered
        self._beside = [(self._quantized[id(targets[i].weight)], factors[i], seeds[i]) for i in self._besides]
        rest = self._rest
        kept = None if dampings is None else [dampings[index] for index in rest]  # what is frozen has no gradients
        return self._others, [factors[index] for index in rest], [seeds[index] for index in rest], kept

    def show(self) -> None:
        """Put the stand-ins in their places, where there is a noise."""
        for module, name, weight, noisy in self._places:
            if module._parameters.get(name) is weight:
                module._parameters[name] = noisy  # type: ignore[assignment]
        for weight_of_shards in self._gathered:
            weight_of_shards.show()
        if not self._handles:
            for layer, factor, seed in self._beside:
                self._handles.append(layer.beside(partial(self._eps, layer, factor, seed)))

    def hide(self) -> None:
        """Put the weights back in their places. A backward pass needs no stand-ins, except for what it recomputes."""
        for module, name, weight, noisy in self._places:
            held: Any = module._parameters.get(name)
            if held is noisy:
                module._parameters[name] = weight  # type: ignore[assignment]
        for weight_of_shards in self._gathered:
            weight_of_shards.hide()
        while self._handles:
            self._handles.pop().remove()

    def end(self) -> list[str]:
        """End the noise; the names of the weights that something wrote into, which is lost."""
        self.hide()
        self._places, self._gathered, self._beside, writes, self._writes = [], [], [], self._writes, []
        return writes

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The noisy and the clean values of a weight, or of a process's shard; None where no noise is drawn for it."""
        for _, _, own, noisy in self._places:
            if own is weight:
                return noisy.draw(), weight.detach()
        for gathered in self._gathered:
            if gathered.target.local is weight:
                return gathered.drawn(), weight.detach()
        for layer, factor, seed in self._beside:
            if layer.weight is weight:
                clean = layer.dequantized()
                return layer.drawer(factor, seed, clean.dtype)() + clean, clean
        return None

    def _eps(self, layer: Quantized, factor: float, seed: int, dtype: torch.dtype) -> Noisy:
        zeros = torch.zeros((), dtype=dtype).expand(layer.weight.shape)
        return Noisy.of(zeros, layer.drawer(factor, seed, dtype), layer.name, self._writes)


def _drawer(target: Target, factor: float, seed: int) -> Callable[[], Tensor]:
    std: Tensor | None = None  # from the first draw on: it is of the clean weight

    def draw() -> Tensor:
        nonlocal std
        values, std = Draws().drawn(target, factor, seed, std)
        return values

    return draw


def _keep_from_compilation() -> None:
    """Let torch.compile take a stand-in as it is, in eager mode."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo.config, "nontraceable_tensor_subclasses"):
        dynamo.config.nontraceable_tensor_subclasses.add(Noisy)


def _homes(
    model: nn.Module, targets: Sequence[Target], held: Mapping[int, Any]
) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the index of each target whose noise can be drawn where it is read: the modules that hold it, its name there.

    It must be a frozen weight of an ordinary kind, whole or one that FSDP2 gathers (`held`), and of two or more
    dimensions (others are small, and many), that a stand-in can be put in place of wherever it is read.
    """
    indices = {id(target.weight): index for index, target in enumerate(targets) if _is_ordinary(target, held)}
    homes: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    elsewhere: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            elsewhere |= {id(parameter) for parameter in module.parameters()}
            continue
        for name, parameter in module._parameters.items():
            if id(parameter) in indices:
                homes[indices[id(parameter)]].append((module, name))
        for name, value in vars(module).items():  # such as the flat weights of an LSTM
            if name not in ("_parameters", "_modules", "_buffers"):
                elsewhere |= {id(held) for held in _within(value)}
    return {index: homes[index] for key, index in indices.items() if key not in elsewhere and index in homes}


def _is_ordinary(target: Target, held: Mapping[int, Any]) -> bool:
    weight, local = target.weight, target.local
    plain = type(weight) is nn.Parameter and local is weight and local.layout == torch.strided
    plain = plain or (id(weight) in held and type(local) is Tensor)
    return plain and not weight.requires_grad and weight.ndim > 1 and weight.is_floating_point()


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, set)) else (value,)
