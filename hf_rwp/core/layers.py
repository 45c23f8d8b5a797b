"""Noise on frozen weights without a copy of them: drawn where something computes with a weight, and again in backward.

1. In the passes of a perturbed micro-step a `Noisy` stands in its modules for each such weight. It holds no values.
2. A torch function that is given one runs with the weight plus its noise, drawn for this call and dropped after it.
3. What autograd would keep of that for the backward pass is kept as the stand-in, and drawn again: the same bits.

The weight itself is never written to, so that there is nothing to restore, whatever raises. One weight is noisy at a
time. The noise is the one that `Perturbation` would have added to the weight, bit for bit.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.hooks import with_tensors
from hf_rwp.core.quantized import Quantized, quantized_layers
from hf_rwp.core.sharding import block_like

_autograd: Any = torch._C._autograd

# Methods that say something about a tensor whatever its values are.
_FACTS = {"size", "dim", "ndimension", "stride", "storage_offset", "numel", "nelement", "element_size", "__len__"}
_FACTS |= {"get_device", "is_contiguous", "is_floating_point", "is_complex", "is_pinned", "is_shared", "is_inference"}
_FACTS |= {"is_conj", "is_neg", "is_signed", "has_names", "__set__"}
# Methods and attributes that often give a view: it is drawn only once something computes with it.
_VIEWS = {"data", "detach", "T", "mT", "H", "mH", "t", "transpose", "permute", "swapaxes", "movedim", "view", "view_as"}
_VIEWS |= {"reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "narrow", "select", "__getitem__", "to"}
_VIEWS |= {"contiguous", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad_"}


class Noisy(Tensor):
    """In place of a frozen weight, or of a view of it: torch functions take its clean values plus its noise.

    What reaches its memory by another way finds NaN there, and never the clean values without a word. clean: what it
    stands for. draw: gives the noisy values, in memory of their own. label: its name. writes: takes that where
    something wrote into it, which is lost.
    """

    _is_param = True  # for isinstance(..., nn.Parameter)
    clean: Tensor
    draw: Callable[[], Tensor]
    label: str
    writes: list[str]

    @staticmethod
    def of(clean: Tensor, draw: Callable[[], Tensor], label: str, writes: list[str]) -> "Noisy":
        values = torch.full((), torch.nan, dtype=clean.dtype, device=clean.device).expand(clean.shape)
        noisy: Noisy = Tensor._make_subclass(Noisy, values)
        noisy.clean, noisy.draw, noisy.label, noisy.writes = clean, draw, label, writes
        return noisy

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, cls) and (name in _FACTS or name == "__get__" or name in _VIEWS):
            shown = function(first.clean, *args[1:], **kwargs)
            if not isinstance(shown, Tensor):
                return shown
            if shown is first.clean:
                return first
            if _share_memory(shown, first.clean):
                rest, draw = args[1:], first.draw
                return cls.of(shown.detach(), lambda: function(draw(), *rest, **kwargs), first.label, first.writes)
        elif isinstance(first, cls) and name == "data_ptr":
            raise NotImplementedError(
                f"something reads the memory of {first.label} directly, as a kernel of its own (Triton) does, where "
                'noise is drawn for torch functions only: give RWP frozen="copy"'
            )
        drawn: list[tuple[Noisy, Tensor]] = []

        def real(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, cls):
                return tensor
            known = next((values for noisy, values in drawn if noisy is tensor), None)
            if known is None:
                drawn.append((tensor, known := tensor.draw()))
            return known

        args, kwargs = with_tensors(tuple(args), real), with_tensors(kwargs, real)
        versions, pack = [values._version for _, values in drawn], _Pack(drawn)
        try:  # not `with`: an interrupt between these and the calls would leave the hooks behind
            _autograd._push_saved_tensors_default_hooks(pack, _unpacked)
            return function(*args, **kwargs)
        finally:
            _autograd._pop_saved_tensors_default_hooks()
            for (noisy, values), version in zip(drawn, versions, strict=True):
                if values._version != version and noisy.label not in noisy.writes:
                    noisy.writes.append(noisy.label)
            drawn.clear()  # autograd keeps the hook

    def __deepcopy__(self, memo: Any) -> Any:
        return deepcopy(self.clean, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clean.__reduce_ex__(protocol)


class _Recipe(NamedTuple):
    """What autograd keeps of noisy values: how to draw them again. version: of the clean ones."""

    noisy: Noisy
    version: int
    size: Sequence[int]
    stride: Sequence[int]
    offset: Any


class _Passed(NamedTuple):
    """What autograd keeps of another tensor. unpack: of the hooks around, activation checkpointing's say."""

    kept: Any
    version: int
    unpack: Callable[[Any], Tensor] | None


class _Pack:
    """Autograd's hook for what a function saves. drawn: stand-ins, and the values drawn for them."""

    def __init__(self, drawn: list[tuple[Noisy, Tensor]]) -> None:
        self.drawn = drawn
        self._around: Any = _autograd._top_saved_tensors_default_hooks(False)  # or they would not be called

    def __call__(self, tensor: Tensor) -> _Recipe | _Passed:
        for noisy, values in self.drawn:
            if tensor.dtype == values.dtype and _share_memory(tensor, values):
                version = noisy.clean._version
                return _Recipe(noisy, version, tensor.size(), tensor.stride(), tensor.storage_offset())
        if self._around is None:
            return _Passed(tensor, tensor._version, None)
        pack, unpack = self._around
        return _Passed(pack(tensor), 0, unpack)


