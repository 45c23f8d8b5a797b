"""Closed forms on models whose loss is quadratic in the weights: L(w) = w.H.w / 2 + b.w, with H chosen."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hf_rwp import RWP
from hf_rwp.analysis import sharpness
from hf_rwp.analysis.sharpness import (
    largest_eigenvalue,
    loss_slice,
    loss_under_noise,
    measure,
    quantized,
    random_directions,
    worst_case,
)
from hf_rwp.core.noise import hashes, noise_seeds


class Quadratic(nn.Module):
    """The loss itself is the output, for any input; the weights are a matrix of 3 filters and a bias."""

    def __init__(self, eigenvalues, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        self.hessian = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
        self.slope = torch.randn(size, generator=generator, dtype=torch.float64)
        values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        self.matrix = nn.Parameter(values[:-2].view(3, -1).clone())
        self.bias = nn.Parameter(values[-2:].clone())

    @property
    def flat(self):
        return torch.cat([self.matrix.reshape(-1), self.bias]).double()

    def loss_at(self, w):
        return 0.5 * w @ self.hessian @ w + self.slope @ w

    def forward(self, inputs):
        return self.loss_at(self.flat) * inputs


EIGENVALUES = [4.0, 3.0, 2.5, 2.0, 1.0, 0.5, 0.3, 0.0]
# Weighted by the batches' sizes, 2 : 1, the loss is that of the quadratic.
BATCHES = [
    (torch.full((2,), 1.25, dtype=torch.float64), torch.zeros(2)),
    (torch.full((1,), 0.5, dtype=torch.float64), torch.zeros(1)),
]


def mean(output, labels):
    return output.mean()


class Classifier(nn.Module):
    """BatchNorm, dropout, attention, a tied weight, a frozen one, and `.logits`, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.up, self.out = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.up.weight
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, inputs):
        hidden = self.drop(self.again(torch.relu(self.up(self.norm(inputs * self.frozen)))))
        return type("Output", (), {"logits": self.out(hidden)})


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return [(torch.randn(n, 8), torch.randint(4, (n,))) for n in (16, 5)]


def stds(model, gamma, noise="filter"):
    """By hand: gamma times the norm of each row, or of a bias."""
    found = []
    for weight in model.parameters():
        rows = weight.detach().view(len(weight) if weight.ndim > 1 else 1, -1)
        fan_in = rows.shape[1] if noise == "filter_normalized" else 1
        found.append((gamma / fan_in**0.5 * rows.norm(dim=1, keepdim=True)).expand_as(rows).reshape(-1))
    return torch.cat(found)


def epsilon(model, gamma, draw, noise="filter", seed=0, noise_1d=True):
    """The noise of a draw, from its definition: these weights are smaller than a tile, and have one seed each."""
    normal = []
    for seed_of, weight in zip(noise_seeds(seed, draw, 0, 0, range(2)), model.parameters(), strict=True):
        generator = torch.Generator().manual_seed(hashes([seed_of], 0)[0])
        drawn = torch.randn(weight.numel(), generator=generator, dtype=torch.float64)
        normal.append(drawn * (noise_1d or weight.ndim > 1))
    return torch.cat(normal) * stds(model, gamma, noise)


@pytest.mark.parametrize("options", [{}, {"noise": "filter_normalized"}, {"noise_1d": False}, {"seed": 7}])
def test_loss_under_noise_is_exact_for_the_given_draws(options):
    model = Quadratic(EIGENVALUES)
    w, gradient = model.flat.detach(), model.hessian @ model.flat.detach() + model.slope
    for level in loss_under_noise(model, BATCHES, [0.0, 0.3, 2.0], draws=5, loss=mean, **options):
        noises = [epsilon(model, level.gamma, draw, **options) for draw in range(5)]
        rises = torch.stack([gradient @ e + 0.5 * e @ model.hessian @ e for e in noises])
        assert level.loss_rise.mean == pytest.approx(rises.mean().item(), abs=1e-12)
        half = 2.7764451 * rises.std().item() / math.sqrt(5)
        assert level.loss_rise.high - level.loss_rise.mean == pytest.approx(half, rel=1e-3, abs=1e-12)
        assert level.loss_rise.mean - level.loss_rise.low == pytest.approx(half, rel=1e-3, abs=1e-12)
        assert math.isnan(level.accuracy.mean)  # the labels are no classes
    assert torch.equal(model.flat, w)


def test_the_noise_is_the_one_that_rwp_trains_with(images):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    seen = []
    model.register_forward_hook(lambda model, *_: seen.append([p.detach().clone() for p in model.parameters()]))
    loss_under_noise(model, images[:1], [0.02], draws=3, seed=5)
    _, *measured = seen
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.0), model, gamma=0.02, alpha=1.0, seed=5)
    for step in (1, 2):  # RWP counts its optimizer steps from 1
        nn.functional.cross_entropy(model(images[0][0]), images[0][1]).backward()
        optimizer.step()
        assert all(map(torch.equal, seen[-1], measured[step]))


