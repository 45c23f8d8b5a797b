"""Guarantee 5 of design.md for many weights at once: threads and fused kernels, the same law as `noise`.

What the kernels do is tested in test_kernels.py; that no interrupt leaves noise behind in test_perturbation.py.
"""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

from hf_rwp import foreach, noise
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
    noisy, expected, used = weights(), weights(), set()
    draws = [(weight, noise.noise_std(weight, 1.0), seed) for seed, weight in enumerate(noisy)]
    for weight, (_, std, seed) in zip(expected, draws, strict=True):
        noise.add_noise_(weight, std, torch.Generator().manual_seed(seed), noise.new_scratch(weight))

    def watched(*args, add_noise_=noise.add_noise_) -> None:
        used.add(threading.current_thread())
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
def test_threads_get_shares_of_about_equal_size_of_large_weights(threads, monkeypatch):
    monkeypatch.setattr(foreach, "ELEMENTS_PER_THREAD", 100)
    sizes = [3, 100, 5, 60, 41, 1, 90, 0]
    some = [torch.ones(size) for size in sizes]
    shares = foreach._shares([(weight, torch.ones(1), 0) for weight in some])
    assert sorted(id(weight) for share in shares for weight, _, _ in share) == sorted(map(id, some))
    loads = [sum(len(weight) for weight, _, _ in share) for share in shares]
    assert len(loads) == threads
    assert max(loads) <= 1.1 * sum(sizes) / threads
    assert len(foreach._shares([(torch.ones(199), torch.ones(1), 0)])) == 1
    elsewhere = torch.ones(1000, device="meta"), torch.ones(1, device="meta"), 0
    assert len(foreach._shares([elsewhere, elsewhere])) == 1


@on_threads
def test_an_error_on_any_thread_is_raised(threads, monkeypatch):
    def fail(weight: Tensor, *_) -> None:
        if weight.shape == (3, 2):
            raise MemoryError("none left")

    monkeypatch.setattr(noise, "add_noise_", fail)
    with pytest.raises(MemoryError, match="none left"):
        NoiseAdder().add_([(weight, torch.ones(()), 0) for weight in weights()])
