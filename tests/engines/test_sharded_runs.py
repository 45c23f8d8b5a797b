"""Whole runs where a mesh of processes holds the weights are the runs of processes that hold them whole."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import night, run_each
from sharded import HIDDEN, Case, Net, base_of, batch, build, snapshot, whole
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP, LossTracker

# The ranks that have data of their own, by replica of the weights.
SHARES = {"hsdp": [[0, 1], [2, 3]], "fsdp": [[0, 1, 2, 3]], "tp": [[0]], "fsdp_tp": [[0, 2]], "hsdp_tp": [[0], [2]]}

OPTIONS: dict[str, dict[str, Any]] = {
    "RWP": {},
    "ARWP": {"options": {"eta": 5.0}},
    "antithetic": {"options": {"antithetic": True}, "accumulation": 4},
    "normalized, without 1-D weights": {"options": {"noise": "filter_normalized", "noise_1d": False}, "gamma": 0.5},
    "a group without noise": {"excluded": "layers.1"},
}


def course(case: Case, model, optimizer, base, batches_of) -> dict[str, Any]:
    """What a run comes to. batches_of: this process's of a micro-step, by its index."""
    tracker = LossTracker(optimizer)
    average = [parameter.detach().clone() for parameter in base.param_groups[0]["params"]]

    def follow(*_: Any) -> None:
        for tensor, parameter in zip(average, base.param_groups[0]["params"], strict=True):
            tensor.lerp_(parameter.detach(), 0.3)

    base.register_step_post_hook(follow)
    for index in range(case.windows * case.accumulation):
        x, y = batches_of(index)
        loss = mse_loss(model(x), y)
        tracker.update(loss)
        (loss / case.accumulation).backward()
        if (index + 1) % case.accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {
        "weights": snapshot(optimizer.model),
        "average": [whole(tensor) for tensor in average],
        "report": optimizer.report(),
        "losses": tracker.compute(),
        "fisher": optimizer.state_dict()["rwp"]["fisher"],
    }


def sharded_course(case: Case) -> dict[str, Any]:
    model, optimizer, base = build(case)
    return course(case, model, optimizer, base, lambda index: batch(case, index))


def whole_course(case: Case) -> dict[str, Any]:
    """The oracle, which knows nothing of DTensors: DDP over one rank a replica, with the data of all of its ranks."""
    shares = SHARES[case.engine]
    torch.manual_seed(0)
    model = Net(HIDDEN if "tp" in case.engine else 7).to(case.dtype)
    rank = dist.get_rank()
    replica = rank * len(shares) // 4
    size = 4 // len(shares)
    groups = [[other * size + place for other in range(len(shares))] for place in range(size)]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    base = base_of(case, model)
    options = {"accumulation_steps": case.accumulation if case.accumulation > 1 else None, "process_group": group}
    optimizer = RWP(base, model, gamma=case.gamma, alpha=case.alpha, **options, **case.options)
    wrapped = DistributedDataParallel(model, process_group=group) if len(shares) > 1 else model

    def batches_of(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [batch(case, index, peer) for peer in shares[replica]]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    return course(case, wrapped, optimizer, base, batches_of)


def both(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    return sharded_course(case), whole_course(case)


@pytest.mark.parametrize("engine", night(SHARES, ["hsdp", "tp", "fsdp_tp"]))
def test_a_run_is_that_of_whole_weights(engine):
    """Weights, their average, report, losses: of another order of sums, so not the same bits."""
    accumulation = 2 if len(SHARES[engine]) == 1 else 1
    cases = [Case(engine, **{"windows": 2, "accumulation": accumulation, **options}) for options in OPTIONS.values()]
    answers = run_each(4, both, [(case,) for case in cases], keep_group=True)
    for name, ranks in zip(OPTIONS, answers, strict=True):
        for own, expected in ranks:
            for what, tolerance in {"weights": 1e-10, "average": 1e-10, "losses": 1e-6}.items():  # losses are float32
                torch.testing.assert_close(
                    own[what],
                    expected[what],
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, at=(name, what): f"{at}: {m}",
                )
            sizes = [one["report"].pop("relative_noise") for one in (own, expected)]
            assert own["report"] == expected["report"]
            assert sizes[0].keys() == sizes[1].keys() == {"largest", "median", "smallest"}
            for key in sizes[0]:
                assert sizes[0][key] == {**sizes[1][key], "size": pytest.approx(sizes[1][key]["size"], rel=1e-9)}
            assert sizes[0]["largest"]["size"] > 0
        assert bool(ranks[0][0]["fisher"]) == (name == "ARWP")
        for weight, expected in ranks[0][1]["fisher"].items():
            parts = [own["fisher"][weight] for own, _ in ranks]
            assert all(found(part, expected) for part in parts), weight
            assert sum(part.numel() for part in parts) >= expected.numel()


def found(part: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether F of some rows is a stretch of F of all."""
    return any(
        torch.allclose(part, expected[begin:][: len(part)], rtol=1e-10, atol=0)
        for begin in range(len(expected) - len(part) + 1)
    )
