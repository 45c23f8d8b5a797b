"""Noise and restore by themselves: every weight bears noise and loses it, on either path; the reference code's too."""

import contextlib
import copy

import pytest
import timm
import torch

from hf_rwp.analysis import noise_cost, timing


def test_the_reference_code_adds_noise_by_filter_and_takes_it_off_up_to_rounding():
    torch.manual_seed(0)
    wide, bias = torch.nn.Parameter(torch.randn(3, 50, 200)), torch.nn.Parameter(torch.randn(9000))
    before = copy.deepcopy([wide, bias])
    noises = noise_cost.reference_noise([wide, bias])
    for weight, clean, noise in zip((wide, bias), before, noises, strict=True):
        assert not torch.equal(weight, clean)
        torch.testing.assert_close(weight - clean, noise, atol=1e-5, rtol=0)
    for clean, noise in (*zip(before[0], noises[0], strict=True), (before[1], noises[1])):
        assert noise.std().item() == pytest.approx(0.01 * clean.norm().item(), rel=0.05)
    noise_cost.reference_restore([wide, bias], noises)
    torch.testing.assert_close([wide, bias], before, atol=1e-5, rtol=0)


def test_noise_and_restore_go_over_every_weight_and_leave_it(monkeypatch):
    made, seen = [], []

    class Seen(noise_cost.Idle):
        def __init__(self, module):
            super().__init__(module)
            made.append(self)

        def forward(self):
            seen.append([weight.detach().clone() for weight in self.module.parameters()])
            return super().forward()

    monkeypatch.setattr(noise_cost, "Idle", Seen)
    module = timm.create_model("test_resnet")
    window = noise_cost.noise_and_restore(module, torch.device("cpu"), accumulation_steps=2)
    assert window() > 0
    clean, perturbed = seen
    for weight, before, noisy, after in zip(
        module.parameters(), clean, perturbed, made[0].module.parameters(), strict=True
    ):
        assert torch.equal(before, weight)
        assert torch.equal(after, weight)
        assert torch.equal(noisy, weight) != bool(weight.any())


@pytest.mark.parametrize("path", ["torch", "kernels"])
def test_host_time_is_that_of_every_small_weight_on_either_path(path):
    """By the kernels' path norms and noise of all of them are asked for in one launch each, and none is written."""
    launched = []

    class Counted(noise_cost.Launches):
        def __getitem__(self, grid):
            launched.append(grid)
            return super().__getitem__(grid)

    module, seen = torch.nn.ParameterList(torch.ones(2) for _ in range(161)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_cost, "Launches", Counted)
        patch.setattr(
            noise_cost.Idle, "forward", lambda self: (seen.append(torch.cat([*self.module])), self.output * 1)[1]
        )
        if path == "kernels":
            pytest.importorskip("triton")
        with noise_cost.kernels_without_launches() if path == "kernels" else contextlib.nullcontext():
            step = noise_cost.noise_and_restore(module, torch.device("cpu"), accumulation_steps=1, alpha=1.0)
            for _ in range(4):
                assert step() > 0
    assert len(seen) == 4
    assert all((weights != 1).all() == (path == "torch") for weights in seen)
    assert len(launched) >= 8 if path == "kernels" else launched == []


def test_noise_and_restore_alone_are_timed_on_one_thread():
    variants = noise_cost.noise_variants(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert {variant.func for variant in variants.values()} == {timing.on_one_thread}
    assert all(variant() > 0 for variant in variants.values())
