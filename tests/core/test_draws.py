"""Guarantee 5 of design.md for many weights at once: threads and fused kernels, the same law as `noise`.

What the kernels do is tested in test_kernels.py; that no interrupt leaves noise behind in test_perturbation.py.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from hf_rwp import RWP, foreach, noise
from hf_rwp.foreach import NoiseAdder

on_threads = pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
SHAPES = [(6, 3, 3, 3), (6,), (), (0, 3), (1, 5, 4), (7, 6), (3, 2)]


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("mode", noise.MODES)
def test_stds_are_those_of_each_weight(mode):
    some, gammas = weights(), [0.1 * number for number in range(len(SHAPES))]
    dampings = [None if number % 2 else torch.rand_like(noise.filter_norms(w)) for number, w in enumerate(some)]
    found = foreach.noise_stds(some, gammas, mode, dampings)
    for std, arguments in zip(found, zip(some, gammas, dampings, strict=True), strict=True):
        weight, gamma, damping = arguments
        assert torch.equal(std, noise.noise_std(weight, gamma, mode, damping))


@on_threads
def test_the_noise_is_the_same_on_any_number_of_threads(threads, monkeypatch):
    noisy, expected, used, deadline = weights(), weights(), set(), time.monotonic() + 30
    draws = [(weight, noise.noise_std(weight, 1.0), seed) for seed, weight in enumerate(noisy)]
    for weight, (_, std, seed) in zip(expected, draws, strict=True):
        noise.add_noise_(weight, std, torch.Generator().manual_seed(seed), noise.new_scratch(weight))

    def watched(*args, add_noise_=noise.add_noise_) -> None:
        used.add(threading.current_thread())
        while len(used) < threads and time.monotonic() < deadline:
            time.sleep(1e-3)
        assert not torch.is_grad_enabled()
        add_noise_(*args)

    monkeypatch.setattr(noise, "add_noise_", watched)
    adder = NoiseAdder()
    adder.add_(draws)
    assert len(used) == threads
    assert all(torch.equal(weight, other) for weight, other in zip(noisy, expected, strict=True))
    assert not any(thread.is_alive() for thread in used - {threading.main_thread()})


@on_threads
def test_parameters_that_require_gradients_are_written_on_every_thread(threads):
    parameters = [nn.Parameter(weight) for weight in weights()]
    before, versions = weights(), [parameter._version for parameter in parameters]
    NoiseAdder().add_([(p, noise.noise_std(p.detach(), 1.0), 3) for p in parameters])
    for parameter, clean, version in zip(parameters, before, versions, strict=True):
        assert parameter.numel() == 0 or not torch.equal(parameter, clean)
        assert parameter._version > version


@on_threads
def test_large_weights_on_a_cpu_get_threads(threads, monkeypatch):
    monkeypatch.setattr(foreach, "ELEMENTS_PER_THREAD", 100)

    def count(*weights: Tensor) -> int:
        return foreach._thread_count([(weight, torch.ones(1), 0) for weight in weights])

    assert count(torch.ones(250), torch.ones(50)) == threads
    assert count(torch.ones(199)) == count() == 1
    assert count(torch.ones(1000, device="meta")) == 1
    monkeypatch.setattr(foreach, "MAX_THREADS", 2)
    assert count(torch.ones(1000)) == min(threads, 2)


@on_threads
def test_a_thread_that_is_held_up_leaves_weights_to_the_others(threads, monkeypatch):
    drawn, everything = [], threading.Event()

    def add(weight: Tensor, *_) -> None:
        drawn.append(weight.numel())
        if len(drawn) == 9:
            everything.set()
        if weight.numel() == 50 and threads > 1:
            assert everything.wait(30)

    monkeypatch.setattr(noise, "add_noise_", add)
    NoiseAdder().add_([(torch.ones(size), torch.ones(1), 0) for size in [3, 1, 50, 9, 2, 8, 7, 5, 4]])
    assert sorted(drawn) == [1, 2, 3, 4, 5, 7, 8, 9, 50]
    assert threads > 1 or drawn == sorted(drawn, reverse=True)


@on_threads
def test_an_error_on_any_thread_is_raised_and_ends_the_others(threads, monkeypatch):
    adder, added, deadline = NoiseAdder(), [], time.monotonic() + 30

    def add(weight: Tensor, *_) -> None:
        if weight.shape == (300,):
            raise MemoryError("none left")
        while not adder._work.stopped and time.monotonic() < deadline:
            time.sleep(1e-3)
        added.append(weight)

    monkeypatch.setattr(noise, "add_noise_", add)
    flat = torch.ones(31, 3, 2)  # the largest comes first, then these: in one storage, and each on its own
    together = [flat[index] for index in range(31)] if threads == 2 else []
    many = [torch.ones(300), *together, *(torch.ones(3, 2) for _ in range(30))]
    with pytest.raises(MemoryError, match="none left"):
        adder.add_([(weight, torch.ones(()), 0) for weight in many])
    assert len(added) < threads


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_without_more_threads_the_caller_draws(threads, monkeypatch):
    def start(thread) -> None:
        raise RuntimeError("can't start new thread")

    noisy, alone = weights(), weights()
    draws = [[(w, noise.noise_std(w, 1.0), 3) for w in some] for some in (noisy, alone)]
    NoiseAdder().add_(draws[0])
    monkeypatch.setattr(threading.Thread, "start", start)
    NoiseAdder().add_(draws[1])
    assert all(torch.equal(weight, other) for weight, other in zip(noisy, alone, strict=True))


def test_weights_in_one_storage_stay_together_in_order():
    flat = torch.ones(500)
    some = [flat, torch.ones(300), flat.view(20, 25).t(), torch.ones(400), flat[:10], torch.ones(2000)]
    groups = foreach._groups([(weight, torch.ones(()), 0) for weight in some])
    found = [[next(n for n, one in enumerate(some) if one is weight) for weight, *_ in group] for group in groups]
    assert found == [[1], [3], [0, 2, 4], [5]]


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_no_noise_comes_after_an_interrupt_of_the_wait_for_a_thread(threads, monkeypatch, signals):
    """One that ends the wait, and one that ends the wait of what restores the weights then."""

    def slowly_elsewhere(*args, add_noise_=noise.add_noise_) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        add_noise_(*args)

    monkeypatch.setattr(noise, "add_noise_", slowly_elsewhere)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    clean = [parameter.detach().clone() for parameter in net.parameters()]
    rwp = RWP(torch.optim.SGD(net.parameters(), lr=0.0), net, alpha=1)
    timers = [threading.Timer(0.1 + 0.15 * n, os.kill, (os.getpid(), signal.SIGINT)) for n in range(signals)]

    def forward() -> None:
        for timer in timers:
            timer.start()
        try:
            net(torch.ones(2, 40))
        finally:
            for timer in timers:
                timer.join()

    try:
        with pytest.raises(KeyboardInterrupt):
            forward()
    finally:
        signal.signal(signal.SIGINT, before)
    rwp.eval()
    assert all(torch.equal(parameter, other) for parameter, other in zip(net.parameters(), clean, strict=True))
    time.sleep(0.6)
    assert all(torch.equal(parameter, other) for parameter, other in zip(net.parameters(), clean, strict=True))


# Fused kernels


def step_with_kernels() -> None:
    """Of a network with weights that the kernels take (two layouts, two dtypes) and some that they leave alone."""
    from hf_rwp.core import kernels

    foreach._fuses = kernels.supports
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
        damping = {name: noise.arwp_damping(fisher, 0.1) for name, fisher in rwp._fisher.items()}
        net(torch.randn(2, 3, 4, 4)).square().sum().backward()
        for position, (name, weight) in enumerate(net.named_parameters()):
            assert torch.equal(weight, clean[name])
            expected, seed = clean[name].clone(), noise.noise_seed(5, window, 0, 0, position)
            std = noise.noise_std(expected, 0.3, damping=damping.get(name))
            if weight.dtype == torch.float64:
                assert not kernels.supports(weight)
                noise.add_noise_(expected, std, torch.Generator().manual_seed(seed), noise.new_scratch(expected))
            else:
                kernels.add_noise_([expected], [std], [seed])
            torch.testing.assert_close(seen[name], expected)
            assert weight.abs().max() == 0 or not torch.equal(seen[name], clean[name])
        rwp.step()
        rwp.zero_grad()


def test_rwp_takes_its_noise_from_the_kernels(monkeypatch):
    """In a process of its own, where Triton interprets them on a CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(step_with_kernels).result()


def test_a_device_on_which_the_kernels_fail_goes_without(monkeypatch, caplog):
    kernels = pytest.importorskip("hf_rwp.core.kernels")
    errors = [FileNotFoundError("no C compiler"), torch.OutOfMemoryError("for now")]

    def fail(*_) -> None:
        raise errors[0]

    monkeypatch.setattr(kernels, "check", fail)
    foreach._passes.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not foreach._passes(torch.device("cpu"), torch.float32)
    foreach._passes.cache_clear()
    assert [record.message for record in caplog.records] == [
        "no fused kernels for torch.float32 on cpu, so that the noise takes longer: no C compiler"
    ]
    del errors[0]
    with pytest.raises(torch.OutOfMemoryError):
        foreach._passes(torch.device("cpu"), torch.float32)


def test_the_kernels_get_one_weight_of_a_storage(monkeypatch):
    flat = torch.ones(60)
    monkeypatch.setattr(foreach, "_fuses", lambda weight: weight.dtype == torch.float32)
    some = [flat, torch.ones(3), flat.view(6, 10).t(), torch.ones(3, dtype=torch.float64), flat]
    assert foreach._split(some) == ([0, 1], [2, 3, 4])
