"""Guarantee 5 of design.md (noise), the pure part, and ARWP's and the schedule's closed forms.

1. A filter is what design.md says, and std is gamma times its norm (over sqrt(fan_in) in mode `filter_normalized`).
2. The noise is std times the generator's draws, in the order of the elements, rounded once; any shape, layout, dtype.
3. It has the right law per filter, and is independent between replicas, micro-steps, windows and parameters.
4. A draw's seed is a function of where the draw stands; the global generator is neither read nor moved.

Oracles: Python loops over the elements in float64, closed forms. Statistical tests hold for all but one in a million
seeds: every p-value is compared with FALSE_ALARM over the number of tests.
"""

import itertools
import math
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import noises, seen_weights, snapshot
from scipy import stats
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import hf_rwp.optimizer
from hf_rwp import RWP
from hf_rwp.core import noise

FALSE_ALARM = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

property_test = settings(max_examples=150, deadline=None, derandomize=True, database=None)
own_shapes = st.lists(st.integers(0, 5), max_size=4)
shapes = st.builds(lambda ones, own: (1,) * ones + tuple(own), st.integers(0, 2), own_shapes)


@st.composite
def weights(draw) -> Tensor:
    """Any shape with and without leading 1s, any floating dtype, contiguous, channels_last or transposed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(draw(shapes), generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-3, 2))
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed"]))
    if layout == "channels_last" and weight.ndim == 4:
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "transposed" and weight.ndim > 1:
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    return weight


# The transcription of design.md: nothing from hf_rwp.


def own_rows(weight: Tensor) -> Tensor:
    """The weight without its leading dimensions of size 1."""
    while weight.ndim and weight.shape[0] == 1:
        weight = weight[0]
    return weight


def filters(weight: Tensor) -> list[Tensor]:
    """The filters of a weight, as views of it: slices along dim 0; a tensor of at most one dimension is one."""
    weight = own_rows(weight)
    return [weight] if weight.ndim < 2 else [weight[index] for index in range(len(weight))]


def transcribed_std(weight: Tensor, gamma: float, mode: str = "filter") -> Tensor:
    """The standard deviation of every element, float64, in the weight's shape."""
    std = torch.empty(weight.shape, dtype=torch.float64)
    for own, out in zip(filters(weight), filters(std), strict=True):
        values = own.double().flatten().tolist()
        norm = math.sqrt(math.fsum(value * value for value in values))
        if values:
            out.fill_(gamma * norm / (math.sqrt(len(values)) if mode == "filter_normalized" else 1.0))
    return std


