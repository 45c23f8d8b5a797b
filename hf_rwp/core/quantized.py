"""Noise for linear layers whose stored weight cannot take any: `x @ eps^T` beside what they compute.

    layer(x) + x @ eps^T = x @ (W + eps)^T + bias        W: what the stored numbers stand for

The noise is relative to the norms of W's filters. Whatever its format, a linear layer says what W is: it is given the
columns of the identity, some at a time, once, for it is frozen. So 4 and 8 bits of bitsandbytes, torchao's weights and
layers that keep packed integers in buffers (GPTQ, AWQ, HQQ) are one case. What turns out not to be linear is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from hf_rwp.core.noise import Source, add_noise_
from hf_rwp.core.sharding import block_of, is_sharded

_COLUMNS = 256  # of the identity at a time
_TOLERANCE = 0.1  # of the linearity that is measured; 8-bit layers round what they are given, too


class Quantized:
    """A linear layer with a stored weight of another kind. weight: stands for W in lists of weights; it holds zeros.

    Raises NotImplementedError, when it is first asked for W, for one that is not linear.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        values = torch.zeros(()).expand(module.out_features, module.in_features)
        self.weight = nn.Parameter(values, requires_grad=False)
        self._norms: Tensor | None = None

    def drawer(self, factor: float, seed: int, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What draws eps, (out, in), in memory of its own."""

        @torch.no_grad()
        def draw() -> Tensor:
            norms = self._filter_norms()
            values = torch.zeros(self.weight.shape, dtype=dtype, device=norms.device)
            add_noise_(block_of(values), norms * factor, seed, Source(values))
            return values

        return draw

    def beside(self, eps: Callable[[torch.dtype], Tensor]) -> RemovableHandle:
        """Let the layer add x @ eps^T until the handle is removed. eps: of a dtype.

        NotImplementedError: the layer's stored weight is sharded, so that no process can say what it stands for.
        """
        if any(is_sharded(parameter) for parameter in self.module.parameters(recurse=False)):
            raise NotImplementedError(
                f"{self.name}, a {type(self.module).__name__}, is quantized and sharded (FSDP2), and noise goes beside "
                "quantized layers that are whole: leave it out of sharding, load the base unquantized (bfloat16), or "
                "leave frozen=False to perturb the others"
            )

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            return output + linear(x, eps(x.dtype)).to(output.dtype)

        handle: RemovableHandle = self.module.register_forward_hook(add, with_kwargs=True)
        return handle

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """W, (out, in)."""
        return torch.cat([part for _, part in self._columns()], 1)

    @torch.no_grad()
    def _filter_norms(self) -> Tensor:
        """The L2 norm of every filter of W, (out,)."""
        if self._norms is None:
            squares: Any = 0.0
            product: Any = 0.0
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(self.weight.shape[1], generator=generator).to(self._sample())
            for at, part in self._columns():
                squares = squares + part.square().sum(1)
                product = product + part @ x[at : at + part.shape[1]].to(part.dtype)
            found = (self._call(x[None]) - self._call(torch.zeros_like(x[None])))[0].to(product.dtype)
            error = (found - product).norm() / product.norm().clamp(min=torch.finfo(product.dtype).tiny)
            if not error < _TOLERANCE:
                raise NotImplementedError(
                    f"{self.name}, a {type(self.module).__name__}, is not linear (relative error {error:.2g}), so that "
                    "noise on its weight is not a product beside it: leave frozen=False to perturb the others"
                )
            self._norms = squares.sqrt()
        norms: Tensor = self._norms
        return norms

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """W by columns: (the first one's number, (out, some))."""
        sample, width = self._sample(), self.weight.shape[1]
        bias = self._call(torch.zeros(1, width).to(sample))
        for at in range(0, width, _COLUMNS):
            identity = torch.eye(width)[at : at + _COLUMNS].to(sample)
            yield at, (self._call(identity) - bias).T

    def _call(self, x: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = self.module.forward  # no hooks, ours among them
        with torch.autocast(x.device.type, enabled=False):
            output = forward(x)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _sample(self) -> Tensor:
        """A tensor of the device and the dtype that the layer computes on and in."""
        tensors = [*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)]
        floating = [t.dtype for t in tensors if t.is_floating_point() and t.dtype != torch.float8_e4m3fn]
        given = getattr(self.module, "compute_dtype", None)
        dtype = given if isinstance(given, torch.dtype) else floating[0] if floating else torch.float32
        return torch.empty(0, dtype=dtype, device=tensors[0].device)


def quantized_layers(model: nn.Module) -> list[Quantized]:
    """The layers of a model that noise goes beside."""
    return [Quantized(name, module) for name, module in model.named_modules() if _is_quantized(module)]


def refuse_other_quantized(model: nn.Module, beside: bool) -> None:
    """Raise NotImplementedError for a frozen weight that noise can neither be added to nor go beside.

    beside: whether noise may go beside linear layers.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.requires_grad or _takes_noise(parameter) or (beside and _is_quantized(module)):
                continue
            kind = f"of {parameter.dtype}" if not parameter.is_floating_point() else f"a {type(parameter).__name__}"
            raise NotImplementedError(
                f"frozen would perturb {name}, which is {kind} in a {type(module).__name__}: noise is added to "
                "floating-point weights, and with frozen=True beside linear layers of another kind. Load these "
                "weights unquantized (bfloat16), or leave frozen=False to perturb the others"
            )


def _is_quantized(module: nn.Module) -> bool:
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter  # which computes with what it holds
    if not all(isinstance(size, int) for size in sizes) or plain or isinstance(module, nn.Bilinear):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    packed = type(module).__module__.startswith("bitsandbytes.")  # whose integers may be stored as bfloat16, for FSDP
    return (packed or any(not _takes_noise(tensor) for tensor in own)) and not any(
        p.requires_grad for p in module.parameters()
    )


def _takes_noise(tensor: Tensor) -> bool:
    """Whether it is a floating-point tensor of torch's own, or a DTensor of one."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) or is_sharded(tensor)
    return plain and (tensor.is_floating_point() or tensor.is_complex()) and tensor.element_size() > 1
