"""The Triton kernels against `noise`, closed forms, and Philox and Box-Muller written again in NumPy.

Without a GPU, Triton's interpreter runs them on a CPU, in a process of its own: TRITON_INTERPRET=1 has to be there
before Triton is imported. With one (`-m gpu`) the same tests run the compiled kernels. The interpreter truncates to
bfloat16, so there a sum may be off by a unit in the last place; how the compiled kernel rounds is read in its PTX.

Statistical tests hold for all but one in a million seeds, as in test_noise.py.
"""

import functools
import itertools
import math
import multiprocessing
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from hf_rwp.core import noise
from hf_rwp.core.sharding import Block, block_of

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("hf_rwp.core.kernels")

FALSE_ALARM = 1e-6
DEVICES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOW = pytest.mark.slow  # for the interpreter; `-m gpu` runs them too
TWO_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)]
BLOCK = 4096  # elements of one program of the noise
# The interpreter takes its time for every program: weights are little larger than what decides how many there are.
SHAPES = [
    *[(), (1,), (5,), (64,), (1, 7), (1, 1, 9), (5, 1), (40, 3), (33, 64), (3, 65), (2, 3, 7, 7), (2, 144), (1, 3, 96)],
    *[(2, 1030), (4097,), (2, 4200), (1, 6, 3, 3), (1, 1, 4, 4)],
]
IN_PIECES = [(1, 1, 16_384), (2, 16_385), (33_000,)]  # to the norms of their filters: one, two and three
CHANNELS_LAST = [(6, 5, 3, 3), (5, 7, 2, 2), (12, 40, 3, 3), (3, 50, 4, 8), (2, 3, 16, 16), (3, 4, 3, 3, 3)]


@functools.cache
def interpreter() -> ProcessPoolExecutor:
    """A process in which Triton interprets; test_draws.py uses it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(len, ()).result()  # starts the process
    return pool


def call(name: str, arguments: dict) -> None:
    torch.set_num_threads(1)
    globals()[name].__wrapped__(**arguments)


def on_devices(test):
    """Run a test's body in the interpreter's process, and again with the compiled kernels where there is a GPU."""

    @functools.wraps(test)
    def run(device, **arguments):
        if device == "interpreter":
            interpreter().submit(call, test.__name__, {"device": "cpu", **arguments}).result()
        else:
            test(device, **arguments)

    return pytest.mark.parametrize("device", DEVICES)(run)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_layouts(device: str, dtype: torch.dtype) -> list[Tensor]:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [random(shape, seed).to(device, dtype) for seed, shape in enumerate(SHAPES + CHANNELS_LAST)]
    return [
        weight.to(memory_format=formats[weight.ndim]) if weight.shape in CHANNELS_LAST else weight for weight in weights
    ]


def planned(weights: Iterable[Tensor]):
    return kernels.plan([block_of(weight) for weight in weights])


def half_norms(weights: Iterable[Tensor]) -> list[Tensor]:
    """A std for the noise of every weight: half its filters' norms."""
    return [noise.filter_norms(block_of(weight)).float() / 2 for weight in weights]


def of_filters(std: Tensor, weight: Tensor) -> Tensor:
    """A number of each filter, in the shape that broadcasts to the weight's."""
    return (std.view(-1, 1) + torch.zeros_like(weight, dtype=std.dtype).reshape(len(std), -1)).view(weight.shape)


