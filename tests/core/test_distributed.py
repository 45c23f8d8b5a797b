"""Guarantees 1 to 6, 8, 9 and 10 of the design between replicas: real gloo groups of 1, 2, 3 and 5 ranks.

A test runs a training loop on every rank (`distributed.run`), collects what the ranks saw, and compares that here with
the paper's loop in float64 (`reference`) or with a closed form. The loops are plain DistributedDataParallel ("ddp")
and Accelerate with batches from anywhere ("accelerate") or from a loader that it prepared ("loader").
"""

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from distributed import Collectives, run, run_each
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from hf_rwp import RWP, LossTracker

FEATURES, TARGETS, IMAGES = 6, 3, 4


class Mlp(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.last = nn.Linear(7, TARGETS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class Branches(nn.Module):
    """One layer that no pass uses, and one of two for every batch: what is used differs between replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 3)
        self.branches = nn.ModuleList([nn.Linear(FEATURES, TARGETS), nn.Linear(FEATURES, TARGETS)])

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[int(x.sum() > 0)](x)


class Segments(nn.Module):
    """Three segments, each with activation checkpointing of the given kind (None: without)."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 5)
        self.segments = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3)])
        self.head = nn.Linear(5, TARGETS)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for segment in self.segments:
            x = segment(x) if self.use_reentrant is None else checkpoint(segment, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def wide() -> nn.Module:
    return nn.Linear(40, 30)


@dataclass(frozen=True)
class Case:
    """A training run, as every rank does it."""

    wiring: str = "ddp"
    net: Callable[[], nn.Module] = Mlp
    alpha: float = 0.5
    gamma: float = 0.2
    accumulation: int = 1
    windows: int = 3
    ddp: dict[str, Any] = field(default_factory=dict)
    compiled: str | None = None  # "inside" DDP, or the "whole" of it
    clip: float | None = None
    overflow_on: int | None = None  # the rank whose loss is infinite in the second window, under a GradScaler
    batches: int = 5  # of a prepared loader, in an epoch


@dataclass
class Window:
    """An optimizer step as one rank saw it."""

    weights: reference.Tensors  # the clean ones, before it
    buffers: reference.Tensors = field(default_factory=dict)  # after it
    seen: list[reference.Tensors] = field(default_factory=list)  # the weights of every forward pass
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    stepped: reference.Tensors | None = None  # the weights that the base optimizer found; None: it was not called
    gradient: reference.Tensors = field(default_factory=dict)  # that it found
    norm: float = 0.0  # of the gradient, as accelerator.clip_grad_norm_ gave it


def batch(rank: int, index: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + index)
    return (
        torch.randn(IMAGES, FEATURES, dtype=torch.float64, generator=generator).to(dtype),
        torch.randn(IMAGES, TARGETS, dtype=torch.float64, generator=generator).to(dtype),
    )


class Loop:
    """The training loop around a network and an optimizer that may be RWP's: `micro_step` says when a step ended."""

    def __init__(self, case: Case, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.case, self.count = case, 0
        self.model: nn.Module = net
        self.scaler = None if case.overflow_on is None else torch.amp.GradScaler("cpu", init_scale=8.0)
        if case.wiring == "ddp":
            inside = torch.compile(net, backend="aot_eager") if case.compiled == "inside" else net
            self.model = DistributedDataParallel(inside, **case.ddp)
            if case.compiled == "whole":
                self.model = torch.compile(self.model, backend="aot_eager")
        else:
            self.accelerator = Accelerator(
                cpu=True,
                gradient_accumulation_steps=case.accumulation,
                dynamo_backend="aot_eager" if case.compiled else "no",
                kwargs_handlers=[DistributedDataParallelKwargs(**case.ddp)] if case.ddp else None,
            )
            self.model, optimizer = self.accelerator.prepare(net, optimizer)
        self.optimizer = optimizer

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank = dist.get_rank()
        if self.case.wiring == "loader":
            items = [batch(99, index) for index in range(self.case.batches * dist.get_world_size())]
            data = TensorDataset(*(torch.cat(values) for values in zip(*items, strict=True)))
            loader = self.accelerator.prepare(DataLoader(data, batch_size=IMAGES))
            for _ in range(2):
                yield from loader
        else:
            yield from (batch(rank, index) for index in range(self.case.windows * self.case.accumulation))

    def micro_step(self, x: Tensor, y: Tensor, window: Window) -> bool:
        self.count += 1
        return self._ddp(x, y, window) if self.case.wiring == "ddp" else self._accelerate(x, y, window)

    def _ddp(self, x: Tensor, y: Tensor, window: Window) -> bool:
        last = self.count % self.case.accumulation == 0
        with nullcontext() if last else self.model.no_sync():
            loss = mse_loss(self.model(x), y)
            window.losses.append(loss.detach())
            if self.scaler:
                overflow = self.count == 2 and dist.get_rank() == self.case.overflow_on
                loss = self.scaler.scale(loss * (torch.inf if overflow else 1.0))
            (loss / self.case.accumulation).backward()
        if last:
            if self.scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
            self.optimizer.zero_grad()
        return last

    def _accelerate(self, x: Tensor, y: Tensor, window: Window) -> bool:
        with self.accelerator.accumulate(self.model):
            loss = mse_loss(self.model(x), y)
            window.losses.append(loss.detach())
            self.accelerator.backward(loss)
            if self.case.clip and self.accelerator.sync_gradients:
                window.norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.case.clip))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.accelerator.sync_gradients


