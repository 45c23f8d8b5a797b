"""The norms and the noise of many weights, in one call: what `noise` says of one, by what their devices have.

1. On a CPU the weights of less than a tile are drawn into one scratch and added together; larger ones tile by tile.
2. On a GPU fused kernels (`kernels`) take all weights in a launch or two, where Triton is there and they pass a check;
   `noise` by itself costs about four small launches a weight. The kernels draw other numbers than torch does.
"""

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_rwp.core import noise
from hf_rwp.core.sharding import Block, add_up, block_like

logger = logging.getLogger(__name__)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # in which a NaN is equal to itself


class Target(NamedTuple):
    """A weight that noise goes on. position, name: in `named_parameters()`. local: the weight, or of a DTensor the part
    in this process's memory, which `block` describes."""

    position: int
    name: str
    weight: Tensor
    local: Tensor
    block: Block


class _Plan(NamedTuple):
    """How a list of targets is worked on; indices in that list."""

    targets: Sequence[Target]
    one_filter: list[list[int]]  # of one dtype each: their norms are a single call
    many_filters: list[int]
    cut: list[int]  # whose filters other processes hold parts of
    small: list[tuple[list[int], list[Tensor]]]  # that fit into one scratch together, and their places in there
    large: list[int]
    alone: set[int]  # of the large ones, those on a CPU in whose storage no other target is, which might overlap
    fused: list[int]
    kernels: Any


