# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 (compile-time constants are upper case, as everywhere in Triton)
"""Norms and noise of many blocks at once: one Triton launch where `noise` needs a few for every block.

The norms and the law of the noise are those of `noise`. The draws come from Philox4x32-10, and depend only on the
weight's seed and an element's place in the whole weight, however it is cut and in whatever order it lies in memory: of
every 4 * GROUP elements, element k * GROUP + j gets the k-th of the four normals that one counter gives.

1. `plan`: which program works on which part of which block, and where that is in memory. It is made once for a list of
   blocks, and the device keeps it.
2. Where the stds are and the seeds change from call to call: one copy takes them to the device, and nobody waits.

Importing this needs Triton, and a first launch compiles, for seconds: it raises RuntimeError without a C compiler.
"""

import contextlib
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language import constexpr

from hf_rwp.core.sharding import Block

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_MAX_NUMEL = 2**31 - 2**16  # of a block: an index has 32 bits, and a program's last ones lie beyond the end
_MAX_WHOLE = 2**34  # of a whole weight: a counter has 32 bits, and gives four elements
_GROUP = constexpr(1024)  # a power of 2; part of the noise's definition: another one is another noise
_ROWS, _SHORT = constexpr(32), constexpr(64)  # filters of at most 64 elements: 32 to a program
_COLUMNS, _PIECE = constexpr(1024), constexpr(16384)  # longer ones: elements at a time, and to a program

# A seed, and elements of its noise by Philox and Box-Muller in float64
_KNOWN_SEED, _KNOWN = (
    0x0123456789ABCDEF,
    {0: -1.03707, 1: -0.58827, 1024: 0.28971, 2048: 1.84132, 3072: -0.50766, 4099: 0.40713},
)


class _Group(NamedTuple):
    """Blocks of one device, dtype and kind of layout, and how programs share them out."""

    device: torch.device
    dtype: torch.dtype
    layout: str  # "in order", "channels_last", or "cut": along columns, so that its rows lie apart in the whole weight
    members: list[int]  # their positions in the caller's list
    alignment: int  # bytes that divide all addresses: 16, which vector loads need, or one element
    norms: list[int]  # how many the kernel writes: of each member's filters, then of the pieces of each in `long`
    long: list[tuple[int, int]]  # (place in `members`, pieces to a filter) where a filter takes more than one
    addresses: Tensor  # (members,), uint64
    geometry: Tensor  # (members, 8), int64, the columns of `_group`
    norm_programs: Tensor  # (programs, 2), int32: (place in `members`, first piece)
    noise_programs: Tensor  # (programs, 2), int32: (place in `members`, which 4 * GROUP elements)


class Plan(NamedTuple):
    """What the kernels know of a list of blocks: true as long as their memory stays where it is."""

    memories: list[Tensor]
    groups: list[_Group]


def supports(block: Block) -> bool:
    """Whether the kernels can take `block`: on a GPU, in float32, bfloat16 or float16, not empty, no subclass.

    In memory its filters, or its part of them, are dense and follow one another: contiguous, or channels_last with
    whole filters. It has at most 2^31 - 2^16 elements, and the whole weight 2^34. (Where Triton interprets,
    TRITON_INTERPRET=1, it is on a CPU instead.)
    """
    memory = block.memory
    return (
        type(memory) in (Tensor, nn.Parameter)
        and memory.is_cuda != _INTERPRETED
        and memory.layout == torch.strided
        and memory.dtype in _DTYPES
        and block.reals == 1
        and 0 < memory.numel() <= _MAX_NUMEL
        and block.filters * block.length <= _MAX_WHOLE
        and _layout(block) != ""
    )


@torch.no_grad()
def plan(blocks: Sequence[Block]) -> Plan:
    """All that does not change from call to call, for blocks of which no two share memory.

    Raises ValueError for a block that `supports` refuses.
    """
    groups: dict[tuple[torch.device, torch.dtype, str], list[int]] = defaultdict(list)
    memories = [block.memory for block in blocks]
    for member, (memory, block) in enumerate(zip(memories, blocks, strict=True)):
        if not supports(block):
            what = f"{memory.dtype}, shape {tuple(memory.shape)} and stride {memory.stride()} on {memory.device}"
            raise ValueError(f"the kernels do not take a block of {what}: `supports` says which they do")
        groups[memory.device, memory.dtype, _layout(block)].append(member)
    return Plan(memories, [_group(*key, members, [blocks[i] for i in members]) for key, members in groups.items()])


