"""The norms and the noise of many weights, in one call: what `noise` says of one, by what their devices have.

1. On a CPU the weights of less than a tile are drawn into one scratch and added together; larger ones tile by tile.
2. On a GPU fused kernels (`kernels`) take all weights in a launch or two, where Triton is there and they pass a check;
   `noise` alone costs about four small launches a weight. The kernels draw other numbers than torch does.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_rwp.core import noise
from hf_rwp.core.sharding import Block

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """A weight that noise goes on. position, name: in `named_parameters()`. layout: what the block rests on."""

    position: int
    name: str
    weight: Tensor
    block: Block
    layout: tuple[Any, ...] = ()


class _Plan(NamedTuple):
    """How a list of targets is worked on; indices in that list."""

    targets: Sequence[Target]
    one_filter: list[list[int]]  # of one dtype each: their norms are a single call
    many_filters: list[int]
    small: list[tuple[list[int], list[Tensor]]]  # that fit into one scratch together, and their places in there
    large: list[int]
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
    ) -> list[Tensor]:
        """Add noise to every target's weight in place; the standard deviations by filter: (rows,) for each, or 0-dim.

        factors: what filters' norms are multiplied by, `noise.std_factor`; less than 0 for the opposite noise. seeds:
        `noise.noise_seeds`. dampings: `noise.arwp_damping`, (rows,) each.
        """
        plan = self._plan_of(targets)
        stds = self._norms(plan)
        torch._foreach_mul_(stds, factors[0] if len(set(factors)) == 1 else list(factors))
        for std, damping in zip(stds, dampings or (), strict=bool(dampings)):
            if damping is not None:
                std.mul_(damping.view_as(std))
        self._add_(plan, stds, seeds)
        return stds

    @torch.no_grad()
    def repeat_(self, target: Target, std: Tensor, seed: int) -> None:
        """Add to one weight the noise that `add_` drew for such a one, bit for bit."""
        self._add_(self._made([target]), [std], [seed])

    def _plan_of(self, targets: Sequence[Target]) -> _Plan:
        if self._plan is None or self._plan.targets is not targets:
            self._plan = self._made(targets)
        return self._plan

    def _made(self, targets: Sequence[Target]) -> _Plan:
        one_filter: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        small: dict[tuple[torch.device, torch.dtype], list[list[int]]] = defaultdict(lambda: [[]])
        room: dict[tuple[torch.device, torch.dtype], int] = defaultdict(lambda: noise.CPU_TILE)
        many_filters, large, fused, storages = [], [], [], set()
        for index, target in enumerate(targets):
            weight, block = target.weight, target.block
            memory, kind = block.memory, (block.memory.device, block.memory.dtype)
            storage = memory.untyped_storage().data_ptr()
            if _fuses(weight, block) and storage not in storages:  # of one storage one: they may overlap
                storages.add(storage)
                fused.append(index)
                continue
            if len(memory) == 1:
                one_filter[kind].append(index)
            else:
                many_filters.append(index)
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
        kernels = _kernels().plan([targets[index].block for index in fused]) if fused else None
        batches = []
        for batch in (batch for batches in small.values() for batch in batches):
            memories = [targets[index].block.memory for index in batch]
            scratch = self._source(memories[0]).scratch
            places = scratch[: sum(map(Tensor.numel, memories))].split([memory.numel() for memory in memories])
            batches.append((batch, [place.view(m.shape) for place, m in zip(places, memories, strict=True)]))
        return _Plan(targets, list(one_filter.values()), many_filters, batches, large, fused, kernels)

    def _norms(self, plan: _Plan) -> list[Tensor]:
        blocks = [target.block for target in plan.targets]
        norms: dict[int, Tensor] = {index: noise.filter_norms(blocks[index]) for index in plan.many_filters}
        if plan.fused:
            norms |= zip(plan.fused, _kernels().filter_norms(plan.kernels), strict=True)
        for indices in plan.one_filter:
            memories = [blocks[index].memory for index in indices]
            dtype = torch.promote_types(memories[0].dtype, torch.float32)
            norms |= zip(indices, torch._foreach_norm(memories, 2, dtype), strict=True)
        return [norms[index] for index in range(len(blocks))]

    def _add_(self, plan: _Plan, stds: Sequence[Tensor], seeds: Sequence[int]) -> None:
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
            noise.add_noise_(blocks[index], stds[index], seeds[index], self._source(blocks[index].memory))

    def _source(self, memory: Tensor) -> noise.Source:
        key = memory.device, memory.dtype
        if key not in self._sources:
            self._sources[key] = noise.Source(memory)
        return self._sources[key]


def _fuses(weight: Tensor, block: Block) -> bool:
    if weight.device.type != "cuda" or type(weight) not in (Tensor, nn.Parameter) or _kernels() is None:
        return False
    return bool(_kernels().supports(block)) and _passes(weight.device, weight.dtype)


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
    """Whether the fused kernels run on a device, and give what they have to."""
    try:
        _kernels().check(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, a GPU that Triton does not know: training goes on all the same
        logger.warning("no fused kernels for %s on %s, so that the noise takes longer: %s", dtype, device, error)
        return False
    return True
