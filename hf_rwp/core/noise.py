"""The noise of Random Weight Perturbation (RWP), as functions on the block of a weight (`sharding.Block`).

Notation follows the papers (RWP: arXiv 2211.11489; ARWP: arXiv 2404.00357):

    eps ~ N(0, std^2)      std = gamma * ||filter||_2                            (RWP)
                           std = gamma * ||filter||_2 / sqrt(1 + eta * F)        (ARWP)
                           F   = beta * F + (sum over the filter of g^2)

ARWP divides the *standard deviation* by the root, as its authors' code does (github.com/nblt/mARWP), whose settings of
eta are those that people know. Its equation 14 can also be read as the *variance* over the root, which damps less.

An element's noise is a function of (seed, window, micro-step, replica, position of its parameter, place in the whole
weight), however the weight is cut. The matrix filters x elements is drawn in *tiles*, whose size depends only on its
shape, each from a generator seeded by hash(seed, tile); whoever holds a part of a tile draws all of it. In a complex
weight E|eps|^2 = std^2: the real and the imaginary parts have half of it each.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_rwp.core.gamma import MODES
from hf_rwp.core.sharding import Block

CPU_TILE = 2**15  # elements; part of the noise's definition, as is what other devices have


def check_noise(noise: str) -> None:
    """Raise ValueError for a mode of noise that is not one of `MODES`."""
    if noise not in MODES:
        raise ValueError(f"unknown noise mode {noise!r}; choose from {', '.join(MODES)}")


def filter_norms(block: Block, dtype: torch.dtype | None = None) -> Tensor:
    """The L2 norm of every filter of a block, or of its part, (rows,). dtype: None for float32 or better."""
    dtype = dtype or torch.promote_types(block.memory.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(block.memory.flatten(1), dim=1, dtype=dtype)
    return norms


def std_factor(block: Block, gamma: float, noise: str = "filter") -> float:
    """What the norm of each of a weight's filters is multiplied by for the standard deviation of its noise.

    gamma: >= 0. In mode `filter` relative to the filter's norm: std = gamma * ||filter|| (arXiv 2211.11489). In mode
        `filter_normalized` relative to the root mean square of the filter's weights: std = gamma * ||filter|| /
        sqrt(fan_in), so that ||noise|| is about gamma * ||weight|| however wide the layer.
    """
    check_noise(noise)
    return gamma / math.sqrt(max(1, block.length) if noise == "filter_normalized" else block.reals)


def noise_seeds(seed: int, window: int, micro_step: int, replica: int, positions: Sequence[int]) -> list[int]:
    """The seeds, in [0, 2^64), of some parameters' draws: hashes of where the draws stand.

    window: the number of the optimizer step. micro_step: that of the gradient within it. replica: the index among
    data-parallel replicas. positions: those of the parameters in `named_parameters()`.
    """
    key = hashlib.blake2b(struct.pack("<4q", seed, window, micro_step, replica), digest_size=8).digest()
    return hashes(int.from_bytes(key, "little"), positions)


def hashes(keys: int | Sequence[int], numbers: int | Sequence[int]) -> list[int]:
    """A hash of (key, number) for each pair, in [0, 2^64), one to one for one key: SplitMix64 (OOPSLA 2014).

    keys, numbers: one or many each, of which the many go together.
    """
    z = np.asarray(numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(keys, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: list[int] = (z ^ (z >> np.uint64(31))).tolist()
    return hashed


class Source:
    """Standard normal numbers for weights of one device and dtype, in memory that is used again and again."""

    def __init__(self, memory: Tensor) -> None:
        # On a CPU a tile is still in the cache when it is added to the weights; elsewhere large ones save launches.
        self.tile = CPU_TILE if memory.device.type == "cpu" else 2**22
        dtype = torch.promote_types(memory.dtype, torch.float32)
        self.scratch = torch.empty(self.tile, dtype=dtype, device=memory.device)
        self._generator = torch.Generator(memory.device)

    def normal(self, seed: int, count: int) -> Tensor:
        """`count` numbers of the tile with this seed, at the beginning of `scratch`."""
        return self.fill_(self.scratch[:count], seed)

    def fill_(self, numbers: Tensor, seed: int) -> Tensor:
        """Fill contiguous memory with the numbers of the tile with this seed, of which a CPU uses the low 32 bits."""
        return numbers.normal_(generator=self._generator.manual_seed(seed))


def tile_of(block: Block, source: Source) -> tuple[int, int]:
    """Rows and columns of the tiles that the whole weight of a block is drawn in."""
    width = max(1, min(block.length, source.tile))
    return source.tile // width, width


def add_noise_(block: Block, std: Tensor, seed: int, source: Source, clean: Tensor | None = None) -> None:
    """Add Gaussian noise to a block in place, a tile at a time. The sum is rounded once, to the weight's dtype.

    std: of every filter in it, (rows,). seed: of the parameter's draw, see `noise_seeds`. source: of its device and
    dtype. clean: what the noise is added to, of the shape of the block's memory and not in it; what is there by
    default. A filter that cannot be flattened and is larger than a tile takes memory of its own for the moment.
    """
    memory, filters, length, row, column = block[:5]
    if memory.numel() == 0:
        return
    std = std.view(-1, *[1] * (memory.ndim - 1))
    bottom, right = row + len(memory), column + math.prod(memory.shape[1:])
    height, width = tile_of(block, source)
    across = -(-length // width)
    seeds = hashes(seed, range(-(-filters // height) * across))
    if clean is not None:
        if memory.shape == (filters, width) and memory.is_contiguous() and memory.dtype == source.scratch.dtype:
            for tile, tile_seed in zip(memory.split(height), seeds, strict=True):
                source.fill_(tile, tile_seed)
            torch.addcmul(clean, memory, std, out=memory)
            return
        memory.copy_(clean)
    for top in range(row // height * height, bottom, height):
        rows = slice(max(top, row) - row, min(top + height, bottom) - row)
        parts = []
        for left in range(column // width * width, right, width):
            shape = min(height, filters - top), min(width, length - left)
            drawn = source.normal(seeds[top // height * across + left // width], math.prod(shape)).view(shape)
            normal = drawn[max(row - top, 0) : bottom - top, max(column - left, 0) : right - left]
            if memory.ndim == 2:
                begin = max(left, column) - column
                _add_(memory[rows, begin : begin + normal.shape[1]], normal, std[rows])
            else:
                parts.append(normal.clone() if across > 1 else normal)
        if parts:
            _add_(memory[rows], torch.cat(parts, 1).view(memory[rows].shape), std[rows])


def _add_(piece: Tensor, normal: Tensor, std: Tensor) -> None:
    if normal.dtype == piece.dtype:
        piece.addcmul_(normal, std)
    else:
        piece.copy_(normal.mul_(std).add_(piece))