@torch.no_grad()
def filter_norms(plan: Plan, factors: Sequence[float] | None = None) -> list[Tensor]:
    """`noise.filter_norms` of every block, (rows,), float32; those of a device, dtype and layout in one tensor.

    factors: what the norms of each block are multiplied by.
    """
    norms: list[Tensor] = plan.memories.copy()
    for group in plan.groups:
        with _current(group.device):
            written = torch.empty(sum(group.norms), dtype=torch.float32, device=group.device)
            tables = group.addresses, group.geometry, group.norm_programs
            compile_time = {"DTYPE": _DTYPES[group.dtype], "ALIGNMENT": group.alignment}
            _norms_kernel[(len(group.norm_programs),)](*tables, written, **compile_time)
        parts = written.split_with_sizes(group.norms)
        for (place, count), pieces in zip(group.long, parts[len(group.members) :], strict=True):
            torch.linalg.vector_norm(pieces.view(-1, count), dim=1, out=parts[place])
        if factors:
            own = [factors[member] for member in group.members]
            if len(set(own)) == 1:
                written.mul_(own[0])
            else:
                torch._foreach_mul_(parts[: len(own)], own)
        for member, part in zip(group.members, parts, strict=False):
            norms[member] = part
    return norms


@torch.no_grad()
def add_noise_(plan: Plan, stds: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Add Gaussian noise to every block in place: the sum is rounded once, to the weight's dtype.

    stds: of the filters in each block, (rows,); float32 saves a copy. seeds: of each weight, in [0, 2^64). Raises
    ValueError where their counts are not the plan's.
    """
    if not len(plan.memories) == len(stds) == len(seeds):
        raise ValueError(f"{len(plan.memories)} blocks, {len(stds)} stds and {len(seeds)} seeds: counts must match")
    for group in plan.groups:
        members, device = group.members, group.device
        dense = [_dense(stds[member], rows, device) for member, rows in zip(members, group.norms, strict=False)]
        with _current(device):
            call = [[std.data_ptr() for std in dense], [seeds[member] for member in members]]
            tables = group.addresses, _sent(call, device), group.geometry, group.noise_programs
            compile_time = {"DTYPE": _DTYPES[group.dtype], "ALIGNMENT": group.alignment, "LAYOUT": group.layout}
            _noise_kernel[(len(group.noise_programs),)](*tables, **compile_time, num_warps=8)
    torch.autograd.graph.increment_version(plan.memories)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels for a device and dtype, and hold what they give against known answers.

    RuntimeError: it is something else. Also whatever Triton raises where it cannot compile or launch.
    """
    flat = torch.zeros(2, 4100, dtype=dtype, device=device)
    last = torch.zeros(2, 8, 4, 4, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    cut = torch.zeros(2, 2100, dtype=dtype, device=device)
    blocks = plan([Block(flat, 2, 4100), Block(last, 2, 128), Block(cut, 2, 4100, 0, 2000)])
    std = torch.tensor([1.0, 0.0], dtype=torch.float32, device=device)
    add_noise_(blocks, [std] * 3, [_KNOWN_SEED] * 3)
    expected = torch.tensor(list(_KNOWN.values()), dtype=torch.float32, device="cpu")
    close = functools.partial(torch.allclose, rtol=1e-2, atol=1e-4)  # bfloat16 has two digits
    right = close(flat[0, list(_KNOWN)].float().cpu(), expected)
    right = right and close(cut[0], flat[0, 2000:]) and close(last[0].flatten(), flat[0, :128])
    for memory in blocks.memories:
        right = right and not memory[1].any()
        memory.fill_(2)
    for memory, norms in zip(blocks.memories, filter_norms(blocks), strict=True):
        right = right and close(norms, torch.full_like(norms, 2 * math.sqrt(_columns(memory))))
    for memory in (flat, last):  # a part gets the same bits, by which writes to weights are told from noise
        whole, part, length = torch.ones_like(memory), torch.ones_like(memory[1:]), _columns(memory)
        ones = torch.ones_like(std)
        blocks = plan([Block(whole, 2, length), Block(part, 2, length, 1)])
        add_noise_(blocks, [ones, ones[1:]], [_KNOWN_SEED] * 2)
        right = right and torch.equal(part, whole[1:])
    if not right:
        raise RuntimeError("the kernels give wrong norms or wrong noise")


@triton.jit
def _norms_kernel(addresses, geometry, programs, norms, DTYPE: constexpr, ALIGNMENT: constexpr):
    member = tl.load(programs + 2 * tl.program_id(0))
    piece = tl.load(programs + 2 * tl.program_id(0) + 1)
    memory = tl.multiple_of(tl.load(addresses + member).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    numel, length = tl.load(geometry + 8 * member).to(tl.int32), tl.load(geometry + 8 * member + 1).to(tl.int32)
    norms += tl.load(geometry + 8 * member + 2) + piece
    if length <= _SHORT:
        _write_norms(memory + piece * length, numel // length - piece, length, norms, _ROWS, _SHORT)
    else:
        pieces = tl.cdiv(length, _PIECE)
        begin = piece % pieces * _PIECE
        if length % 8 == 0:  # Triton sees a multiple of 8, and loads vectors
            first = memory + piece // pieces * (length // 8 * 8) + begin
            _write_norms(first, 1, tl.minimum(length // 8 * 8 - begin, _PIECE), norms, 1, _COLUMNS)
        else:
            first = memory + piece // pieces * length + begin
            _write_norms(first, 1, tl.minimum(length - begin, _PIECE), norms, 1, _COLUMNS)


@triton.jit
def _write_norms(first, count, length, norms, ROWS: constexpr, COLUMNS: constexpr):
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
def _noise_kernel(addresses, call, geometry, programs, DTYPE: constexpr, ALIGNMENT: constexpr, LAYOUT: constexpr):
    member = tl.load(programs + 2 * tl.program_id(0))
    block = tl.load(programs + 2 * tl.program_id(0) + 1)
    memory = tl.multiple_of(tl.load(addresses + member).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    std = tl.load(call + 2 * member).to(tl.pointer_type(tl.float32))
    seed = tl.load(call + 2 * member + 1)
    geometry += 8 * member
    if LAYOUT == "cut":
        _add_to_cut(memory, std, seed, block * (4 * _GROUP), geometry)
    else:
        within = tl.arange(0, _GROUP)
        if LAYOUT == "channels_last":
            # Neighbours in memory are `positions` apart in order: threads take the group's elements in such steps.
            positions, run = tl.load(geometry + 6).to(tl.int32), tl.load(geometry + 7).to(tl.int32)
            within = (within * positions + within // run) & (_GROUP - 1)  # a permutation
        normals = tl.randn4x(seed, block.to(tl.uint32) * _GROUP + within)
        numel = tl.load(geometry).to(tl.int32)  # not sooner: the draw leaves few registers
        begin = (block.to(tl.int64) * (4 * _GROUP) - tl.load(geometry + 3)).to(tl.int32)  # below 0: ahead of the memory
        if (numel | begin) % 8 == 0:  # Triton sees multiples of 8, and loads and stores vectors
            _add_normals(memory, std, normals, begin // 8 * 8 + within, numel // 8 * 8, geometry, LAYOUT)
        else:
            _add_normals(memory, std, normals, begin + within, numel, geometry, LAYOUT)


@triton.jit
def _add_normals(memory, std, normals, index, numel, geometry, LAYOUT: constexpr):
    """Add std * normal to the elements `index`, and to those one, two and three GROUPs later."""
    length = tl.load(geometry + 1).to(tl.uint32)
    for word in tl.static_range(4):
        inside = index.to(tl.uint32) < numel.to(tl.uint32)  # not below 0 either
        which = index.to(tl.uint32) // length
        element = memory + index
        if LAYOUT == "channels_last":
            positions = tl.load(geometry + 6).to(tl.uint32)
            place = index.to(tl.uint32) - which * length
            channel = place // positions
            step = (place - channel * positions) * tl.load(geometry + 5).to(tl.uint32) + channel
            element = memory + (which * length + step).to(tl.int32)
        _add(element, std + which.to(tl.int32), normals[word], inside)
        index += _GROUP


@triton.jit
def _add_to_cut(memory, std, seed, begin, geometry):
    """Add std * normal to 4 * GROUP elements from `begin` on, each with a counter of its own."""
    numel, columns = tl.load(geometry).to(tl.int32), tl.load(geometry + 1).to(tl.uint32)
    start, length = tl.load(geometry + 3), tl.load(geometry + 4)
    for first in range(begin, tl.minimum(begin + 4 * _GROUP, numel), _GROUP):
        index = first + tl.arange(0, _GROUP)
        which = index.to(tl.uint32) // columns
        place = start + which.to(tl.int64) * length + (index.to(tl.uint32) - which * columns)
        uniform = tl.rand4x(seed, (place // (4 * _GROUP) * _GROUP + place % _GROUP).to(tl.uint32))
        kth = place // _GROUP % 4
        radius, angle = tl.where(kth < 2, uniform[0], uniform[2]), tl.where(kth < 2, uniform[1], uniform[3])
        pair = tl.pair_uniform_to_normal(radius, angle)
        normal = tl.where(kth % 2 == 0, pair[0], pair[1])
        _add(memory + index, std + which.to(tl.int32), normal, index < numel)


@triton.jit
def _add(element, std, normal, inside):
    value = tl.load(element, mask=inside).to(tl.float32)
    scale = tl.load(std, mask=inside)
    tl.store(element, tl.fma(scale, normal, value).to(element.dtype.element_ty), mask=inside)


_INTERPRETED = not isinstance(_noise_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 made the decorator decide so


def _group(device: torch.device, dtype: torch.dtype, layout: str, members: list[int], blocks: list[Block]) -> _Group:
    group, tile = _GROUP.value, 4 * _GROUP.value
    rows = [len(block.memory) for block in blocks]
    norms, long, geometry, norm_programs, noise_programs = rows.copy(), [], [], [], []
    for place, (memory, _, length, row, column, *_) in enumerate(blocks):
        numel, columns = memory.numel(), _columns(memory)
        pieces, first = -(-columns // _PIECE.value), sum(rows[:place])
        if pieces > 1:
            first = sum(norms)
            norms.append(rows[place] * pieces)
            long.append((place, pieces))
        start = row * length + column  # of the elements of the whole weight, where this memory begins
        channels = memory.shape[1] if layout == "channels_last" else columns
        positions = columns // channels
        run = group // math.gcd(positions, group)  # so many steps, modulo GROUP, until one meets the first again
        geometry.append([numel, columns, first, start, length, channels, positions, run])
        norm_programs.append(np.arange(0, rows[place] * pieces, _ROWS.value if columns <= _SHORT.value else 1))
        begin, end = (0, numel) if layout == "cut" else (start, start + numel)
        noise_programs.append(np.arange(begin // tile, -(-end // tile)))
    addresses = [block.memory.data_ptr() for block in blocks]
    alignment = dtype.itemsize if functools.reduce(operator.or_, addresses) % 16 else 16
    programs = _programs(norm_programs), _programs(noise_programs)
    tables = np.array(addresses, np.uint64), np.array(geometry, np.int64), *programs
    sent = [torch.from_numpy(table).to(device) for table in tables]
    return _Group(device, dtype, layout, members, alignment, norms, long, *sent)


def _programs(numbers: list[np.ndarray]) -> np.ndarray:
    places = np.repeat(np.arange(len(numbers)), [len(one) for one in numbers])
    return np.stack([places, np.concatenate(numbers)], axis=1).astype(np.int32)


def _layout(block: Block) -> str:
    """A name for how the elements of a block follow one another; empty where the kernels do not take it."""
    memory, whole = block.memory, _columns(block.memory) == block.length
    if memory.is_contiguous():
        return "in order" if whole or len(memory) == 1 else "cut"
    last = _FORMATS.get(memory.ndim)
    return "channels_last" if whole and last and memory.is_contiguous(memory_format=last) else ""


def _columns(memory: Tensor) -> int:
    return math.prod(memory.shape[1:])


def _dense(std: Tensor, rows: int, device: torch.device) -> Tensor:
    if std.dtype is torch.float32 and std.numel() == rows and std.is_contiguous() and std.device == device:
        return std
    return std.to(device, torch.float32).expand(rows).contiguous()


def _sent(columns: list[list[int]], device: torch.device) -> Tensor:
    numbers = torch.from_numpy(np.array(columns, dtype=np.uint64).T.copy())
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
