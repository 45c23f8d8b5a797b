"""The loss of clean and of perturbed micro-steps, kept apart."""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_rwp.environment import this_replica
from hf_rwp.optimizer import RWP


class LossTracker:
    """Averages the loss by role; replicas talk to each other only when asked, so that a step takes no longer.

    optimizer: the RWP wrapper; None in the plain training that RWP is compared to.

    tracker = LossTracker(optimizer)
    tracker.update(loss)                   # after every forward pass
    accelerator.log(tracker.compute())     # at logging time, on all replicas
    """

    def __init__(self, optimizer: RWP | None) -> None:
        self._optimizer = optimizer
        self._totals: Tensor | None = None

    @torch.no_grad()
    def update(self, loss: Tensor, count: float = 1) -> None:
        """Add the latest micro-step's unweighted loss. loss: 0-dim, a mean. count: what it is a mean over (images)."""
        if self._totals is None:
            self._totals = torch.zeros(3, 2, device=loss.device)  # (plain, clean, perturbed) x (sum, count)
        role = self._optimizer.role if self._optimizer else None
        row = self._totals[0 if role is None else 1 + role.perturbed]
        row[0] += loss.float() * count
        row[1] += count

    def compute(self) -> dict[str, float]:
        """The means since the last call, over all replicas. Collective: call it on all of them.

        `loss`, and where there were such micro-steps `loss_clean`, `loss_perturbed` and their difference `loss_gap`, a
        free measure of sharpness. Plain training, which has no role, is in `loss` alone. Empty before any update.
        """
        totals, self._totals = self._totals, None
        if totals is None:  # another replica may have losses, and waits
            device = next(self._optimizer.model.parameters()).device if self._optimizer else None
            totals = torch.zeros(3, 2, device=device)
        if this_replica()[1] > 1:
            dist.all_reduce(totals)
        loss, count = totals.sum(0).tolist()
        if not count:
            return {}
        means = {"loss": loss / count}
        _, (clean, n_clean), (perturbed, n_perturbed) = totals.tolist()
        if n_clean:
            means["loss_clean"] = clean / n_clean
        if n_perturbed:
            means["loss_perturbed"] = perturbed / n_perturbed
        if n_clean and n_perturbed:
            means["loss_gap"] = means["loss_perturbed"] - means["loss_clean"]
        return means
