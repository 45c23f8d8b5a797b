"""The noise of Random Weight Perturbation (RWP), as pure tensor functions.

Notation follows the papers (RWP: arXiv 2211.11489; ARWP: arXiv 2404.00357):

    eps ~ N(0, std^2)      std = gamma * ||filter||_2                            (RWP)
                           std = gamma * ||filter||_2 / sqrt(1 + eta * F)        (ARWP)
                           F   = beta * F + (sum over the filter of g^2)

A *filter* is one slice of a weight along dim 0, after leading dimensions of size 1 are dropped: a convolution
(64, 3, 7, 7) has 64 filters, a ViT's position embedding (1, 197, 384) has 197. A tensor with at most one dimension of
its own is a single filter. Per-filter quantities keep the weight's number of dimensions, with 1 in place of the
dimensions inside a filter, so that they broadcast against the weight.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

MODES = ("filter", "filter_normalized")
DEFAULT_GAMMA = {"filter": 0.01, "filter_normalized": 0.2}
SCHEDULES = ("constant", "linear", "cosine")


def filter_dims(shape: torch.Size) -> tuple[int, ...]:
    """The dimensions of `shape` that lie inside a filter: those a per-filter norm reduces over."""
    leading = _leading_ones(shape)
    return tuple(range(len(shape))) if len(shape) - leading < 2 else tuple(range(leading + 1, len(shape)))


def filter_norms(weight: Tensor) -> Tensor:
    """The L2 norm of every filter of `weight`, in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=filter_dims(weight.shape), keepdim=True, dtype=dtype)
    return norms


def std_factor(shape: torch.Size, gamma: float, mode: str = "filter") -> float:
    """What the norms of a weight's filters are multiplied by for the noise's standard deviation, see `noise_std`."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is no mode of noise: choose one of {', '.join(MODES)}")
    fan_in = math.prod(shape[dim] for dim in filter_dims(shape))
    return gamma / math.sqrt(max(1, fan_in)) if mode == "filter_normalized" else gamma


def noise_std(weight: Tensor, gamma: float, mode: str = "filter", damping: Tensor | None = None) -> Tensor:
    """The noise's standard deviation for every filter of `weight`.

    gamma: >= 0. In mode `filter` relative to the filter's norm: std = gamma * ||filter|| (arXiv 2211.11489). In mode
        `filter_normalized` relative to the root mean square of the filter's weights: std = gamma * ||filter|| /
        sqrt(fan_in), so that ||noise|| is about gamma * ||weight|| however wide the layer.
    damping: ARWP's factor in (0, 1] for every filter, see `arwp_damping`; None is 1.
    """
    std = filter_norms(weight).mul_(std_factor(weight.shape, gamma, mode))
    return std if damping is None else std.mul_(damping)


def arwp_fisher(fisher: Tensor | None, gradient: Tensor, beta: float) -> Tensor:
    """ARWP's F after a step with `gradient`: beta * F + (sum over the filter of g^2), arXiv 2404.00357.

    fisher: F before it, in the shape that `filter_norms` gives; None at the start, as 0. beta: in [0, 1).
    """
    squared = filter_norms(gradient).square_()
    return squared if fisher is None else fisher.mul(beta).add_(squared)


def arwp_damping(fisher: Tensor, eta: float) -> Tensor:
    """ARWP's factor on the noise of every filter: 1 / sqrt(1 + eta * F), in (0, 1]. eta: >= 0."""
    return fisher.mul(eta).add_(1).rsqrt_()


def noise_seed(seed: int, window: int, micro_step: int, replica: int, position: int) -> int:
    """The seed, in [0, 2^64), of one parameter's draw: a hash of where the draw stands (a CPU uses its low 32 bits).

    window: the number of the optimizer step. micro_step: that of the gradient within it. replica: the rank among
    data-parallel replicas. position: the parameter's in `named_parameters()`.
    """
    key = struct.pack("<5q", seed, window, micro_step, replica, position)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def new_scratch(weight: Tensor) -> Tensor:
    """Memory for `add_noise_`, on the weight's device, in float32 or better: a row of numbers, on a CPU one of indices.

    The length of a row bounds how many elements are drawn at a time. On a CPU a small piece is still in the cache when
    it is added to the weights, and torch works on it with one thread, as several pieces at a time may have one each;
    elsewhere a larger one saves kernel launches.
    """
    shape = (2, 2**15) if weight.device.type == "cpu" else (1, 2**22)
    return weight.new_empty(shape, dtype=torch.promote_types(weight.dtype, torch.float32))


