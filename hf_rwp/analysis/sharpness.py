"""How flat the loss is around the weights of a model, in numbers.

    loss_under_noise     E[L(w + eps)] - L(w) and accuracy at w + eps, eps the noise of RWP   (arXiv 2211.11489)
    worst_case           L(w + rho * g / ||g||) - L(w), what SAM's step goes up               (arXiv 2010.01412)
    largest_eigenvalue   of the Hessian at w, by Lanczos' iteration
    loss_slice           L(w + a * d + b * d' + ...) on a grid; d from `random_directions`    (arXiv 1712.09913)
    quantized            loss and accuracy with weights rounded to a few bits

`batches` is anything that gives the same pairs of model input and labels (B,) in each of many passes, such as a list;
every number is over all of them. A model gives logits (B, C), as a tensor or as `.logits`. `loss` is the mean over one
batch; only for integer labels is there an accuracy (nan elsewhere). A batch may also be a mapping, as transformers'
collators make them: the model's arguments, `labels` among them. The loss is then the model's own, the mean over labels
that are not -100 (for a causal language model without each text's first), and there is no accuracy. The model is in
eval mode meanwhile (BatchNorm's statistics are fixed, dropout is off); afterwards its weights, buffers, gradients and
modes are what they were, to the bit, after an interrupt too, and the global random numbers are untouched. Weights are
trainable floating-point parameters, each once, and moving them takes one copy of them. Equal seeds give models of one
architecture, on one kind of device, equal draws.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from hf_rwp.analysis.batches import Batches, check_batch, counted_labels
from hf_rwp.core.noise import Source, add_noise_, filter_norms, noise_seeds, std_factor
from hf_rwp.core.sharding import block_of

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """Mean loss, and accuracy as a fraction."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Estimate:
    """A mean over draws with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class UnderNoise:
    """Noise of size gamma: how much the loss rises over that of the weights as they are, and the accuracy."""

    gamma: float
    loss_rise: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue of the Hessian: one lies within `error` of `value`; iterations are Hessian-vector products."""

    value: float
    error: float
    iterations: int
    converged: bool


def measure(model: nn.Module, batches: Batches, loss: Loss = cross_entropy) -> Measured:
    """Loss and accuracy of the weights as they are."""
    with _evaluating(model):
        return _measured(model, batches, loss)


def loss_under_noise(
    model: nn.Module,
    batches: Batches,
    gammas: Sequence[float],
    *,
    draws: int = 8,
    noise: str = "filter",
    noise_1d: bool = True,
    seed: int = 0,
    loss: Loss = cross_entropy,
) -> list[UnderNoise]:
    """Loss rise and accuracy under the noise that RWP trains with, for every gamma.

    gammas, noise, noise_1d: as in `RWP`. draws: of the noise, at least 3, the same ones for every gamma. The intervals
    are Student's t over draws: they tell how well the mean over noise is known, for these images; where the noise
    wrecks the model losses are skewed, and the interval is rough. That of the accuracy is cut to [0, 1]. Raises
    ValueError for fewer draws.
    """
    if draws < 3:
        raise ValueError(f"draws must be at least 3, for an interval of their mean, got {draws}")
    at_weights, found = measure_draws(
        model, batches, gammas, draws=draws, noise=noise, noise_1d=noise_1d, seed=seed, loss=loss
    )
    levels = []
    for gamma, points in found:
        rise = estimate([point.loss - at_weights.loss for point in points])
        accuracy = estimate([point.accuracy for point in points])
        accuracy = replace(accuracy, low=max(accuracy.low, 0.0), high=min(accuracy.high, 1.0))
        levels.append(UnderNoise(gamma, rise, accuracy))
    return levels


