"""Noise beside linear layers whose stored weights cannot take any: as in the weights that they stand for."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_rwp import RWP
from hf_rwp.core.quantized import Quantized, quantized_layers


class Packed(nn.Module):
    """As GPTQ's layers: integers and scales in buffers, and another layout than nn.Linear's weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(1) / 7
        self.register_buffer("qweight", (weight / scales[:, None]).round().to(torch.int32).T.contiguous())
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def weight_of(self):
        return (self.qweight * self.scales).T

    def forward(self, x):
        return x @ self.weight_of().T.to(x.dtype) + self.bias


class Lora(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def linears():
    torch.manual_seed(0)
    return [nn.Linear(16, 16) for _ in range(3)]


def model_of(bases):
    bases = list(bases)
    torch.manual_seed(1)
    return nn.Sequential(*map(Lora, bases))


def stands_for(packed):
    """The same model with the weights that a packed one stands for."""
    bases = []
    for layer in packed:
        base = nn.Linear(16, 16)
        base.load_state_dict({"weight": Quantized("", layer.base).dequantized(), "bias": layer.base.bias})
        bases.append(base)
    return model_of(bases)


def micro_step(model, frozen, seeds=(0, 1), dtype=torch.float32, **options):
    """Losses and gradients of as many windows of one perturbed gradient, and what RWP says of the noise."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"alpha": 1.0, "gamma": 0.1, "noise_1d": False, **options}
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=frozen, **options)
    found = []
    for seed in seeds:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        loss = model(x).square().mean()
        loss.backward()
        found += [loss.detach(), *[parameter.grad.clone() for parameter in own]]
        rwp.step()
        rwp.zero_grad()
    report = rwp.report()
    rwp.remove()
    return found, report


def computed_twice(model):
    for layer in model:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def positions_of(model):
    return [name for name, _ in model.named_parameters()]


class Stored(nn.Linear):
    """As bitsandbytes' layers: a parameter in the weight's place, of integers and of another shape."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = Packed(linear)
        self.weight = nn.Parameter(packed.qweight.to(torch.int8).reshape(-1, 1), requires_grad=False)
        self.scales, self.bias = packed.scales, packed.bias

    def forward(self, x):
        weight = (self.weight.view(self.in_features, -1) * self.scales).T
        return x @ weight.T.to(x.dtype) + self.bias


@pytest.mark.parametrize("checkpoints", [False, True])
def test_noise_beside_is_noise_in_the_weight_that_is_stored_otherwise(checkpoints):
    """Of the same position among the parameters, so of the same seed: the numbers are alike to float32's rounding."""
    model = model_of(map(Stored, linears()))
    twin = stands_for(model)
    assert positions_of(model) == positions_of(twin)
    state = copy.deepcopy(model.state_dict())
    if checkpoints:
        computed_twice(model)
    found, report = micro_step(model, True)
    expected, reported = micro_step(twin, "copy")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain, _ = micro_step(stands_for(model_of(map(Stored, linears()))), False)
    assert not torch.allclose(found[0], plain[0], rtol=1e-3)
    largest, of_twin = (said["relative_noise"]["largest"] for said in (report, reported))
    assert largest["size"] == pytest.approx(of_twin["size"], rel=1e-4)
    for name in state:
        assert name.split(".")[1] != "base" or torch.equal(model.state_dict()[name], state[name])
    assert not any(layer.base._forward_hooks for layer in model)


def test_layers_without_a_weight_parameter_have_noise_of_their_filters_sizes():
    bases = linears()
    with torch.no_grad():
        bases[1].weight[3] *= 50
    model = model_of(map(Packed, bases))
    (layer, *others) = quantized_layers(model)[1:2]
    assert others == []
    weight = model[1].base.weight_of()
    torch.testing.assert_close(layer.dequantized(), weight)
    draws = torch.stack([layer.drawer(0.1, seed, torch.float32)() for seed in range(400)])
    torch.testing.assert_close(draws.std((0, 2)), 0.1 * weight.norm(dim=1), rtol=0.1, atol=0)
    assert draws.mean().abs() < 0.01
    found, report = micro_step(model, True)
    assert report["relative_noise"]["largest"]["elements"] == 256
    assert all(value.isfinite().all() for value in found)


def test_the_filters_of_a_quantized_layer_are_measured_once():
    calls = []

    class Counts(Packed):
        def forward(self, x):
            calls.append(x.shape[0])
            return super().forward(x)

    model = model_of(map(Counts, linears()))
    micro_step(model, True, seeds=range(2))
    first = len(calls)
    calls.clear()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True, alpha=1.0, gamma=0.1)
    rwp._report.measures = False
    for _ in range(3):
        model(torch.randn(4, 16)).sum().backward()
        rwp.step()
    assert first > 3 * 2
    assert (
        sum(rows != 4 for rows in calls) == 4 * 3
    )  # of each layer: zeros and the identity, and a look at its linearity
    rwp.remove()


def test_half_precision_takes_noise_of_its_own_dtype():
    model = model_of(map(Packed, linears())).to(torch.bfloat16)
    for layer in model:
        layer.base.scales = layer.base.scales.float()
    found, _ = micro_step(model, True, dtype=torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in found)


def test_what_is_not_linear_is_refused_by_name():
    class Squares(Packed):
        def forward(self, x):
            return super().forward(x).square()

    model = model_of([*map(Packed, linears()[:2]), Squares(linears()[2])])
    with pytest.raises(NotImplementedError, match=r"2\.base, a Squares, is not linear \(relative error"):
        micro_step(model, True)


def test_other_weights_that_cannot_take_noise_are_refused_by_name():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 16, dtype=torch.int8), requires_grad=False)

    model = model_of(linears())
    model.append(Words())
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(NotImplementedError, match=r"would perturb 3\.table, which is of torch\.int8 in a Words"):
        RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True)
    RWP(torch.optim.SGD(own, lr=0.1), model, frozen=False).remove()


def test_a_copy_of_a_quantized_weight_is_refused_by_name():
    model = model_of(map(Stored, linears()))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(
        NotImplementedError, match=r"would perturb 0\.base\.weight, .* in a Stored: .*with frozen=True beside"
    ):
        RWP(torch.optim.SGD(own, lr=0.1), model, frozen="copy")


def test_a_quantized_layer_that_is_sharded_is_refused_by_name():
    layer = Stored(linears()[0])
    layer.weight.device_mesh = "of a DTensor"
    with pytest.raises(NotImplementedError, match=r"a\.b, a Stored, is quantized and sharded"):
        Quantized("a.b", layer).beside(lambda dtype: torch.zeros(16, 16))
    assert not layer._forward_hooks


def nf4(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(16, 16, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def int8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


@pytest.mark.parametrize("make", [nf4, int8, torchao_int8])
def test_quantized_layers_of_libraries_see_the_noise_of_the_weights_that_they_stand_for(make):
    model = model_of(map(make, linears()))
    twin = stands_for(model)
    tolerance = {"rtol": 0.1, "atol": 0.01} if make is int8 else {"rtol": 1e-3, "atol": 1e-4}
    found, _ = micro_step(model, True)
    expected, _ = micro_step(twin, "copy")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert not torch.allclose(found[0], micro_step(model_of(map(make, linears())), False)[0][0], rtol=0.01)
