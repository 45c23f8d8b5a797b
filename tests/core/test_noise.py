"""Guarantee 5 of hf_rwp/README.md (noise), the pure part, and ARWP's and the schedule's closed forms.

1. A filter is as hf_rwp/README.md says, and std gamma times its norm (over sqrt(fan_in) in mode `filter_normalized`).
2. The noise is std times a tile's draws, in the order of the elements, rounded once; any shape, layout, dtype.
3. It is layout-free: whoever holds a part of a weight draws that part of the whole weight's noise, bit for bit.
4. It has the right law per filter, and is independent between replicas, micro-steps, windows and parameters.
5. A draw's seed is a function of where the draw stands; the global generator is neither read nor moved.

Oracles: Python loops over the elements in float64, closed forms. Statistical tests hold for all but one in a million
seeds: every p-value is compared with FALSE_ALARM over the number of tests.
"""

import copy
import itertools
import math
import os

import distributed
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import noises, seen_weights, snapshot
from scipy import stats
from torch import Tensor, nn

from hf_rwp import RWP
from hf_rwp.core import damping, noise, report, window
from hf_rwp.core.gamma import MODES
from hf_rwp.core.replicas import Replicas
from hf_rwp.core.sharding import Block, block_of

FALSE_ALARM = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]
TILE = 2**15

property_test = settings(max_examples=80, deadline=None, derandomize=True, database=None)
own_shapes = st.lists(st.integers(0, 5), max_size=4)
shapes = st.builds(lambda ones, own: (1,) * ones + tuple(own), st.integers(0, 2), own_shapes)
keys = st.integers(0, 2**64 - 1)


@st.composite
def weights(draw) -> Tensor:
    """Any shape with and without leading 1s, any floating or complex dtype, contiguous, channels_last or transposed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([*DTYPES, *COMPLEX]))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weight = torch.randn(draw(shapes), generator=generator, dtype=wide) * 10.0 ** draw(st.integers(-3, 2))
    weight = weight.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed"]))
    if layout == "channels_last" and weight.ndim == 4:
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "transposed" and weight.ndim > 1:
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    return weight


# The transcription of hf_rwp/README.md: nothing from hf_rwp.


def own_rows(weight: Tensor) -> Tensor:
    """The weight without its leading dimensions of size 1."""
    while weight.ndim and weight.shape[0] == 1:
        weight = weight[0]
    return weight


def filters(weight: Tensor) -> list[Tensor]:
    """The filters of a weight, as views of it: slices along dim 0; a tensor of at most one dimension is one."""
    weight = own_rows(weight)
    return [weight] if weight.ndim < 2 else [weight[index] for index in range(len(weight))]


def wide(weight: Tensor) -> Tensor:
    return weight.to(torch.complex128 if weight.is_complex() else torch.float64)


def transcribed_std(weight: Tensor, gamma: float, mode: str = "filter") -> Tensor:
    """sqrt(E|eps|^2) of every element, float64, in the weight's shape."""
    std = torch.empty(weight.shape, dtype=torch.float64)
    for own, out in zip(filters(weight), filters(std), strict=True):
        values = wide(own).flatten().tolist()
        norm = math.sqrt(math.fsum(abs(value) ** 2 for value in values))
        if values:
            out.fill_(gamma * norm / (math.sqrt(len(values)) if mode == "filter_normalized" else 1.0))
    return std