def measure_draws(
    model: nn.Module,
    batches: Batches,
    gammas: Iterable[float],
    *,
    draws: int,
    noise: str = "filter",
    noise_1d: bool = True,
    frozen: bool = False,
    seed: int = 0,
    loss: Loss = cross_entropy,
    batch_statistics: bool = False,
    enough: Callable[[Measured, list[Measured]], bool] | None = None,
) -> tuple[Measured, list[tuple[float, list[Measured]]]]:
    """Loss and accuracy of the weights as they are, and, for every gamma, under each draw of the noise.

    frozen: whether frozen floating-point weights are perturbed as well. batch_statistics: whether BatchNorm takes those
    of each batch, as the noisy passes of training do, and not its running ones. enough: whether larger gammas can be
    left out, by what was measured at the weights and at the last one.
    """
    levels = []
    perturbed = [(at, weight) for at, weight in _positions(model, frozen) if noise_1d or weight.ndim > 1]
    positions = [position for position, _ in perturbed]
    weights = [weight for _, weight in perturbed]
    with _evaluating(model, batch_statistics), _restored(weights) as clean:
        sources = {weight.dtype: Source(weight) for weight in clean}
        at_weights = _measured(model, batches, loss)
        for gamma in gammas:
            points = []
            for draw in range(draws):
                for weight, number in zip(clean, noise_seeds(seed, draw, 0, 0, positions), strict=True):
                    weight.copy_(clean[weight])
                    block = block_of(weight)
                    std = filter_norms(block).mul_(std_factor(block, gamma, noise))
                    add_noise_(block, std, number, sources[weight.dtype])
                points.append(_measured(model, batches, loss))
            levels.append((gamma, points))
            if enough is not None and enough(at_weights, points):
                break
    return at_weights, levels


def worst_case(model: nn.Module, batches: Batches, rho: float = 0.05, loss: Loss = cross_entropy) -> float:
    """How much the loss rises by SAM's step: rho, in the unit of the weights, along the gradient over all batches."""
    weights = _weights(model)
    with _evaluating(model), _restored(weights) as clean:
        before = _measured(model, batches, loss).loss
        gradient = _mean_over(
            model, batches, loss, lambda value: torch.autograd.grad(value, weights, materialize_grads=True)
        )
        _move(clean, [(rho / max(math.sqrt(_dot(gradient, gradient)), 1e-12), gradient)])
        return _measured(model, batches, loss).loss - before


def largest_eigenvalue(
    model: nn.Module,
    batches: Batches,
    *,
    iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
    loss: Loss = cross_entropy,
) -> Eigenvalue:
    """The Hessian's largest eigenvalue: the most positive one, however large a negative one may be.

    iterations: at most, at least 1, one pass over the batches each. tolerance: of the error, relative to the value; a
    value near 0 beside large ones may never reach it, and is then returned as not converged. A converged value is that
    of a smaller eigenvalue only if the random start (seed) is all but orthogonal to the largest one's vector. nan where
    the loss is not a number.

    Lanczos' vectors are not kept orthogonal to each other: that brings copies of eigenvalues and no others (Paige,
    1980), and memory is that of a few copies of the weights, however many iterations. Products are in the model's
    precision: take float32 or better, and the module as it is before torch.compile, which has no second derivatives.
    """
    weights = _weights(model)
    generator = _generator(weights[0], seed)
    vector = [torch.randn(w.shape, generator=generator, device=w.device, dtype=_wide(w)) for w in weights]
    previous = [torch.zeros_like(v) for v in vector]
    diagonal: list[float] = []
    off_diagonal = [0.0]
    length = math.sqrt(_dot(vector, vector))

    def product(value: Tensor) -> Sequence[Tensor]:
        gradient = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
        along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        return torch.autograd.grad(along, weights, materialize_grads=True)

    # Fused attention has no second derivative.
    with _evaluating(model), sdpa_kernel(SDPBackend.MATH):
        while True:
            torch._foreach_div_(vector, length)
            image = _mean_over(model, batches, loss, product)
            diagonal.append(_dot(image, vector))
            torch._foreach_add_(image, vector, alpha=-diagonal[-1])
            torch._foreach_add_(image, previous, alpha=-off_diagonal[-1])
            previous, vector = vector, image
            length = math.sqrt(_dot(vector, vector))
            if not math.isfinite(length):
                return Eigenvalue(math.nan, math.nan, len(diagonal), False)
            value, error = _top_of_tridiagonal(diagonal, off_diagonal[1:], length)
            converged = error <= tolerance * abs(value)
            if converged or len(diagonal) == iterations:
                return Eigenvalue(value, error, len(diagonal), converged)
            off_diagonal.append(length)


