"""What stands in place of a frozen weight: torch functions that are given it take the weight plus its noise.

1. A torch function that is given a `Noisy` runs with the weight plus its noise, drawn for this call, dropped after it.
2. What autograd would keep of that for the backward pass is kept as the stand-in, and drawn again: the same bits.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_rwp.core.hooks import with_tensors

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
