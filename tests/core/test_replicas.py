"""What a replica is: whoever holds a whole copy of the weights and has its gradients averaged with the others'.

Not the rank of the world: DDP over a part of the ranks, processes that train by themselves, launchers that start
processes that do not know of each other; and buffers that others combine.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.state import PartialState
from distributed import rank, run
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP, LossTracker


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank() + index)
    draw = [torch.randn(4, size, dtype=torch.float64, generator=generator) for size in (6, 3)]
    return draw[0], draw[1]


@dataclass
class Step:
    weights: reference.Tensors
    seen: list[reference.Tensors] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    gradient: reference.Tensors = field(default_factory=dict)


def steps(
    model: nn.Module, net: nn.Module, optimizer: RWP, count: int, accumulation: int = 1, context=None
) -> list[Step]:
    """Train, and note what there was to see."""
    found = []
    for number in range(count):
        found.append(Step(reference.snapshot(net)))
        with reference.seen_weights(net) as found[-1].seen:
            for micro_step in range(accumulation):
                found[-1].batches.append(batch(number * accumulation + micro_step))
                x, y = found[-1].batches[-1]
                with (context or contextlib.nullcontext)():
                    (mse_loss(model(x), y) / accumulation).backward()
        found[-1].gradient = {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_mixed(ranks: list[list[Step]], alpha: float, perturbed: list[bool]) -> None:
    """perturbed: of every slot, replica by replica."""
    for of_step in zip(*ranks, strict=True):
        clean = of_step[0].weights
        noises = [eps for step in of_step for eps in reference.noises(step.seen, clean)]
        assert [eps is not None for eps in noises] == perturbed
        batches = [one for step in of_step for one in step.batches]
        expected = reference.mixed_gradient(network(), clean, noises, batches, mse_loss, alpha)
        for step in of_step:
            torch.testing.assert_close(step.weights, clean, rtol=0, atol=0)
            torch.testing.assert_close(step.gradient, expected, rtol=1e-12, atol=1e-14)


def wrap(net: nn.Module, **options: Any) -> RWP:
    return RWP(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net, **{"gamma": 0.3, "alpha": 0.3, **options})


# Groups that are not the world.


def in_groups(groups: list[list[int]]) -> tuple[list[Step], dict[str, Any], dict[str, float], Tensor]:
    mine = [dist.new_group(ranks) for ranks in groups][next(n for n, ranks in enumerate(groups) if rank() in ranks)]
    net = network()
    net.register_buffer("which", torch.tensor(float(rank())))
    optimizer = wrap(net)
    tracker = LossTracker(optimizer)
    model = DistributedDataParallel(net, process_group=mine)
    found = steps(model, net, optimizer, 3)
    tracker.update(torch.tensor(float(rank())))
    net.which.fill_(rank())
    optimizer.sync_buffers()
    return found, optimizer.report(), tracker.compute(), net.which


def test_ddp_over_a_part_of_the_ranks_mixes_within_its_own_group():
    groups = [[0, 2], [1, 3]]
    ranks = run(4, in_groups, groups, timeout=60)
    for group in groups:
        assert_mixed([ranks[member][0] for member in group], 0.3, [False, True])
        for member in group:
            _, report, losses, buffer = ranks[member]
            assert (report["replicas"], report["slots"]) == (2, {"clean": 3, "perturbed": 3})
            assert losses == {
                "loss": sum(group) / 2,
                "loss_clean": group[0],
                "loss_perturbed": group[1],
                "loss_gap": 2.0,
            }
            assert buffer == group[0]
    eps = [reference.noises(ranks[member][0][0].seen, ranks[member][0][0].weights)[0] for member in (2, 3)]
    torch.testing.assert_close(eps[0]["0.weight"], eps[1]["0.weight"])  # two runs of one seed at equal weights


def test_an_uneven_group_is_right_too():
    ranks = run(3, in_groups, [[2, 1, 0]], timeout=60)
    assert_mixed([steps for steps, *_ in ranks], 0.3, [False, True, False])


def by_itself(alpha: float) -> list[Step]:
    net = network()
    own, _ = dist.new_subgroups(1)
    optimizer = wrap(net, alpha=alpha, process_group=own, accumulation_steps=2)
    model = DistributedDataParallel(net)
    return steps(model, net, optimizer, 3, accumulation=2, context=model.no_sync)


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_a_process_that_trains_by_itself_is_a_replica_of_its_own(alpha):
    for found in run(2, by_itself, alpha):
        assert_mixed([found], alpha, [False, True])


def never_synchronized(how: str) -> None:
    net = network()
    clean = reference.snapshot(net)
    if how == "LocalSGD":
        accelerator = Accelerator(cpu=True)
        model, prepared = accelerator.prepare(net, wrap(net))
        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4):
            mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
            with pytest.raises(RuntimeError) as raised:
                prepared.step()
    else:
        optimizer = wrap(net, accumulation_steps=2)
        model = DistributedDataParallel(net)
        with pytest.raises(RuntimeError) as raised:
            steps(model, net, optimizer, 1, accumulation=2, context=model.no_sync)
    assert "never averaged" in str(raised.value)
    assert "process_group=torch.distributed.new_subgroups(1)[0], accumulation_steps=2" in str(raised.value)
    torch.testing.assert_close(reference.snapshot(net), clean, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["no_sync", "LocalSGD"])
def test_a_step_after_gradients_that_were_never_averaged_is_refused(how):
    run(2, never_synchronized, how)


def joins(alpha: float) -> bool:
    net = network()
    optimizer = wrap(net, alpha=alpha)
    model = DistributedDataParallel(net)
    with model.join(), pytest.raises(NotImplementedError) if alpha < 1 else contextlib.nullcontext() as raised:
        for index in range(2 + rank()):
            mse_loss(model(batch(index)[0]), batch(index)[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return raised is None or "drop_last=True" in str(raised.value)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_join_is_refused_where_a_replica_that_is_out_of_data_would_be_missing_from_the_mix(alpha):
    assert run(2, joins, alpha) == [True, True]


# Processes that do not know of each other.


@pytest.fixture
def launched(monkeypatch):
    """The environment of one of two processes that torchrun started where Accelerate finds no GPU."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.usefixtures("launched")