def random_directions(model: nn.Module, count: int = 2, seed: int = 0) -> list[list[Tensor]]:
    """Gaussian directions in weight space, normalised as in Li et al. (arXiv 1712.09913).

    Every filter of a direction has the norm of that filter of the weights, so that a step of 1 is as long as the
    weights and architectures with different scales compare; biases and norm weights (one dimension) stay where they
    are. Each direction is a copy of the weights in memory.
    """
    directions = []
    for number in range(count):
        direction = []
        seeds = noise_seeds(seed, number, 1, 0, [position for position, _ in _positions(model)])
        for weight, own_seed in zip(_weights(model), seeds, strict=True):
            normal = torch.zeros(weight.shape, device=weight.device, dtype=_wide(weight))
            if weight.ndim > 1:
                normal.normal_(generator=_generator(weight, own_seed))
                block = block_of(normal)
                scale = filter_norms(block_of(weight)) / filter_norms(block)
                block.memory.mul_(scale.unsqueeze(1))
            direction.append(normal)
        directions.append(direction)
    return directions


def loss_slice(
    model: nn.Module,
    batches: Batches,
    directions: Sequence[Sequence[Tensor]],
    coordinates: Sequence[float],
    loss: Loss = cross_entropy,
) -> Tensor:
    """The loss at w + a * directions[0] + b * directions[1] + ..., for all a, b, ... of `coordinates`.

    Returns float64 on the CPU, one dimension for each direction, of len(coordinates) each.
    """
    with _evaluating(model), _restored(_weights(model)) as clean:
        losses = []
        for point in itertools.product(coordinates, repeat=len(directions)):
            _move(clean, list(zip(point, directions, strict=True)))
            losses.append(_measured(model, batches, loss).loss)
    return torch.tensor(losses, dtype=torch.float64).view([len(coordinates)] * len(directions))


def quantized(model: nn.Module, batches: Batches, bits: int, loss: Loss = cross_entropy) -> Measured:
    """Loss and accuracy with weights of two and more dimensions, frozen ones too, rounded to the nearest of 2^bits - 1
    levels: symmetric around 0, evenly spaced up to the largest magnitude in each filter (output channel).

    Only weights are rounded, activations are not, and the arithmetic is the model's own: what this says is accuracy,
    not speed. Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"bits must be at least 2, for a symmetric grid to hold more than 0, got {bits}")
    return replaced(model, batches, lambda weight: _rounded(weight, 2 ** (bits - 1) - 1), loss)


def replaced(
    model: nn.Module, batches: Batches, change: Callable[[Tensor], Tensor], loss: Loss = cross_entropy
) -> Measured:
    """Loss and accuracy with each weight of two and more dimensions, frozen ones too, as `change` makes it."""
    weights = [p for p in model.parameters() if p.is_floating_point() and p.ndim > 1]
    with _evaluating(model), _restored(weights):
        for weight in weights:
            weight.copy_(change(weight.detach()))
        return _measured(model, batches, loss)


def _rounded(weight: Tensor, levels: int) -> Tensor:
    filters = block_of(weight.to(_wide(weight))).memory.flatten(1)
    scale = filters.abs().amax(1, keepdim=True) / levels
    return (filters / scale).round().mul(scale).where(scale > 0, filters).reshape(weight.shape)


def _positions(model: nn.Module, frozen: bool = False) -> list[tuple[int, nn.Parameter]]:
    """Weights with their position in `named_parameters()`, which seeds a draw. frozen: those that do not learn, too."""
    weights = [(i, p) for i, p in enumerate(model.parameters()) if p.is_floating_point()]
    found = [(i, p) for i, p in weights if p.requires_grad or frozen]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no trainable floating-point parameter to move: call requires_grad_(True)"
        )
    return found


def _generator(weight: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(weight.device).manual_seed(seed)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [weight for _, weight in _positions(model)]


@contextmanager
def _evaluating(model: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if batch_statistics and isinstance(module, _BatchNorm)]
    buffers = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers(recurse=False)}
    try:
        model.eval()
        for norm in norms:
            norm.train()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers.items():
            buffer.copy_(value)


@contextmanager
def _restored(weights: Sequence[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Weights that may be written to, with a copy of each, which is put back at the end."""
    clean = {weight: weight.detach().clone() for weight in weights}
    try:
        yield clean
    finally:
        with torch.no_grad():
            for weight, value in clean.items():
                weight.copy_(value)
        torch.clear_autocast_cache()


