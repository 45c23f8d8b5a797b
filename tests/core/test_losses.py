"""LossTracker in one process: the loss of clean and of perturbed micro-steps, apart; nothing is read back before."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rwp import RWP, LossTracker
from hf_rwp.core.placement import Role
from hf_rwp.core.replicas import Replicas

CLEAN, PERTURBED = Role(perturbed=False, weight=0.4), Role(perturbed=True, weight=1.6)


def tracked(*updates: tuple) -> LossTracker:
    """A tracker fed with (role, loss) or (role, loss, count)."""
    optimizer = SimpleNamespace(role=None, model=nn.Linear(1, 1), replicas=Replicas())
    tracker = LossTracker(optimizer)
    for optimizer.role, loss, *count in updates:
        tracker.update(torch.tensor(loss), *count)
    return tracker


def test_losses_are_means_by_role_and_unweighted():
    means = tracked((CLEAN, 1.0), (PERTURBED, 4.0), (CLEAN, 2.0), (PERTURBED, 8.0), (CLEAN, 3.0)).compute()
    assert means == {"loss": pytest.approx(3.6), "loss_clean": 2.0, "loss_perturbed": 6.0, "loss_gap": 4.0}


def test_a_loss_counts_as_often_as_it_is_a_mean_over():
    means = tracked((CLEAN, 1.0, 30), (CLEAN, 5.0, 10), (PERTURBED, 4.0, 60)).compute()
    assert means == {"loss": pytest.approx(3.2), "loss_clean": 2.0, "loss_perturbed": 4.0, "loss_gap": 2.0}


@pytest.mark.parametrize(("role", "key"), [(CLEAN, "loss_clean"), (None, "loss"), (PERTURBED, "loss_perturbed")])
def test_a_role_without_micro_steps_has_no_mean(role, key):
    assert tracked((role, 1.0), (role, 2.0)).compute() == {"loss": 1.5, key: 1.5}


def test_without_a_wrapper_there_is_one_loss():
    tracker = LossTracker(None)
    assert tracker.compute() == {}
    tracker.update(torch.tensor(2.0))
    assert tracker.compute() == {"loss": 2.0}
    assert tracker.compute() == {}


def test_compute_starts_afresh():
    tracker = tracked((CLEAN, 100.0), (PERTURBED, 100.0))
    tracker.compute()
    assert tracker.compute() == {}
    tracker.update(torch.tensor(1.0))
    assert tracker.compute() == {"loss": 1.0, "loss_perturbed": 1.0}
    assert tracked().compute() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sums_do_not_drown_in_a_low_precision(dtype):
    tracker = tracked()
    tracker._optimizer.role = CLEAN
    for _ in range(3000):
        tracker.update(torch.tensor(1.5, dtype=dtype), count=64)
    assert tracker.compute()["loss"] == 1.5


def test_update_keeps_no_graph_and_reads_nothing_back():
    class Operations(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    tracker = tracked((CLEAN, 1.0))
    loss = torch.tensor(2.0, requires_grad=True) * 1
    with Operations() as operations:
        tracker.update(loss)
    assert operations.names
    assert not any("_local_scalar_dense" in name for name in operations.names)  # .item(): it waits for the device
    assert not tracker._recent.requires_grad


def test_it_follows_the_wrappers_roles_in_a_loop():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.5, alpha=0.8, accumulation_steps=3)
    tracker, losses = LossTracker(optimizer), {"loss_clean": [], "loss_perturbed": []}
    for _ in range(4):
        for kind in ("loss_clean", "loss_perturbed", "loss_clean"):
            loss = model(torch.ones(2, 3)).square().mean()
            tracker.update(loss)
            losses[kind].append(loss.item())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    means = {kind: sum(values) / len(values) for kind, values in losses.items()}
    means["loss"] = sum(map(sum, losses.values())) / 12
    means["loss_gap"] = means["loss_perturbed"] - means["loss_clean"]
    assert tracker.compute() == pytest.approx(means, rel=1e-5)


def test_the_total_is_of_all_that_was_computed_since_the_reset_and_survives_a_checkpoint():
    tracker, resumed = tracked((CLEAN, 1.0), (PERTURBED, 2.0)), tracked((CLEAN, 9.0))
    tracker.compute()
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for each in (tracker, resumed):
        each._optimizer.role = CLEAN
        each.update(torch.tensor(4.0))
        assert each.compute() == {"loss": 4.0, "loss_clean": 4.0}
        total = {"loss": 7 / 3, "loss_clean": 2.5, "loss_perturbed": 2.0, "loss_gap": -0.5}
        assert each.total() == pytest.approx(total)
        each.reset()
        assert each.total() == {}
