"""runs/steps.py without a recipe: gradients in parts, and SAM, against what they are defined as."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from hf_rwp import LossTracker
from hf_rwp.runs.steps import accumulate, plain_step, sam_step, wrap_sam


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return list(zip(images.chunk(3), images.sum(1, keepdim=True).chunk(3), strict=True))


def adding(model, parts, **options):
    return partial(accumulate, model, parts, lambda inputs, targets: mse_loss(model(inputs), targets), **options)


def gradients(model, parts):
    loss = sum(mse_loss(model(inputs), targets) for inputs, targets in parts) / len(parts)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_gradient_is_that_of_the_parts_mean_loss(model, parts, accelerated):
    accelerator = Accelerator(cpu=True) if accelerated else None
    tracker = LossTracker(None, torch.device("cpu"))
    expected = gradients(copy.deepcopy(model), parts)
    losses = [mse_loss(copy.deepcopy(model)(inputs), targets).item() for inputs, targets in parts]
    add_gradients = adding(model, parts, accelerator=accelerator, tracker=tracker)
    add_gradients()
    torch.testing.assert_close([weight.grad for weight in model.parameters()], list(expected))
    assert tracker.compute()["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    add_gradients(track=False)
    assert tracker.compute() == {}
    torch.testing.assert_close([weight.grad for weight in model.parameters()], [2 * value for value in expected])


class Counting(torch.nn.Module):
    """In place of DistributedDataParallel: counts the backward passes that are not to be averaged."""

    def __init__(self, module):
        super().__init__()
        self.module, self.entered = module, 0

    def forward(self, inputs):
        return self.module(inputs)

    def no_sync(self):
        self.entered += 1
        return torch.enable_grad()


@pytest.mark.parametrize(("sync", "expected"), [(True, 2), (False, 3)])
def test_all_backward_passes_but_the_last_are_local(model, parts, sync, expected):
    counting = Counting(model)
    adding(counting, parts)(sync=sync)
    assert counting.entered == expected


def test_a_plain_step_clips_ahead_of_the_update(model, parts):
    before, expected = copy.deepcopy(model), gradients(copy.deepcopy(model), parts)

    def halve():
        for weight in model.parameters():
            weight.grad *= 0.5

    plain_step(torch.optim.SGD(model.parameters(), lr=0.1), adding(model, parts), halve)
    for now, then, gradient in zip(model.parameters(), before.parameters(), expected, strict=True):
        torch.testing.assert_close(now, then - 0.05 * gradient)
        assert now.grad is None


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_takes_the_gradient_at_the_top_of_the_ascent(model, parts, adaptive):
    """arXiv 2010.01412, algorithm 1, and 2102.11600: by w^2 * g / ||w * g||. Statistics are the first pass's."""
    ascended, once = copy.deepcopy(model), copy.deepcopy(model)
    ascent = gradients(once, parts)
    scales = [weight.detach().abs() if adaptive else torch.ones_like(weight) for weight in model.parameters()]
    norm = torch.cat([(s * g).flatten() for s, g in zip(scales, ascent, strict=True)]).norm()
    with torch.no_grad():
        for weight, s, g in zip(ascended.parameters(), scales, ascent, strict=True):
            weight += 0.1 * s**2 * g / norm
    expected = [w - 0.5 * g for w, g in zip(model.parameters(), gradients(ascended, parts), strict=True)]
    sam = wrap_sam(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.1, adaptive=adaptive)
    sam_step(sam, model, adding(model, parts))
    torch.testing.assert_close(list(model.parameters()), expected)
    torch.testing.assert_close(model[1].running_mean, once[1].running_mean)
    assert model[1].momentum == 0.1


def test_statistics_come_back_to_life_after_a_failure(model, parts):
    passes = []

    def fail_later(inputs, targets):
        passes.append(1)
        if len(passes) > len(parts):
            raise RuntimeError
        return mse_loss(model(inputs), targets)

    sam = wrap_sam(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.1)
    with pytest.raises(RuntimeError):
        sam_step(sam, model, partial(accumulate, model, parts, fail_later))
    assert model[1].momentum == 0.1