def _unpacked(packed: _Recipe | _Passed) -> Tensor:
    if isinstance(packed, _Passed):
        if packed.unpack is not None:
            return packed.unpack(packed.kept)
        if packed.kept._version != packed.version:
            raise RuntimeError(_CHANGED % f"a tensor of shape {tuple(packed.kept.shape)}")
        return packed.kept  # type: ignore[no-any-return]
    noisy, version, size, stride, offset = packed
    if noisy.clean._version != version:
        raise RuntimeError(_CHANGED % noisy.label)
    values = noisy.draw()
    if (values.size(), values.stride(), values.storage_offset()) == (size, stride, offset):
        return values
    return values.as_strided(size, stride, offset)


_CHANGED = (
    "%s is needed by the backward pass, and was changed in place after its forward pass: take the backward pass ahead "
    "of the change, or change a copy"
)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    here, there = one.untyped_storage(), other.untyped_storage()
    return here.data_ptr() == there.data_ptr() and here.nbytes() > 0


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
        self._besides: list[int] = []
        self._rest: list[int] = []
        self._others: list[Target] = []
        self._places: list[tuple[nn.Module, str, Tensor, Noisy]] = []  # and the weight that a stand-in stands for
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
            self._homes = _homes(self._model, targets)
            self._besides = [index for index, target in enumerate(targets) if id(target.weight) in self._quantized]
            self._rest = [i for i in range(len(targets)) if i not in self._homes and i not in set(self._besides)]
            self._others = [targets[index] for index in self._rest]
            self._given = targets
        places: list[tuple[nn.Module, str, Tensor, Noisy]] = []
        for index, homes in self._homes.items():
            target = targets[index]
            draw = _drawer(target, factors[index], seeds[index])
            noisy = Noisy.of(target.weight.detach(), draw, target.name, self._writes)
            places += [(module, name, target.weight, noisy) for module, name in homes]
        self._places = places
        self._beside = [(self._quantized[id(targets[i].weight)], factors[i], seeds[i]) for i in self._besides]
        rest = self._rest
        kept = None if dampings is None else [dampings[index] for index in rest]  # what is frozen has no gradients
        return self._others, [factors[index] for index in rest], [seeds[index] for index in rest], kept

    def show(self) -> None:
        """Put the stand-ins in their places, where there is a noise."""
        for module, name, weight, noisy in self._places:
            if module._parameters.get(name) is weight:
                module._parameters[name] = noisy  # type: ignore[assignment]
        if not self._handles:
            for layer, factor, seed in self._beside:
                self._handles.append(layer.beside(partial(self._eps, layer, factor, seed)))

    def hide(self) -> None:
        """Put the weights back in their places. A backward pass needs no stand-ins, except for what it recomputes."""
        for module, name, weight, noisy in self._places:
            held: Any = module._parameters.get(name)
            if held is noisy:
                module._parameters[name] = weight  # type: ignore[assignment]
        while self._handles:
            self._handles.pop().remove()

    def end(self) -> list[str]:
        """End the noise; the names of the weights that something wrote into, which is lost."""
        self.hide()
        self._places, self._beside, writes, self._writes = [], [], self._writes, []
        return writes

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The noisy and the clean values of a weight; None where no noise is drawn for it."""
        for _, _, own, noisy in self._places:
            if own is weight:
                return noisy.draw(), weight.detach()
        for layer, factor, seed in self._beside:
            if layer.weight is weight:
                clean = layer.dequantized()
                return layer.drawer(factor, seed, clean.dtype)() + clean, clean
        return None

    def _eps(self, layer: Quantized, factor: float, seed: int, dtype: torch.dtype) -> Noisy:
        zeros = torch.zeros((), dtype=dtype).expand(layer.weight.shape)
        return Noisy.of(zeros, layer.drawer(factor, seed, dtype), layer.name, self._writes)


def _drawer(target: Target, factor: float, seed: int) -> Callable[[], Tensor]:
    @torch.no_grad()
    def draw() -> Tensor:
        values = torch.empty_like(target.local, requires_grad=False).copy_(target.local)
        own = target._replace(local=values, block=block_like(target.block, values))
        Draws().add_([own], [factor], [seed])  # one that is kept would keep the values
        return values

    return draw


def _keep_from_compilation() -> None:
    """Let torch.compile take a stand-in as it is, in eager mode."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo.config, "nontraceable_tensor_subclasses"):
        dynamo.config.nontraceable_tensor_subclasses.add(Noisy)


def _homes(model: nn.Module, targets: Sequence[Target]) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the index of each target whose noise can be drawn where it is read: the modules that hold it, its name there.

    It must be a frozen weight, whole, of an ordinary kind and of two or more dimensions (others are small, and many),
    that a stand-in can be put in place of wherever it is read.
    """
    indices = {id(target.weight): index for index, target in enumerate(targets) if _is_ordinary(target)}
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


def _is_ordinary(target: Target) -> bool:
    weight = target.weight
    plain = type(weight) is nn.Parameter and target.local is weight and weight.layout == torch.strided
    return plain and not weight.requires_grad and weight.ndim > 1 and weight.is_floating_point()


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, set)) else (value,)