def splitmix64(key: int, number: int) -> int:
    """The `number`-th output of SplitMix64 (OOPSLA 2014, figure 17) from the state `key`; number 0 leaves it there."""
    z = (key + number * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def transcribed_normal(weight: Tensor, seed: int, tile: int = TILE) -> Tensor:
    """Standard normal draws in the weight's shape, float64: both parts of a complex number have one.

    The matrix filters x elements is cut in tiles: as many whole filters as make up at most `tile` elements, or, of a
    longer one, `tile` elements. Tiles are counted along the filters first, and each has a generator of its own.
    """
    parts = torch.empty((*weight.shape, 2) if weight.is_complex() else weight.shape, dtype=torch.float64)
    count = len(filters(weight))
    length = parts.numel() // max(1, count)
    width = max(1, min(length, tile))
    height, number, matrix = tile // width, 0, parts.view(count, length)
    for top in range(0, count, height):
        for left in range(0, length, width):
            piece = matrix[top : top + height, left : left + width]
            dtype = torch.float64 if weight.dtype in (torch.float64, torch.complex128) else torch.float32
            generator = torch.Generator().manual_seed(splitmix64(seed, number))
            piece.copy_(torch.empty(piece.shape, dtype=dtype).normal_(generator=generator))
            number += 1
    return torch.view_as_complex(parts) if weight.is_complex() else parts


def std_of(weight: Tensor, gamma: float, mode: str = "filter") -> Tensor:
    """The standard deviation of the real numbers of each filter, (rows,)."""
    block = block_of(weight)
    return noise.filter_norms(block).mul_(noise.std_factor(block, gamma, mode))


def by_element(values: Tensor, weight: Tensor) -> Tensor:
    """A value of each filter, in the weight's shape, float64."""
    result = torch.empty(weight.shape, dtype=torch.float64)
    for own, value in zip(filters(result), values, strict=True):
        own.fill_(value.item())
    return result


def seed_at(seed: int, window: int, micro_step: int, replica: int, position: int) -> int:
    (found,) = noise.noise_seeds(seed, window, micro_step, replica, [position])
    return found


def draw(weight: Tensor, std: Tensor, seed: int, tile: int = TILE) -> Tensor:
    """The noisy weight; the weight stays."""
    noisy = weight.clone()
    block = block_of(noisy)
    source = noise.Source(block.memory)
    source.tile = tile
    noise.add_noise_(block, std, seed, source)
    return noisy


# 1. Filters and their std


@property_test
@given(weights())
def test_filter_norms_are_norms_of_slices_after_leading_ones(weight):
    norms = noise.filter_norms(block_of(weight))
    assert norms.shape == (len(filters(weight)),)
    assert norms.dtype == (torch.float64 if weight.dtype in (torch.float64, torch.complex128) else torch.float32)
    torch.testing.assert_close(by_element(norms, weight), transcribed_std(weight, 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        *[((), 1), ((1,), 1), ((7,), 1), ((1, 7), 1), ((1, 1, 7), 1), ((1, 1), 1), ((0,), 1)],
        *[((10, 5), 10), ((5, 1), 5), ((64, 3, 7, 7), 64), ((5, 1, 1, 1), 5), ((0, 3), 0), ((3, 0), 3)],
        *[((1, 197, 384), 197), ((1, 1, 6, 2), 6)],
    ],
)
def test_number_of_filters(shape, count):
    block = block_of(torch.ones(shape))
    assert noise.filter_norms(block).shape == (count,)
    assert (block.filters, block.row, block.column) == (count, 0, 0)
    assert block.filters * block.length == math.prod(shape)


@property_test
@given(weights(), st.floats(0, 10), st.sampled_from(MODES))
def test_std_is_gamma_times_the_filters_norm(weight, gamma, mode):
    """And a complex number's is shared by its two parts."""
    before = weight.clone()
    std = by_element(std_of(weight, gamma, mode), weight) * (math.sqrt(2) if weight.is_complex() else 1)
    torch.testing.assert_close(std, transcribed_std(weight, gamma, mode), rtol=2e-6, atol=1e-30)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(4, 8), (4, 300, 5, 5), (1, 16, 32), (50,)])
