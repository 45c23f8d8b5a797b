"""A run whose losses are no longer numbers ends there, with what to try; it is not a result."""

import math
from collections.abc import Mapping
from typing import Any


def is_finite(losses: Mapping[str, float]) -> bool:
    """Whether all losses are finite numbers."""
    return all(map(math.isfinite, losses.values()))


def refuse_divergence(losses: Mapping[str, float], step: int, advice: str) -> None:
    """Raise FloatingPointError for a training loss that is not a finite number.

    advice: flags, of which a smaller value may help.
    """
    if not is_finite(losses):
        raise FloatingPointError(
            f"the loss is {dict(losses)} by step {step}: nothing was saved since it diverged. Try a smaller {advice}"
        )


def refuse_meaningless(figures: Mapping[str, Any], step: int | None, advice: str = "") -> None:
    """Raise FloatingPointError where a held-out loss among the figures is not a finite number.

    step: of the run so far; None where nothing is trained. advice: as `refuse_divergence` takes it.
    """
    losses = {name: value for name, value in figures.items() if name.startswith("eval_loss")}
    wrong = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if not wrong:
        return
    if step is None:
        raise FloatingPointError(
            f"the held-out loss is {wrong}: these weights hold, or lead to, numbers that are not finite, and no figure "
            "of theirs means anything. Evaluate an earlier checkpoint, or train again"
        )
    raise FloatingPointError(
        f"the held-out loss is {wrong} by step {step}: the run has diverged, though its training loss may still be a "
        f"number, and this epoch is not saved. Try a smaller {advice}"
    )
