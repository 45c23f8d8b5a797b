"""Which gradient is taken where: the role of every slot of an optimizer step.

W data-parallel replicas times K micro-steps make S = W * K slots.

1. W >= 2, parallel: even replicas take the clean gradient, odd ones the perturbed, in all their micro-steps.
2. W = 1, sequential: the micro-steps alternate, clean first.
3. alpha = 1: every slot is perturbed. alpha = 0: none is, and there is nothing to do here.

The framework averages all slots (its 1 / (W * K)); a slot's weight turns that mean into the paper's mix,
alpha * (mean of the perturbed gradients) + (1 - alpha) * (mean of the clean ones), arXiv 2211.11489.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """What one slot does. perturbed: its gradient is taken at perturbed weights. weight: what multiplies it."""

    perturbed: bool
    weight: float


def role(replica: int, micro_step: int, replicas: int, micro_steps: int, alpha: float) -> Role:
    """The role of the slot (replica, micro_step) among `replicas` * `micro_steps`.

    replica: in [0, replicas). micro_step: in [0, micro_steps). alpha: the perturbed gradient's share, in (0, 1].
    Raises ValueError where 0 < alpha < 1 and there is one slot alone: nothing to mix.
    """
    if alpha == 1:
        return Role(True, 1.0)
    index, count = (replica, replicas) if replicas > 1 else (micro_step, micro_steps)
    if count < 2:
        raise ValueError(f"one gradient on one replica cannot hold the mix of two that alpha={alpha} asks for")
    perturbed = count // 2
    if index % 2:
        return Role(True, alpha * count / perturbed)
    return Role(False, (1 - alpha) * count / (count - perturbed))
