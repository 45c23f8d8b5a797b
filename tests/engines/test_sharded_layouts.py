"""The noise of a weight is the same however a mesh of processes holds it: the plain run is the oracle."""

import copy
import itertools
import math

import pytest
import torch
from distributed import run, run_each
from sharded import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.gamma import MODES
from hf_rwp.core.noise import Source, add_noise_, std_factor
from hf_rwp.core.sharding import block_of, local_of

OLD = torch.__version__ < (2, 9)  # gloo sends no complex numbers there
SHAPES = [
    (50, 300),
    (3, 100_000),  # tiles are parts of rows
    (700, 90),  # tiles are several rows, and there are two
    (10, 3, 3, 3),
    (4, 3, 3, 3),  # one filter a rank
    (1, 197, 24),
    (1, 1, 24),
    (3, 5),  # fewer filters than ranks
    (7,),
    (768,),
    (3,),
    (),
    (0, 4),
]
# By name: the mesh, and what each of its dimensions does.
LAYOUTS = {
    "Shard(0)/4": ((4,), [Shard(0)]),
    "Shard(0)/2": ((2, 2), [Shard(0), Replicate()]),
    "Replicate x Shard(0)": ((2, 2), [Replicate(), Shard(0)]),
    "Shard(1)/2": ((2, 2), [Replicate(), Shard(1)]),
    "Shard(1)/4": ((4,), [Shard(1)]),
    "Shard(2)/4": ((4,), [Shard(2)]),
    "Shard(0) x Shard(1)": ((2, 2), [Shard(0), Shard(1)]),
    "Shard(0) x Shard(0)": ((2, 2), [Shard(0), Shard(0)]),
    "Shard(1) x Shard(1)": ((2, 2), [Shard(1), Shard(1)]),
    "Replicate x Replicate": ((2, 2), [Replicate(), Replicate()]),
    "_StridedShard x Shard(0)": ((2, 2), "fully_shard of Shard(0)"),
    "Shard(0) of Shard(1)": ((2, 2), "fully_shard of Shard(1)"),
}


def weight_of(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator)


def laid_out(plain, mesh, layout):
    """A DTensor of `plain`'s values."""
    if isinstance(layout, list):
        return distribute_tensor(plain, mesh, layout)
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(plain, mesh["tp"], [Shard(int(layout[-2]))]))
    fully_shard(module, mesh=mesh["dp"])
    return module.weight.detach()


def noisy(weight, factor):
    """A copy of a weight with noise in it, and the standard deviations."""
    weight = copy.deepcopy(weight)
    target = Target(0, "weight", weight, local_of(weight), block_of(weight))
    stds = Draws().add_([target], [factor], [17])
    return weight, stds[0], target.block


def fits(layout, shape):
    """Whether a layout can hold a shape, and is of those that RWP works with."""
    dims = [0, int(layout[-2])] if isinstance(layout, str) else [p.dim for p in layout if isinstance(p, Shard)]
    if OLD and layout == "fully_shard of Shard(0)" and math.prod(shape[:1]) % 4:
        return False  # which torch 2.8 does not put together again
    if layout == "fully_shard of Shard(1)" and shape[1:2] == (1,):
        return False  # of which torch itself loses some
    first = next((dim for dim, size in enumerate(shape) if size != 1), len(shape))
    return all(dim < len(shape) and (dim <= first + 1 or shape[dim] == 1) for dim in dims)


def differences(dtype, shapes):
    """How many cases there were, and which are not as in the plain run."""
    found, cases, wide = [], 0, torch.promote_types(dtype, torch.float64)
    meshes = {
        (4,): init_device_mesh("cpu", (4,)),
        (2, 2): init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")),
    }
    for (name, (mesh, layout)), shape in itertools.product(LAYOUTS.items(), shapes):
        if not fits(layout, shape):
            continue
        cases += 1
        plain = weight_of(shape, dtype)
        sharded = laid_out(plain, meshes[mesh], layout)
        assert torch.equal(whole(sharded), plain)
        factor = std_factor(block_of(plain), 0.01)
        expected, whole_stds, _ = noisy(plain, factor)
        actual, stds, block = noisy(sharded, factor)
        own = whole_stds.expand(block.filters)[block.row :][: len(block.memory)]
        stds = stds.expand_as(own)
        exact = torch.linalg.vector_norm(block_of(plain.to(wide)).memory, dim=1) * factor
        right = {
            "factors": all(std_factor(block, 0.1, m) == std_factor(block_of(plain), 0.1, m) for m in MODES),
            "norms": within_an_ulp(stds, exact[block.row :]) if block.groups else torch.equal(stds, own),
            "noise": torch.equal(with_noise(sharded, own), expected),
            "sum": torch.allclose(whole(actual), expected, rtol=0, atol=1e-4),
        }
        found += [(name, shape, what) for what in right if not right[what]]
    return cases, found


def with_noise(sharded, stds):
    """The whole weight with noise of given standard deviations: its own might be rounded otherwise."""
    sharded = copy.deepcopy(sharded)
    block = block_of(sharded)
    add_noise_(block, stds, 17, Source(block.memory))
    return whole(sharded)


def within_an_ulp(actual, expected):
    """Of float32. expected: of as many filters, or more."""
    expected = expected[: len(actual)].float()
    infinite = torch.full_like(expected, torch.inf)
    return bool(
        ((torch.nextafter(expected, -infinite) <= actual) & (actual <= torch.nextafter(expected, infinite))).all()
    )


@pytest.mark.parametrize(
    ("dtype", "shapes", "count"),
    [
        pytest.param(torch.float32, SHAPES, 111 if OLD else 119, id="real"),
        pytest.param(torch.complex64, [(50, 300), (3, 5)], 22, id="complex"),
        pytest.param(torch.complex64, [(4, 3, 3, 3), (7,)], 17, id="complex, more", marks=pytest.mark.slow),
    ],
)
def test_noise_and_norms_are_those_of_the_plain_run(dtype, shapes, count):
    if OLD and dtype.is_complex:
        pytest.skip("gloo sends no complex numbers there")
    ranks = run(4, differences, dtype, shapes, keep_group=True)
    assert ranks == [(count, [])] * 4


def refusals(shape, dim):
    sharded = distribute_tensor(weight_of(shape, torch.float32), init_device_mesh("cpu", (4,)), [Shard(dim)])
    try:
        return block_of(sharded)._replace(groups=()).column
    except NotImplementedError as error:
        return str(error)


def test_shards_along_an_inner_dimension_are_refused_by_name_on_all_ranks():
    """Also where some ranks hold nothing, or a whole dimension: of 2 along dim 2 the others hold none."""
    shapes = [((10, 3, 3, 3), 2), ((10, 3, 2, 3), 2), ((10, 3, 3, 3), 3), ((1, 10, 6, 2), 3), ((10, 3, 3, 3), 1)]
    *inner, second = run_each(4, refusals, shapes, keep_group=True)
    for (shape, dim), answers in zip(shapes, inner, strict=False):
        assert all(f"a weight of shape {shape} is cut along dim {dim}" in answer for answer in answers)
    assert second == [0, 9, 18, 27]