@functools.cache
def normals(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    """The draws alone, on the CPU."""
    weight = torch.zeros(shape, device=device)
    kernels.add_noise_(planned([weight]), [torch.ones(1, device=device)], [seed])
    return weight.cpu()


# Written again: nothing from hf_rwp or Triton. Philox4x32-10 is that of Salmon et al., "Parallel random numbers: as
# easy as 1, 2, 3" (SC11).


def philox(counters: np.ndarray, seed: int) -> list[np.ndarray]:
    """Four words, uint32, of each counter: 32 bits of it are used."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counters.astype(np.uint64), *[np.zeros(len(counters), np.uint64) for _ in range(3)]]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = second >> np.uint64(32), first >> np.uint64(32)
        c = [high[0] ^ c[1] ^ np.uint64(key[0]), second & mask, high[1] ^ c[3] ^ np.uint64(key[1]), first & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [word.astype(np.uint32) for word in c]


def expected_normals(index: np.ndarray, seed: int) -> np.ndarray:
    """Of every 4096 elements, 1024 * k + j gets normal k of the block's counter j: Box-Muller, in float64."""
    uniform = []
    for word in philox(index // BLOCK * 1024 + index % 1024, seed):
        signed = word.view(np.int32)
        folded = np.where(signed < 0, ~signed, signed).astype(np.float32)
        uniform.append((folded * np.float32(4.6566127342e-10)).astype(np.float64))
    four = []
    for first, second in (uniform[:2], uniform[2:]):
        radius = np.sqrt(-2 * np.log(np.maximum(first, 1e-7)))
        four += [radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)]
    return np.choose(index % BLOCK // 1024, four)


def test_philox_is_that_of_its_authors():
    """Known answers of Random123's kat_vectors, for a counter of 0 and a key of 0."""
    assert [int(word[0]) for word in philox(np.zeros(1, np.int64), 0)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


# Norms


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_noise(device, dtype):
    weights = all_layouts(device, dtype) + [random(shape).to(device, dtype) for shape in IN_PIECES]
    for weight, norms in zip(weights, kernels.filter_norms(planned(weights)), strict=True):
        expected = noise.filter_norms(block_of(weight.double()))
        assert (norms.dtype, norms.device, norms.shape) == (torch.float32, weight.device, expected.shape)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)


@on_devices
@pytest.mark.parametrize("factors", [[0.5] * 3, [0.5, -2.0, 3.0]])
def test_norms_are_multiplied_by_the_factors_of_their_blocks(device, factors):
    weights = [random(shape, 1).to(device) for shape in ((4, 100), (20_000,), (3, 20_000))]  # the others in pieces
    plan = planned(weights)
    for norms, plain, factor in zip(
        kernels.filter_norms(plan, factors), kernels.filter_norms(plan), factors, strict=True
    ):
        assert torch.equal(norms, plain * factor)


@on_devices
def test_norms_of_weights_that_are_not_finite_are_those_of_noise(device):
    weights = [random((4, 100), 1).to(device), random((20_000,), 2).to(device), torch.full((3, 5), 1e30, device=device)]
    weights[0][1, 7], weights[0][2, 99], weights[1][3] = math.inf, math.nan, -math.inf
    for weight, norms in zip(weights, kernels.filter_norms(planned(weights)), strict=True):
        torch.testing.assert_close(norms, noise.filter_norms(block_of(weight)), equal_nan=True)


# The draws


@on_devices
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1])
def test_draws_are_philox_and_box_muller(device, seed):
    for numel in (1, 1500, BLOCK + 1025):
        expected = torch.from_numpy(expected_normals(np.arange(numel), seed)).float()
        torch.testing.assert_close(normals((numel,), seed, device), expected, rtol=0, atol=1e-5)


def test_the_known_answers_are_philox_and_box_muller():
    expected = expected_normals(np.arange(4100), kernels._KNOWN_SEED)
    for element, normal in kernels._KNOWN.items():
        assert normal == pytest.approx(expected[element], abs=1e-5)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_passes(device, dtype):
    """Also where the defaults are others."""
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            kernels.check(torch.device(device), dtype)
    finally:
        torch.set_default_dtype(torch.float32)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, *[pytest.param(dtype, marks=SLOW) for dtype in DTYPES[::2]]])
def test_the_check_notices_other_noise_and_other_norms(device, dtype):
    right = {name: getattr(kernels, name) for name in ("add_noise_", "filter_norms")}
    results: dict[int, list[Tensor]] = {}  # of each call in a check

    def check(wrong: tuple[str, int, int] | None = None) -> None:
        """With what the kernels gave in the first check. wrong: a kernel, of how many weights, and whose is wrong."""
        numbers = itertools.count()

        def call(name, plan, *args):
            number = next(numbers)
            if number not in results:
                found = right[name](plan, *args)
                results[number] = [tensor.clone() for tensor in (plan.memories if found is None else found)]
            tensors = [tensor.clone() for tensor in results[number]]
            if wrong and wrong[:2] == (name, len(tensors)):
                tensors[wrong[2]].mul_(1.1)
            if name == "filter_norms":
                return tensors
            return [memory.copy_(tensor) for memory, tensor in zip(plan.memories, tensors, strict=True)]

        with pytest.MonkeyPatch.context() as patch:
            for name in right:
                patch.setattr(kernels, name, functools.partial(call, name))
            kernels.check(torch.device(device), dtype)

    check()
    # The plans of two are a weight and a part of its rows.
    for wrong in [*itertools.product(right, (3,), (1, 2)), ("add_noise_", 2, 1)]:
        with pytest.raises(RuntimeError, match="wrong norms or wrong noise"):
            check(wrong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels._KNOWN, 4099, 0.3)
        with pytest.raises(RuntimeError, match="wrong norms or wrong noise"):
            check()


