"""Noise on frozen weights without a copy of them: drawn where something computes with a weight, and again in backward.

1. In the passes of a perturbed micro-step a `Noisy` stands in its modules for each such weight. It holds no values.
2. A torch function that is given one runs with the weight plus its noise, drawn for this call and dropped after it.
3. What autograd would keep of that for the backward pass is kept as the stand-in, and drawn again: the same bits.

The weight itself is never written to, so that nothing has to be restored, whatever raises. Noise is in the memory of one
weight at a time. It is the noise that `Perturbation` would have added, bit for bit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.hooks import with_tensors

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
    stands for. draw: gives the noisy values, in memory of their own. writes: takes the name of a weight that something
    wrote into, which is lost.
    """

    _is_param = True  # isinstance(..., nn.Parameter) asks for it
    clean: Tensor
    draw: Callable[[], Tensor]
    name: str
    writes: list[str]

    @staticmethod
    def of(clean: Tensor, draw: Callable[[], Tensor], name: str, writes: list[str]) -> "Noisy":
        values = torch.full((), torch.nan, dtype=clean.dtype, device=clean.device).expand(clean.shape)
        noisy: Noisy = Tensor._make_subclass(Noisy, values)
        noisy.clean, noisy.draw, noisy.name, noisy.writes = clean, draw, name, writes
        return noisy

    @classmethod
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
                return cls.of(shown.detach(), lambda: function(draw(), *rest, **kwargs), first.name, first.writes)
        elif name == "data_ptr":
            raise NotImplementedError(
                f"something reads the memory of {first.name} directly, as a kernel of its own (Triton) does, where "
                'noise is drawn for torch functions only: give RWP frozen="copy"'
            )
        drawn: dict[int, tuple[Noisy, Tensor]] = {}

        def real(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, cls):
                return tensor
            if id(tensor) not in drawn:
                drawn[id(tensor)] = tensor, tensor.draw()
            return drawn[id(tensor)][1]

        args, kwargs = with_tensors(tuple(args), real), with_tensors(kwargs, real)
        versions = [values._version for _, values in drawn.values()]
        with _kept_as_recipes(list(drawn.values())):
            result = function(*args, **kwargs)
        for (noisy, values), version in zip(drawn.values(), versions, strict=True):
            if values._version != version and noisy.name not in noisy.writes:
                noisy.writes.append(noisy.name)
        return result

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
    offset: int


class _Passed(NamedTuple):
    """What autograd keeps of another tensor. unpack: of the hooks around, activation checkpointing's say."""

    kept: Any
    version: int
    unpack: Callable[[Any], Tensor] | None


def _kept_as_recipes(drawn: Sequence[tuple[Noisy, Tensor]]) -> saved_tensors_hooks:
    """A context in which autograd keeps none of the noisy values. drawn: stand-ins, and the values drawn for them."""
    around: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)  # of which only the innermost are called

    def pack(tensor: Tensor) -> _Recipe | _Passed:
        for noisy, values in drawn:
            if tensor.dtype == values.dtype and _share_memory(tensor, values):
                version = noisy.clean._version
                return _Recipe(noisy, version, tensor.size(), tensor.stride(), tensor.storage_offset())
        if around is None:
            return _Passed(tensor, tensor._version, None)
        return _Passed(around[0](tensor), 0, around[1])

    return saved_tensors_hooks(pack, _unpacked)


@torch.no_grad()
def _unpacked(packed: _Recipe | _Passed) -> Tensor:
    if isinstance(packed, _Passed):
        if packed.unpack is not None:
            with torch.enable_grad():  # a checkpoint computes anew
                return packed.unpack(packed.kept)
        if packed.kept._version != packed.version:
            raise RuntimeError(_CHANGED % f"a tensor of shape {tuple(packed.kept.shape)}")
        return packed.kept  # type: ignore[no-any-return]
    noisy, version, size, stride, offset = packed
    if noisy.clean._version != version:
        raise RuntimeError(_CHANGED % noisy.name)
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
    """The frozen weights of a model whose noise is drawn where it is needed; at most one noise at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._draws = model, Draws()
        self._homes: list[list[tuple[nn.Module, str]]] = []  # of the latest targets: who holds each, and its name there
        self._shown: list[tuple[nn.Module, str, Tensor, Noisy]] = []  # and the weight that a stand-in stands for
        self._writes: list[str] = []

    def split(self, targets: Sequence[Target]) -> tuple[list[int], list[int]]:
        """Indices of the targets that this works for, and of the others, which need a copy."""
        homes = _homes(self._model, targets)
        self._homes = list(homes.values())
        return list(homes), [index for index in range(len(targets)) if index not in homes]

    def add(self, targets: Sequence[Target], factors: Sequence[float], seeds: Sequence[int]) -> None:
        """Begin a noise, and show it. targets: those that `split` took last."""
        self.end()
        shown: list[tuple[nn.Module, str, Tensor, Noisy]] = []
        for homes, target, factor, seed in zip(self._homes, targets, factors, seeds, strict=True):
            noisy = Noisy.of(target.weight.detach(), self._drawer(target, factor, seed), target.name, self._writes)
            shown += [(module, name, target.weight, noisy) for module, name in homes]
        self._shown = shown
        self.show()

    def show(self) -> None:
        """Put the stand-ins in their places, where there is a noise."""
        for module, name, weight, noisy in self._shown:
            if module._parameters.get(name) is weight:
                module._parameters[name] = noisy  # type: ignore[assignment]

    def hide(self) -> None:
        """Put the weights back in their places, which a backward pass needs not."""
        for module, name, weight, noisy in self._shown:
            if module._parameters.get(name) is noisy:
                module._parameters[name] = weight  # type: ignore[assignment]

    def end(self) -> list[str]:
        """End the noise; the names of the weights that something wrote into, which is lost."""
        self.hide()
        self._shown, writes, self._writes = [], self._writes, []
        return writes

    def noisy(self, weight: Tensor) -> Tensor | None:
        """The noisy values of a weight, in memory of their own; None for another one."""
        found = next((noisy for _, _, own, noisy in self._shown if own is weight), None)
        return None if found is None else found.draw()

    def _drawer(self, target: Target, factor: float, seed: int) -> Callable[[], Tensor]:
        stds: list[Tensor] = []

        @torch.no_grad()
        def draw() -> Tensor:
            if not stds:
                stds.append(self._draws.std(target, factor))
            return self._draws.noisy(target, stds[0], seed, target.local)

        return draw


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
