"""Which gamma suits a model: the noise that takes back a given share of what its weights have learned.

1. `batches` are read once. L is the loss of the weights as they are, L0 that of a guess from the labels' frequencies.
2. Noise grows or shrinks by factors of 2, the same draws each time, to where the mean loss rises by `share` of L0 - L.
3. Between two sizes the rise is taken to be a power of gamma: the proposal is where it reaches that.

BatchNorm takes the statistics of each batch meanwhile, as in the noisy passes of training: its running ones are those
of other weights. The largest noise that a loss tolerates is a measure of flatness (Jiang et al., arXiv 1912.02178).
Here the tolerance is relative to what there is to lose, so that one share serves losses of any scale.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_rwp.analysis.batches import Batch, Batches, check_batch, counted_labels
from hf_rwp.analysis.sharpness import Loss, Measured, measure_draws
from hf_rwp.core.gamma import DEFAULT_GAMMA, SHARE
from hf_rwp.core.noise import check_noise, std_factor
from hf_rwp.core.sharding import block_of

UP = tuple(2.0**power for power in range(-2, 8))  # of the mode's default gamma, tried in this order until the loss
DOWN = tuple(2.0**power for power in range(-3, -9, -1))  # has risen enough, and these where the first is too much
LEARNED = 0.95  # a loss that is at least so much of a guess's tells nothing


class NothingLearnedError(ValueError):
    """A model's loss is no better than that of a guess."""


@dataclass(frozen=True)
class NoiseLevel:
    """How much the loss rises under noise of size gamma: the mean over draws, the least and the most."""

    gamma: float
    rise: float
    low: float
    high: float


@dataclass(frozen=True)
class GammaProposal:
    """What `find_gamma` found.

    gamma: the proposal, for `RWP(gamma=...)` with this `noise`. reached: whether it is where the loss rises by
    `allowed`, and not the largest or smallest size that was tried. loss: of the weights as they are. baseline: of a
    guess from the labels' frequencies, nan where `rise` was given. levels: by size, ascending. sizes: for each weight
    that is perturbed, by name, how large its noise is at gamma, relative to the weight. Printed without these two.
    """

    gamma: float
    reached: bool
    noise: str
    loss: float
    baseline: float
    allowed: float
    levels: tuple[NoiseLevel, ...] = field(repr=False)
    sizes: Mapping[str, float] = field(repr=False)


def find_gamma(
    model: nn.Module,
    batches: Batches,
    loss: Loss = cross_entropy,
    *,
    noise: str = "filter",
    noise_1d: bool = True,
    frozen: bool = False,
    share: float = SHARE,
    rise: float | None = None,
    num_batches: int = 8,
    draws: int = 4,
    seed: int = 0,
) -> GammaProposal:
    """Propose a `gamma` for a model, from how much noise its loss tolerates.

    The weights need to have learned something: take trained ones, or train without noise for a few hundred steps first.

    Args:
        model: Any module, as it is; its weights, buffers, gradients, modes and the random numbers of torch, numpy and
            Python are left as they were, whatever raises. Not to be called between a forward and a backward pass.
        batches: Pairs of model input and integer labels (B,), or mappings with `labels` from which the model computes
            its loss, as transformers' collators make them. Read once: a generator or a shuffling loader will do.
        loss: The mean loss of logits (B, C) and labels, for pairs.
        noise: `filter` or `filter_normalized`, as in `RWP`; each has a gamma of its own.
        noise_1d: Whether biases and norm weights are perturbed.
        frozen: Whether frozen weights are as well. They are copied for it, and quantized ones stay without noise.
        share: Of what the weights have learned, in (0, 1): the loss of a guess from the labels' frequencies less
            theirs. Under the proposed noise the loss rises by so much of it.
        rise: The rise of the loss to propose for, above 0, in place of `share`; for losses without integer labels.
        num_batches: How many batches to read, at least 1.
        draws: Draws of the noise for each size, at least 1.
        seed: Of the noise.

    Returns:
        The proposal, with all that was measured.

    Raises:
        ValueError: for an option out of range, for samples or nothing in place of batches, for labels that are not
            integers without `rise`.
        NothingLearnedError: a ValueError, where the loss is no better than that of a guess, or no number.
    """
    check_noise(noise)
    for name, value, valid, allowed in (
        ("share", share, 0 < share < 1, "in (0, 1)"),
        ("rise", rise, rise is None or 0 < rise < math.inf, "finite and above 0"),
        ("num_batches", num_batches, num_batches >= 1, "at least 1"),
        ("draws", draws, draws >= 1, "at least 1"),
    ):
        if not valid:
            raise ValueError(f"{name} must be {allowed}, got {value}")
    with _random_numbers_kept(model):
        some = list(itertools.islice(batches, num_batches))
        for batch in some:
            check_batch(batch)
        baseline = math.nan if rise is not None else _loss_of_a_guess(some)
        options: Any = {"batch_statistics": True, "draws": draws, "noise": noise, "noise_1d": noise_1d}
        options |= {"frozen": frozen, "seed": seed, "loss": loss}

        def allowed_at(clean: Measured) -> float:
            return _allowed(clean.loss, baseline, share) if rise is None else rise

        def measured(factors: Sequence[float], exceeded: bool) -> tuple[Measured, list[NoiseLevel]]:
            """Levels up to the first that exceeds what is allowed, or to the first that does not."""
            clean, found = measure_draws(
                model,
                some,
                [DEFAULT_GAMMA[noise] * factor for factor in factors],
                enough=lambda clean, points: exceeded is not (_level(0, clean, points).rise < allowed_at(clean)),
                **options,
            )
            return clean, [_level(gamma, clean, points) for gamma, points in found]

        clean, levels = measured(UP, exceeded=True)
        limit = allowed_at(clean)
        if len(levels) == 1:
            levels = [*measured(DOWN, exceeded=False)[1][::-1], *levels]
    gamma, reached = _where(levels, limit)
    sizes = _sizes(model, gamma, noise, noise_1d, frozen)
    return GammaProposal(gamma, reached, noise, clean.loss, baseline, limit, tuple(levels), sizes)