def assert_not_rare(p_value: float, tests: int = 1) -> None:
    assert p_value >= FALSE_ALARM / tests, f"p = {p_value:.1e} in one of {tests} tests"


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_of_every_filter_is_gaussian_with_its_std(device, dtype):
    weight = (random((4, 3, 25, 200), 3) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, 1, 1)).to(device, dtype)
    noisy, (std,) = weight.clone(), half_norms([weight])
    kernels.add_noise_(planned([noisy]), [std], [2**40 + 3])
    z = ((noisy.double() - weight.double()).flatten(1) / std.double().view(4, 1)).cpu()
    for values in z:
        n, square = len(values), values.square().sum().item()
        assert_not_rare(2 * stats.norm.sf(abs(values.sum().item()) / math.sqrt(n)), 20)
        assert_not_rare(2 * min(stats.chi2(n).cdf(square), stats.chi2(n).sf(square)), 20)
        assert_not_rare(stats.kstest(values.numpy(), "norm").pvalue, 20)
    for limit in (3.0, 4.0):  # the tails
        test = stats.binomtest(int((z.abs() > limit).sum()), z.numel(), 2 * stats.norm.sf(limit))
        assert_not_rare(test.pvalue, 20)


@on_devices
def test_draws_are_independent_between_seeds_and_elements(device):
    """Seeds that differ in one bit, high or low; elements of one counter and neighbours."""
    draws = {seed: normals((5 * BLOCK,), seed, device) for seed in (9, 8, 9 + 2**31, 9 + 2**32, 9 + 2**63)}
    pairs = list(itertools.combinations(draws.values(), 2))
    pairs += [(draws[9][:-lag], draws[9][lag:]) for lag in (1, 2, 1024, 2048, 3072, 4096)]
    for (one, other), power in itertools.product(pairs, (1, 2)):
        correlation = torch.corrcoef(torch.stack([one, other]).double() ** power)[0, 1].item()
        assert_not_rare(2 * stats.norm.sf(abs(correlation) * math.sqrt(len(one))), 2 * len(pairs))


@on_devices
@pytest.mark.parametrize("dtype", TWO_DTYPES)
def test_noise_follows_the_elements_and_not_the_memory(device, dtype):
    for weight in all_layouts(device, dtype)[len(SHAPES) :]:
        contiguous, std = weight.contiguous(), half_norms([weight])
        clean = weight.clone()
        kernels.add_noise_(planned([weight, contiguous]), std * 2, [7, 7])
        assert weight.stride() == clean.stride() != contiguous.stride()
        assert torch.equal(weight, contiguous)
        assert (weight != clean).float().mean() > 0.9


@on_devices
def test_a_draw_is_one_of_its_seed_alone(device):
    weights = all_layouts(device, torch.float32)
    stds = half_norms(weights)
    together = [weight.clone() for weight in weights]
    kernels.add_noise_(planned(together), stds, range(len(weights)))
    for index in (0, 5, SHAPES.index((2, 4200)), len(weights) - 1):
        alone = weights[index].clone()
        kernels.add_noise_(planned([alone]), [stds[index]], [index])
        assert torch.equal(alone, together[index])


# The addition


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once(device, dtype):
    weights = all_layouts(device, dtype)
    for index, weight in enumerate(weights):
        (std,), noisy = half_norms([weight]), weight.clone()
        kernels.add_noise_(planned([noisy]), [std], [index])
        added = normals(weight.shape, index, device).double() * of_filters(std, weight).double().cpu()
        exact, info = weight.double().cpu() + added, torch.finfo(dtype)
        compute = 2**-23 * (weight.double().cpu().abs() + added.abs())
        share = 1.0 if dtype == torch.bfloat16 and device == "cpu" else 0.5
        rounding = share * info.eps * exact.abs() + info.eps * info.smallest_normal
        assert ((noisy.double().cpu() - exact).abs() <= rounding + compute).all()