def test_normalized_noise_is_gamma_times_the_weight_whatever_the_fan_in(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_square = by_element(std_of(weight, 0.2, "filter_normalized"), weight).square().sum()
    torch.testing.assert_close(expected_square.sqrt(), 0.2 * weight.norm())


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'rows'.*filter, filter_normalized"):
        noise.std_factor(block_of(torch.ones(3)), 0.1, "rows")


# 2. The addition


def check_noise_is_std_times_the_tiles_draws(weight: Tensor, std: Tensor, seed: int, tile: int = TILE) -> None:
    noisy = draw(weight, std, seed, tile)
    added = transcribed_normal(weight, seed, tile) * by_element(std, weight)
    exact = wide(weight) + added
    unit = torch.finfo(weight.dtype)
    for got, true, clean, eps in zip(*map(real_parts, (noisy, exact, weight, added)), strict=True):
        compute = torch.finfo(std.dtype).eps * (clean.abs() + eps.abs())
        rounding = unit.eps / 2 * true.abs() + unit.eps * unit.smallest_normal
        assert ((got - true).abs() <= rounding + compute).all()
    assert noisy.stride() == weight.clone().stride()


def real_parts(tensor: Tensor) -> list[Tensor]:
    return [tensor.real.double(), tensor.imag.double()] if tensor.is_complex() else [tensor.double()]


@property_test
@given(weights(), keys, st.sampled_from([1, 5, 20, 64, 4096, TILE]), st.floats(0, 3))
def test_noise_is_std_times_the_tiles_draws_rounded_once(weight, seed, tile, gamma):
    check_noise_is_std_times_the_tiles_draws(weight, std_of(weight, gamma, "filter_normalized"), seed, tile)


@pytest.mark.parametrize("dtype", [*DTYPES, *COMPLEX])
@pytest.mark.parametrize(
    "shape", [(32_767,), (32_768,), (32_769,), (90, 9, 9, 9), (3, 50_001), (1000, 1, 70), (1, 2, 40_000)]
)
def test_noise_of_a_large_weight_is_std_times_its_tiles_draws(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    weight = weight.to(dtype) if dtype.is_complex else weight.real.to(dtype)
    check_noise_is_std_times_the_tiles_draws(weight, std_of(weight, 0.5, "filter_normalized"), 5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("tile", [3, 10, TILE])
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_noise_follows_the_elements_and_not_the_memory(dtype, tile, layout):
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = weight.to(memory_format=torch.channels_last)
    if layout == "transposed":
        other = weight.transpose(0, 3).contiguous().transpose(0, 3)
    std = std_of(weight, 0.5)
    noisy = draw(weight, std, 2, tile)
    assert torch.equal(draw(other, std, 2, tile), noisy)
    assert not torch.equal(noisy, weight)


@pytest.mark.parametrize("shape", [(3, 100_000), (200_001,), (500, 1, 500), (1, 2, 100_000)])
def test_every_element_of_a_large_weight_gets_noise_of_its_own(shape):
    drawn = draw(torch.zeros(shape), torch.ones(len(filters(torch.empty(shape)))), 3).flatten()
    pairs = drawn[: drawn.numel() // 2 * 2].view(-1, 2)  # single draws repeat by chance
    assert pairs.unique(dim=0).shape[0] > 0.95 * pairs.shape[0]  # a repeated piece halves it
    variance = drawn.double().square().sum().item()
    assert_not_rare(2 * min(stats.chi2(drawn.numel()).cdf(variance), stats.chi2(drawn.numel()).sf(variance)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_is_bounded_and_accurate(dtype):
    scratch = noise.Source(torch.zeros(5000, 5000, dtype=dtype)).scratch
    assert scratch.shape == (TILE,)
    assert scratch.dtype == torch.promote_types(dtype, torch.float32)


# 3. However a weight is cut

CUT = [
    (50, 300),
    (250, 300),
    (3, 70_000),
    (10, 3, 3, 3),
    (1, 197, 24),
    (1, 1, 24),
    (7,),
    (768,),
    (3,),
    (),
    (3, 5),
    (2, 33_000),
]
CUT_LAST = [(10, 3, 3, 3), (10, 5, 2, 2), (2, 4000, 3, 3)]  # the last one's filters are larger than a tile


INNER = {1: [], 2: [1 / 2], 4: [1 / 4, 1 / 2, 3 / 4], "uneven": [1 / 7, 1 / 7, 5 / 8]}  # edges of the parts
CUTS = [*itertools.product([1, 2, 4], [1, 2, 4]), ("uneven", 1), (1, "uneven"), ("uneven", "uneven")]


def spans(size: int, cut: int | str) -> list[tuple[int, int]]:
    """Where each part begins and ends; some may be empty."""
    return list(itertools.pairwise([0, *(int(size * fraction) for fraction in INNER[cut]), size]))


def parts_of(block: Block, rows: int | str, columns: int | str) -> list[tuple[Block, Tensor]]:
    """Blocks of clones of the parts of a whole one, and the parts themselves."""
    parts, memory = [], block.memory
    inner = math.prod(memory.shape[2:])  # columns that stay together
    for (top, bottom), (left, right) in itertools.product(
        spans(memory.shape[0], rows), spans(memory.shape[1], columns)
    ):
        part = memory[top:bottom, left:right]
        parts.append((block._replace(memory=part.clone(), row=top, column=left * inner), part))
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    ("shape", "last"), [*((shape, False) for shape in CUT), *((shape, True) for shape in CUT_LAST)]
)
def test_the_noise_of_a_part_is_that_part_of_the_whole_weights_noise(shape, last, dtype):
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    clean = clean.to(memory_format=torch.channels_last) if last else clean
    std, noisy = std_of(clean, 0.5, "filter_normalized"), clean.clone()
    whole, source = block_of(noisy), noise.Source(block_of(noisy).memory)
    noise.add_noise_(whole, std, 11, source)
    assert not torch.equal(noisy, clean)
    for cut in CUTS:
        for (part, _), (_, expected) in zip(parts_of(block_of(clean), *cut), parts_of(whole, *cut), strict=True):
            noise.add_noise_(part, std[part.row : part.row + len(part.memory)], 11, source)
            assert torch.equal(part.memory, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    ("shape", "last"), [*((shape, False) for shape in CUT), *((shape, True) for shape in CUT_LAST)]
)
def test_noise_beside_clean_values_is_that_in_place(shape, last, dtype):
    """What was in the block's memory is no matter; a part of a weight is no exception."""
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    clean = clean.to(memory_format=torch.channels_last) if last else clean
    std, noisy, found = std_of(clean, 0.5), clean.clone(), torch.full_like(clean, torch.nan)
    source, values = noise.Source(block_of(clean).memory), clean.clone()
    noise.add_noise_(block_of(noisy), std, 11, source)
    noise.add_noise_(block_of(found), std, 11, source, block_of(values).memory)
    assert torch.equal(found, noisy)
    assert torch.equal(values, clean)
    for (part, own), (_, expected) in zip(
        parts_of(block_of(clean), *CUTS[-1]), parts_of(block_of(noisy), *CUTS[-1]), strict=True
    ):
        part.memory.fill_(torch.nan)
        noise.add_noise_(part, std[part.row : part.row + len(part.memory)], 11, source, own)
        assert torch.equal(part.memory, expected)


class Recorder(noise.Source):
    """Knows which tiles were drawn: their seeds and sizes."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__(memory)
        self.tiles: dict[int, int] = {}

    def normal(self, seed: int, count: int) -> Tensor:
        self.tiles[seed] = count
        return super().normal(seed, count)


@pytest.mark.parametrize("shape", CUT)
def test_tiles_are_a_function_of_the_whole_shape_alone(shape):
    def tiles(block: Block) -> dict[int, int]:
        source = Recorder(block.memory)
        noise.add_noise_(block, torch.ones(len(block.memory)), 11, source)
        return source.tiles

    whole = tiles(block_of(torch.zeros(shape)))
    assert sum(whole.values()) == math.prod(shape)
    assert max(whole.values()) <= TILE
    assert tiles(block_of(torch.zeros(shape, dtype=torch.bfloat16))) == whole
    assert tiles(block_of(torch.zeros((*shape, 2)).movedim(-1, 0)[1])) == whole
    for cut in CUTS:
        drawn: dict[int, int] = {}
        for part, _ in parts_of(block_of(torch.zeros(shape)), *cut):
            drawn |= tiles(part)
        assert drawn == whole


# 4. The law


def assert_not_rare(p_value: float, tests: int = 1) -> None:
    assert p_value >= FALSE_ALARM / tests, f"p = {p_value:.1e} in one of {tests} tests"


def assert_uncorrelated(samples: dict[tuple, Tensor]) -> None:
    """All pairs of samples, and of their squares: |r| * sqrt(n) is a standard normal's under independence."""
    tests = len(samples) * (len(samples) - 1)
    for power in (1, 2):
        moments = torch.stack([sample.flatten().double() ** power for sample in samples.values()])
        z = torch.corrcoef(moments) * math.sqrt(moments.shape[1])
        for (row, one), (column, other) in itertools.combinations(enumerate(samples), 2):
            p_value = 2 * stats.norm.sf(abs(z[row, column].item()))
            assert p_value >= FALSE_ALARM / tests, f"{one} and {other} are dependent: p = {p_value:.1e}"


def check_law(samples: list[Tensor], rounded: bool = False) -> None:
    """Each sample is one of N(0, 1). rounded: too coarsely to look like its distribution."""
    tests = 3 * len(samples)
    for sample in samples:
        n, values = sample.numel(), sample.flatten()
        assert_not_rare(2 * stats.norm.sf(abs(values.sum().item()) / math.sqrt(n)), tests)
        square = values.square().sum().item()
        assert_not_rare(2 * min(stats.chi2(n).cdf(square), stats.chi2(n).sf(square)), tests)
        if not rounded:
            assert_not_rare(stats.kstest(values.numpy(), "norm").pvalue, tests)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [*itertools.product([torch.float64], MODES), *zip([torch.float32, torch.bfloat16], MODES, strict=True)],
)
@pytest.mark.parametrize("shape", [(8, 64, 7, 7), (1, 16, 4096), (30_000,), (1, 9000), (2, 40_000)])
def test_noise_of_every_filter_is_gaussian_with_its_std(shape, dtype, mode):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for index, own in enumerate(filters(weight)):
        own.mul_(10.0 ** (index % 4))  # neighbours that differ by orders of magnitude
    weight = weight.to(dtype)
    gamma = 300.0 if dtype == torch.bfloat16 else 0.5  # beside it the rounding to bfloat16 does not show
    noisy = draw(weight, std_of(weight, gamma, mode), seed_at(4, 1, 0, 1, 2))
    z = (noisy.double() - weight.double()) / transcribed_std(weight, gamma, mode)
    check_law(filters(z), rounded=dtype == torch.bfloat16)


@pytest.mark.parametrize(("dtype", "mode"), zip(COMPLEX, MODES, strict=True))
@pytest.mark.parametrize("shape", [(8, 500), (1, 4, 6000), (60_000,), (2, 40_000)])
def test_both_parts_of_complex_noise_have_half_its_variance(shape, dtype, mode):
    """Smaller and larger than a tile: E|eps|^2 = std^2."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    for index, own in enumerate(filters(weight)):
        own.mul_(10.0 ** (index % 4))
    noisy = draw(weight, std_of(weight, 0.5, mode), seed_at(4, 1, 0, 1, 2))
    z = (noisy - weight).to(torch.complex128) / transcribed_std(weight, 0.5, mode) * math.sqrt(2)
    parts = [*filters(z.real), *filters(z.imag)]
    check_law(parts)
    assert_uncorrelated({(number,): part for number, part in enumerate(parts)})


def test_draws_are_independent_between_places():
    """Places that differ in one coordinate by one, from a corner and from the middle of a run."""
    places = {(0, 1, 0, 0, 0), (7, 9000, 3, 2, 50)}
    for place, axis in itertools.product(sorted(places), range(5)):
        places |= {(*place[:axis], place[axis] + step, *place[axis + 1 :]) for step in (1, 2)}
    zeros = torch.zeros(40_000, dtype=torch.float64)
    assert_uncorrelated({place: draw(zeros, torch.ones(1), seed_at(*place)) for place in sorted(places)})


def test_noises_in_a_run_are_independent_between_parameters_micro_steps_windows_and_replicas(monkeypatch):
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(80, 80, bias=False), nn.Linear(80, 80, bias=False)).double()
    nn.init.constant_(network[0].weight, 0.1)
    nn.init.constant_(network[1].weight, 0.1)
    samples = {}
    for index in (1, 3):
        model = copy.deepcopy(network)
        monkeypatch.setattr(window, "replicas_of", lambda *_, index=index: Replicas(index, 5))
        optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.0), model, gamma=1.0, accumulation_steps=3)
        with seen_weights(model) as seen:
            for _ in range(2):
                for _ in range(3):
                    model(torch.ones(1, 80, dtype=torch.float64)).sum().backward()
                optimizer.step()
        for slot, noise_by_name in enumerate(noises(seen, snapshot(network))):
            samples |= {(index, slot, name): eps for name, eps in noise_by_name.items()}
    assert len(samples) == 2 * 6 * 2
    assert_uncorrelated(samples)


# 5. Seeds and generators


@property_test
@given(keys, st.lists(keys, min_size=1, max_size=5))
def test_hashes_are_those_of_splitmix64(key, numbers):
    assert noise.hashes(key, numbers) == [splitmix64(key, number) for number in numbers]
    assert noise.hashes(numbers, numbers) == [splitmix64(number, number) for number in numbers]
    assert noise.hashes(numbers, 0) == [splitmix64(number, 0) for number in numbers]


def test_splitmix64_gives_the_published_numbers():
    """The first outputs from the state 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64")."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert noise.hashes(1234567, [1, 2, 3, 4]) == published


@property_test
@given(keys, keys)
def test_a_hash_is_one_to_one(key, number):
    """Its steps, each undone."""
    (z,) = noise.hashes(key, [number])
    z ^= z >> 31 ^ z >> 62
    z = z * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z ^= z >> 27 ^ z >> 54
    z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    z ^= z >> 30 ^ z >> 60
    assert (z - key) * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64 == number


def test_seeds_of_a_run_are_distinct():
    draws = itertools.product([0, 1, 42, -1, 2**40], range(1, 30), range(4), range(9))
    seeds = [seed for draw in draws for seed in noise.noise_seeds(*draw, range(20))]
    assert len(seeds) == len(set(seeds)) == 5 * 29 * 4 * 9 * 20
    assert min(seeds) >= 0
    assert max(seeds) < 2**64


place = st.tuples(st.integers(-(2**40), 2**40), *[st.integers(0, 2**40)] * 4)


@property_test
@given(place, place)
def test_a_seed_is_one_of_its_place_alone(one, other):
    assert (seed_at(*one) == seed_at(*other)) == (one == other)
    assert noise.noise_seeds(*one[:4], [7, one[4], 3])[1] == seed_at(*one)


def test_a_seed_is_the_same_in_another_process():
    place = (3, 14, 1, 5, [9, 2])
    assert distributed.run(1, noise.noise_seeds, *place) == [noise.noise_seeds(*place)]
    (other,) = distributed.run(1, hash, "what Python hashes with a seed of the process")
    assert other != hash("what Python hashes with a seed of the process") or "PYTHONHASHSEED" in os.environ


@pytest.mark.parametrize("shape", [(), (5,), (40, 9), (2, 300_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_global_generator_is_neither_read_nor_moved(shape, dtype):
    weight = torch.ones(shape, dtype=dtype)
    std = std_of(weight, 0.5)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(draw(weight, std, seed_at(0, 1, 0, 1, 0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


# ARWP, the schedule and the relative size


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (1, 3, 4), (2, 3, 2, 2)])
def test_arwp_fisher_is_the_decaying_sum_of_squared_filter_norms(shape, beta):
    generator = torch.Generator().manual_seed(6)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    fisher, history = None, []
    for gradient in gradients:
        before = None if fisher is None else fisher.clone()
        history.append((fisher, before))
        squared = noise.filter_norms(block_of(gradient)).square()
        fisher = damping.arwp_fisher(fisher, squared, beta)
    expected = torch.zeros(shape, dtype=torch.float64)
    for age, gradient in enumerate(reversed(gradients)):
        expected += beta**age * transcribed_std(gradient, 1.0).square()
    torch.testing.assert_close(by_element(fisher, expected), expected)
    assert all(before is None or torch.equal(kept, before) for kept, before in history)  # nothing changed in place


@pytest.mark.parametrize("eta", [0.0, 0.1, 10.0])
def test_arwp_damping_is_its_closed_form(eta):
    fisher = torch.tensor([0.0, 1e-3, 1.0, 250.0], dtype=torch.float64)
    expected = [1 / math.sqrt(1 + eta * f) for f in (0.0, 1e-3, 1.0, 250.0)]
    torch.testing.assert_close(damping.arwp_damping(fisher, eta), torch.tensor(expected, dtype=torch.float64))
    assert fisher.tolist() == [0.0, 1e-3, 1.0, 250.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_size_is_the_norm_of_the_difference_over_the_norm(dtype):
    clean = torch.tensor([3.0, -4.0], dtype=dtype)
    norms = report.noise_and_weight(torch.tensor([3.0, -3.5], dtype=dtype), clean)
    assert norms.tolist() == [0.5, 5.0]
    assert report.relative_size([norms.tolist()]) == pytest.approx(0.1)
    assert report.relative_size([[0.0, 0.0]]) == 0.0


def test_the_relative_size_of_a_cut_weight_is_that_of_the_whole():
    noisy, clean = torch.randn(2, 40, dtype=torch.float64)
    parts = [report.noise_and_weight(*own).tolist() for own in zip(noisy.split(17), clean.split(17), strict=True)]
    whole = (noisy - clean).norm() / clean.norm()
    assert report.relative_size(parts) == pytest.approx(whole.item(), rel=1e-12)