def test_processes_that_would_train_alone_are_refused():
    net = network()
    optimizer = wrap(net, alpha=1.0)  # Accelerate has not looked yet: a process group might still come
    with pytest.raises(RuntimeError, match=r"2 processes were launched.*ACCELERATE_USE_CPU=true"):
        net(torch.ones(1, 6).double())
    optimizer.remove()
    PartialState._shared_state["num_processes"] = 1
    with pytest.raises(RuntimeError, match="each would train by itself"):
        wrap(net)


def test_a_launcher_that_was_asked_for_two_processes_and_started_one_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    net = network()
    Accelerator(cpu=True)
    wrap(net).remove()  # accelerate launch --num_processes 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="told to start more than one process and started one"):
        wrap(net)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")  # an address that somebody exported
    wrap(net)


# Writes and buffers.


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.2, 0.2)
        return self.net(x)


def write() -> str:
    net = Writing()
    optimizer = wrap(net)
    model = DistributedDataParallel(net)
    try:
        mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        optimizer.remove()
    return ""


def test_a_write_that_would_let_replicas_drift_apart_is_refused_on_the_first_step():
    clean, perturbed = run(2, write)
    assert clean == ""
    assert "net.0.weight" in perturbed


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.last(self.norm(self.first(x)).tanh())


def learn(wrapped: bool, broadcast: bool, reduce: bool) -> tuple[Tensor, int, int]:
    net = Normed().double()
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = RWP(base, net, gamma=0.01) if wrapped else base
    model = DistributedDataParallel(net, broadcast_buffers=broadcast)
    for index in range(60):
        model(batch(index)[0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    distribute_bn(net, 2, reduce=reduce)
    return net.norm.running_var, int(net.norm.num_batches_tracked), int(net.seen)


@pytest.mark.parametrize(("broadcast", "reduce"), [(False, True), (False, False), (True, False)])
def test_statistics_that_others_combine_are_those_of_plain_training(broadcast, reduce):
    (variance, *counts), (other, *theirs) = run(2, learn, True, broadcast, reduce)
    assert counts == theirs == [60, 60]
    torch.testing.assert_close(variance, other)
    torch.testing.assert_close(variance, run(2, learn, False, broadcast, reduce)[0][0], rtol=0.1, atol=0.0)


class Observed(nn.Module):
    """Lays a buffer out in its first pass, in place, as the observers of quantization-aware training do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("low", torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        if not self.low.numel():
            self.low.resize_(3).fill_(torch.inf)
        self.low.copy_(torch.minimum(self.low, output.detach().amin(0)))
        return output


def observe() -> tuple[Tensor, bool]:
    net = Observed()
    optimizer = wrap(net)
    model = DistributedDataParallel(net)
    steps(model, net, optimizer, 3)
    for use in (net.state_dict, optimizer.eval, optimizer.train):
        use()
    optimizer.sync_buffers()
    return net.low, bool(net.low.isfinite().all())


def test_a_buffer_that_a_first_pass_lays_out_is_no_end_of_training():
    (low, finite), (other, _) = run(2, observe)
    assert finite
    torch.testing.assert_close(low, other)


# Antithetic noise between replicas.


def antithetic(alpha: float) -> list[Step]:
    net = network()
    optimizer = wrap(net, alpha=alpha, antithetic=True)
    return steps(DistributedDataParallel(net), net, optimizer, 2)


@pytest.mark.parametrize(("alpha", "world", "pairs"), [(0.3, 4, [(1, 3)]), (1.0, 3, [(0, 1)])])
def test_antithetic_noise_comes_in_pairs_of_replicas_and_the_gradient_is_the_mix(alpha, world, pairs):
    ranks = run(world, antithetic, alpha, timeout=60)
    perturbed = [alpha == 1 or member % 2 == 1 for member in range(world)]
    assert_mixed(ranks, alpha, perturbed)
    for number in range(2):
        eps = [reference.noises(found[number].seen, found[number].weights)[0] for found in ranks]
        for one, other in pairs:
            for name in eps[one]:
                torch.testing.assert_close(eps[one][name], -eps[other][name], rtol=1e-9, atol=1e-15)