def _loss_of_a_guess(batches: Sequence[Batch]) -> float:
    """The entropy of the labels' frequencies, in nats. Raises ValueError where labels are not classes or tokens."""
    counts: dict[int, int] = {}
    for batch in batches:
        labels = counted_labels(batch["labels"]) if isinstance(batch, Mapping) else batch[1]
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels are {str(labels.dtype).removeprefix('torch.')}, of which there is no guess to compare a loss "
                "with: set rise, how much the loss may rise"
            )
        for label, count in zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True):
            counts[label] = counts.get(label, 0) + count
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def _allowed(loss: float, baseline: float, share: float) -> float:
    """Raises NothingLearnedError for a loss that leaves nothing to take back."""
    if not loss < LEARNED * baseline:
        raise NothingLearnedError(
            f"the loss is {loss:.4g}, and a guess from the labels' frequencies has {baseline:.4g}: the weights have "
            "not learned enough for noise to take anything back. Load trained ones, train without noise for a few "
            "hundred steps first, or set rise, how much the loss may rise"
        )
    return share * (baseline - loss)


def _level(gamma: float, clean: Measured, points: Sequence[Measured]) -> NoiseLevel:
    rises = [point.loss - clean.loss for point in points]
    return NoiseLevel(gamma, sum(rises) / len(rises), min(rises), max(rises))


def _where(levels: Sequence[NoiseLevel], limit: float) -> tuple[float, bool]:
    """The gamma at which the rise is `limit`, if a power of gamma; and whether it lies between two levels."""
    within = len(list(itertools.takewhile(lambda level: level.rise < limit, levels)))
    if within in (0, len(levels)):
        return levels[max(0, within - 1)].gamma, False
    before, after = levels[within - 1 : within + 1]
    if before.rise <= 0 or not math.isfinite(after.rise):
        return before.gamma, True  # of which no power can be told: the size that is known to be within the limit
    power = math.log(after.rise / before.rise) / math.log(after.gamma / before.gamma)
    return before.gamma * (limit / before.rise) ** (1 / power), True


def _sizes(model: nn.Module, gamma: float, noise: str, noise_1d: bool, frozen: bool) -> dict[str, float]:
    """What ||noise|| / ||weight|| comes to: gamma * sqrt(fan_in) in mode `filter`, gamma in `filter_normalized`."""
    sizes = {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and (weight.requires_grad or frozen) and (noise_1d or weight.ndim > 1):
            block = block_of(weight)
            sizes[name] = std_factor(block, gamma, noise) * math.sqrt(block.length)
    return sizes


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Torch's, numpy's and Python's: a loader that shuffles or augments draws from them."""
    devices = {weight.device for weight in model.parameters() if weight.device.type != "cpu"}
    kinds = {device.type for device in devices}
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device.index for device in devices], device_type=next(iter(kinds), "cuda")):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
