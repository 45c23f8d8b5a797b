# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 (compile-time constants are upper case, as everywhere in Triton)
"""Norms and noise of many weights at once: one Triton launch where `noise` needs several for every weight.

The norms and the law of the noise are those of `noise`. The draws come from Philox4x32-10, and depend on the weight's
seed and an element's index alone, in the order of the elements and not of the memory: of every 4 * GROUP elements,
element k * GROUP + j gets the k-th of the four normals that one counter gives.

1. Which program works on which part of which weight depends on shapes alone. `_plan` makes that table once for a list
   of weights, and the device keeps it.
2. Addresses and seeds change from call to call: one copy takes them to the device, and nobody waits for it.

Importing this needs Triton, and a first launch compiles, for seconds: it raises RuntimeError without a C compiler.
"""

import contextlib
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hf_rwp.noise import filter_dims

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MAX_NUMEL = 2**31 - 2**16  # an index has 32 bits, and a program's last ones lie beyond the end
_GROUP = 1024  # a power of 2; part of the noise's definition: another one is another noise
_ROWS, _SHORT = 32, 64  # filters of at most 64 elements: 32 to a program
_COLUMNS, _PIECE = 1024, 16384  # longer ones: 1024 elements at a time, and every 16384 are a program's

# A seed, and elements of its noise by Philox and Box-Muller in float64
_KNOWN_SEED, _KNOWN = (
    0x0123456789ABCDEF,
    {0: -1.03707, 1: -0.58827, 1024: 0.28971, 2048: 1.84132, 3072: -0.50766, 4099: 0.40713},
)

_Layout = tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]]


class _Group(NamedTuple):
    """Weights of one device, dtype and kind of layout, and how programs share them out."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    members: list[int]  # their positions in the caller's list
    norm_shapes: list[torch.Size]
    cuts: list[int]  # pieces to a filter, for each member: 1 but where a filter is long
    pieces: list[int]  # filters * cuts: the norms that the kernel writes
    geometry: Tensor  # (members, 8), int32, the columns of `_group`
    norm_programs: Tensor  # (programs, 2), int32: (place in `members`, first piece)
    noise_programs: Tensor  # (programs, 2), int32: (place in `members`, which 4 * GROUP elements)


def supports(weight: Tensor) -> bool:
    """Whether the kernels can take `weight`: on a GPU, in float32, bfloat16 or float16, not empty, no subclass.

    In memory its filters are dense and follow one another: contiguous or channels_last. It has less than 2^31 - 2^16
    elements. (Where Triton interprets, TRITON_INTERPRET=1, it is on a CPU instead.)
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_cuda != _INTERPRETED
        and weight.layout == torch.strided
        and weight.dtype in _DTYPES
        and _has_dense_filters(weight)
    )


@torch.no_grad()
def filter_norms(weights: Sequence[Tensor]) -> list[Tensor]:
    """`noise.filter_norms` of every weight, float32: 1 in place of the dimensions inside a filter.

    weights: such that `supports`; a layout that it refuses raises ValueError. The norms of a device and dtype are
    views of one tensor.
    """
    norms: list[Tensor] = [torch.empty(0, device="cpu")] * len(weights)
    for group in _plan(_layouts(weights)):
        addresses = [weights[member].data_ptr() for member in group.members]
        with _current(group.device):
            written = torch.empty(sum(group.pieces), dtype=torch.float32, device=group.device)
            _norms_kernel[(len(group.norm_programs),)](
                _sent(addresses, group.device),
                group.geometry,
                group.norm_programs,
                written,
                DTYPE=_DTYPES[group.dtype],
                ALIGNMENT=_alignment(addresses, group.dtype),
                ROWS=_ROWS,
                SHORT=_SHORT,
                COLUMNS=_COLUMNS,
                PIECE=_PIECE,
            )
        parts = written.split(group.pieces)
        for member, shape, cuts, part in zip(group.members, group.norm_shapes, group.cuts, parts, strict=True):
            norms[member] = (part if cuts == 1 else torch.linalg.vector_norm(part.view(-1, cuts), dim=1)).view(shape)
    return norms