def build(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    if case.compiled:
        torch._dynamo.reset()
    torch.manual_seed(0)
    net = case.net().double()
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def wrap(case: Case, net: nn.Module, base: torch.optim.Optimizer, **options: Any) -> RWP:
    steps = case.accumulation if case.wiring == "ddp" else None
    return RWP(base, net, gamma=case.gamma, alpha=case.alpha, accumulation_steps=steps, **options)


def record(case: Case) -> list[Window]:
    net, base = build(case)
    loop = Loop(case, net, wrap(case, net, base))
    windows = [Window(reference.snapshot(net))]

    def stepping(*_: Any) -> None:
        windows[-1].stepped = reference.snapshot(net)
        windows[-1].gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()
        }

    base.register_step_pre_hook(stepping)
    with reference.seen_weights(net) as seen:
        for x, y in loop.batches():
            window = windows[-1]
            window.batches.append((x, y))
            if loop.micro_step(x, y, window):
                window.seen, seen[:] = seen[:], []
                window.buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
                windows.append(Window(reference.snapshot(net)))
    return windows[:-1]


def is_perturbed(alpha: float, world: int, rank: int, micro_step: int, micro_steps: int) -> bool:
    """The design's placement, once more."""
    if alpha == 1:
        return True
    return rank % 2 == 1 if world > 1 else micro_steps > 1 and micro_step % 2 == 1


def assert_mixed(case: Case, ranks: list[list[Window]], twin: Callable[[], nn.Module] | None = None) -> None:
    """Every step of every rank used the paper's mix, at clean weights. twin: the network for the reference."""
    world, net = len(ranks), (twin or case.net)().double()
    assert {len(windows) for windows in ranks} == {len(ranks[0])}
    assert len(ranks[0]) > 1
    for windows in zip(*ranks, strict=True):
        clean, micro_steps = windows[0].weights, len(windows[0].seen)
        for window in windows:
            assert_same(window.weights, clean)
            assert_same(window.stepped, clean)
        noises = [noise for window in windows for noise in reference.noises(window.seen, clean)]
        slots = itertools.product(range(world), range(micro_steps))
        roles = [is_perturbed(case.alpha, world, *slot, micro_steps) for slot in slots]
        assert [noise is not None for noise in noises] == roles
        batches = [entry for window in windows for entry in window.batches]
        expected = reference.mixed_gradient(net, clean, noises, batches, mse_loss, case.alpha)
        norm = float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
        factor = micro_steps / case.accumulation  # a short window is divided by the full one's length, as without RWP
        if case.clip:
            assert [window.norm for window in windows] == pytest.approx([norm] * world, rel=1e-12)
            factor *= min(1.0, case.clip / (norm + 1e-6))
        expected = {name: gradient * factor for name, gradient in expected.items()}
        for window in windows:
            torch.testing.assert_close(window.gradient, expected, rtol=1e-12, atol=1e-14)


def assert_all_mixed(world: int, cases: list[Case], twin: Callable[[], nn.Module] | None = None) -> None:
    for case, ranks in zip(cases, run_each(world, record, [(case,) for case in cases]), strict=True):
        assert_mixed(case, ranks, twin)


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Guarantee 2: the step's gradient is the mix.


