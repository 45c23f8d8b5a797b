"""What gamma, the size of the noise, is relative to, its defaults, and how it grows over training; without torch."""

import math

MODES = ("filter", "filter_normalized")
DEFAULT_GAMMA = {"filter": 0.01, "filter_normalized": 0.2}
SCHEDULES = ("constant", "linear", "cosine")
SHARE = 0.125  # of what weights have learned, that noise may take back where `find_gamma` proposes a gamma


def gamma_factor(progress: float, schedule: str = "constant", growth: float = 0.0, start: float = 0.0) -> float:
    """What to multiply gamma by at `progress`, the fraction of the training's optimizer steps behind us, in [0, 1].

    schedule: `constant` is 1 throughout; `linear` and `cosine` rise from 1 to 1 + growth, cosine as in ARWP's 1x form
        (arXiv 2404.00357): 1 + growth * (1 - cos(pi * progress)) / 2.
    growth: how much larger than at the start gamma is at the end, >= 0, in multiples of gamma.
    start: before this fraction the factor is 0, plain training; it does not shift the schedule. In [0, 1].
    """
    if progress < start:
        return 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 + growth * progress
    if schedule == "cosine":
        return 1.0 + growth * (1.0 - math.cos(math.pi * progress)) / 2.0
    raise ValueError(f"schedule is {schedule!r}: choose one of {', '.join(SCHEDULES)}")