def add_noise_(weight: Tensor, std: Tensor, generator: torch.Generator, scratch: Tensor) -> None:
    """Add Gaussian noise to `weight` in place, a bounded piece at a time.

    std: as `noise_std` gives. generator: on the weight's device; the draws follow the order of the elements, not of the
    memory, so that a channels_last weight gets the same noise. scratch: see `new_scratch`; a filter that is longer than
    its rows gets rows of its own for the moment. The sum is rounded once, to the weight's dtype.

    On a CPU large pieces take their noise from 65,536 values, up to 4.4 standard deviations, whose distribution is
    within 2^-16 of the Gaussian one.
    """
    shape = None
    for piece, piece_std in _pieces(weight, std, scratch.shape[1]):
        if piece.shape != shape:  # the first and, if fewer filters are left, the last
            shape = piece.shape
            draw = _standard_normal(shape, generator, scratch)
        if scratch.dtype == piece.dtype:
            piece.addcmul_(draw(), piece_std)
        else:
            piece.copy_(draw().mul_(piece_std).add_(piece))


def _standard_normal(shape: torch.Size, generator: torch.Generator, scratch: Tensor) -> Callable[[], Tensor]:
    """A function that fills one tensor of `shape` from N(0, 1) at each call, in `scratch` if its rows are long enough.

    On a CPU most of normal_'s time is the generator's, which is asked for 32 random bits a number. Here it is asked for
    16, which choose among as many levels. That it takes few calls matters too: threads that draw take turns at Python's
    lock. Fewer than 2^13 numbers are not worth even these.
    """
    count = shape.numel()
    words = -(-count // 4)  # of 64 bits
    if 4 * words > scratch.shape[1]:
        scratch = scratch.new_empty(len(scratch), 4 * words)
    numbers = scratch[0, :count]
    normal = numbers.view(shape)
    if scratch.device.type != "cpu" or count < 2**13:
        return functools.partial(normal.normal_, generator=generator)
    levels = torch.from_numpy(_normal_levels(scratch.dtype))
    bits = scratch[0].view(torch.int64)[:words]  # where the numbers will be: they become indices first
    chosen = bits.view(torch.uint16)[:count]
    indices = scratch[1].view(torch.int32)[:count]

    def draw() -> Tensor:
        bits.random_(-(2**63), None, generator=generator)
        torch.index_select(levels, 0, indices.copy_(chosen), out=numbers)
        return normal

    return draw


@functools.cache
def _normal_levels(dtype: torch.dtype) -> np.ndarray:
    """The means of 2^16 equally likely parts of N(0, 1), in order: to 4.39, variance 0.9999985, kurtosis 2.9998.

    Not a tensor, since one that is made under a mode such as FakeTensorMode would stay for good.
    """
    edges = torch.special.ndtri(torch.arange(2**16 + 1, dtype=torch.float64, device="cpu") / 2**16)
    density = edges.square().div_(-2).exp_().div_(math.sqrt(2 * math.pi))
    means: np.ndarray = density.diff().mul_(-(2**16)).to(dtype).numpy()
    return means


def relative_size(noisy: Tensor, clean: Tensor) -> Tensor:
    """||noisy - clean|| / ||clean||, a 0-dim tensor in float32 or better; 0 where both are 0."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    if clean.ndim == 0:
        noisy, clean = noisy.unsqueeze(0), clean.unsqueeze(0)
    rows = max(1, 2**16 * len(clean) // max(1, clean.numel()))  # some rows at a time: no second copy of a large weight
    pieces = zip(noisy.split(rows), clean.split(rows), strict=True)
    norms = [torch.linalg.vector_norm(some_noisy.to(dtype) - some_clean) for some_noisy, some_clean in pieces]
    noise: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return noise.div_(torch.linalg.vector_norm(clean, dtype=dtype).clamp_min_(torch.finfo(dtype).tiny))


def gamma_factor(progress: float, schedule: str = "constant", growth: float = 0.0, start: float = 0.0) -> float:
    """What to multiply gamma by at `progress`, the fraction of the training's optimizer steps behind us, in [0, 1].

    schedule: `constant` is 1 throughout; `linear` and `cosine` rise from 1 to 1 + growth, cosine as in ARWP's 1x form
        (arXiv 2404.00357): 1 + growth * (1 - cos(pi * progress)) / 2.
    growth: how much larger than at the start gamma is at the end, >= 0, in multiples of gamma.
    start: before this fraction the factor is 0, plain training; it does not shift the schedule. In [0, 1].
    """
    if progress < start:
        return 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 + growth * progress
    if schedule == "cosine":
        return 1.0 + growth * (1.0 - math.cos(math.pi * progress)) / 2.0
    raise ValueError(f"schedule is {schedule!r}: choose one of {', '.join(SCHEDULES)}")


def _pieces(weight: Tensor, std: Tensor, length: int) -> Iterable[tuple[Tensor, Tensor]]:
    """`weight` and `std`, some filters at a time: at most `length` elements, or one filter where that is larger."""
    if weight.numel() <= length:
        return [(weight, std)]
    dim = min(_leading_ones(weight.shape), weight.ndim - 1)
    rows = max(1, length * weight.shape[dim] // weight.numel())
    std = std.expand([*std.shape[:dim], weight.shape[dim], *std.shape[dim + 1 :]])
    return zip(weight.split(rows, dim), std.split(rows, dim), strict=True)


def _leading_ones(shape: torch.Size) -> int:
    return next((dim for dim, size in enumerate(shape) if size != 1), len(shape))