@on_devices
@pytest.mark.parametrize("dtype", TWO_DTYPES)
def test_std_0_leaves_the_weights_bit_equal(device, dtype):
    weights = all_layouts(device, dtype)
    noisy = [weight.clone() for weight in weights]
    kernels.add_noise_(planned(noisy), [std * 0 for std in half_norms(weights)], [1] * len(weights))
    assert all(torch.equal(one, other) for one, other in zip(noisy, weights, strict=True))


@on_devices
def test_weights_and_stds_that_are_not_finite_give_what_torch_gives(device):
    weight, std = random((5, 1000), 5).to(device), torch.tensor([1.0, 0.0, math.inf, math.nan, 1e38], device=device)
    weight[0, 3], weight[1, 4], weight[2, 5], weight[2, 6] = math.inf, math.nan, -math.inf, math.inf
    expected = torch.addcmul(weight, normals(weight.shape, 6, device).to(device), std.view(5, 1))
    kernels.add_noise_(planned([weight]), [std], [6])
    torch.testing.assert_close(weight, expected, equal_nan=True)


@on_devices
@pytest.mark.parametrize("dtype", TWO_DTYPES)
def test_nothing_beside_the_weights_is_written(device, dtype):
    """Weights in the middle of larger memory: aligned for vector loads, and off by one element."""
    for numel, shift in itertools.product((1, 1024, 1032, BLOCK - 1, BLOCK + 8), (0, 1)):
        memory = torch.full((numel + 2 * BLOCK,), 7.0, dtype=dtype, device=device)
        weight = memory[BLOCK + shift :][:numel]
        plan = planned([weight])
        norms = kernels.filter_norms(plan)
        torch.testing.assert_close(norms[0].item(), 7 * math.sqrt(numel), rtol=1e-6, atol=0)
        kernels.add_noise_(plan, norms, [8])
        assert (weight != 7).float().mean() > 0.9
        assert (memory[: BLOCK + shift] == 7).all()
        assert (memory[BLOCK + shift + numel :] == 7).all()


@on_devices
def test_autograd_sees_the_change(device):
    weight = nn.Parameter(torch.ones(3, 4, device=device))
    square, version = weight.square().sum(), weight._version
    plan = planned([weight])
    norms = kernels.filter_norms(plan)
    assert weight._version == version
    assert not norms[0].requires_grad
    kernels.add_noise_(plan, norms, [1])
    assert weight._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@on_devices
def test_stds_may_be_expanded_or_strided(device):
    weight, seeds = random((6, 10)).to(device), [4, 4]
    one, other = weight.clone(), weight.clone()
    column = torch.full((6, 2), 0.5, dtype=torch.float64, device=device)[:, :1]
    kernels.add_noise_(planned([one, other]), [column.squeeze(1), torch.full((1,), 0.5, device=device)], seeds)
    assert torch.equal(one, other)
    assert not torch.equal(one, weight)


# Parts of weights

MATRICES = [(1, 4500), (4, 5), (20, 37), (5, 1032), (2, 4200)]
GRIDS = [(3, 1), (1, 3), (2, 2)]  # parts along the rows, along the columns