def test_loss_rise_is_half_the_trace_of_hessian_times_covariance():
    model = Quadratic(EIGENVALUES)
    expected = 0.5 * (model.hessian.diagonal() * stds(model, 0.5).square()).sum().item()
    (level,) = loss_under_noise(model, BATCHES, [0.5], draws=4000, loss=mean)
    assert level.loss_rise.low < expected < level.loss_rise.high
    assert level.loss_rise.high - level.loss_rise.low < 0.2 * expected


def test_the_interval_holds_the_true_rise_as_often_as_it_says():
    model = Quadratic(EIGENVALUES)
    expected = 0.5 * (model.hessian.diagonal() * stds(model, 0.1).square()).sum().item()
    held = 0
    for seed in range(300):
        (level,) = loss_under_noise(model, BATCHES, [0.1], draws=5, seed=seed, loss=mean)
        held += level.loss_rise.low < expected < level.loss_rise.high
    assert 0.92 <= held / 300 <= 0.98


def test_an_interval_is_students():
    """By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.302653."""
    found = sharpness.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.high - 2, 2 - found.low) == pytest.approx([4.302653 / 3**0.5] * 2, rel=1e-6)


def test_worst_case_is_the_closed_form():
    model = Quadratic(EIGENVALUES)
    gradient = model.hessian @ model.flat.detach() + model.slope
    step = 0.3 * gradient / gradient.norm()
    expected = gradient @ step + 0.5 * step @ model.hessian @ step
    assert worst_case(model, BATCHES, 0.3, loss=mean) == pytest.approx(expected.item(), abs=1e-12)


def test_worst_case_at_a_stationary_point_is_no_rise():
    model = Quadratic(EIGENVALUES)
    model.slope = -model.hessian @ model.flat.detach()
    assert worst_case(model, BATCHES, 0.05, loss=mean) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "eigenvalues",
    [EIGENVALUES, [1.0, 0.5, -0.2, -0.9, -3.0, -20.0, -50.0, -100.0], [-1.0, -2, -3, -4, -5, -6, -7, -800], [2.0] * 8],
)
def test_largest_eigenvalue_is_that_of_the_matrix(eigenvalues):
    model = Quadratic(eigenvalues)
    found = largest_eigenvalue(model, BATCHES, tolerance=1e-8, loss=mean)
    largest = torch.linalg.eigvalsh(model.hessian)[-1].item()
    assert found.value == pytest.approx(largest, abs=1e-7)
    assert found.converged
    assert found.iterations <= 12  # 8, but for rounding
    assert found.error <= 1e-8 * abs(largest)


def test_an_eigenvalue_that_is_not_there_yet_says_so():
    model = Quadratic(EIGENVALUES)
    found = largest_eigenvalue(model, BATCHES, iterations=2, loss=mean)
    assert (found.iterations, found.converged) == (2, False)
    distances = (torch.linalg.eigvalsh(model.hessian) - found.value).abs()
    assert distances.min().item() <= found.error


def test_eigenvalue_of_a_classifier_is_that_of_its_full_hessian(classifier, images):
    classifier.double()
    images = [(x.double(), y) for x, y in images]
    weights = [p for p in classifier.parameters() if p.requires_grad]
    names = [name for name, p in classifier.named_parameters() if p.requires_grad]

    def loss_of(flat):
        parts = flat.split([w.numel() for w in weights])
        values = {name: part.view_as(w) for name, part, w in zip(names, parts, weights, strict=True)}
        x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
        logits = torch.func.functional_call(classifier, values, x).logits
        return nn.functional.cross_entropy(logits, y)

    classifier.eval()
    hessian = torch.autograd.functional.hessian(loss_of, torch.cat([w.detach().reshape(-1) for w in weights]))
    classifier.train()
    found = largest_eigenvalue(classifier, images, iterations=100, tolerance=1e-6)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-5)
    assert found.converged


def test_fused_attention_has_a_second_derivative(images):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            key = (x @ self.weight)[None, None]
            return scaled_dot_product_attention(key, key, key)[0, 0]

    assert math.isfinite(largest_eigenvalue(Attention(), images).value)


def test_slices_are_parabolas():
    model = Quadratic(EIGENVALUES)
    w = model.flat.detach()
    directions = random_directions(model, 2, seed=3)
    first, second = (torch.cat([part.reshape(-1) for part in parts]) for parts in directions)
    coordinates = [-1.0, -0.5, 0.0, 0.5, 1.0]
    line = loss_slice(model, BATCHES, directions[:1], coordinates, loss=mean)
    torch.testing.assert_close(line, torch.stack([model.loss_at(w + a * first) for a in coordinates]))
    plane = loss_slice(model, BATCHES, directions, coordinates, loss=mean)
    expected = [[model.loss_at(w + a * first + b * second) for b in coordinates] for a in coordinates]
    torch.testing.assert_close(plane, torch.tensor(expected, dtype=torch.float64))
    assert plane[2, 2] == measure(model, BATCHES, mean).loss