@torch.no_grad()
def add_noise_(weights: Sequence[Tensor], stds: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Add Gaussian noise to every weight in place: the sum is rounded once, to the weight's dtype.

    weights: such that `supports`, no two of them sharing memory. stds: of each weight, as `noise.noise_std` gives.
    seeds: one in [0, 2^64) for each weight. ValueError: lengths differ, or `supports` refuses a layout.
    """
    if not len(weights) == len(stds) == len(seeds):
        raise ValueError(f"{len(weights)} weights, {len(stds)} stds and {len(seeds)} seeds: there is to be one of each")
    for group in _plan(_layouts(weights)):
        addresses = [weights[member].data_ptr() for member in group.members]
        group_stds = [
            _dense_std(stds[member], shape, group.device)
            for member, shape in zip(group.members, group.norm_shapes, strict=True)
        ]
        with _current(group.device):
            call = [
                number
                for member, address, std in zip(group.members, addresses, group_stds, strict=True)
                for number in (address, std.data_ptr(), seeds[member])
            ]
            _noise_kernel[(len(group.noise_programs),)](
                _sent(call, group.device),
                group.geometry,
                group.noise_programs,
                DTYPE=_DTYPES[group.dtype],
                ALIGNMENT=_alignment(addresses, group.dtype),
                CHANNELS_LAST=group.channels_last,
                GROUP=_GROUP,
                num_warps=8,
            )
    torch.autograd.graph.increment_version(weights)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels for a device and dtype, and hold what they give against known answers.

    RuntimeError: it is something else. Also whatever Triton raises where it cannot compile or launch.
    """
    flat = torch.zeros(2, 4100, dtype=dtype, device=device)
    last = torch.zeros(2, 8, 4, 4, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    std = torch.tensor([1.0, 0.0], dtype=torch.float32, device=device)
    add_noise_([flat, last], [std.view(2, 1), std.view(2, 1, 1, 1)], [_KNOWN_SEED, _KNOWN_SEED])
    expected = torch.tensor(list(_KNOWN.values()), dtype=torch.float32, device="cpu")
    close = functools.partial(torch.allclose, rtol=1e-2, atol=1e-4)  # bfloat16 has two digits
    right = close(flat[0, list(_KNOWN)].float().cpu(), expected) and close(
        last[0].flatten(), flat[0, : last[0].numel()]
    )
    right = right and not flat[1].any() and not last[1].any()
    for weight, norms in zip((flat, last), filter_norms([flat.fill_(2), last.fill_(2)]), strict=True):
        right = right and close(norms, torch.full_like(norms, 2 * math.sqrt(weight[0].numel())))
    if not right:
        raise RuntimeError("the kernels' norms or noise are not what they have to be")


@triton.jit
def _norms_kernel(
    addresses,
    geometry,
    programs,
    norms,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    member = tl.load(programs + 2 * tl.program_id(0))
    piece = tl.load(programs + 2 * tl.program_id(0) + 1)
    weight = tl.multiple_of(tl.load(addresses + member).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    length = tl.load(geometry + 8 * member + 1)
    pieces = tl.load(geometry + 8 * member + 2)
    cuts = tl.load(geometry + 8 * member + 3)
    norms += tl.load(geometry + 8 * member + 4) + piece
    if length <= SHORT:
        _write_norms(weight + piece * length, pieces - piece, length, norms, ROWS, SHORT)
    elif length % 8 == 0:  # Triton sees a multiple of 8, and loads vectors
        begin = piece % cuts * PIECE
        first = weight + piece // cuts * (length // 8 * 8) + begin
        _write_norms(first, 1, tl.minimum(length // 8 * 8 - begin, PIECE), norms, 1, COLUMNS)
    else:
        begin = piece % cuts * PIECE
        _write_norms(weight + piece // cuts * length + begin, 1, tl.minimum(length - begin, PIECE), norms, 1, COLUMNS)


@triton.jit
def _write_norms(first, count, length, norms, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The norms of `count` stretches of `length` elements that follow one another in memory; of ROWS at most."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, length, COLUMNS):
        inside = (rows < count)[:, None] & (begin + columns < length)
        values = tl.load(first + rows[:, None] * length + begin + columns, mask=inside, other=0).to(tl.float32)
        squares += values * values
    tl.store(norms + rows, tl.sqrt_rn(tl.sum(squares, axis=1)), mask=rows < count)


@triton.jit
def _noise_kernel(
    call,
    geometry,
    programs,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUP: tl.constexpr,
):
    member = tl.load(programs + 2 * tl.program_id(0))
    block = tl.load(programs + 2 * tl.program_id(0) + 1)
    weight = tl.multiple_of(tl.load(call + 3 * member).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    std = tl.load(call + 3 * member + 1).to(tl.pointer_type(tl.float32))
    seed = tl.load(call + 3 * member + 2)
    geometry += 8 * member
    numel = tl.load(geometry)
    within = tl.arange(0, GROUP)
    if CHANNELS_LAST:
        # Neighbours in memory are `positions` apart in order: threads take the group's elements in such steps.
        within = (within * tl.load(geometry + 6) + within // tl.load(geometry + 7)) & (GROUP - 1)  # a permutation
    normals = tl.randn4x(seed, block * GROUP + within)
    index = block * (4 * GROUP) + within
    if numel % 8 == 0:  # Triton sees a multiple of 8, and loads and stores vectors
        _add_normals(weight, std, normals, index, numel // 8 * 8, geometry, CHANNELS_LAST, GROUP)
    else:
        _add_normals(weight, std, normals, index, numel, geometry, CHANNELS_LAST, GROUP)


@triton.jit
def _add_normals(weight, std, normals, index, numel, geometry, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr):
    """Add std * normal to the elements `index`, and to those one, two and three GROUPs later."""
    length = tl.load(geometry + 1).to(tl.uint32)
    for word in tl.static_range(4):
        inside = index < numel
        which = index.to(tl.uint32) // length
        element = weight + index
        if CHANNELS_LAST:
            positions = tl.load(geometry + 6).to(tl.uint32)
            place = index.to(tl.uint32) - which * length
            channel = place // positions
            step = (place - channel * positions) * tl.load(geometry + 5).to(tl.uint32) + channel
            element = weight + (which * length + step).to(tl.int32)
        value = tl.load(element, mask=inside).to(tl.float32)
        scale = tl.load(std + which.to(tl.int32), mask=inside)
        tl.store(element, tl.fma(scale, normals[word], value).to(weight.dtype.element_ty), mask=inside)
        index += GROUP


_INTERPRETED = not isinstance(_noise_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 made the decorator decide so


@functools.lru_cache(maxsize=4)
def _plan(layouts: tuple[_Layout, ...]) -> list[_Group]:
    """The groups of a list of weights, their tables on the devices. ValueError: `supports` refuses a layout."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    shells = [torch.empty_strided(shape, stride, device="meta") for _, _, shape, stride in layouts]
    for member, ((device, dtype, shape, stride), shell) in enumerate(zip(layouts, shells, strict=True)):
        if dtype not in _DTYPES or not _has_dense_filters(shell):
            raise ValueError(f"a weight of {dtype}, shape {tuple(shape)} and stride {stride} is none that `supports`")
        groups[device, dtype, not shell.is_contiguous()].append(member)
    return [_group(*key, members, [shells[member] for member in members]) for key, members in groups.items()]


def _group(
    device: torch.device, dtype: torch.dtype, channels_last: bool, members: list[int], shells: list[Tensor]
) -> _Group:
    norm_shapes, cuts, pieces, geometry, norm_programs, noise_programs = [], [], [], [], [], []
    for place, shell in enumerate(shells):
        inside = filter_dims(shell.shape)
        norm_shape = torch.Size(1 if dim in inside else size for dim, size in enumerate(shell.shape))
        length = shell.numel() // math.prod(norm_shape)
        channels = shell.shape[1] if channels_last else length
        positions = length // channels
        run = _GROUP // math.gcd(positions, _GROUP)  # so many steps, modulo GROUP, until one meets the first again
        norm_shapes.append(norm_shape)
        cuts.append(-(-length // _PIECE))
        pieces.append(math.prod(norm_shape) * cuts[-1])
        geometry.append([shell.numel(), length, pieces[-1], cuts[-1], sum(pieces[:-1]), channels, positions, run])
        norm_programs.append(_programs(place, pieces[-1], _ROWS if length <= _SHORT else 1))
        noise_programs.append(_programs(place, -(-shell.numel() // (4 * _GROUP)), 1))
    columns = torch.tensor(geometry, dtype=torch.int32, device="cpu")
    tables = [table.to(device) for table in (columns, torch.cat(norm_programs), torch.cat(noise_programs))]
    return _Group(device, dtype, channels_last, members, norm_shapes, cuts, pieces, *tables)


def _programs(place: int, units: int, step: int) -> Tensor:
    first = torch.arange(0, units, step, dtype=torch.int32, device="cpu")
    return torch.stack([torch.full_like(first, place), first], dim=1)


def _layouts(weights: Sequence[Tensor]) -> tuple[_Layout, ...]:
    return tuple((weight.device, weight.dtype, weight.shape, weight.stride()) for weight in weights)


def _has_dense_filters(weight: Tensor) -> bool:
    """Whether filters are dense in memory and follow one another, and indices have 32 bits."""
    if not 0 < weight.numel() <= _MAX_NUMEL:
        return False
    if weight.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if weight.ndim not in formats or weight.shape[0] == 1:  # a filter is then a slice of channels
        return False
    return weight.is_contiguous(memory_format=formats[weight.ndim])


def _dense_std(std: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    if std.shape == shape and std.dtype == torch.float32 and std.device == device and std.is_contiguous():
        return std
    return std.to(device, torch.float32).expand(shape).contiguous()


def _sent(numbers: list[int], device: torch.device) -> Tensor:
    pinned = torch.tensor(numbers, dtype=torch.uint64, device="cpu", pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _alignment(addresses: list[int], dtype: torch.dtype) -> int:
    """Bytes that divide all addresses: 16, which vector loads need, or one element."""
    return dtype.itemsize if functools.reduce(operator.or_, addresses) % 16 else 16


def _current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