def parts(size: int, count: int, even: bool) -> list[slice]:
    """`count` slices that cover `size`, fewer where some would be empty; uneven ones begin where 8 does not divide."""
    width = -(-size // count) if even else 2 * size // (3 * count) + 1
    starts = [part * width for part in range(count) if part * width < size]
    return [slice(*bounds) for bounds in zip(starts, [*starts[1:], size], strict=True)]


def cuts(whole: Tensor, rows: int, columns: int, even: bool) -> list[tuple[Block, Tensor]]:
    """The blocks of a matrix cut into rows x columns, amid sevens in memory, and what each is a copy of."""
    found = []
    for some_rows, some_columns in itertools.product(
        parts(whole.shape[0], rows, even), parts(whole.shape[1], columns, even)
    ):
        piece = whole[some_rows, some_columns]
        memory = torch.full((piece.numel() + 2 * BLOCK,), 7.0, dtype=whole.dtype, device=whole.device)
        memory = memory[BLOCK + (not even) :][: piece.numel()].view(piece.shape).copy_(piece)
        found.append((Block(memory, *whole.shape, some_rows.start, some_columns.start), piece))
    return found


@on_devices
@pytest.mark.parametrize(
    ("dtype", "even"),
    [
        (torch.float32, True),
        (torch.bfloat16, False),
        pytest.param(torch.float32, False, marks=SLOW),
        pytest.param(torch.float16, False, marks=SLOW),
    ],
)
def test_a_cut_weight_has_the_whole_ones_noise(device, dtype, even):
    wholes = [random(shape, seed).to(device, dtype) for seed, shape in enumerate(MATRICES)]
    stds = half_norms(wholes)
    pieces = [
        (*piece, stds[seed], seed)
        for (seed, whole), grid in itertools.product(enumerate(wholes), GRIDS)
        for piece in cuts(whole, *grid, even)
    ]
    clean = [block.memory.clone() for block, *_ in pieces]
    plan = kernels.plan([block for block, *_ in pieces])
    assert {group.layout for group in plan.groups} == {"in order", "cut"}
    of_rows = [std[block.row : block.row + len(block.memory)] for block, _, std, _ in pieces]
    kernels.add_noise_(plan, of_rows, [seed for *_, seed in pieces])
    kernels.add_noise_(planned(wholes), stds, range(len(wholes)))
    for (block, expected, *_), before in zip(pieces, clean, strict=True):
        assert torch.equal(block.memory, expected)
        assert (block.memory != before).float().mean() > 0.8 or before.numel() < 50
        beside = block.memory.new_empty(0).set_(block.memory.untyped_storage())
        block.memory.fill_(7)
        assert (beside == 7).all()


@on_devices
@pytest.mark.parametrize(
    ("count", "even"),
    [(3, False), *[pytest.param(*pair, marks=SLOW) for pair in itertools.product((1, 2, 4), (True, False))]],
)
def test_a_channels_last_weight_cut_along_its_rows_has_the_whole_ones_noise(device, count, even):
    for shape in CHANNELS_LAST:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        whole = random(shape).to(device).to(memory_format=memory_format)
        (std,), sizes = half_norms([whole]), (shape[0], math.prod(shape[1:]))
        rows = parts(shape[0], count, even)
        blocks = [Block(whole[some].clone(), *sizes, some.start) for some in rows]
        plan = kernels.plan(blocks)
        assert [group.layout for group in plan.groups] == ["channels_last"]
        kernels.add_noise_(plan, [std[some] for some in rows], [5] * len(rows))
        kernels.add_noise_(planned([whole]), [std], [5])
        assert torch.equal(torch.cat([block.memory for block in blocks]), whole)


@on_devices
@pytest.mark.parametrize(
    ("shape", "filters", "length", "row", "column"),
    [
        ((3, 100), 2**17, 2**17, 2**17 - 3, 2**17 - 100),  # the last of 2^34 elements
        ((2, 2**13), 2**21, 2**13, 2**21 - 2, 0),
        ((1, 5000), 1, 2**34, 0, 2**34 - 5000),
        ((2, 100), 4, 2**32, 1, 2**32 - 100),
        ((2, 100), 2, 2**32 - 2, 0, 2**31 - 50),
    ],
)
def test_places_beyond_32_bits_are_told_apart(device, shape, filters, length, row, column):
    block = Block(torch.zeros(shape, device=device), filters, length, row, column)
    kernels.add_noise_(kernels.plan([block]), [torch.ones(shape[0], device=device)], [11])
    places = (row + np.arange(shape[0])[:, None]) * length + column + np.arange(shape[1])
    expected = torch.from_numpy(expected_normals(places.ravel(), 11)).float()
    torch.testing.assert_close(block.memory.cpu().flatten(), expected, rtol=0, atol=1e-5)


@on_devices
@pytest.mark.parametrize("even", [True, False])
def test_squared_norms_of_parts_add_up(device, even):
    for shape, grid in itertools.product([*MATRICES, (70, 64), (2, 40_000)], GRIDS):
        whole = random(shape).to(device)
        pieces, squares = cuts(whole, *grid, even), torch.zeros(shape[0], dtype=torch.float64, device=device)
        plan = kernels.plan([block for block, _ in pieces])
        for (block, piece), norms in zip(pieces, kernels.filter_norms(plan), strict=True):
            assert norms.shape == (len(piece),)
            squares[block.row :][: len(piece)] += norms.double().square()
        expected = noise.filter_norms(block_of(whole.double())) if shape[0] > 1 else whole.double().norm().view(1)
        torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-6, atol=0)


