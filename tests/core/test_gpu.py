"""Parallel placement with weights on a device: two ranks of a gloo group that share one GPU, and the same on a CPU."""

import pytest
import torch
from distributed import rank, run
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP
from hf_rwp.runs.records import weights_digest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ALPHA = 0.3


def network() -> nn.Module:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(32, 5))


def batch(number: int, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * number + which)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (6,), generator=generator)


def train(device: str, dtype: torch.dtype, steps: int) -> tuple[list[tuple[dict, dict, dict]], str]:
    """Of each step the weights before it, those of its forward pass, and the gradient; the last weights' digest."""
    net = network().to(device, dtype, memory_format=torch.channels_last)
    optimizer = RWP(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net, gamma=0.05, alpha=ALPHA)
    model = DistributedDataParallel(net)
    seen = {}
    net[-1].register_forward_pre_hook(lambda *_: seen.update(copies()))

    def copies() -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in net.named_parameters()}

    record = []
    for number in range(steps):
        clean = copies()
        images, labels = batch(number, rank())
        cross_entropy(model(images.to(device, dtype)), labels.to(device)).backward()
        record.append((clean, dict(seen), {name: p.grad.cpu() for name, p in net.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()
    return record, weights_digest(net)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_the_mix_on_both_ranks(device):
    (clean_rank, digest), (perturbed_rank, other) = run(2, train, device, torch.float64, 3, timeout=120)
    assert digest == other
    net = network().double()
    for number, (mine, theirs) in enumerate(zip(clean_rank, perturbed_rank, strict=True)):
        assert all(torch.equal(mine[0][name], theirs[0][name]) for name in mine[0])
        assert all(torch.equal(mine[0][name], mine[1][name]) for name in mine[0])  # rank 0 is clean
        noisy = [name for name in theirs[0] if not torch.equal(theirs[0][name], theirs[1][name])]
        assert noisy == [name for name in theirs[0] if theirs[0][name].any()]  # 0 has no noise
        gradients = []
        for which, weights in enumerate((mine[1], theirs[1])):
            leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
            images, labels = batch(number, which)
            loss = cross_entropy(functional_call(net, leaves, images), labels)
            gradients.append(torch.autograd.grad(loss, list(leaves.values())))
        for name, clean, perturbed in zip(mine[2], *gradients, strict=True):
            expected = (1 - ALPHA) * clean + ALPHA * perturbed
            torch.testing.assert_close(mine[2][name], expected, rtol=1e-10, atol=1e-12)
            assert torch.equal(mine[2][name], theirs[2][name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_bit_equal_after_60_steps(device, dtype):
    (_, digest), (_, other) = run(2, train, device, dtype, 60, timeout=120)
    assert digest == other
