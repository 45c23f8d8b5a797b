"""Guarantee 5 of hf_rwp/README.md for many weights in one call: the noise and the stds that `noise` gives each of them.

What the kernels do is tested in test_kernels.py; here a stub stands in for them, but for one step in a process where
Triton interprets them.
"""

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import hf_rwp.core
from hf_rwp import RWP
from hf_rwp.core import damping, draws, noise
from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.sharding import Block, block_of

SHAPES = [(6, 3, 3, 3), (6,), (), (0, 3), (1, 5, 4), (7, 6), (3, 2), (40_000,), (2, 40_000), (600, 90), (3, 0), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16, torch.complex128]


def mixed_weights() -> list[Tensor]:
    """Every shape in every dtype, channels_last and transposed weights, and some that share a storage."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for dtype in DTYPES for shape in SHAPES]
    last = torch.randn(4, 8, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    flat = torch.randn(400, generator=generator)
    weights += [last, torch.randn(5, 4, 6, generator=generator).transpose(0, 2), flat[:60].view(6, 10).t()]
    return [*weights, flat[60:100], flat[100:], nn.Parameter(torch.randn(9, 4, generator=generator))]


def targets_of(weights: Sequence[Tensor]) -> list[Target]:
    return [Target(number, f"w{number}", weight, weight, block_of(weight)) for number, weight in enumerate(weights)]


def seeds_of(weights: Sequence[Tensor]) -> list[int]:
    return noise.noise_seeds(3, 1, 0, 0, range(len(weights)))


def clones(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def same(weights: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))


@torch.no_grad()
def check_one_by_one(weights: Sequence[Tensor], noisy: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
    """noisy: what `Draws.add_` made of `weights`."""
    for weight, found, std, seed in zip(clones(weights), noisy, stds, seeds_of(weights), strict=True):
        block = block_of(weight)
        noise.add_noise_(block, std, seed, noise.Source(block.memory))
        assert torch.equal(weight, found)


@pytest.mark.parametrize("copied", [False, True])
def test_noise_is_that_of_each_weight_alone(copied):
    weights = mixed_weights()
    clean, versions = clones(weights), [weight._version for weight in weights]
    copies = clones(weights) if copied else None
    stds = Draws().add_(targets_of(weights), [0.5] * len(weights), seeds_of(weights), None, copies)
    assert copies is None or same(copies, clean)
    check_one_by_one(clean, weights, stds)
    for weight, before, version in zip(weights, clean, versions, strict=True):
        assert weight.numel() == 0 or not torch.equal(weight, before)
        assert weight.numel() == 0 or weight._version > version


def test_small_weights_of_more_than_one_scratch_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(1)
    sizes = [20_000, 12_768, 1, 30_000, 32_768, 2_768, 40, 40_000, 16]  # one scratch is exactly full, and one not quite
    weights = [torch.randn(2, size // 2, generator=generator) for size in sizes if size > 1]
    weights += [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    clean, adder = clones(weights), Draws()
    check_one_by_one(clean, weights, adder.add_(targets_of(weights), [0.3] * len(weights), seeds_of(weights)))


@pytest.mark.parametrize("copied", [False, True])
def test_weights_that_overlap_get_the_noise_of_all_of_them(copied):
    views = [lambda t: t, lambda t: t[:500].view(20, 25).t(), lambda t: t[:10], lambda t: t[2:30]]
    flat, expected = torch.ones(70_000), torch.ones(70_000)
    weights = [view(flat) for view in views]
    copies = clones(weights) if copied else None
    stds = Draws().add_(targets_of(weights), [0.1] * 4, seeds_of(weights), None, copies)
    for view, std, seed in zip(views, stds, seeds_of(weights), strict=True):
        alone = torch.zeros(view(expected).shape)
        noise.add_noise_(block_of(alone), std, seed, noise.Source(alone))
        view(expected).add_(alone)
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-5)


def test_stds_are_factors_times_norms_times_damping():
    """Norms by Python's own sums; a factor below 0 is the opposite noise."""
    weights = [weight for weight in mixed_weights() if weight.numel() < 1000]
    clean = clones(weights)
    generator = torch.Generator().manual_seed(2)
    factors = [0.1 * number - 1 for number in range(len(weights))]
    dampings = [
        None if number % 3 else torch.rand(len(block_of(weight).memory), generator=generator)
        for number, weight in enumerate(weights)
    ]
    stds = Draws().add_(targets_of(weights), factors, seeds_of(weights), dampings)
    for std, weight, factor, scale in zip(stds, clean, factors, dampings, strict=True):
        while weight.ndim and weight.shape[0] == 1:
            weight = weight[0]
        rows = weight.unsqueeze(0) if weight.ndim < 2 else weight
        norms = [math.sqrt(math.fsum(abs(value) ** 2 for value in row.flatten().tolist())) for row in rows]
        expected = torch.tensor(norms, dtype=torch.float64) * factor * (1 if scale is None else scale.double())
        torch.testing.assert_close(std.double().reshape(-1), expected, rtol=2e-6, atol=1e-30)