@on_devices
def test_a_plan_serves_many_calls(device):
    weights = [*all_layouts(device, torch.float32)[-8:-4], random((16_385,)).to(device)]
    once, twice = ([weight.clone() for weight in weights] for _ in range(2))
    kept = planned(twice)
    for seed in (1, 2):
        plan = planned(once)
        for some in (plan, kept):
            kernels.add_noise_(some, kernels.filter_norms(some), [seed] * len(weights))
    assert all(torch.equal(*pair) for pair in zip(once, twice, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(once, weights, strict=True))


# What they take


class Subclass(Tensor):
    pass


@on_devices
def test_supports_dense_filters_alone(device):
    def supports(weight: Tensor) -> bool:
        return kernels.supports(block_of(weight))

    assert all(supports(weight) for dtype in DTYPES for weight in all_layouts(device, dtype))
    assert supports(nn.Parameter(torch.ones(3, device=device)))
    matrix, images = torch.ones(6, 8, device=device), torch.ones(6, 4, 3, 3, device=device)
    last = images.to(memory_format=torch.channels_last)
    blocks = [
        block_of(torch.ones(0, device=device)),
        block_of(torch.ones(1, device=device).expand(5)),
        block_of(torch.ones(8, device=device)[::2]),
        block_of(last[:1]),  # its filters are slices of channels
        block_of(images.transpose(2, 3)),
        *[block_of(torch.ones(3, dtype=dtype, device=device)) for dtype in (torch.float64, torch.int32)],
        block_of(torch.ones(3, dtype=torch.complex64, device=device)),
        Block(matrix[:0], 6, 8),
        Block(matrix.T, 8, 6),
        Block(matrix[:, :4], 6, 8),
        Block(last, 6, 72, 0, 36),
        Block(torch.ones(1, 1, device=device), 2**17 + 1, 2**17),
    ]
    for block in blocks:
        assert not kernels.supports(block)
        with pytest.raises(ValueError, match="supports"):
            kernels.plan([block_of(matrix), block])
    assert not kernels.supports(Block(torch.ones(3, 3, device=device).to_sparse(), 3, 3))
    assert not supports(torch.ones(3, device=device).as_subclass(Subclass))
    assert not supports(torch.ones(1, device="meta").expand(2**31 - 1).contiguous())
    assert kernels.supports(Block(matrix[2:4], 6, 8, 2, 0))
    assert kernels.supports(Block(matrix[:, :4].contiguous(), 6, 8, 0, 4))
    assert kernels.supports(Block(torch.ones(1, 1, device=device), 2**17, 2**17))
    assert kernels.filter_norms(kernels.plan([])) == []
    kernels.add_noise_(kernels.plan([]), [], [])
    with pytest.raises(ValueError, match="1 blocks, 1 stds and 2 seeds"):
        kernels.add_noise_(planned([torch.ones(1, device=device)]), [torch.ones(1, device=device)], [1, 2])


def test_a_cpu_is_left_to_torch():
    assert not kernels.supports(block_of(torch.ones(3)))


# The compiled kernels


@functools.cache
def compiled(kernel: str, dtype: torch.dtype, backend: str, architecture: int | str, layout: str = "in order"):
    """A kernel compiled as its launch would, for a device that need not be there."""
    constants = {"DTYPE": kernels._DTYPES[dtype], "ALIGNMENT": 16}
    pointers = {"addresses": "*u64", "geometry": "*i64", "programs": "*i32", "norms": "*fp32"}
    warps = 4
    if kernel == "_noise_kernel":
        pointers = {"addresses": "*u64", "call": "*u64", "geometry": "*i64", "programs": "*i32"}
        constants["LAYOUT"] = layout
        warps = 8
    source = triton.compiler.ASTSource(
        getattr(kernels, kernel),
        pointers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
    )
    target = triton.backends.compiler.GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    return triton.compile(source, target=target, options={"num_warps": warps})


LAYOUTS = ["in order", "channels_last", "cut"]
KERNELS = [("_norms_kernel", "in order"), *[("_noise_kernel", layout) for layout in LAYOUTS]]
TARGETS = [*[("cuda", 90, dtype) for dtype in DTYPES], ("cuda", 80, torch.bfloat16), ("hip", "gfx942", torch.bfloat16)]
# All for one target, and one or two for the others: a dtype is but a load and a store in each of them.
IN_CI = {*itertools.product(TARGETS[1:2], KERNELS), (TARGETS[-1], KERNELS[0])}
IN_CI |= {(target, KERNELS[1 + number % 3]) for number, target in enumerate(TARGETS)}
COMPILED = [pytest.param(*pair, marks=[] if pair in IN_CI else SLOW) for pair in itertools.product(TARGETS, KERNELS)]


@pytest.fixture
def _new_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("_new_cache")
@pytest.mark.parametrize(("target", "kernel"), COMPILED)
def test_compiles_without_a_gpu(target, kernel):
    (backend, architecture, dtype), (name, layout) = target, kernel
    try:
        binary = compiled(name, dtype, backend, architecture, layout).asm
    except Exception as error:
        if backend == "hip" and "linker" in str(error):  # Triton 3.3's comes with ROCm
            pytest.skip(str(error))
        raise
    assert binary["cubin" if backend == "cuda" else "hsaco"]


@pytest.mark.slow  # true of one version of Triton, which CI does not choose
@pytest.mark.usefixtures("_new_cache")
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_weights_are_read_and_written_as_vectors(dtype):
    norms, noisy = (compiled(kernel, dtype, "cuda", 90).asm["ptx"] for kernel in ("_norms_kernel", "_noise_kernel"))
    assert "ld.global.v4.b32" in norms  # 16 bytes
    width = 4 if dtype == torch.float32 else 2  # 4 elements
    assert len(re.findall(rf"ld\.global\.v{width}\.b32", noisy)) == 4
    assert len(re.findall(rf"st\.global\.v{width}\.b32", noisy)) == 4


@pytest.mark.usefixtures("_new_cache")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_compiled_sum_is_rounded_to_the_nearest(layout):
    ptx = compiled("_noise_kernel", torch.bfloat16, "cuda", 90, layout).asm["ptx"]
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)
    assert not re.search(r"cvt\.rz\.bf16", ptx)


