"""Which gradient is taken where: the role of every slot of an optimizer step.

W data-parallel replicas times K micro-steps make S = W * K slots.

1. W >= 2, parallel: even replicas take the clean gradient, odd ones the perturbed, in all their micro-steps.
2. W = 1, sequential: the micro-steps alternate, clean first.
3. alpha = 1: every slot is perturbed. alpha = 0: none is, and there is nothing to do here.

The framework averages all slots (its 1 / (W * K)); a slot's weight turns that mean into the paper's mix,
alpha * (mean of the perturbed gradients) + (1 - alpha) * (mean of the clean ones), arXiv 2211.11489.

Where the framework weighs slots by their tokens, `shares` says how much of its sum either role has.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """What one slot does. perturbed: its gradient is taken at perturbed weights. weight: what multiplies it."""

    perturbed: bool
    weight: float


def role(
    replica: int,
    micro_step: int,
    replicas: int,
    micro_steps: int,
    alpha: float,
    shares: tuple[float, float] | None = None,
) -> Role:
    """The role of the slot (replica, micro_step) among `replicas` * `micro_steps`.

    replica: in [0, replicas). micro_step: in [0, micro_steps). alpha: the perturbed gradient's share, in (0, 1].
    shares: what the framework's own factors on the clean and on the perturbed slots' mean gradients add up to, >= 0;
        None where it averages all slots. Where one is 0 that role has no gradient, and the other's is the step's.
    Raises ValueError where 0 < alpha < 1 and there is only one slot: nothing to mix.
    """
    if alpha == 1:
        return Role(True, 1.0)
    index, count = (replica, replicas) if replicas > 1 else (micro_step, micro_steps)
    if count < 2:
        raise ValueError(
            f"alpha={alpha} mixes a clean and a perturbed gradient, but this step has only one, on one replica"
        )
    if shares is not None and 0 in shares:
        return Role(index % 2 == 1, 1.0)
    total = count if shares is None else 1
    clean, perturbed = shares or (count - count // 2, count // 2)
    if index % 2:
        return Role(True, alpha * total / perturbed)
    return Role(False, (1 - alpha) * total / clean)


def role_shares(items: list[float]) -> tuple[float, float]:
    """The clean and the perturbed slots' shares where a slot's factor is its part of all items (tokens, say).

    items: one count for each replica, or for each micro-step where there is one replica; all 0 gives shares of 0.
    """
    total = sum(items) or 1
    return sum(items[0::2]) / total, sum(items[1::2]) / total


def mixes(alpha: float, gamma: float | None = None) -> bool:
    """Whether a step takes a clean and a perturbed gradient. gamma: None where it has its default, which is not 0."""
    return 0 < alpha < 1 and gamma != 0


def fewest_micro_steps(replicas: int, alpha: float, antithetic: bool = False) -> int:
    """The fewest micro-steps on each of `replicas` with which a step has all the gradients that it needs.

    Those are one of each kind where it mixes them, and two perturbed ones for an antithetic pair.
    """
    perturbed = max(1, replicas // 2) if mixes(alpha) else replicas
    pairs = 2 if antithetic and alpha and perturbed < 2 else 1
    return pairs * (2 if mixes(alpha) and replicas == 1 else 1)


def antithetic(replica: int, micro_step: int, replicas: int, micro_steps: int, alpha: float) -> tuple[int, int, int]:
    """Whose noise a perturbed slot takes, and its sign: (replica, micro_step, 1 or -1).

    The perturbed slots of a step are taken in pairs, replica by replica: the second has the opposite of the first's.
    Where their number is odd, the last one is without a partner.
    """
    if alpha == 1:
        order, slot = replica * micro_steps + micro_step, lambda n: (n // micro_steps, n % micro_steps)
    elif replicas > 1:
        order, slot = replica // 2 * micro_steps + micro_step, lambda n: (2 * (n // micro_steps) + 1, n % micro_steps)
    else:
        order, slot = micro_step // 2, lambda n: (0, 2 * n + 1)
    return (*slot(order - order % 2), -1 if order % 2 else 1)