def _move(clean: dict[nn.Parameter, Tensor], steps: Sequence[tuple[float, Sequence[Tensor]]]) -> None:
    """Set the weights to their clean values plus some directions; rounded once, to the weight's dtype."""
    for index, (weight, value) in enumerate(clean.items()):
        moved = value.to(_wide(value))
        for length, direction in steps:
            moved = torch.add(moved, direction[index], alpha=length)
        weight.copy_(moved)


def _losses(model: nn.Module, batches: Batches, loss: Loss) -> Iterator[tuple[Tensor, int, float]]:
    """Of each batch: the mean loss, in float32 or better; over how many labels; how many are right, or nan."""
    torch.clear_autocast_cache()  # autocast may hold a low-precision copy of weights that have moved
    device, empty = next(model.parameters()).device, True
    for batch in batches:
        empty = False
        check_batch(batch)
        if isinstance(batch, Mapping):
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            value = getattr(model(**moved), "loss", None)
            if value is None:
                raise ValueError(
                    f"{type(model).__name__} gave no loss for a batch with {', '.join(batch)}: a mapping needs "
                    "`labels` and a model that computes its loss from them. Else give pairs of inputs and labels"
                )
            yield value.to(_wide(value)), counted_labels(batch["labels"]).numel(), math.nan
            continue
        inputs, labels = batch[0], batch[1].to(device)
        output = model(inputs.to(device))
        logits = getattr(output, "logits", output)
        logits = logits.to(_wide(logits))
        right = (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)  # argmax would find a class in nans
        yield loss(logits, labels), len(labels), math.nan if labels.is_floating_point() else right.sum().item()
    if empty:
        raise ValueError(
            "batches gave nothing: they are read in many passes, and a generator gives one. Pass a list, or a loader"
        )


def _measured(model: nn.Module, batches: Batches, loss: Loss) -> Measured:
    total, correct, count = 0.0, 0.0, 0
    for value, size, right in _losses(model, batches, loss):
        count += size
        total += value.item() * size
        correct += right
    return Measured(total / count, correct / count)


def _mean_over(
    model: nn.Module, batches: Batches, loss: Loss, derivative: Callable[[Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """A derivative of the mean loss over all batches, in float32 or better."""
    totals: list[Tensor] = []
    count = 0
    with torch.enable_grad():
        for value, size, _ in _losses(model, batches, loss):
            parts = [part.detach() * size for part in derivative(value)]
            parts = [part.to(_wide(part)) for part in parts]
            if totals:
                torch._foreach_add_(totals, parts)
            totals, count = totals or parts, count + size
    torch._foreach_div_(totals, count)
    return totals


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    precise = torch.float32 if left[0].device.type == "mps" else torch.float64  # mps has no float64
    return torch.stack([(a * b).sum(dtype=precise) for a, b in zip(left, right, strict=True)]).sum().item()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _top_of_tridiagonal(diagonal: list[float], off_diagonal: list[float], length: float) -> tuple[float, float]:
    """The largest eigenvalue of Lanczos' matrix T, and how far the Hessian's nearest one is at most.

    length: of the next vector, before it is normalised.
    """
    beside = torch.tensor(off_diagonal, dtype=torch.float64)
    tridiagonal = (
        torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(beside, 1) + torch.diag(beside, -1)
    )
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[-1].item(), abs(length * vectors[-1, -1].item())


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of draws of one law, at least 2, with its 95 % confidence interval by Student's t."""
    from scipy.special import stdtrit  # of an extra that find_gamma does without

    count = len(values)
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)