def test_no_damping_at_all_is_a_damping_of_one():
    weights, others, more = mixed_weights(), mixed_weights(), mixed_weights()
    factors, seeds, adder = [0.5] * len(weights), seeds_of(weights), Draws()
    adder.add_(targets_of(weights), factors, seeds)
    adder.add_(targets_of(others), factors, seeds, [None] * len(weights))
    ones = [torch.ones(len(block_of(weight).memory)) for weight in weights]
    adder.add_(targets_of(more), factors, seeds, ones)
    assert same(weights, others)
    assert same(weights, more)


def test_opposite_factors_give_opposite_noise():
    weights = [torch.zeros(30, 20), torch.zeros(50), torch.zeros(3, 20_000)]
    targets, seeds = targets_of(weights), seeds_of(weights)
    found = []
    for sign in (1.0, -1.0):
        for weight in weights:
            weight.fill_(1)
        Draws().add_(targets, [sign] * 3, seeds)
        found.append([weight - 1 for weight in weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, -other, rtol=1e-5, atol=1e-5)


def test_a_weight_holds_its_noise_to_the_bit():
    weights = [*mixed_weights(), torch.ones(3, 70_000), torch.ones(90, 400, 2, 2).to(memory_format=torch.channels_last)]
    weights += [torch.ones(300, 200).t(), torch.ones(2, 40_000, dtype=torch.complex64)]
    clean, targets, seeds, adder = clones(weights), targets_of(weights), seeds_of(weights), Draws()
    stds = adder.add_(targets, [0.5] * len(weights), seeds)
    for drawn in zip(targets, stds, seeds, clean, strict=True):
        assert adder.holds(*drawn)
        weight = drawn[0].weight
        if weight.numel():
            last = tuple(size - 1 for size in weight.shape)
            weight.detach()[last] += 1
            assert not adder.holds(*drawn)


def test_it_takes_a_tile_of_memory_to_tell_whether_a_weight_holds_its_noise():
    weight = torch.ones(4000, 500)
    clean, (target,), adder = weight.clone(), targets_of([weight]), Draws()
    (std,) = adder.add_([target], [0.5], [1])
    with torch.profiler.profile(profile_memory=True) as profiler:
        assert adder.holds(target, std, 1, clean)
    held = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(itertools.accumulate(held)) <= 2 * 4 * noise.CPU_TILE


def test_the_draws_of_one_call_leave_nothing_behind_for_the_next():
    weights, others = mixed_weights(), mixed_weights()
    adder, factors = Draws(), [0.5] * len(weights)
    adder.add_(targets_of(mixed_weights()[::-1]), factors, seeds_of(weights))
    adder.add_(targets_of(weights), factors, seeds_of(weights))
    Draws().add_(targets_of(others), factors, seeds_of(others))
    assert same(weights, others)


def test_a_plan_is_used_again_for_the_very_same_list_alone(monkeypatch):
    planned = []

    def plan(adder, targets, *args, plan=Draws._made):
        planned.append(targets)
        return plan(adder, targets, *args)

    monkeypatch.setattr(Draws, "_made", plan)
    targets, adder = targets_of([torch.ones(3, 2), torch.ones(4)]), Draws()
    for given in (targets, targets, list(targets), targets, targets):
        adder.add_(given, [1.0, 1.0], [1, 2])
    assert len(planned) == 3
    std = adder.add_(targets, [1.0, 1.0], [1, 2])[0]
    adder.holds(targets[0], std, 1, torch.ones(3, 2))
    adder.add_(targets, [1.0, 1.0], [1, 2])
    assert len(planned) == 4  # a comparison has one of its own, and leaves the list's


def test_the_global_generator_is_neither_read_nor_moved():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, weights = torch.get_rng_state(), clones(mixed_weights())
        torch.set_rng_state(before)
        Draws().add_(targets_of(weights), [0.5] * len(weights), seeds_of(weights))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(weights)
    assert same(*found)


# Fused kernels


class Kernels:
    """Stands in for the module: takes float32 weights, gives norms of 2, and adds the std."""

    def __init__(self) -> None:
        self.planned: list[list[Tensor]] = []
        self.seeds: list[int] = []

    def supports(self, block: Block) -> bool:
        return block.memory.dtype == torch.float32

    def plan(self, blocks: Sequence[Block]) -> list[Tensor]:
        self.planned.append([block.memory for block in blocks])
        return self.planned[-1]

    def filter_norms(self, plan: list[Tensor], factors: Sequence[float]) -> list[Tensor]:
        return [torch.full((len(memory),), 2.0 * factor) for memory, factor in zip(plan, factors, strict=True)]

    def add_noise_(self, plan: list[Tensor], stds: Sequence[Tensor], seeds: Sequence[int]) -> None:
        self.seeds += seeds
        for memory, std in zip(plan, stds, strict=True):
            memory += std.view(-1, *[1] * (memory.ndim - 1))


@pytest.fixture
def kernels(monkeypatch):
    stub = Kernels()
    monkeypatch.setattr(draws, "_kernels", lambda: stub)
    monkeypatch.setattr(draws, "_fuses", lambda weight, block: stub.supports(block))
    return stub


def test_norms_and_noise_of_some_weights_are_the_kernels(kernels):
    weights = [torch.zeros(3, 2), torch.ones(4, dtype=torch.float64), torch.zeros(5), torch.ones(2, 3).bfloat16()]
    clean, targets, adder = clones(weights), targets_of(weights), Draws()
    seeds = seeds_of(weights)
    for _ in range(2):
        stds = adder.add_(targets, [0.5, 0.1, 0.25, 0.1], seeds, [torch.full((3,), 0.5), None, None, None])
    assert len(kernels.planned) == 1
    assert kernels.seeds == [seeds[0], seeds[2]] * 2
    assert (weights[0] == 2 * 0.5).all()
    assert (weights[2] == 2 * 0.5).all()
    for number in (1, 3):
        twice = clean[number]
        adder.add_(targets_of([twice]), [0.1], [seeds[number]])
        adder.add_(targets_of([twice]), [0.1], [seeds[number]])
        assert torch.equal(twice, weights[number])
    assert [std.reshape(-1).shape for std in stds] == [(3,), (1,), (1,), (2,)]


def test_the_kernels_get_one_weight_of_a_storage(kernels):
    flat = torch.ones(60)
    weights = [flat, torch.ones(3), flat.view(6, 10).t(), torch.ones(3, dtype=torch.float64), flat]
    Draws().add_(targets_of(weights), [0.1] * 5, seeds_of(weights))
    ((first, second),) = kernels.planned
    assert (first.data_ptr(), second.data_ptr()) == (flat.data_ptr(), weights[1].data_ptr())
    assert first.numel() == 60


def test_fused_weights_and_others_of_their_storage_hold_their_noise(kernels):
    """As the weights of an LSTM on a GPU, which are one block of memory."""
    flat = torch.zeros(60)
    weights = [flat[:20].view(4, 5), flat[20:25], flat[30:].view(5, 6)]
    clean, targets, adder = clones(weights), targets_of(weights), Draws()
    stds = adder.add_(targets, [0.5] * 3, [7, 8, 9])
    assert kernels.seeds == [7]
    for drawn in zip(targets, stds, [7, 8, 9], clean, strict=True):
        assert adder.holds(*drawn)
    assert kernels.seeds == [7, 7]


class OnGPU:
    """What looks like a weight on a GPU."""

    device, dtype = torch.device("cuda"), torch.float32


def test_what_the_kernels_take_is_a_plain_tensor_on_a_gpu_that_they_support_and_pass_on(monkeypatch):
    stub, passes = Kernels(), {torch.float32: True}
    monkeypatch.setattr(draws, "_kernels", lambda: stub)
    monkeypatch.setattr(draws, "_passes", lambda device, dtype: passes[dtype])
    block, other = block_of(torch.ones(3)), block_of(torch.ones(3, dtype=torch.float64))
    assert not draws._fuses(torch.ones(3), block)
    assert not draws._fuses(OnGPU(), block)  # of another class than Tensor
    monkeypatch.setattr(draws, "Tensor", OnGPU)
    assert draws._fuses(OnGPU(), block)
    assert not draws._fuses(OnGPU(), other)
    passes[torch.float32] = False
    assert not draws._fuses(OnGPU(), block)
    monkeypatch.setattr(draws, "_kernels", lambda: None)
    assert not draws._fuses(OnGPU(), block)


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.delattr(hf_rwp.core, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "hf_rwp.core.kernels", None)
    assert draws._kernels.__wrapped__() is None


def test_a_device_on_which_the_kernels_fail_goes_without(monkeypatch, caplog):
    errors = [FileNotFoundError("no C compiler"), torch.OutOfMemoryError("for now")]

    def fail(*_) -> None:
        raise errors[0]

    monkeypatch.setattr(draws, "_kernels", lambda: SimpleNamespace(check=fail))
    draws._passes.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not draws._passes(torch.device("cpu"), torch.float32)
    draws._passes.cache_clear()
    assert [record.message for record in caplog.records] == [
        "no fused kernels for torch.float32 on cpu, so that the noise takes longer: no C compiler"
    ]
    del errors[0]
    with pytest.raises(torch.OutOfMemoryError):
        draws._passes(torch.device("cpu"), torch.float32)


def step_with_kernels() -> None:
    from hf_rwp.core import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_fuses", lambda weight, block: kernels.supports(block))
        check_two_windows(kernels)


def check_two_windows(kernels) -> None:
    """Of a network with weights that the kernels take (two layouts, two dtypes) and some that they leave alone."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
    net = nn.Sequential(convolution, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 5), nn.LayerNorm(5))
    net[3].bfloat16()
    net[4].double()
    seen = {}
    rwp = RWP(torch.optim.SGD(net.parameters(), lr=0.0), net, gamma=0.3, alpha=1, seed=5, eta=0.1)

    def forward(images: Tensor) -> Tensor:
        hidden = net[2](net[1](net[0](images))).bfloat16()
        seen.update({name: weight.detach().clone() for name, weight in net.named_parameters()})
        return net[4](net[3](hidden).double())

    net.forward = forward
    for window in (1, 2):
        clean = {name: weight.detach().clone() for name, weight in net.named_parameters()}
        scales = {name: damping.arwp_damping(f, 0.1) for name, f in rwp.state_dict()["rwp"]["fisher"].items()}
        net(torch.randn(2, 3, 4, 4)).square().sum().backward()
        seeds = noise.noise_seeds(5, window, 0, 0, range(len(clean)))
        for (name, weight), seed in zip(net.named_parameters(), seeds, strict=True):
            assert torch.equal(weight, clean[name])
            expected = clean[name].clone()
            block = block_of(expected)
            std = noise.filter_norms(block) * 0.3 * scales.get(name, 1)
            if weight.dtype == torch.float64:
                assert not kernels.supports(block)
                noise.add_noise_(block, std, seed, noise.Source(expected))
            else:
                kernels.add_noise_(kernels.plan([block]), [std], [seed])
            torch.testing.assert_close(seen[name], expected)
            assert weight.abs().max() == 0 or not torch.equal(seen[name], clean[name])
        rwp.step()
        rwp.zero_grad()


def test_rwp_takes_its_noise_from_the_kernels():
    """In another process, where Triton interprets them on a CPU."""
    pytest.importorskip("triton")
    from test_kernels import interpreter

    interpreter().submit(step_with_kernels).result()