def transcribed_draws(weight: Tensor, generator: torch.Generator, length: int) -> Tensor:
    """Standard normal draws, float64, in the weight's shape: `length` elements at a time, but never part of a filter.

    One filter that is larger is drawn at once. A single filter's pieces are made of its elements instead. In pieces of
    2^13 elements and more each is the mean of one of 2^16 equally likely parts of N(0, 1): 16 random bits say which.
    """
    edges = stats.norm.pdf(stats.norm.ppf(np.arange(2**16 + 1) / 2**16))
    means = (edges[:-1] - edges[1:]) * 2**16
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    drawn = torch.empty(weight.shape, dtype=torch.float64)
    rows = own_rows(drawn)
    rows = rows.unsqueeze(0) if rows.ndim == 0 else rows
    for piece in rows.split(max(1, length // max(1, rows[:1].numel()))) if weight.numel() else ():
        if piece.numel() < 2**13:
            normal = torch.empty(piece.numel(), dtype=dtype).normal_(generator=generator)
        else:
            words = torch.empty(-(-piece.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
            chosen = [words.numpy().astype("uint64") >> np.uint64(16 * part) & 0xFFFF for part in range(4)]
            normal = torch.from_numpy(means[np.stack(chosen, axis=1).ravel()[: piece.numel()].astype(int)])
        piece.copy_(normal.view(piece.shape))
    return drawn


def generator_at(*place: int) -> torch.Generator:
    return torch.Generator().manual_seed(noise.noise_seed(*place))


def draw(weight: Tensor, std: Tensor, generator: torch.Generator, length: int | None = None) -> Tensor:
    """The noisy weight; the weight stays. length: of the scratch's rows, if not all of them."""
    noisy = weight.clone()
    noise.add_noise_(noisy, std, generator, noise.new_scratch(weight)[:, :length])
    return noisy


# 1. Filters and their std


@property_test
@given(weights())
def test_filter_norms_are_norms_of_slices_after_leading_ones(weight):
    norms = noise.filter_norms(weight)
    assert norms.ndim == weight.ndim
    assert norms.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double().expand(weight.shape), transcribed_std(weight, 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        *[((), 1), ((1,), 1), ((7,), 1), ((1, 7), 1), ((1, 1, 7), 1), ((1, 1), 1), ((0,), 1)],
        *[((10, 5), 10), ((5, 1), 5), ((64, 3, 7, 7), 64), ((5, 1, 1, 1), 5), ((0, 3), 0), ((3, 0), 3)],
        *[((1, 197, 384), 197), ((1, 1, 6, 2), 6)],
    ],
)
def test_number_of_filters(shape, count):
    assert noise.filter_norms(torch.ones(shape)).numel() == count


@property_test
@given(weights(), st.floats(0, 10), st.sampled_from(noise.MODES))
def test_std_is_gamma_times_the_filters_norm(weight, gamma, mode):
    before = weight.clone()
    std = noise.noise_std(weight, gamma, mode).double().expand(weight.shape)
    torch.testing.assert_close(std, transcribed_std(weight, gamma, mode), rtol=2e-6, atol=1e-30)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(4, 8), (4, 300, 5, 5), (1, 16, 32), (50,)])
def test_normalized_noise_is_gamma_times_the_weight_whatever_the_fan_in(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_square = noise.noise_std(weight, 0.2, "filter_normalized").expand(shape).square().sum()
    torch.testing.assert_close(expected_square.sqrt(), 0.2 * weight.norm())


@property_test
@given(weights(), st.floats(0.01, 10), st.sampled_from(noise.MODES))
def test_damping_multiplies_the_std_of_each_filter(weight, gamma, mode):
    damping = torch.linspace(0.1, 1, noise.filter_norms(weight).numel()).view(noise.filter_norms(weight).shape)
    torch.testing.assert_close(
        noise.noise_std(weight, gamma, mode, damping), noise.noise_std(weight, gamma, mode) * damping, equal_nan=True
    )


# 2. The addition


def check_noise_is_std_times_the_generators_draws(
    weight: Tensor, std: Tensor, seed: int, length: int | None, accuracy: float = 0.0
) -> None:
    """accuracy: of a draw from N(0, 1), beside rounding."""
    noisy = draw(weight, std, torch.Generator().manual_seed(seed), length)
    drawn = transcribed_draws(weight, torch.Generator().manual_seed(seed), length or 2**15)
    added = drawn * std.double().expand(weight.shape)
    exact = weight.double() + added
    compute = torch.finfo(std.dtype).eps * (weight.double().abs() + added.abs()) + accuracy * std
    unit = torch.finfo(weight.dtype)
    rounding = unit.eps / 2 * exact.abs() + unit.eps * unit.smallest_normal
    assert ((noisy.double() - exact).abs() <= rounding + compute).all()
    assert noisy.stride() == weight.clone().stride()


@property_test
@given(weights(), st.integers(0, 2**32), st.sampled_from([1, 5, 20, 64, 4096]), st.floats(0, 3))
def test_noise_is_std_times_the_generators_draws_rounded_once(weight, seed, length, gamma):
    std = noise.noise_std(weight, gamma, "filter_normalized")
    check_noise_is_std_times_the_generators_draws(weight, std, seed, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(8191,), (8192,), (8193,), (70_001,), (90, 9, 9, 9), (3, 50_001), (1000, 1, 70), (1, 2, 40_000)]
)
def test_noise_of_a_large_weight_is_std_times_its_levels_rounded_once(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    std = noise.noise_std(weight, 0.5, "filter_normalized")
    check_noise_is_std_times_the_generators_draws(weight, std, 5, None, accuracy=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_are_those_of_the_standard_normal_law(dtype):
    levels = torch.from_numpy(noise._normal_levels(dtype)).double()
    cumulative = stats.norm.cdf(levels.numpy()) * 2**16
    assert (np.floor(cumulative) == np.arange(2**16)).all()  # no more than 2^-16 from the law anywhere
    torch.testing.assert_close(levels, -levels.flip(0), rtol=1e-6, atol=1e-9)
    assert levels.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert levels.pow(4).mean().item() == pytest.approx(3, rel=1e-4)


def test_levels_do_not_depend_on_where_they_are_first_needed():
    drawn = []
    for context in (nullcontext(), torch.device("meta"), torch.inference_mode(), FakeTensorMode()):
        noise._normal_levels.cache_clear()
        with (
            context,
            pytest.raises(RuntimeError, match="numpy") if isinstance(context, FakeTensorMode) else nullcontext(),
        ):
            weight = torch.zeros(9000, device="cpu")
            draw(weight, torch.ones(1, device="cpu"), torch.Generator().manual_seed(3))
        drawn.append(draw(torch.zeros(9000), torch.ones(1), torch.Generator().manual_seed(3)))
    assert all(torch.equal(weight, drawn[0]) for weight in drawn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [3, 10, 2**15])
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_noise_follows_the_elements_and_not_the_memory(dtype, length, layout):
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = weight.to(memory_format=torch.channels_last)
    if layout == "transposed":
        other = weight.transpose(0, 3).contiguous().transpose(0, 3)
    std = noise.noise_std(weight, 0.5)
    noisy = draw(weight, std, torch.Generator().manual_seed(2), length)
    assert torch.equal(draw(other, std, torch.Generator().manual_seed(2), length), noisy)
    assert not torch.equal(noisy, weight)


@pytest.mark.parametrize("shape", [(3, 300_000), (700_001,), (1000, 1, 1000), (1, 2, 400_000)])
def test_every_element_of_a_large_weight_gets_noise_of_its_own(shape):
    drawn = draw(torch.zeros(shape), torch.ones([1] * len(shape)), torch.Generator().manual_seed(3)).flatten()
    pairs = drawn[: drawn.numel() // 2 * 2].view(-1, 2)  # single draws repeat by chance
    assert pairs.unique(dim=0).shape[0] > 0.95 * pairs.shape[0]  # a repeated piece halves it
    variance = drawn.double().square().sum().item()
    assert_not_rare(2 * min(stats.chi2(drawn.numel()).cdf(variance), stats.chi2(drawn.numel()).sf(variance)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_is_bounded_and_accurate(dtype):
    scratch = noise.new_scratch(torch.zeros(5000, 5000, dtype=dtype))
    assert scratch.shape == (2, 2**15)
    assert scratch.dtype == torch.promote_types(dtype, torch.float32)


# 3. The law


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


@pytest.mark.parametrize("mode", noise.MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 64, 7, 7), (1, 16, 4096), (30_000,), (1, 9000)])
def test_noise_of_every_filter_is_gaussian_with_its_std(shape, dtype, mode):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for index, own in enumerate(filters(weight)):
        own.mul_(10.0 ** (index % 4))  # neighbours that differ by orders of magnitude
    weight = weight.to(dtype)
    gamma = 300.0 if dtype == torch.bfloat16 else 0.5  # beside it the rounding to bfloat16 does not show
    noisy = draw(weight, noise.noise_std(weight, gamma, mode), generator_at(4, 1, 0, 1, 2))
    z = (noisy.double() - weight.double()) / transcribed_std(weight, gamma, mode)
    for sample in filters(z):
        n, values = sample.numel(), sample.flatten()
        assert_not_rare(2 * stats.norm.sf(abs(values.sum().item()) / math.sqrt(n)), 3 * len(filters(z)))
        square = values.square().sum().item()
        p_value = 2 * min(stats.chi2(n).cdf(square), stats.chi2(n).sf(square))
        assert_not_rare(p_value, 3 * len(filters(z)))
        if dtype != torch.bfloat16:
            assert_not_rare(stats.kstest(values.numpy(), "norm").pvalue, 3 * len(filters(z)))


def test_draws_are_independent_between_places():
    """Places that differ in one coordinate by one, from a corner and from the middle of a run."""
    places = {(0, 1, 0, 0, 0), (7, 9000, 3, 2, 50)}
    for place, axis in itertools.product(sorted(places), range(5)):
        places |= {(*place[:axis], place[axis] + step, *place[axis + 1 :]) for step in (1, 2)}
    zeros = torch.zeros(40_000, dtype=torch.float64)
    assert_uncorrelated({place: draw(zeros, torch.ones(1), generator_at(*place)) for place in sorted(places)})


def test_noises_in_a_run_are_independent_between_parameters_micro_steps_windows_and_replicas(monkeypatch):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(80, 80, bias=False), nn.Linear(80, 80, bias=False)).double()
    nn.init.constant_(model[0].weight, 0.1)
    nn.init.constant_(model[1].weight, 0.1)
    clean, samples = snapshot(model), {}
    for index in (1, 3):
        monkeypatch.setattr(hf_rwp.optimizer, "this_replica", lambda index=index: (index, 5))
        optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.0), model, gamma=1.0, accumulation_steps=3)
        with seen_weights(model) as seen:
            for _ in range(2):
                for _ in range(3):
                    model(torch.ones(1, 80, dtype=torch.float64)).sum().backward()
                optimizer.step()
        for slot, noise_by_name in enumerate(noises(seen, clean)):
            samples |= {(index, slot, name): eps for name, eps in noise_by_name.items()}
        optimizer.remove()
    assert len(samples) == 2 * 6 * 2
    assert_uncorrelated(samples)


# 4. Seeds and generators


def test_seeds_of_a_run_are_distinct():
    places = itertools.product([0, 1, 42, -1, 2**40], range(1, 30), range(4), range(9), range(20))
    seeds = [noise.noise_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < 2**64


place = st.tuples(st.integers(-(2**40), 2**40), *[st.integers(0, 2**40)] * 4)


@property_test
@given(place, place)
def test_a_seed_is_one_of_its_place_alone(one, other):
    assert (noise.noise_seed(*one) == noise.noise_seed(*other)) == (one == other)
    assert noise.noise_seed(*one) == noise.noise_seed(*one)


def test_a_seed_is_the_same_in_another_process():
    code = "from hf_rwp.core.noise import noise_seed; print(noise_seed(3, 14, 1, 5, 9))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env={"PYTHONHASHSEED": "77"}, capture_output=True, check=True, text=True).stdout
    assert int(found) == noise.noise_seed(3, 14, 1, 5, 9)


@pytest.mark.parametrize("shape", [(), (5,), (40, 9), (2, 300_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_global_generator_is_neither_read_nor_moved(shape, dtype):
    weight = torch.ones(shape, dtype=dtype)
    std = noise.noise_std(weight, 0.5)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(draw(weight, std, generator_at(0, 1, 0, 1, 0)))
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
        fisher = noise.arwp_fisher(fisher, gradient, beta)
    expected = torch.zeros(shape, dtype=torch.float64)
    for age, gradient in enumerate(reversed(gradients)):
        expected += beta**age * transcribed_std(gradient, 1.0).square()
    torch.testing.assert_close(fisher.expand(shape), expected)
    assert all(before is None or torch.equal(kept, before) for kept, before in history)  # nothing changed in place


@pytest.mark.parametrize("eta", [0.0, 0.1, 10.0])
def test_arwp_damping_is_its_closed_form(eta):
    fisher = torch.tensor([[0.0], [1e-3], [1.0], [250.0]], dtype=torch.float64)
    expected = [1 / math.sqrt(1 + eta * f) for f in (0.0, 1e-3, 1.0, 250.0)]
    torch.testing.assert_close(noise.arwp_damping(fisher, eta), torch.tensor(expected, dtype=torch.float64).view(4, 1))
    assert fisher.flatten().tolist() == [0.0, 1e-3, 1.0, 250.0]


@given(st.floats(0, 1), st.floats(0, 5), st.floats(0, 1))
@property_test
def test_gamma_factor_is_its_closed_form(progress, growth, start):
    closed_forms = {
        "constant": 1.0,
        "linear": 1 + growth * progress,
        "cosine": 1 + growth * math.sin(math.pi * progress / 2) ** 2,
    }
    assert set(closed_forms) == set(noise.SCHEDULES)
    for schedule, value in closed_forms.items():
        expected = 0.0 if progress < start else value
        assert noise.gamma_factor(progress, schedule, growth, start) == pytest.approx(expected, abs=1e-12)


def test_gamma_factor_is_one_by_default_and_refuses_an_unknown_schedule():
    assert [noise.gamma_factor(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"'step'.*constant, linear, cosine"):
        noise.gamma_factor(0.5, "step")


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_size_is_the_norm_of_the_difference_over_the_norm(dtype):
    clean = torch.tensor([3.0, -4.0], dtype=dtype)
    assert noise.relative_size(torch.tensor([3.0, -3.5], dtype=dtype), clean).item() == pytest.approx(0.1)
    assert noise.relative_size(torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)).item() == 0.0