def test_directions_have_the_norms_of_the_filters_and_leave_one_dimension_alone():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(4, 2))
    first, second = random_directions(model)
    for weight, *parts in zip(model.parameters(), first, second, strict=True):
        for part in parts:
            if weight.ndim == 1:
                assert not part.any()
            else:
                torch.testing.assert_close(part.flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
    assert not torch.equal(first[0], second[0])


def test_models_of_one_architecture_get_the_same_draws():
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    ours, theirs = (random_directions(model, 1, seed=2)[0][0] for model in (one, other))
    torch.testing.assert_close(nn.functional.normalize(ours), nn.functional.normalize(theirs))
    channels_last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    contiguous = nn.Conv2d(3, 4, 3)
    contiguous.load_state_dict(channels_last.state_dict())
    ours, theirs = (random_directions(model, 1)[0][0] for model in (channels_last, contiguous))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantization_is_round_to_nearest_in_each_filter(bits):
    model = nn.Linear(6, 3).double()
    with torch.no_grad():
        model.weight[1] = 0
        model.bias.copy_(torch.tensor([0.123, 0.456, 0.789]))
    top = 2 ** (bits - 1) - 1
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append((module.weight.clone(), module.bias.clone())))
    kept = model.weight.detach().clone()
    quantized(model, [(torch.randn(2, 6).double(), torch.tensor([0, 1]))], bits)
    ((weight, bias),) = seen
    for row, original in zip(weight, kept, strict=True):
        scale = original.abs().max().item() / top
        levels = [scale * level for level in range(-top, top + 1)]
        nearest = [min(levels, key=lambda level: abs(level - value)) for value in original.tolist()]
        assert row.tolist() == pytest.approx(nearest, abs=1e-12)
    assert torch.equal(bias, model.bias)
    assert torch.equal(model.weight, kept)


MEASUREMENTS = {
    "measure": lambda model, batches: measure(model, batches),
    "loss_under_noise": lambda model, batches: loss_under_noise(model, batches, [0.1], draws=3),
    "worst_case": lambda model, batches: worst_case(model, batches, 0.1),
    "largest_eigenvalue": lambda model, batches: largest_eigenvalue(model, batches, iterations=5),
    "loss_slice": lambda model, batches: loss_slice(model, batches, random_directions(model), [-1.0, 0.0, 1.0]),
    "quantized": lambda model, batches: quantized(model, batches, 4),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("interrupt", [None, RuntimeError, KeyboardInterrupt])
def test_a_model_is_afterwards_what_it_was(name, interrupt, classifier, images):
    """Weights, buffers, gradients, modes and the global random numbers, to the bit; a part in eval mode stays so."""
    model = classifier
    model.train()
    model.drop.eval()
    model.norm(torch.randn(9, 8))
    model(images[0][0]).logits.sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()

    calls = iter(range(10**6))

    def stop(*_):
        if interrupt and next(calls) == (
            1 if name in ("measure", "quantized") else 3
        ):  # in the second pass, if there is one
            raise interrupt

    hook = model.register_forward_hook(stop)
    with pytest.raises(interrupt) if interrupt else nullcontext():
        MEASUREMENTS[name](model, images)
    hook.remove()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)
    assert [module.training for module in model.modules()] == modes
    assert model.again.weight is model.up.weight
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_low_precision_models_are_measured_and_restored(name, images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    MEASUREMENTS[name](model, [(x.bfloat16(), y) for x, y in images])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_accuracy_and_loss_are_over_images_not_batches(classifier, images):
    classifier.eval()
    x, y = (torch.cat(parts) for parts in zip(*images, strict=True))
    logits = classifier(x).logits
    found = measure(classifier, images)
    assert found.accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)


def test_a_model_that_diverged_gives_no_numbers_and_no_error(images):
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert math.isnan(loss_under_noise(model, images, [0.1], draws=3)[0].loss_rise.mean)
    assert math.isnan(worst_case(model, images))
    assert math.isnan(largest_eigenvalue(model, images).value)
    assert loss_slice(model, images, random_directions(model, 1), [0.0]).isnan().all()
    assert math.isnan(quantized(model, images, 8).loss)


def test_what_cannot_be_measured_is_refused(images):
    model = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"batches gave nothing.*Pass a list"):
        loss_under_noise(model, iter(images), [0.1], draws=3)
    with pytest.raises(ValueError, match=r"draws must be at least 3, .*got 2"):
        loss_under_noise(model, images, [0.1], draws=2)
    with pytest.raises(ValueError, match=r"bits must be at least 2, .*got 1"):
        quantized(model, images, 1)
    with pytest.raises(ValueError, match=r"Linear has no trainable.*requires_grad_"):
        worst_case(model.requires_grad_(False), images)