class Draws:
    """Draws noise for lists of weights. Generators, scratch and the plan of the last list are kept between calls."""

    def __init__(self) -> None:
        self._sources: dict[tuple[torch.device, torch.dtype], noise.Source] = {}
        self._plan: _Plan | None = None

    @torch.no_grad()
    def add_(
        self,
        targets: Sequence[Target],
        factors: Sequence[float],
        seeds: Sequence[int],
        dampings: Sequence[Tensor | None] | None = None,
        clean: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Add noise to every target's weight in place; the standard deviations by filter: (rows,) for each, or 0-dim.

        factors: what filters' norms are multiplied by, `noise.std_factor`; less than 0 for the opposite noise. seeds:
        `noise.noise_seeds`. dampings: `noise.arwp_damping`, (rows,) each. clean: copies of the weights, if there are
        any; it is faster on a CPU.
        """
        plan = self._plan_of(targets)
        stds = self._stds(plan, factors)
        for std, damping in zip(stds, dampings or (), strict=bool(dampings)):
            if damping is not None:
                std.mul_(damping.view_as(std))
        self._add_(plan, stds, seeds, clean)
        return stds

    @torch.no_grad()
    def drawn(self, target: Target, factor: float, seed: int, std: Tensor | None) -> tuple[Tensor, Tensor]:
        """A target's weight plus its noise, in memory of its own, and the standard deviations, see `add_`.

        std: those that an earlier call gave for the same noise, which then are not computed again.
        """
        values = torch.empty_like(target.local, requires_grad=False)
        block = block_like(target.block, values)
        if values.device.type == "cpu":
            if std is None:
                (std,) = self._stds(self._made([target]), [factor])
            noise.add_noise_(block, std, seed, self._source(block.memory), target.block.memory)
        else:
            values.copy_(target.local)
            plan = self._made([target._replace(local=values, block=block)])
            if std is None:
                (std,) = self._stds(plan, [factor])
            self._add_(plan, [std], [seed])
        return values, std

    @torch.no_grad()
    def holds(self, target: Target, std: Tensor, seed: int, clean: Tensor) -> bool:
        """Whether a weight is its clean values plus the noise that the last `add_` drew for it, bit for bit.

        A tile's rows at a time, which is all the memory that this takes.
        """
        block, own = block_like(target.block, target.local), block_like(target.block, clean).memory
        height, _ = noise.tile_of(block, self._source(own))
        plan = self._plan
        fuse = plan is not None and any(plan.targets[index].local is target.local for index in plan.fused)
        for row, (noisy, values) in enumerate(zip(block.memory.split(height), own.split(height), strict=True)):
            # Of the same strides: in others sums may be rounded otherwise.
            part = torch.empty_like(noisy).copy_(values)
            part_block = block._replace(memory=part, row=block.row + row * height)
            stds = std[row * height :][: len(part)] if std.ndim else std
            self._add_(self._made([target._replace(local=part, block=part_block)], fuse), [stds], [seed])
            if not torch.equal(part.view(_BITS[part.dtype.itemsize]), noisy.view(_BITS[part.dtype.itemsize])):
                return False
        return True

    def _plan_of(self, targets: Sequence[Target]) -> _Plan:
        if self._plan is None or self._plan.targets is not targets:
            self._plan = self._made(targets)
        return self._plan

    def _made(self, targets: Sequence[Target], fuse: bool = True) -> _Plan:
        one_filter: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        small: dict[tuple[torch.device, torch.dtype], list[list[int]]] = defaultdict(lambda: [[]])
        room: dict[tuple[torch.device, torch.dtype], int] = defaultdict(lambda: noise.CPU_TILE)
        many_filters: list[int] = []
        storages = Counter(target.block.memory.untyped_storage().data_ptr() for target in targets)
        cut, large, alone, fused, seen = [], [], set(), [], set()
        for index, target in enumerate(targets):
            local, block = target.local, target.block
            memory, kind = block.memory, (block.memory.device, block.memory.dtype)
            storage = memory.untyped_storage().data_ptr()
            if block.groups:
                cut.append(index)
            if fuse and _fuses(local, block) and storage not in seen:  # of one storage one: they may overlap
                seen.add(storage)
                fused.append(index)
                continue
            if not block.groups:
                (one_filter[kind] if len(memory) == 1 else many_filters).append(index)
            size = memory.numel()
            whole = memory.ndim == 2 and size == block.filters * block.length <= noise.CPU_TILE
            if whole and memory.device.type == "cpu" and memory.dtype in (torch.float32, torch.float64):
                if size > room[kind]:
                    small[kind].append([])
                    room[kind] = noise.CPU_TILE
                room[kind] -= size
                small[kind][-1].append(index)
            else:
                large.append(index)
                if memory.device.type == "cpu" and storages[storage] == 1:
                    alone.add(index)
        kernels = _kernels().plan([targets[index].block for index in fused]) if fused else None
        batches = []
        for batch in (batch for batches in small.values() for batch in batches):
            memories = [targets[index].block.memory for index in batch]
            scratch = self._source(memories[0]).scratch
            places = scratch[: sum(map(Tensor.numel, memories))].split([memory.numel() for memory in memories])
            batches.append((batch, [place.view(m.shape) for place, m in zip(places, memories, strict=True)]))
        return _Plan(targets, list(one_filter.values()), many_filters, cut, batches, large, alone, fused, kernels)

    def _stds(self, plan: _Plan, factors: Sequence[float]) -> list[Tensor]:
        blocks = [target.block for target in plan.targets]
        stds: dict[int, Tensor] = {}
        if plan.fused:
            own = [factors[index] for index in plan.fused]
            stds |= zip(plan.fused, _kernels().filter_norms(plan.kernels, own), strict=True)
        for indices in plan.one_filter:
            memories = [blocks[index].memory for index in indices]
            dtype = torch.promote_types(memories[0].dtype, torch.float32)
            norms = torch.stack(torch._foreach_norm(memories, 2, dtype))
            norms.mul_(norms.new_tensor([factors[index] for index in indices]))
            stds |= zip(indices, norms.unbind(), strict=True)
        if plan.many_filters:
            many = [noise.filter_norms(blocks[index]) for index in plan.many_filters]
            torch._foreach_mul_(many, [factors[index] for index in plan.many_filters])
            stds |= zip(plan.many_filters, many, strict=True)
        if plan.cut:
            for index, square in zip(plan.cut, cut_squares([blocks[index] for index in plan.cut]), strict=True):
                dtype = torch.promote_types(blocks[index].memory.dtype, torch.float32)
                stds[index] = square.sqrt_().mul_(factors[index]).to(dtype)
        return [stds[index] for index in range(len(blocks))]

    def _add_(
        self, plan: _Plan, stds: Sequence[Tensor], seeds: Sequence[int], clean: Sequence[Tensor] | None = None
    ) -> None:
        blocks = [target.block for target in plan.targets]
        if plan.fused:
            _kernels().add_noise_(plan.kernels, [stds[i] for i in plan.fused], [seeds[i] for i in plan.fused])
        for indices, normals in plan.small:
            memories = [blocks[index].memory for index in indices]
            source = self._source(memories[0])
            for normal, seed in zip(normals, noise.hashes([seeds[index] for index in indices], 0), strict=True):
                source.fill_(normal, seed)
            own = [stds[index] for index in indices]
            torch._foreach_addcmul_(memories, normals, [std.view(-1, 1) if std.ndim else std for std in own])
        for index in plan.large:
            block, beside = blocks[index], None
            if clean is not None and index in plan.alone:
                beside = block_like(block, clean[index]).memory
            noise.add_noise_(block, stds[index], seeds[index], self._source(block.memory), beside)

    def _source(self, memory: Tensor) -> noise.Source:
        key = memory.device, memory.dtype
        if key not in self._sources:
            self._sources[key] = noise.Source(memory)
        return self._sources[key]


def cut_squares(blocks: Sequence[Block]) -> list[Tensor]:
    """The squared norms of filters that processes hold parts of, (rows,) each, float64. Collective, see `add_up`."""
    return add_up(
        [noise.filter_norms(block, torch.float64).square_() for block in blocks], [block.groups for block in blocks]
    )


def _fuses(local: Tensor, block: Block) -> bool:
    if local.device.type != "cuda" or type(local) not in (Tensor, nn.Parameter) or _kernels() is None:
        return False
    return bool(_kernels().supports(block)) and _passes(local.device, local.dtype)


@functools.cache
def _kernels() -> Any:
    """The module, or None for a torch without Triton."""
    try:
        from hf_rwp.core import kernels
    except ImportError:
        return None
    return kernels


@functools.cache
def _passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels run on a device, and give the right norms and noise."""
    try:
        _kernels().check(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, a GPU that Triton does not know: training goes on all the same
        logger.warning("no fused kernels for %s on %s, so that the noise takes longer: %s", dtype, device, error)
        return False
    return True
