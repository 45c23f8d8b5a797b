"""The loss of clean and of perturbed micro-steps, kept apart."""

import torch
from torch import Tensor

from hf_rwp.core.optimizer import RWP
from hf_rwp.core.replicas import add_over, replicas_of


class LossTracker:
    """Averages the loss by role; replicas talk to each other only when asked, so that a step takes no longer.

        tracker = LossTracker(optimizer)
        tracker.update(loss)                   # after every forward pass
        accelerator.log(tracker.compute())     # at logging time, on all replicas
        tracker.total()                        # all that was computed since the last reset(), after an epoch

    Args:
        optimizer ([`RWP`] or `None`):
            The wrapper; `None` in the plain training that RWP is compared to.
        device (`torch.device`, *optional*):
            Where the losses are, for a plain replica that has none yet.
    """

    def __init__(self, optimizer: RWP | None, device: torch.device | None = None) -> None:
        self._optimizer = optimizer
        self._device = device
        self._recent: Tensor | None = None
        self._sums: list[list[float]] = []
        self.reset()

    @torch.no_grad()
    def update(self, loss: Tensor, count: float = 1) -> None:
        """Add the latest micro-step's unweighted loss. loss: 0-dim, a mean. count: what it is a mean over (images)."""
        if self._recent is None:
            self._recent = torch.zeros(3, 2, device=loss.device)  # (plain, clean, perturbed) x (sum, count)
        role = self._optimizer.role if self._optimizer else None
        row = self._recent[0 if role is None else 1 + role.perturbed]
        row[0] += loss.float() * count
        row[1] += count

    def compute(self) -> dict[str, float]:
        """The means since the last call, over all replicas. Collective: call it on all of them.

        `loss`, and where there were such micro-steps `loss_clean`, `loss_perturbed` and their difference `loss_gap`, a
        free measure of sharpness. Plain training, which has no role, is only in `loss`. Empty before any update.
        """
        recent, self._recent = self._recent, None
        if recent is None:  # another replica may have losses, and waits
            device = next(self._optimizer.model.parameters()).device if self._optimizer else self._device
            recent = torch.zeros(3, 2, device=device)
        replicas = self._optimizer.replicas if self._optimizer else replicas_of()
        add_over(recent, replicas)
        sums = recent.tolist()
        self._sums = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self._sums, sums, strict=True)]
        return _means(sums)

    def total(self) -> dict[str, float]:
        """The means of all that `compute` saw since the last `reset`. No collective."""
        return _means(self._sums)

    def reset(self) -> None:
        """Begin anew, for `total`."""
        self._sums = [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What `total` is made of, alike on all replicas; JSON can hold it."""
        return {"sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, list[list[float]]]) -> None:
        self._recent, self._sums = None, state_dict["sums"]


def _means(sums: list[list[float]]) -> dict[str, float]:
    loss, count = (sum(column) for column in zip(*sums, strict=True))
    if not count:
        return {}
    means = {"loss": loss / count}
    _, (clean, n_clean), (perturbed, n_perturbed) = sums
    if n_clean:
        means["loss_clean"] = clean / n_clean
    if n_perturbed:
        means["loss_perturbed"] = perturbed / n_perturbed
    if n_clean and n_perturbed:
        means["loss_gap"] = means["loss_perturbed"] - means["loss_clean"]
    return means