@pytest.mark.parametrize("wiring", ["ddp", "accelerate"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_step_gradient_is_the_mix(world, wiring):
    slots = itertools.product([1, 2, 3, 4], [0.2, 0.5, 0.8, 1.0])
    cases = [Case(wiring, alpha=alpha, accumulation=count, windows=2) for count, alpha in slots]
    assert_all_mixed(world, [case for case in cases if world * case.accumulation > 1 or case.alpha == 1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_short_last_window_is_the_mix(world):
    cases = [Case("loader", alpha=0.8, accumulation=accumulation, batches=5) for accumulation in (2, 3, 4)]
    for case, ranks in zip(cases, run_each(world, record, [(case,) for case in cases]), strict=True):
        assert {len(window.seen) for window in ranks[0]} == {case.accumulation, 5 % case.accumulation}
        assert_mixed(case, ranks)


# Guarantees 8 and 10: whatever DDP, the compiler, checkpointing, clipping and the scaler do in between.


OPTIONS: list[tuple[Callable[[], nn.Module], int, dict[str, Any]]] = [
    (Branches, 1, {"find_unused_parameters": True}),
    (Branches, 2, {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    (partial(Mlp, norm=True), 1, {"static_graph": True}),
    (partial(Mlp, norm=True), 2, {"gradient_as_bucket_view": True}),
    (partial(Mlp, norm=True), 2, {"broadcast_buffers": False}),
]


@pytest.mark.parametrize("wiring", ["ddp", "accelerate"])
@pytest.mark.parametrize("world", [2, 3])
def test_options_of_ddp_keep_the_mix(world, wiring):
    assert_all_mixed(world, [Case(wiring, net, 0.8, accumulation=count, ddp=ddp) for net, count, ddp in OPTIONS])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_keeps_the_mix(use_reentrant, world):
    case = Case(net=partial(Segments, use_reentrant), alpha=0.8)
    assert_all_mixed(world, [case, replace(case, accumulation=2)], twin=Segments)


@pytest.mark.parametrize(("wiring", "compiled"), [("ddp", "inside"), ("ddp", "whole"), ("accelerate", "whole")])
def test_compiling_keeps_the_mix(wiring, compiled):
    case = Case(wiring, alpha=0.8, compiled=compiled)
    assert_mixed(case, run(2, record, case))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 2)])
def test_clipping_clips_the_mix(world, accumulation):
    case = Case("accelerate", alpha=0.8, accumulation=accumulation)
    assert_all_mixed(world, [replace(case, clip=max_norm) for max_norm in (0.05, 1e3)])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all(rank):
    case = Case(alpha=0.8, windows=4, overflow_on=rank)
    ranks = run(2, record, case)
    for windows in ranks:
        assert [window.stepped is None for window in windows] == [False, True, False, False]
        assert_same(windows[2].weights, windows[1].weights)
        noises = [reference.noises(window.seen, window.weights) for window in windows]
        assert all(len(noise) == 1 for noise in noises)
    assert [noise[0] is not None for noise in noises] == [True] * 4  # of rank 1, in the skipped window as well
    assert_mixed(case, [[window for window in windows if window.stepped is not None] for windows in ranks])


def learning_rates(wrapped: bool) -> list[float]:
    case = Case("accelerate")
    net, base = build(case)
    used = []
    base.register_step_pre_hook(lambda *_: used.append(base.param_groups[0]["lr"]))
    optimizer = wrap(case, net, base) if wrapped else base
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    loop = Loop(case, net, optimizer)
    scheduler = loop.accelerator.prepare(scheduler)
    for index in range(5):
        loop.micro_step(*batch(dist.get_rank(), index), Window({}))
        scheduler.step()
    return used


def test_accelerated_scheduler_moves_the_base_learning_rate():
    world = 2  # Accelerate steps a scheduler once for every process
    expected = [pytest.approx(0.1 * 0.9 ** (world * step)) for step in range(5)]
    assert run(world, learning_rates, True) == run(world, learning_rates, False) == [expected] * world


# Guarantee 1: the base optimizer, bit for bit.


def final_state(case: Case, factors: list[float] | None) -> tuple[reference.Tensors, dict[str, int]]:
    """The network after training, and RWP's slots. factors: of gamma, window by window; None: without RWP."""
    net, base = build(case)
    optimizer = wrap(case, net, base) if factors else base
    loop = Loop(case, net, optimizer)
    for index, (x, y) in enumerate(loop.batches()):
        if factors:
            optimizer.scale_gamma(factors[index // case.accumulation])
        loop.micro_step(x, y, Window({}))
    return net.state_dict(), optimizer.report()["slots"] if factors else {}


@pytest.mark.parametrize("wiring", ["ddp", "accelerate"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (3, 2)])
def test_gamma_zero_is_the_base_optimizer(world, accumulation, wiring):
    case = Case(wiring, partial(Mlp, norm=True), 0.8, 0.2, accumulation, windows=4)
    off = [(replace(case, gamma=0.0), [1.0] * 4), (replace(case, alpha=0.0), [1.0] * 4), (case, [0.0] * 4)]
    plain, *found = run_each(world, final_state, [(case, None), *off])
    for ranks in found:
        for (state, slots), (expected, _) in zip(ranks, plain, strict=True):
            assert_same(state, expected)
            assert slots == {"clean": 0, "perturbed": 0}


def test_training_is_plain_before_the_start_and_perturbed_after_it():
    assert run(2, final_state, Case(windows=6), [0.0] * 4 + [1.0] * 2)[0][1] == {"clean": 2, "perturbed": 2}


# Guarantee 3: whoever looks at the weights finds them clean, on every rank.


def looks() -> tuple[dict[str, bool], list[bool]]:
    """Whether the weights were clean, by where one looked; whether each forward pass saw others."""
    case = Case(net=partial(Mlp, norm=True), gamma=0.5, accumulation=2)
    net, base = build(case)
    optimizer = wrap(case, net, base)
    model = DistributedDataParallel(net)
    rank = dist.get_rank()
    clean, found = reference.snapshot(net), {}

    def look(place: str, weights: dict[str, Tensor] | None = None, prefix: str = "") -> None:
        weights = dict(net.named_parameters()) if weights is None else weights
        same = [torch.equal(weights[name[len(prefix) :]], clean[name]) for name in clean if name.startswith(prefix)]
        found[place] = all(same) and found.get(place, True)

    base.register_step_pre_hook(lambda *_: look("step"))
    net.last.register_forward_pre_hook(lambda module, _: None if module.training else look("evaluation"))
    with reference.seen_weights(net) as seen:
        noisy = []
        for index in range(8):
            optimizer.train()
            look("train")
            with nullcontext() if index % 2 else model.no_sync():
                output = model(batch(rank, index)[0])
                noisy.append(reference.noises(seen[-1:], clean)[0] is not None)
                if index == 2:
                    look("state_dict of the model", net.state_dict())
                if index == 3:
                    look("state_dict of a submodule", net.last.state_dict(), "last.")
                if index == 4 + rank % 2:  # alone: nobody waits for the others
                    optimizer.eval()
                    look("eval before backward")
                    net.eval()
                    with torch.no_grad():
                        net(batch(0, 0)[0])
                    net.train()
                output.square().sum().backward()
            look("after backward")
            optimizer.eval()
            look("eval after backward")
            if index % 2:
                optimizer.step()
                clean.update(reference.snapshot(net))
                optimizer.zero_grad()
                look("zero_grad")
    return found, noisy


@pytest.mark.parametrize("world", [2, 3])
def test_weights_are_clean_wherever_one_looks_on_every_rank(world):
    places = {"step", "train", "state_dict of the model", "state_dict of a submodule", "eval before backward"}
    places |= {"evaluation", "after backward", "eval after backward", "zero_grad"}
    for rank, (found, noisy) in enumerate(run(world, looks)):
        assert found == dict.fromkeys(places, True)
        assert noisy == [rank % 2 == 1] * 8


def raise_in_forward() -> list[bool]:
    case = Case(gamma=0.5)
    net, base = build(case)
    optimizer, model = wrap(case, net, base), DistributedDataParallel(net)
    clean, found = reference.snapshot(net), []
    with reference.seen_weights(net) as seen:
        handle = net.last.register_forward_pre_hook(lambda *_: model.undefined)
        with pytest.raises(AttributeError):
            model(batch(0, 0)[0])
        handle.remove()
        found.append(reference.noises(seen, clean)[0] is not None)
    found.append(all(torch.equal(p, clean[name]) for name, p in net.named_parameters()))
    model(batch(dist.get_rank(), 0)[0]).sum().backward()
    optimizer.step()
    return [*found, optimizer.report()["slots"] == {"clean": 1, "perturbed": 1}]


def test_weights_are_clean_after_an_exception_in_forward():
    assert run(2, raise_in_forward) == [[False, True, True], [True, True, True]]


# Guarantee 4: replicas stay bit-equal.

BASES = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}


def train_long(base_name: str, dtype: torch.dtype) -> tuple[Any, int, float]:
    """Weights and the base's state after 200 steps, how many passes were perturbed, and how far the weights moved."""
    torch.manual_seed(0)
    net = Mlp().to(dtype)
    optimizer = RWP(BASES[base_name](net.parameters()), net, gamma=0.1)
    model, rank, perturbed = DistributedDataParallel(net), dist.get_rank(), 0
    start = clean = reference.snapshot(net)
    with reference.seen_weights(net) as seen:
        for index in range(200):
            x, y = batch(rank, index, dtype)
            mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            perturbed += reference.noises(seen, clean)[0] is not None
            seen.clear()
            clean = reference.snapshot(net)
    moved = max(float((clean[name] - start[name]).abs().max()) for name in clean)
    return (clean, optimizer.state_dict()["state"]), perturbed, moved


@pytest.mark.parametrize(
    ("base_name", "dtype", "world"),  # every pair of values
    [
        ("sgd", torch.float32, 2),
        ("adamw", torch.bfloat16, 2),
        ("sgd", torch.bfloat16, 3),
        ("adamw", torch.float32, 3),
    ],
)
def test_ranks_agree_after_200_steps(base_name, dtype, world):
    ranks = run(world, train_long, base_name, dtype)
    for rank, (state, perturbed, moved) in enumerate(ranks):
        assert_same(state, ranks[0][0])
        assert perturbed == (200 if rank % 2 else 0)
        assert moved > 0.05


# Guarantee 5: noise is independent between replicas, micro-steps and steps.


def standardized_noises(case: Case, world: int) -> list[Tensor]:
    """Every perturbed pass's noise divided by gamma * ||filter||: one vector of standard normals each."""
    result = []
    for windows in run(world, record_wide, case):
        for clean, seen in windows:
            std = {
                name: case.gamma * (w.norm(dim=1, keepdim=True) if w.ndim > 1 else w.norm())
                for name, w in clean.items()
            }
            for noise in filter(None, reference.noises(seen, clean)):
                result.append(torch.cat([(noise[name] / std[name]).flatten() for name in clean]))
    return result


def record_wide(case: Case) -> list[tuple[reference.Tensors, list[reference.Tensors]]]:
    net, base = build(case)
    optimizer, model = wrap(case, net, base), DistributedDataParallel(net)
    windows = []
    for _ in range(case.windows):
        with reference.seen_weights(net) as seen:
            for _ in range(case.accumulation):  # the same images everywhere
                model(torch.ones(2, 40, dtype=torch.float64)).square().mean().backward()
        windows.append((reference.snapshot(net), seen))
        optimizer.step()
        optimizer.zero_grad()
    return windows


@pytest.mark.parametrize(("alpha", "draws"), [(0.5, 2 * 4), (1.0, 5 * 4)])
def test_noise_is_independent_between_replicas_micro_steps_and_steps(alpha, draws):
    """Of independent standard normals x and y, <x, y> / ||y|| is standard normal. False-alarm rate 1e-6 in all."""
    noises = standardized_noises(Case(net=wide, alpha=alpha, accumulation=2, windows=2), world=5)
    assert len(noises) == draws
    pairs = list(itertools.combinations(noises, 2))
    limit = NormalDist().inv_cdf(1 - 1e-6 / (2 * len(pairs)))
    assert max(abs(float(x @ y / y.norm())) for x, y in pairs) < limit


@pytest.mark.parametrize(("world", "perturbed"), [(2, [1]), (3, [1]), (5, [1, 3])])
def test_odd_replicas_alone_are_perturbed(world, perturbed):
    """In the passes themselves, not in what the wrapper says of them; with alpha = 1 rank 0 is as well."""
    cases = [(Case(net=wide, alpha=alpha, windows=4),) for alpha in (0.5, 1.0)]
    for ranks, expected in zip(run_each(world, record_wide, cases), (perturbed, list(range(world))), strict=True):
        noisy = [[any(reference.noises(seen, clean)) for clean, seen in windows] for windows in ranks]
        assert noisy == [[rank in expected] * 4 for rank in range(world)]


# Guarantee 6: buffers.


def running_statistics(buffers: reference.Tensors, features: Tensor) -> reference.Tensors:
    """BatchNorm's, with momentum 0.1, after a pass with `features`."""
    return {
        "norm.running_mean": 0.9 * buffers["norm.running_mean"] + 0.1 * features.mean(0),
        "norm.running_var": 0.9 * buffers["norm.running_var"] + 0.1 * features.var(0),
        "norm.num_batches_tracked": buffers["norm.num_batches_tracked"] + 1,
    }


def assert_statistics_are_those_of_clean_passes(ranks: list[list[Window]], alpha: float, broadcast: bool) -> None:
    of_rank = [dict(Mlp(norm=True).double().named_buffers()) for _ in ranks]
    for windows in zip(*ranks, strict=True):
        start = of_rank[0]
        for rank, window in enumerate(windows):
            buffers = start if broadcast else of_rank[rank]  # DDP gives replica 0's to all before a forward pass
            # Without a broadcast a perturbed replica would never learn any, and an average over replicas not either.
            updates = not broadcast or (rank == 0 if alpha == 1 else rank % 2 == 0)
            seen, (x, _) = window.seen[0], window.batches[0]
            features = x @ seen["first.weight"].T + seen["first.bias"]
            learned = running_statistics(buffers, features)
            counter = "norm.num_batches_tracked"
            of_rank[rank] = learned if updates else buffers | {counter: learned[counter]}
            torch.testing.assert_close(window.buffers, of_rank[rank], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("wiring", ["ddp", "accelerate"])
def test_clean_passes_alone_update_batch_norm_where_they_reach_all_replicas(wiring, world):
    options = list(itertools.product([0.5, 1.0], [False, True]))
    cases = [
        Case(wiring, partial(Mlp, norm=True), alpha, ddp={"broadcast_buffers": broadcast})
        for alpha, broadcast in options
    ]
    for option, ranks in zip(options, run_each(world, record, [(case,) for case in cases]), strict=True):
        assert_statistics_are_those_of_clean_passes(ranks, *option)


def buffers_of(rank: int) -> reference.Tensors:
    values = torch.arange(6.0) + rank
    return {
        "float": values,
        "bool": values % 2 == 0,
        "int64": torch.tensor(2**60 + rank),
        "bfloat16": values.bfloat16(),
        "transposed": values.reshape(2, 3).T,
        "strided": values[::2],
        "channels_last": values.reshape(1, 3, 2, 1).expand(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "expanded": values[:2, None].expand(2, 4),
    }


def sync(name: str, persistent: bool) -> Tensor:
    net = nn.Linear(2, 2)
    net.register_buffer("buffer", buffers_of(dist.get_rank())[name], persistent)
    RWP(torch.optim.SGD(net.parameters(), lr=0.1), net).sync_buffers()
    return net.buffer


@pytest.mark.parametrize("persistent", [False, True])
def test_sync_buffers_gives_every_rank_those_of_rank_0(persistent):
    expected = buffers_of(0)
    found = dict(zip(expected, run_each(3, sync, [(name, persistent) for name in expected]), strict=True))
    assert_same(found, {name: [buffer] * 3 for name, buffer in expected.items()})


def sync_all() -> tuple[Counter[str], reference.Tensors]:
    net = nn.Linear(2, 2)
    for name, buffer in buffers_of(dist.get_rank()).items():
        net.register_buffer(f"of_{name}", buffer)
    optimizer = RWP(torch.optim.SGD(net.parameters(), lr=0.1), net)
    with Collectives() as mode:
        optimizer.sync_buffers()
    return mode.counts, dict(net.named_buffers())


def test_sync_buffers_is_one_broadcast_of_each_dtype():
    for counts, found in run(2, sync_all):
        assert sum(counts.values()) == 4, counts
        assert_same(found, {f"of_{name}": buffer for name, buffer in buffers_of(0).items()})


def train_and_sync(case: Case, order: str) -> list[reference.Tensors]:
    net, base = build(case)
    optimizer = wrap(case, net, base)
    loop = Loop(case, net, optimizer)
    for x, y in loop.batches():
        loop.micro_step(x, y, Window({}))
    loop.model(batch(dist.get_rank(), 99)[0])  # without a backward pass
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for method in order.split(", "):
        getattr(optimizer, method)()
    return [before, {name: buffer.clone() for name, buffer in net.named_buffers()}]


@pytest.mark.parametrize("broadcast", [False, True])
def test_sync_buffers_makes_batch_norm_equal_after_training(broadcast):
    case = Case(net=partial(Mlp, norm=True), ddp={"broadcast_buffers": broadcast})
    for ranks in run_each(3, train_and_sync, [(case, "eval, sync_buffers"), (case, "sync_buffers, eval")]):
        for rank, (before, after) in enumerate(ranks):
            assert_same(after, ranks[0][0])
            assert (rank == 0) == torch.equal(before["norm.running_mean"], after["norm.running_mean"])


# Guarantee 9: no collective more than the base run's.


def collectives(case: Case, wrapped: bool) -> Counter[str]:
    """Those of a whole training run: forward, backward, step, zero_grad, train, eval and saving."""
    with Collectives() as mode:
        net, base = build(case)
        optimizer = wrap(case, net, base) if wrapped else base
        loop = Loop(case, net, optimizer)
        for x, y in loop.batches():
            if wrapped:
                optimizer.train()
            if loop.micro_step(x, y, Window({})) and wrapped:
                optimizer.eval()
                optimizer.state_dict()
    return mode.counts


@pytest.mark.parametrize("world", [2, 3])
def test_no_collective_more_than_the_base_run(world):
    loops = itertools.product(["ddp", "accelerate", "loader"], [1, 2])
    cases = [Case(wiring, partial(Mlp, norm=True), accumulation=count, windows=5) for wiring, count in loops]
    plain, wrapped = (run_each(world, collectives, [(case, on) for case in cases]) for on in (False, True))
    assert all(sum(counts.values()) > 5 for ranks in plain for counts in ranks)
    assert wrapped == plain


# Memory: a snapshot on perturbed replicas alone.


def live_bytes() -> int:
    """Of the tensors that were made since the last `gc.freeze`."""
    gc.collect()
    tensors = [entry for entry in gc.get_objects() if type(entry) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def training_bytes(wrapped: bool) -> list[int]:
    case = Case(net=partial(nn.Linear, 1000, 600))
    gc.freeze()
    net, base = build(case)
    optimizer, sizes = wrap(case, net, base) if wrapped else base, []
    model = DistributedDataParallel(net)
    for step in range(3):
        model(torch.ones(1, 1000, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step != 1:
            sizes.append(live_bytes())
    return sizes


def test_only_perturbed_replicas_hold_a_copy_of_the_weights():
    weights, scratch = 8 * 1001 * 600, 8 * 2**18
    plain, wrapped = run(2, training_bytes, False), run(2, training_bytes, True)
    extra = [[a - b for a, b in zip(*sizes, strict=True)] for sizes in zip(wrapped, plain, strict=True)]
    assert extra[0] == [0, 0]
    assert all(weights <= size <= weights + scratch for size in extra[1]), extra
    assert len(set(extra[1])) == 1, extra


# What is reported: the same on all ranks, and what happened.


def reports() -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Two reports, and the noise relative to the weights in the first perturbed pass before each."""
    case = Case(accumulation=2, alpha=0.8)
    net, base = build(case)
    optimizer = wrap(case, net, base)
    loop, found, sizes = Loop(case, net, optimizer), [], []
    batches = loop.batches()
    for windows in (1, 2):
        clean = reference.snapshot(net)
        with reference.seen_weights(net) as seen:
            for x, y in itertools.islice(batches, windows * case.accumulation):
                loop.micro_step(x, y, Window({}))
        sizes.append({name: float((seen[0][name] - w).norm() / w.norm()) for name, w in clean.items()})
        found.append(optimizer.report())
    return found, sizes


@pytest.mark.parametrize("world", [2, 3])
def test_report_says_on_rank_0_what_happened_on_rank_1(world):
    ranks = run(world, reports)
    assert [found for found, _ in ranks] == [ranks[0][0]] * world
    assert not any(ranks[0][1][0].values())
    for report, sizes, windows in zip(ranks[0][0], ranks[1][1], (1, 3), strict=True):
        relative = {
            rank: {"name": name, "elements": elements, "size": pytest.approx(sizes[name], rel=1e-9)}
            for rank, name, elements in (
                ("largest", "first.weight", 42),
                ("median", "first.bias", 7),
                ("smallest", "last.bias", 3),
            )
        }
        assert report == {
            "placement": "parallel",
            "replicas": world,
            "alpha": 0.8,
            "windows": windows,
            "slots": {"clean": 2 * windows * ((world + 1) // 2), "perturbed": 2 * windows * (world // 2)},
            "relative_noise": relative,
        }
        assert all(entry["size"] > 0.05 for entry in report["relative_noise"].values())


def track(alpha: float) -> tuple[list[float], list[dict[str, float]]]:
    case = Case(alpha=alpha)
    net, base = build(case)
    optimizer = wrap(case, net, base)
    tracker, window = LossTracker(optimizer), Window({})
    loop, rank = Loop(case, net, optimizer), dist.get_rank()
    for index in range(4):
        loop.micro_step(*batch(rank, index), window)
        tracker.update(window.losses[-1], count=index + 1 + rank)
    return [float(loss) for loss in window.losses], [tracker.compute(), tracker.compute()]


@pytest.mark.parametrize(("world", "alpha"), [(2, 0.5), (3, 0.5), (3, 1.0), (1, 1.0), (2, 0.0)])
def test_loss_tracker_gives_all_ranks_the_means_by_role(world, alpha):
    ranks = run(world, track, alpha)
    totals = {"plain": [0.0, 0], "clean": [0.0, 0], "perturbed": [0.0, 0]}
    for rank, (losses, _) in enumerate(ranks):
        kind = ("perturbed" if is_perturbed(alpha, world, rank, 0, 1) else "clean") if alpha else "plain"
        for index, loss in enumerate(losses):
            totals[kind][0] += loss * (index + 1 + rank)
            totals[kind][1] += index + 1 + rank
    total, count = (sum(values) for values in zip(*totals.values(), strict=True))
    expected = {"loss": total / count} | {
        f"loss_{kind}": t / n for kind, (t, n) in totals.items() if n and kind != "plain"
    }
    if len(expected) == 3:
        expected["loss_gap"] = expected["loss_perturbed"] - expected["loss_clean"]
    for _, computed in ranks:
        assert computed == [pytest.approx(expected, rel=1e-5, abs=1e-6), {}]


def track_alone() -> dict[str, float]:
    net, base = build(Case())
    tracker = LossTracker(wrap(Case(), net, base))
    if dist.get_rank() == 0:
        tracker.update(torch.tensor(2.0))
    return tracker.compute()


def test_loss_tracker_does_not_hang_where_a_rank_had_nothing_to_add():
    assert run(2, track_alone, timeout=5) == [{"loss": 2.0}] * 2


# Errors come on all ranks: one that raised alone would leave the others waiting.


def backward_twice(forward_passes: int) -> None:
    net, base = build(Case())
    optimizer, model = wrap(Case(), net, base), DistributedDataParallel(net)
    losses = [model(batch(dist.get_rank(), index)[0]).sum() for index in range(forward_passes)]
    losses[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        losses[-1].backward()
    optimizer.eval()


def nothing_to_perturb(wiring: str) -> None:
    net, base = build(Case(wiring, net=partial(nn.LayerNorm, FEATURES)))
    optimizer = wrap(Case(wiring), net, base, noise_1d=False)
    model = Loop(Case(wiring), net, optimizer).model
    with pytest.raises(RuntimeError, match="nothing to perturb"):
        model(batch(dist.get_rank(), 0)[0]).sum().backward()


def step_while_disarmed() -> None:
    net, base = build(Case())
    optimizer, model = wrap(Case(), net, base), DistributedDataParallel(net)
    optimizer.eval()
    model(batch(dist.get_rank(), 0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()


def use_after_removal() -> None:
    net, base = build(Case())
    optimizer, model = wrap(Case(), net, base), DistributedDataParallel(net)
    wrap(Case(), net, base)
    model(batch(dist.get_rank(), 0)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="newer RWP"):
        optimizer.step()


def misuse(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


@pytest.mark.parametrize("world", [2, 3])
def test_misuse_raises_on_all_ranks(world):
    cases = [(backward_twice, 1), (backward_twice, 2), (nothing_to_perturb, "ddp"), (nothing_to_perturb, "accelerate")]
    run_each(world, misuse, [*cases, (step_while_disarmed,), (use_after_removal,)], timeout=5)