@pytest.mark.slow  # true of one version of Triton, which CI does not choose
@pytest.mark.usefixtures("_new_cache")
@pytest.mark.parametrize(("kernel", "layout"), KERNELS)
def test_registers_do_not_spill(tmp_path, kernel, layout):
    """The stack is what sin and cos keep for huge angles: 28 bytes, never reached."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled(kernel, torch.float32, "cuda", 90, layout).asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers <= 64
    assert stack <= 32


# On a GPU


def resnet50_shapes() -> list[tuple[int, ...]]:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return [tuple(weight.shape) for weight in timm.create_model("resnet50").parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_resnet_takes_a_handful_of_launches(memory_format):
    weights = [torch.randn(shape, device="cuda") for shape in resnet50_shapes()]
    weights = [weight.to(memory_format=memory_format) if weight.ndim == 4 else weight for weight in weights]
    plan = planned(weights)
    perturb = functools.partial(kernels.add_noise_, plan, kernels.filter_norms(plan), range(len(weights)))
    for function in (functools.partial(kernels.filter_norms, plan), perturb):
        function()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        launches = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert 0 < len(launches) <= 4  # a kernel and a copy for each kind of layout


@pytest.mark.gpu
def test_two_calls_on_a_gpu_give_the_same_bits():
    weights = [torch.randn(shape, device="cuda") for shape in resnet50_shapes()]
    norms = [kernels.filter_norms(planned(weights)) for _ in range(2)]
    noisy = [[weight.clone() for weight in weights] for _ in range(2)]
    for copies in noisy:
        kernels.add_noise_(planned(copies), norms[0], range(len(weights)))
    assert all(torch.equal(*pair) for pairs in (norms, noisy) for pair in zip(*pairs, strict=True))
