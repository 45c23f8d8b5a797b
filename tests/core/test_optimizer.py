"""RWP in one process. The sections are the design's guarantees by number, then misuse, loops and what is reported.

1 gamma = 0 is the base optimizer. 2 The step's gradient is the paper's mix. 3 Weights are clean wherever somebody
looks. 5 Noise is a function of its key. 6 Buffers. 7 Resume. 8 Every kind of parameter. 10 AMP, clipping, EMA, compile,
checkpointing, copies. (4 and 9 need several processes.)
"""

import contextlib
import copy
import gc
import io
import itertools
import logging
import pickle
import shutil
import weakref
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, find_executable_batch_size
from hypothesis import given, settings
from reference import gradient, mixed_gradient, noises, seen_weights, snapshot
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from hf_rwp import RWP, LossTracker

GAMMA = 0.2  # large, so that no gradient at clean weights passes for one at perturbed weights


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        nn.init.normal_(model[1].bias)  # noise is relative to a weight: zeros would get none
    return model.to(dtype)


def inputs(count, seed=0, dtype=torch.float64, size=5):
    return list(torch.randn(count, size, 6, generator=torch.Generator().manual_seed(seed)).to(dtype))


def labels(x):
    return (x.float().sum(1) * 2).long() % 3


def loss_of(model, x):
    return F.cross_entropy(model(x), labels(x))


def wrap(model, base=None, **kwargs):
    base = base or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return RWP(base, model, **{"gamma": GAMMA, "accumulation_steps": 2, **kwargs})


def run_windows(model, optimizer, batches, micro_steps=2):
    """A plain loop: `micro_steps` gradients to a step."""
    for start in range(0, len(batches), micro_steps):
        for x in batches[start : start + micro_steps]:
            (loss_of(model, x) / micro_steps).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(model):
    """A copy of all that a checkpoint would hold, read without the help of `state_dict`."""
    pairs = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in pairs}


def assert_same(got, expected):
    """Bit for bit: tensors, and whatever holds them."""
    assert type(got) is type(expected)
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
    elif isinstance(got, dict):
        assert got.keys() == expected.keys()
        for key in got:
            assert_same(got[key], expected[key])
    elif isinstance(got, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same(*pair)
    else:
        assert got == expected


def differs(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


class Watch:
    """What a loop did: weights and inputs of every forward pass in training, weights and gradients at every step."""

    def __init__(self, model, base):
        self.model, self.passes, self.steps = model, [], []
        model.register_forward_pre_hook(torch.compiler.disable(self._forward), with_kwargs=True)
        base.register_step_pre_hook(self._step)

    def _forward(self, module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            self.passes.append((snapshot(module), args[0] if args else kwargs["x"]))

    def _step(self, *_):
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.steps.append((snapshot(self.model), gradients))

    def check(self, alpha, lengths, *, twin=None, scales=None, loss=F.cross_entropy, ordered=True):
        """Every step's gradient is the paper's mix of its window's passes.

        lengths: of the windows. scales: the framework's own factors. ordered: whether clean slots come first.
        """
        passes = iter(self.passes)
        for (weights, gradients), length, scale in zip(self.steps, lengths, scales or [1] * len(lengths), strict=True):
            window = list(itertools.islice(passes, length))
            eps = noises([seen for seen, _ in window], weights)
            roles = [noise is not None for noise in eps]
            expected = [alpha == 1 or slot % 2 == 1 for slot in range(length)]
            assert roles == expected if ordered else sorted(roles) == sorted(expected)
            batches = [(x, labels(x)) for _, x in window]
            mix = mixed_gradient(twin or self.model, weights, eps, batches, loss, alpha)
            for name, got in gradients.items():
                torch.testing.assert_close(got.double(), scale * mix[name], rtol=1e-12, atol=1e-14)
        assert next(passes, None) is None


# 1. gamma = 0 is the base optimizer, bit for bit


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("off", [{"gamma": 0.0}, {"alpha": 0.0}, "groups", "schedule"], ids=str)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_gamma_zero_is_the_base_optimizer(base, off, micro_steps):
    def train(wrapped):
        model = nn.Sequential(network(torch.float32), nn.Dropout(0.3))
        inner = base(model.parameters())
        optimizer = inner
        if wrapped:
            optimizer = RWP(inner, model, **(off if isinstance(off, dict) else {}))
            if off == "groups":
                optimizer.param_groups[0]["rwp_gamma"] = 0.0
            elif off == "schedule":
                optimizer.scale_gamma(0.0)
        torch.manual_seed(1)
        run_windows(model, optimizer, inputs(5 * micro_steps, dtype=torch.float32), micro_steps)
        state = inner.state_dict()
        for group in state["param_groups"]:
            for key in [key for key in group if "rwp_" in key]:
                del group[key]
        return tensors(model), state, torch.get_rng_state()

    assert_same(train(wrapped=True), train(wrapped=False))


def test_no_step_before_the_start_fraction_is_perturbed_and_every_one_after_it_is():
    model = network()
    optimizer = wrap(model)
    optimizer.scale_gamma(0.0)
    with seen_weights(model) as seen:
        for x in inputs(2):
            loss_of(model, x).backward()
    assert noises(seen, snapshot(model)) == [None, None]
    assert optimizer.role is None
    optimizer.step()
    optimizer.zero_grad()
    optimizer.scale_gamma(1.0)
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(4, seed=1))
    watch.check(0.5, [2, 2])


def test_scale_gamma_scales_the_noise():
    def noise(factor):
        model = network()
        optimizer = wrap(model, alpha=1.0)
        optimizer.scale_gamma(7.0)  # factors replace each other: they do not add up
        optimizer.scale_gamma(factor)
        with seen_weights(model) as seen:
            model(inputs(1)[0])
        return noises(seen, snapshot(network()))[0]

    half, one = noise(0.5), noise(1.0)
    for name in one:
        torch.testing.assert_close(2 * half[name], one[name], rtol=1e-12, atol=1e-15)


# 2. The step's gradient is the mix, to float64 rounding


@pytest.mark.parametrize(("alpha", "micro_steps"), [*itertools.product([0.2, 0.5, 0.8, 1.0], [2, 3, 4, 5]), (1.0, 1)])
@pytest.mark.parametrize("mode", [{}, {"noise": "filter_normalized", "eta": 5.0, "noise_1d": False}], ids=str)
def test_the_gradient_is_the_mix(alpha, micro_steps, mode):
    model = network()
    optimizer = wrap(model, alpha=alpha, accumulation_steps=micro_steps, **mode)
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(3 * micro_steps), micro_steps)
    watch.check(alpha, [micro_steps] * 3)
    eps = [noise for noise in noises([seen for seen, _ in watch.passes[:micro_steps]], watch.steps[0][0]) if noise]
    for one, other in itertools.combinations(eps, 2):
        assert differs(one, other)


def test_a_second_forward_pass_before_backward_belongs_to_the_micro_step():
    model = network()
    optimizer = wrap(model, alpha=0.8)
    first, left, right = inputs(3)
    clean = snapshot(model)
    with seen_weights(model) as seen:
        (loss_of(model, first) / 2).backward()
        ((loss_of(model, left) + loss_of(model, right)) / 2).backward()
    eps = noises(seen, clean)
    assert_same(eps[1], eps[2])
    batches = [(x, labels(x)) for x in (first, left, right)]
    clean_gradient = gradient(model, clean, batches[0], F.cross_entropy)
    halves = [mixed_gradient(model, clean, [eps[1]], [batch], F.cross_entropy, 1.0) for batch in batches[1:]]
    for name, p in model.named_parameters():
        expected = 0.2 * clean_gradient[name] + 0.8 * (halves[0][name] + halves[1][name])
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
    optimizer.step()
    assert optimizer.report()["slots"] == {"clean": 1, "perturbed": 1}


Pair = namedtuple("Pair", "logits extra")


@dataclass
class Output:
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class SlottedOutput:
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda logits: (logits, None), lambda output: output[0]),
        (lambda logits: [{"a": [logits]}], lambda output: output[0]["a"][0]),
        (lambda logits: Pair(logits, 1), lambda output: output.logits),
        (Output, lambda output: output.logits),
        (SlottedOutput, lambda output: output.logits),
        (lambda logits: logits * 1.0, lambda output: output.mul_(1.0)),
        (lambda logits: (logits[:, :1], logits[:, 1:]), lambda output: torch.cat(output, 1)),
    ],
    ids=["tuple", "nested", "namedtuple", "dataclass", "slots", "in place", "two tensors"],
)
def test_the_gradient_is_the_mix_whatever_holds_the_output(pack, unpack):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return pack(self.net(x))

    model = Packed()
    optimizer = wrap(model, alpha=0.8)
    watch = Watch(model, optimizer.base)
    for x in inputs(2):
        (F.cross_entropy(unpack(model(x)), labels(x)) / 2).backward()
    optimizer.step()
    watch.check(0.8, [2], loss=lambda output, target: F.cross_entropy(unpack(output), target))


def accelerated(micro_steps, batches, alpha=0.5, sized=True, **plugin):
    """Model, wrapper, loader, accelerator and watch of an Accelerate loop whose windows Accelerate alone knows."""
    if plugin:
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(**plugin))
    else:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_steps)
    model = network()
    optimizer = wrap(model, alpha=alpha, accumulation_steps=None)
    watch = Watch(model, optimizer.base)
    if not sized:
        batches = IterableBatches(batches)
    loader = DataLoader(batches, batch_size=None if not sized else 1, collate_fn=(lambda b: b[0]) if sized else None)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    return SimpleNamespace(
        accelerator=accelerator, model=model, optimizer=prepared, loader=loader, watch=watch, rwp=optimizer
    )


class IterableBatches(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def accumulate(run, batches):
    """One pass in accelerate's own idiom (examples/by_feature/gradient_accumulation.py)."""
    for x in batches:
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, x))
            run.optimizer.step()
            run.optimizer.zero_grad()


def lengths_of(batches, micro_steps):
    """The lengths of an epoch's windows, the last one perhaps short."""
    return [min(micro_steps, batches - start) for start in range(0, batches, micro_steps)]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("micro_steps", "batches"), [(2, 4), (2, 5), (3, 4), (3, 5), (4, 7), (5, 7), (5, 3)])
def test_the_gradient_is_the_mix_in_short_last_windows_of_an_accelerate_loop(alpha, micro_steps, batches):
    run = accelerated(micro_steps, inputs(batches), alpha)
    for _ in range(2):
        accumulate(run, run.loader)
    lengths = 2 * lengths_of(batches, micro_steps)
    run.watch.check(alpha, lengths, scales=[length / micro_steps for length in lengths])


def test_a_window_of_one_gradient_is_an_ordinary_step_and_is_announced(caplog):
    run = accelerated(2, inputs(3), alpha=0.8)
    accumulate(run, run.loader)
    assert "a step of one gradient" in caplog.text
    assert run.rwp.role.perturbed is False
    assert run.rwp.role.weight == 1


def test_the_gradient_is_the_mix_where_a_loader_has_no_length():
    run = accelerated(2, inputs(6), sized=False)
    for _ in range(2):
        accumulate(run, run.loader)
    run.watch.check(0.5, [2] * 6)


def test_windows_go_on_over_the_end_of_an_epoch_where_accelerate_lets_them():
    run = accelerated(3, inputs(4), alpha=0.8, num_steps=3, sync_with_dataloader=False)
    for _ in range(3):
        accumulate(run, run.loader)
    run.watch.check(0.8, [3] * 4)


def test_the_gradient_is_the_mix_after_an_epoch_that_was_left_early():
    run = accelerated(3, inputs(8), alpha=0.8)
    accumulate(run, itertools.islice(run.loader, 6))
    accumulate(run, run.loader)
    run.watch.check(0.8, [3, 3, 3, 3, 2], scales=[1, 1, 1, 1, 2 / 3])


def test_the_gradient_is_the_mix_after_skipped_batches():
    run = accelerated(3, inputs(8), alpha=0.8)
    accumulate(run, skip_first_batches(run.loader, 3))
    accumulate(run, run.loader)
    run.watch.check(0.8, [3, 2, 3, 3, 2], scales=[1, 2 / 3, 1, 1, 2 / 3])


def test_evaluation_with_a_loader_of_its_own_in_a_window_leaves_the_mix_right():
    run = accelerated(3, inputs(5), alpha=0.8)
    held_out = run.accelerator.prepare(DataLoader(inputs(2, seed=9), batch_size=1, collate_fn=lambda b: b[0]))
    for x in run.loader:
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(loss_of(run.model, x))
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.model.eval()
        run.optimizer.eval()
        with torch.no_grad():
            for y in held_out:
                run.model(y)
        run.model.train()
        run.optimizer.train()
    run.watch.check(0.8, [3, 2], scales=[1, 2 / 3])


# 3. Weights are clean, to the bit, wherever somebody looks


def evaluate(model, context):
    model.eval()
    with context():
        model(inputs(1, seed=5, dtype=next(model.parameters()).dtype)[0])
    model.train()


def training_pass_without_gradients(model, optimizer):
    model[1].track_running_stats = False  # BatchNorm would rightly learn from this pass
    with torch.no_grad():
        model(inputs(1, seed=5)[0])
    model[1].track_running_stats = True


BETWEEN = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "eval": lambda model, optimizer: optimizer.eval(),
    "train": lambda model, optimizer: optimizer.train(),
    "eval and train": lambda model, optimizer: (optimizer.eval(), optimizer.train()),
    "state_dict": lambda model, optimizer: model.state_dict(),
    "state_dict of a submodule": lambda model, optimizer: model[3].state_dict(),
    "state_dict of every submodule": lambda model, optimizer: [module.state_dict() for module in model.modules()],
    "evaluation under no_grad": lambda model, optimizer: evaluate(model, torch.no_grad),
    "evaluation under inference_mode": lambda model, optimizer: evaluate(model, torch.inference_mode),
    "evaluation with gradients": lambda model, optimizer: evaluate(model, contextlib.nullcontext),
    "training pass under no_grad": training_pass_without_gradients,
    "all at once": lambda model, optimizer: [
        action(model, optimizer) for name, action in BETWEEN.items() if name != "all at once"
    ],
}


STAY_CLEAN = (
    "eval",
    "train",
    "eval and train",
    "state_dict",
    "state_dict of a submodule",
    "state_dict of every submodule",
    "all at once",
)


@pytest.mark.parametrize("look", BETWEEN)
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_weights_are_clean_between_forward_and_backward_and_the_gradient_is_right(look, alpha):
    model = network()
    optimizer = wrap(model, alpha=alpha)
    first, second = inputs(2)
    loss_of(model, first).backward()
    weights = snapshot(model)
    clean = tensors(model) if alpha < 1 else weights  # alpha = 1 has no clean pass for BatchNorm to learn from
    with seen_weights(model) as seen:
        loss = loss_of(model, second) / 2
    noisy = snapshot(model)
    assert differs(weights, noisy)
    met = []
    handle = model[0].register_forward_pre_hook(lambda *_: met.append(snapshot(model)))
    zero_grad = optimizer.base.zero_grad
    optimizer.base.zero_grad = lambda *args: (met.append(snapshot(model)), zero_grad(*args))
    BETWEEN[look](model, optimizer)
    handle.remove()
    assert_same(met, [weights] * len(met))
    if look in STAY_CLEAN:
        assert_same({name: tensor for name, tensor in tensors(model).items() if name in clean}, clean)
    else:
        assert met
        assert_same(snapshot(model), noisy)  # for weights that the loss uses outside the model
    before = {name: 0 if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    assert_same({name: tensor for name, tensor in tensors(model).items() if name in clean}, clean)
    batches = [(second, labels(second))]
    perturbed = mixed_gradient(model, weights, noises(seen, weights), batches, F.cross_entropy, 1.0)
    share = alpha if alpha < 1 else 1 / 2  # of the window's gradient that this slot is
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad - before[name], share * perturbed[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, "eval mode"], ids=str)
def test_a_pass_that_trains_nothing_is_never_perturbed(context):
    model = network()
    optimizer = wrap(model, alpha=1.0)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(snapshot(module)))
    if context == "eval mode":
        model.eval()(inputs(1)[0])
        model.train()
    else:
        with context():
            model(inputs(1)[0])
    assert_same(seen, [snapshot(network())])
    assert optimizer.report()["windows"] == 0


class Probe(torch.optim.SGD):
    """Notes the weights that it is called at, and averages like a schedule-free optimizer would."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.125)
        self.model, self.met = model, []

    def step(self, closure=None):
        self.met.append(snapshot(self.model))
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.met.append(snapshot(self.model))
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def train(self):
        self.met.append(snapshot(self.model))
        torch._foreach_neg_(list(self.model.parameters()))

    def eval(self):
        self.train()


@pytest.mark.parametrize("call", ["step", "zero_grad", "eval", "train"])
@pytest.mark.parametrize("when", ["after forward", "after backward"])
def test_the_base_optimizer_meets_clean_weights(call, when):
    model = network()
    base = Probe(model)
    optimizer = wrap(model, base, alpha=1.0, accumulation_steps=1)
    clean = snapshot(model)
    loss = loss_of(model, inputs(1)[0])
    if when == "after backward":
        loss.backward()
    getattr(optimizer, call)()
    assert_same(base.met, [clean])


def test_weights_that_the_base_moves_for_evaluation_come_back():
    model = network()
    optimizer = wrap(model, Probe(model), alpha=1.0, accumulation_steps=1)
    clean, x = snapshot(model), inputs(1)[0]
    model(x)
    optimizer.eval()
    assert_same(snapshot(model), {name: -weight for name, weight in clean.items()})
    optimizer.train()
    assert_same(snapshot(model), clean)
    with seen_weights(model) as seen:
        loss_of(model, x).backward()
    assert_same(snapshot(model), clean)
    mix = mixed_gradient(model, clean, noises(seen, clean), [(x, labels(x))], F.cross_entropy, 1.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, mix[name], rtol=1e-12, atol=1e-14)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        raise ctx.error


class Fragile(nn.Module):
    """Raises `error` in the forward or in the backward pass, half way through, once."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.where, self.error = None, None

    def forward(self, x):
        where, self.where = self.where, None
        x = self.net[:3](x)
        if where == "forward":
            raise self.error
        return self.net[3](Fails.apply(x, self.error) if where == "backward" else x)


RECOVERIES = {
    "nothing": lambda optimizer: None,
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "eval": lambda optimizer: optimizer.eval(),
}


@pytest.mark.parametrize(
    ("where", "error", "recovery"),
    [
        ("forward", ValueError, "nothing"),
        ("forward", ValueError, "eval"),
        ("forward", KeyboardInterrupt, "eval"),
        ("backward", ValueError, "eval"),
        ("backward", ValueError, "zero_grad"),
        ("backward", KeyboardInterrupt, "eval"),
    ],
)
def test_weights_are_clean_after_an_error_and_the_next_steps_are_the_mix(where, error, recovery):
    model = Fragile()
    optimizer = wrap(model, alpha=0.8)
    run_windows(model, optimizer, inputs(2))
    batches = inputs(6, seed=1)
    loss_of(model, batches[0]).backward()
    clean = tensors(model)
    model.where, model.error = where, error("once")
    with pytest.raises(error, match="once"):
        loss_of(model, batches[1]).backward()
    RECOVERIES[recovery](optimizer)
    assert_same(tensors(model), clean)
    optimizer.train()
    optimizer.zero_grad()
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, batches[2:])
    watch.check(0.8, [2, 2], ordered=False)


def test_a_saved_checkpoint_is_clean_in_the_middle_of_a_micro_step(tmp_path):
    model = network()
    optimizer = wrap(model, alpha=1.0)
    clean = snapshot(model)
    loss = loss_of(model, inputs(1)[0])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loss.backward()
    saved = torch.load(tmp_path / "model.pt")
    assert_same({name: saved[name] for name in clean}, clean)
    assert optimizer.report()["slots"] == {"clean": 0, "perturbed": 1}


def test_loading_in_the_middle_of_a_micro_step_ends_it():
    model, other = network(), network(seed=1)
    optimizer = wrap(model, alpha=1.0)
    loss = loss_of(model, inputs(1)[0])
    model.load_state_dict(other.state_dict())
    assert_same(tensors(model), tensors(other))
    with pytest.raises(RuntimeError, match="load_state_dict"):
        loss.backward()
    assert_same(tensors(model), tensors(other))
    optimizer.zero_grad()
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(2))
    watch.check(1.0, [2])


def test_weights_are_clean_when_grad_scaler_skips_and_the_next_step_is_the_mix():
    model = network()
    optimizer = wrap(model, alpha=0.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    watch = Watch(model, optimizer.base)
    batches = inputs(6)
    for start in range(0, 6, 2):
        clean = snapshot(model)
        for x in batches[start : start + 2]:
            overflow = float("inf") if start == 2 else 1.0
            scaler.scale(overflow * loss_of(model, x) / 2).backward()
            assert_same(snapshot(model), clean)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        if start == 2:
            assert_same(snapshot(model), clean)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert len(watch.steps) == 2
    del watch.passes[2:4]
    watch.check(0.8, [2, 2])


def test_zero_grad_in_the_middle_of_a_window_begins_a_new_one(caplog):
    model = network()
    optimizer = wrap(model, alpha=0.8, accumulation_steps=3)
    for x in inputs(2):
        loss_of(model, x).backward()
    optimizer.zero_grad()
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(6), 3)
    watch.check(0.8, [3, 3])
    assert not caplog.records


def test_batches_given_up_between_forward_and_backward_begin_a_new_window(caplog):
    model = network()
    optimizer = wrap(model, alpha=0.3)
    watch = Watch(model, optimizer.base)
    for number in range(3):  # of a loss that was NaN, say
        first, given_up, *window = inputs(4, seed=number)
        (loss_of(model, first) / 2).backward()
        loss_of(model, given_up)
        optimizer.zero_grad()
        del watch.passes[-2:]
        run_windows(model, optimizer, window)
    watch.check(0.3, [2, 2, 2])
    assert not caplog.records


def test_a_step_with_a_closure_finds_clean_weights_where_gamma_went_to_0():
    model = network()
    base = Probe(model)
    optimizer = wrap(model, base, alpha=1.0)
    clean = snapshot(model)
    model(inputs(1)[0])
    optimizer.scale_gamma(0.0)
    optimizer.step(lambda: None)
    assert_same(base.met, [clean])


@pytest.mark.parametrize("order", ["zero_grad before forward", "zero_grad before backward", "zero_grad at the end"])
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_the_gradient_is_the_mix_wherever_a_loop_zeroes(order, alpha):
    micro_steps = 1 if alpha == 1 else 2
    model = network()
    optimizer = wrap(model, alpha=alpha, accumulation_steps=micro_steps)
    watch = Watch(model, optimizer.base)
    for index, x in enumerate(inputs(3 * micro_steps)):
        first, last = index % micro_steps == 0, (index + 1) % micro_steps == 0
        if first and order == "zero_grad before forward":
            optimizer.zero_grad()
        loss = loss_of(model, x) / micro_steps
        if first and order == "zero_grad before backward":
            optimizer.zero_grad()
        loss.backward()
        if last:
            optimizer.step()
        if last and order == "zero_grad at the end":
            optimizer.zero_grad()
    watch.check(alpha, [micro_steps] * 3)


def test_weights_are_clean_once_the_wrapper_is_gone():
    model, x = network(), inputs(1)[0]
    optimizer = wrap(model, alpha=0.8)
    loss_of(model, x).backward()
    clean = tensors(model)
    model.zero_grad()
    output = model(x)
    assert differs(snapshot(model), clean)
    del output, optimizer
    gc.collect()
    assert_same(tensors(model), clean)
    with seen_weights(model) as seen:
        loss_of(model, x).backward()
    assert noises(seen, snapshot(model)) == [None]
    expected = gradient(model, snapshot(model), (x, labels(x)), F.cross_entropy)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


# 5. Noise is a function of (seed, window, micro-step, replica, position), and of nothing else


def drawn(micro_steps=4, windows=2, seed=0, prepare=lambda model: None, batches=None):
    """eps of all perturbed passes, by (window, micro-step); the base moves nothing, so that only the key differs."""
    model = network()
    prepare(model)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.0), accumulation_steps=micro_steps, seed=seed)
    with seen_weights(model) as seen:
        run_windows(model, optimizer, batches or inputs(micro_steps * windows), micro_steps)
    eps = noises(seen, snapshot(model))
    return {(i // micro_steps, i % micro_steps): noise for i, noise in enumerate(eps) if noise is not None}


def test_noise_is_a_function_of_its_key():
    eps = drawn()
    assert_same(drawn(batches=inputs(8, seed=3)), eps)
    for one, other in itertools.combinations(eps.values(), 2):
        assert all(not torch.equal(one[name], other[name]) for name in one)
    other_seed = drawn(seed=1)
    assert all(not torch.equal(eps[key][name], other_seed[key][name]) for key in eps for name in eps[key])


def test_freezing_a_layer_leaves_the_noise_of_the_others():
    eps = drawn()
    frozen = drawn(prepare=lambda model: model[0].requires_grad_(False))
    for key, noise in frozen.items():
        assert not any(noise[name].any() for name in ("0.weight", "0.bias"))
        for name in ("1.weight", "3.weight", "3.bias"):
            assert noise[name].any()
            assert torch.equal(noise[name], eps[key][name])


def test_the_global_generator_is_untouched():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = network()
    optimizer = wrap(model)
    run_windows(model, optimizer, inputs(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)  # and the noise does not come from it
    assert_same(drawn(), (torch.manual_seed(2), drawn())[1])


# 6. Buffers are updated by clean slots alone


class Running(nn.Module):
    """Buffers of the other kinds: one that a forward pass replaces, one not persistent, and an expanded one."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.register_buffer("replaced", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("transient", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("expanded", torch.ones(1).expand(4))

    def forward(self, x):
        output = self.net(x)
        self.replaced = 0.9 * self.replaced + output.detach().mean(0)
        self.transient.add_(output.detach().mean(0))
        return output


def cumulative():
    model = network()
    model[1].momentum = None
    return model


@pytest.mark.parametrize("build", [network, cumulative, Running])
def test_buffers_are_updated_by_clean_slots_alone(build):
    model, twin = build(), build()
    optimizer = wrap(model, accumulation_steps=3)
    clean = []
    with seen_weights(model) as seen:
        for x in inputs(9):
            (loss_of(model, x) / 3).backward()
            if not optimizer.role.perturbed:
                clean.append((seen[-1], x))
            if len(seen) % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert len(clean) == 6
    for weights, x in clean:
        twin.load_state_dict(weights, strict=False)
        twin(x)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_buffers_of_a_checkpoint_in_the_middle_of_a_micro_step_are_clean():
    model = Running()
    optimizer = wrap(model)
    first, second = inputs(2)
    loss_of(model, first).backward()
    clean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = loss_of(model, second)
    assert_same({name: tensor.clone() for name, tensor in model.state_dict().items()}, clean)
    loss.backward()
    assert optimizer.report()["slots"] == {"clean": 1, "perturbed": 1}


def test_with_alpha_one_the_perturbed_passes_update_the_buffers():
    model, twin = network(), network()
    optimizer = wrap(model, alpha=1.0)
    batches = inputs(4)
    with seen_weights(model) as seen:
        run_windows(model, optimizer, batches)
    for weights, x in zip(seen, batches, strict=True):
        twin.load_state_dict(weights, strict=False)
        twin(x)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert model[1].num_batches_tracked == 4
    optimizer.sync_buffers()
    assert model[1].num_batches_tracked == 4


# 7. Resume at a step boundary is bit-exact


@pytest.mark.parametrize("kwargs", [{}, {"eta": 50.0, "beta": 0.5, "alpha": 0.8}, {"alpha": 1.0}], ids=str)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_resume_is_bit_exact(tmp_path, kwargs, base):
    batches = inputs(12, dtype=torch.float32)

    def start(**more):
        model = network(torch.float32)
        optimizer = wrap(model, base(model.parameters()), **kwargs, **more)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(model, optimizer, scheduler, batches):
        for start in range(0, len(batches), 2):
            run_windows(model, optimizer, batches[start : start + 2])
            scheduler.step()
        return tensors(model), optimizer.state_dict(), optimizer.report()["windows"]

    through = train(*start(seed=3), batches)
    first = start(seed=3)
    train(*first, batches[:6])
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    resumed = start(seed=4)  # the checkpoint's seed counts, not the argument's
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert_same(train(*resumed, batches[6:]), through)
    if "eta" in kwargs:
        assert through[1]["rwp"]["fisher"]


def test_saving_does_not_change_what_follows():
    def train(save):
        model = network()
        optimizer = wrap(model, eta=50.0)
        for start in range(0, 6, 2):
            run_windows(model, optimizer, inputs(6)[start : start + 2])
            if save:
                pickle.dumps(optimizer.state_dict())
                model.state_dict()
        return tensors(model)

    assert_same(train(True), train(False))


def test_a_checkpoint_of_the_base_alone_loads_and_keeps_the_groups_gamma():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run_windows(model, base, inputs(2))
    saved = copy.deepcopy(base.state_dict())
    saved["param_groups"][0]["lr"] = 0.25
    optimizer = wrap(network(), gamma=0.3)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["rwp_gamma"] == optimizer.param_groups[0]["initial_rwp_gamma"] == 0.3
    assert_same(optimizer.base.state_dict()["state"], saved["state"])


def test_the_base_alone_loads_a_checkpoint_of_the_wrapper():
    model = network()
    optimizer = wrap(model)
    run_windows(model, optimizer, inputs(2))
    base = torch.optim.SGD(network().parameters(), lr=0.3)
    base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(base.state_dict()["state"], optimizer.base.state_dict()["state"])


def test_a_scheduled_gamma_comes_back_from_a_checkpoint():
    optimizer = wrap(network(), gamma=0.2)
    optimizer.scale_gamma(0.5)
    resumed = wrap(network(), gamma=0.7)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["rwp_gamma"] == 0.1
    resumed.scale_gamma(2.0)
    assert resumed.param_groups[0]["rwp_gamma"] == 0.4


# 8. Every kind of parameter


class Zoo(nn.Module):
    """A quadratic in each of its parameters, so that the gradient at any weights is known: the weights minus one."""

    def __init__(self, parameters, unused=()):
        super().__init__()
        self.used = nn.ParameterList(parameters)
        self.unused = nn.ParameterList(unused)

    def forward(self, x):
        return x.sum() * 0 + sum((0.5 * (p.double() - 1) ** 2).sum() for p in self.used)


SHAPES = st.one_of(
    st.sampled_from([(), (0,), (3, 0), (1,), (1, 1), (7,), (4, 3), (4, 3, 3, 3), (1, 5, 4), (1, 1, 6), (2, 1, 2)]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
)
KINDS = st.tuples(
    SHAPES,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["used", "frozen", "unused", "excluded", "not in the optimizer", "tied"]),
    st.booleans(),
)
UNIT_ROUNDOFF = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@given(
    kinds=st.lists(KINDS, min_size=1, max_size=6),
    alpha=st.sampled_from([0.25, 0.8, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    mode=st.sampled_from(["filter", "filter_normalized"]),
    noise_1d=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_step_is_right_for_every_shape_dtype_and_kind_of_parameter(kinds, alpha, seed, mode, noise_1d):
    generator = torch.Generator().manual_seed(0)
    used, unused, excluded, foreign, targets = [], [], [], [], []
    anchor = nn.Parameter(torch.ones(5, 2))  # something to perturb, whatever else there is
    for shape, dtype, kind, channels_last in [((5, 2), torch.float32, "used", False), *kinds]:
        weight = torch.randn(shape, generator=generator).to(dtype)
        if channels_last and len(shape) == 4:
            weight = weight.to(memory_format=torch.channels_last)
        p = nn.Parameter(weight, requires_grad=kind != "frozen")
        (unused if kind == "unused" else used).append(p)
        if kind == "tied":
            used.append(p)
        (excluded if kind == "excluded" else foreign if kind == "not in the optimizer" else targets).append(p)
    model = Zoo([anchor, *used], unused)
    groups = [{"params": [anchor, *targets]}, {"params": excluded, "rwp_gamma": 0.0}]
    optimizer = wrap(model, torch.optim.SGD(groups, lr=0.0), alpha=alpha, seed=seed, noise=mode, noise_1d=noise_1d)
    clean, strides = snapshot(model), [p.stride() for p in model.parameters()]
    uses = {id(p): sum(p is other for other in model.used) for p in model.parameters()}

    with seen_weights(model) as seen:
        for _ in range(2):
            (model(torch.zeros(1)) / 2).backward()
            assert_same(snapshot(model), clean)
            assert [p.stride() for p in model.parameters()] == strides

    eligible = {id(p) for p in [anchor, *targets] if p.requires_grad and (noise_1d or p.ndim > 1)}
    for name, p in model.named_parameters():
        eps = [weights[name].double() - clean[name].double() for weights in seen]
        assert alpha == 1 or not eps[0].any()
        if id(p) not in eligible:
            assert not eps[1].any()
        elif p.numel() >= 4:
            assert eps[1].any()
        if not p.requires_grad or not uses[id(p)]:
            assert p.grad is None
            continue
        shares = [1 - alpha, alpha] if alpha < 1 else [0.5, 0.5]
        parts = [share * (clean[name].double() + e - 1) for share, e in zip(shares, eps, strict=True)]
        bound = 8 * UNIT_ROUNDOFF[p.dtype] * (1 + sum(part.abs() for part in parts)) * uses[id(p)]
        assert ((p.grad.double() - uses[id(p)] * sum(parts)).abs() <= bound).all()
    optimizer.step()
    assert optimizer.report()["slots"]["perturbed"] == (1 if alpha < 1 else 2)


def test_a_tied_parameter_gets_its_noise_once():
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            torch.manual_seed(0)
            self.down, self.up = nn.Linear(6, 3).double(), nn.Linear(3, 6, bias=False).double()
            self.head = nn.Linear(6, 3).double()
            if tied:
                self.head.weight = self.down.weight

        def forward(self, x):
            return self.head(self.up(self.down(x)))

    model = Tied()
    optimizer = wrap(model, alpha=0.8, gamma=0.1)
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(4))
    watch.check(0.8, [2, 2])
    assert model.head.weight is model.down.weight
    untied = Tied(tied=False)
    optimizer = wrap(untied, gamma=0.1)
    with seen_weights(untied) as seen:
        for x in inputs(2):
            loss_of(untied, x).backward()
    assert torch.equal(watch.passes[1][0]["down.weight"], seen[1]["down.weight"])


def test_the_gradient_is_the_mix_for_sparse_gradients():
    def build(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3)).double()

    model = build(sparse=True)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.8, eta=1.0)
    clean = snapshot(model)
    batches = [(torch.tensor([[0, 1], [5, 5]]), torch.tensor([0, 2])), (torch.tensor([[1, 3]]), torch.tensor([1]))]
    with seen_weights(model) as seen:
        for x, y in batches:
            (F.cross_entropy(model(x), y) / 2).backward()
    mix = mixed_gradient(build(sparse=False), clean, noises(seen, clean), batches, F.cross_entropy, 0.8)
    torch.testing.assert_close(model[0].weight.grad.to_dense(), mix["0.weight"], rtol=1e-12, atol=1e-14)
    optimizer.step()


def test_channels_last_weights_get_the_same_noise():
    def noise(memory_format):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double().to(memory_format=memory_format)
        optimizer = wrap(model, alpha=1.0)
        with seen_weights(model) as seen:
            model(torch.zeros(1, 3, 5, 5).double())
        assert optimizer.role.perturbed
        return seen[0]

    assert_same(noise(torch.channels_last), noise(torch.contiguous_format))


def test_layers_unfrozen_during_training_are_perturbed_from_then_on():
    model = network()
    model[0].requires_grad_(False)
    head = [*model[1].parameters(), *model[3].parameters()]
    optimizer = wrap(model, torch.optim.SGD(head, lr=0.1), alpha=0.8)
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(2))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [model[0].weight]})
    optimizer.add_param_group({"params": [model[0].bias], "rwp_gamma": 0.0})
    assert [group["rwp_gamma"] for group in optimizer.base.param_groups] == [GAMMA, GAMMA, 0.0]
    before = snapshot(model)
    run_windows(model, optimizer, inputs(2, seed=1))
    watch.check(0.8, [2, 2])
    first, second = (
        noises([seen], clean)[0] for (seen, _), (clean, _) in zip(watch.passes[1::2], watch.steps, strict=True)
    )
    assert not first["0.weight"].any()
    assert first["3.weight"].any()
    assert second["0.weight"].any()
    assert not second["0.bias"].any()
    assert not torch.equal(model[0].weight, before["0.weight"])


# 10. AMP, clipping, EMA, compile, checkpointing, copies


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("outer", [autocast, contextlib.nullcontext], ids=["around the loop", "around the forward"])
@pytest.mark.parametrize("look", ["nothing", "state_dict", "evaluation under no_grad", "zero_grad"])
def test_the_gradient_is_the_mix_under_autocast(outer, look):
    model = network(torch.float32)
    optimizer = wrap(model, alpha=0.8, accumulation_steps=4, gamma=0.5)
    batches = inputs(4, dtype=torch.float32)
    clean = snapshot(model)
    with outer(), seen_weights(model) as seen:
        for x in batches:
            with autocast():
                loss = loss_of(model, x) / 4
            if not (look == "zero_grad" and len(seen) > 1):
                BETWEEN.get(look, lambda *_: None)(model, optimizer)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    kinds = {False: [], True: []}
    for weights, x in zip(seen, batches, strict=True):
        twin = network(torch.float32)
        twin.load_state_dict(weights, strict=False)
        with autocast():
            loss_of(twin, x).backward()
        kinds[differs(weights, clean)].append({name: p.grad for name, p in twin.named_parameters()})
    assert [len(kind) for kind in kinds.values()] == [2, 2]
    mean = {kind: {name: sum(g[name] for g in kinds[kind]) / 2 for name in clean} for kind in kinds}
    for name, p in model.named_parameters():
        expected = 0.8 * mean[True][name] + 0.2 * mean[False][name]
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_clipping_clips_the_mix():
    model = network()
    optimizer = wrap(model, alpha=0.8)
    clean, batches = snapshot(model), inputs(2)
    with seen_weights(model) as seen:
        for x in batches:
            (loss_of(model, x) / 2).backward()
    total = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.01)
    pairs = [(x, labels(x)) for x in batches]
    mix = mixed_gradient(model, clean, noises(seen, clean), pairs, F.cross_entropy, 0.8)
    norm = torch.cat([g.flatten() for g in mix.values()]).norm()
    torch.testing.assert_close(total, norm)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), clean[name] - 0.1 * 0.01 * mix[name] / norm, rtol=1e-5, atol=1e-8)


def timm_average(model):
    average = ModelEmaV3(model, decay=0.5)
    return average, average.update


def torch_average(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    return average, average.update_parameters


@pytest.mark.parametrize(
    ("make", "when"),
    [(timm_average, "after step"), (timm_average, "between forward and backward"), (torch_average, "after step")],
)
def test_an_average_of_the_weights_never_sees_the_noise(make, when):
    model = network()
    optimizer = wrap(model, alpha=1.0, accumulation_steps=1)
    average, update = make(model)
    expected = snapshot(model)
    for x in inputs(4):
        clean = snapshot(model)
        loss = loss_of(model, x)
        if when != "after step":
            update(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if when == "after step":
            update(model)
            clean = snapshot(model)
        expected = {name: 0.5 * weight + 0.5 * clean[name] for name, weight in expected.items()}
    for name, got in average.module.named_parameters():
        torch.testing.assert_close(got.detach(), expected[name], rtol=1e-12, atol=1e-14)
    with seen_weights(average.module) as seen:
        average.module.train()(inputs(1)[0]).sum()
    assert_same(seen[0], snapshot(average.module))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_of_the_model_train_without_noise(make):
    model = network()
    optimizer = wrap(model, alpha=1.0, accumulation_steps=1)
    run_windows(model, optimizer, inputs(1), 1)
    twin = make(model)
    assert_same(tensors(twin), tensors(model))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    with seen_weights(twin) as seen:
        loss_of(twin, inputs(1)[0]).backward()
    assert_same(seen[0], snapshot(twin))
    plain.step()
    plain.zero_grad()
    assert optimizer.report()["slots"]["perturbed"] == 1
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(1), 1)
    watch.check(1.0, [1])
    again = wrap(twin, plain, alpha=1.0, accumulation_steps=1)
    watch = Watch(twin, plain)
    run_windows(twin, again, inputs(1), 1)
    watch.check(1.0, [1])


class Segments(nn.Module):
    """Layers that are recomputed in the backward pass, one by one."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8).double()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double() for _ in range(4))
        self.head = nn.Linear(8, 3).double()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("look", ["nothing", "state_dict", "zero_grad"])
def test_the_gradient_is_the_mix_with_activation_checkpointing(reentrant, look):
    model = Segments(reentrant)
    optimizer = wrap(model, alpha=0.8)
    watch = Watch(model, optimizer.base)
    for start in range(0, 4, 2):
        for index, x in enumerate(inputs(4)[start : start + 2]):
            loss = loss_of(model, x) / 2
            if not (look == "zero_grad" and index):
                BETWEEN.get(look, lambda *_: None)(model, optimizer)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.check(0.8, [2, 2], twin=Segments())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_whole_model_is_refused(reentrant):
    model = network()
    optimizer = wrap(model, alpha=1.0)
    output = checkpoint(model, inputs(1)[0].requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="Checkpoint its layers"):
        output.sum().backward()
    optimizer.eval()
    assert_same(snapshot(model), snapshot(network()))


def matrices():
    """What inductor compiles without C++, which takes the compiler a quarter of a minute for `network`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)).double()


class Own(nn.Module):
    """A module that is not torch's own, which old compilers skip."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no c++")


@pytest.mark.parametrize(
    ("how", "backend", "alpha", "build"),
    [
        pytest.param("torch.compile", "inductor", 0.8, matrices, marks=needs_compiler),
        pytest.param("torch.compile", "inductor", 0.8, network, marks=[needs_compiler, pytest.mark.slow]),
        ("torch.compile", "aot_eager", 0.5, network),
        ("torch.compile", "aot_eager", 0.8, network),
        ("compiled before it is wrapped", "aot_eager", 0.8, network),
        ("module.compile", "aot_eager", 0.8, network),
    ],
)
def test_a_compiled_model_is_right_and_is_not_recompiled(how, backend, alpha, build):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Own(build())
    compiled = model if how == "module.compile" else torch.compile(model, backend=backend)
    if how == "module.compile":
        model.compile(backend=backend)
    optimizer = wrap(compiled if how == "compiled before it is wrapped" else model, alpha=alpha)
    watch = Watch(model, optimizer.base)
    run_windows(compiled, optimizer, inputs(4))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    run_windows(compiled, optimizer, inputs(8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    watch.check(alpha, [2] * 6, twin=Own(build()))


# Misuse


def test_one_gradient_on_one_process_is_nothing_to_mix():
    model = network()
    optimizer = wrap(model, accumulation_steps=None)
    with pytest.raises(RuntimeError, match=r"nothing to mix.*gradient_accumulation_steps=2.*alpha=1"):
        model(inputs(1)[0])
    assert_same(tensors(model), tensors(network()))
    optimizer.alpha = 1.0  # one of the remedies
    run_windows(model, optimizer, inputs(2), 1)
    assert optimizer.report()["slots"] == {"clean": 0, "perturbed": 2}


@pytest.mark.parametrize("slot", [0, 1])
def test_a_second_backward_pass_in_a_micro_step_is_refused(slot):
    model = network()
    optimizer = wrap(model)
    batches = inputs(2)
    for x in batches[:slot]:
        loss_of(model, x).backward()
    output = model(batches[slot])
    output.mean().backward(retain_graph=True)
    gradients = snapshot_of_gradients(model)
    with pytest.raises(RuntimeError, match="Add the losses up"):
        output.square().mean().backward()
    assert_same(snapshot_of_gradients(model), gradients)
    assert_same(snapshot(model), snapshot(network()))
    assert optimizer.report()["slots"] == {"clean": 1, "perturbed": slot}


def snapshot_of_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_forward_passes_with_a_backward_each_are_refused():
    model = network()
    optimizer = wrap(model)
    first, second = (model(x).mean() for x in inputs(2))
    first.backward()
    with pytest.raises(RuntimeError, match="a second backward pass"):
        second.backward()
    optimizer.eval()
    assert_same(snapshot(model), snapshot(network()))


class Unpacked(nn.Module):
    """Its output hides the tensors where nobody would look for them."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x))


UNSEEN = {
    "a submodule's forward": (lambda: nn.Sequential(network()), lambda model, x: model[0](x)),
    "model.forward": (network, lambda model, x: model.forward(x)),
    "eval mode": (network, lambda model, x: model.eval()(x)),
    "an unknown output": (Unpacked, lambda model, x: model(x).logits),
}


@pytest.mark.parametrize(("build", "forward"), UNSEEN.values(), ids=UNSEEN)
def test_a_backward_that_no_forward_of_the_model_began_is_refused_by_step(build, forward):
    model, (x,) = build(), inputs(1)
    optimizer = wrap(model)
    F.cross_entropy(forward(model, x), labels(x)).backward()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="call the model itself, in training mode, and return tensors"):
        optimizer.step()
    assert_same(snapshot(model), before)


def test_a_perturbed_output_of_unknown_kind_has_no_backward_pass():
    model, (x,) = Unpacked(), inputs(1)
    optimizer = wrap(model, alpha=1.0)
    output = model(x).logits
    assert_same(snapshot(model), snapshot(Unpacked()))
    with pytest.raises(RuntimeError):
        F.cross_entropy(output, labels(x)).backward()
    assert optimizer.report()["slots"]["perturbed"] == 0


def test_training_on_after_eval_is_refused_by_step():
    model = network()
    optimizer = wrap(model)
    run_windows(model, optimizer, inputs(2))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        run_windows(model, optimizer, inputs(2))


NAN = float("nan")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"gamma": value} for value in (-0.1, NAN, float("inf"))),
        *({"alpha": value} for value in (-0.1, 1.1, NAN)),
        *({"accumulation_steps": value} for value in (-1, 0)),
        *({"eta": value} for value in (-1.0, NAN, float("inf"))),
        *({"beta": value} for value in (-0.1, 1.0, NAN)),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        wrap(network(), **wrong)


@pytest.mark.parametrize("gamma", [-1.0, NAN, float("inf")])
def test_a_groups_gamma_out_of_range_is_refused(gamma):
    model = network()
    with pytest.raises(ValueError, match=r"^rwp_gamma must be .*, got "):
        wrap(model, torch.optim.SGD([{"params": model.parameters(), "rwp_gamma": gamma}], lr=0.1))
    with pytest.raises(ValueError, match=r"^factor must be .*, got "):
        wrap(model).scale_gamma(gamma)


def test_an_unknown_mode_is_refused_with_the_choice():
    with pytest.raises(ValueError, match="filter, filter_normalized"):
        wrap(network(), noise="gaussian")


def test_parameters_that_the_model_does_not_have_are_refused():
    model = network()
    with pytest.raises(ValueError, match=r"2 of the optimizer's parameters .* \(shapes \[\(3, 8\), \(3,\)\]\)"):
        RWP(torch.optim.SGD(model.parameters(), lr=0.1), model[:3])
    optimizer = wrap(model)
    with pytest.raises(ValueError, match="not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_nothing_to_perturb_is_refused():
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model[1].parameters(), lr=0.1), noise_1d=False, alpha=1.0)
    with pytest.raises(RuntimeError, match="nothing to perturb"):
        model(inputs(1)[0])
    assert optimizer.report()["slots"] == {"clean": 0, "perturbed": 0}


@pytest.mark.parametrize("noisy", [False, True])
def test_the_newest_wrapper_takes_over(noisy):
    model = network()
    old = wrap(model, alpha=0.8)
    if noisy:
        loss_of(model, inputs(1)[0]).backward()
        model(inputs(1)[0])
    model.zero_grad()
    new = wrap(model, old.base, alpha=0.8)
    assert_same(snapshot(model), snapshot(network()))
    for use in (old.step, old.zero_grad, old.train):
        with pytest.raises(RuntimeError, match="a newer RWP took over"):
            use()
    watch = Watch(model, new.base)
    run_windows(model, new, inputs(4))
    watch.check(0.8, [2, 2])
    assert old.report()["slots"]["perturbed"] == 0


def test_a_removed_wrapper_leaves_nothing_behind():
    model = network()
    optimizer = wrap(model, alpha=0.8)
    loss_of(model, inputs(1)[0]).backward()
    output = model(inputs(1)[0])
    optimizer.remove()
    assert_same(snapshot(model), snapshot(network()))
    del output
    for module in model.modules():
        hooks = [module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called]
        hooks += [module._state_dict_pre_hooks, module._load_state_dict_pre_hooks]
        assert not any(hooks)
    assert not any(p._backward_hooks for p in model.parameters())
    with pytest.raises(RuntimeError, match="wrap the model again"):
        optimizer.step()


@pytest.mark.parametrize("gradients", ["none", "zeros"])
@pytest.mark.parametrize("disarmed", [True, False])
def test_a_step_without_a_backward_pass_is_no_error(gradients, disarmed):
    model = network()
    optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.1))
    if gradients == "zeros":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    if disarmed:
        optimizer.eval()
    optimizer.step()
    assert optimizer.report()["windows"] == 0


def test_checkpoint_loaders_of_torch_distributed_work():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = network(), network()
    trained, fresh = wrap(model), wrap(other)
    run_windows(model, trained, inputs(4))
    state = get_optimizer_state_dict(model, trained)
    set_optimizer_state_dict(other, fresh, state)
    assert_same(fresh.base.state_dict()["state"], trained.base.state_dict()["state"])
    assert fresh.report()["windows"] == 2


REFUSED = {  # what Accelerate's state says, and what is named with what works
    "FSDP": ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "FSDP of version 1.*What works.*fsdp_version: 2"),
    "DEEPSPEED": (
        {"deepspeed_plugins": {"one": SimpleNamespace(zero_stage=3, selected=True)}},
        "ZeRO-3.*What works.*stage 2.*FSDP2",
    ),
    "MEGATRON_LM": ({}, "MEGATRON_LM.*What works"),
    "XLA": ({}, "XLA.*What works"),
}


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        *itertools.product(["construction", "prepare", "forward"], ["FSDP", "DEEPSPEED", "MEGATRON_LM"]),
        ("construction", "XLA"),
        ("forward", "XLA"),
    ],
)
def test_what_cuts_weights_anywhere_is_refused_at_the_first_chance(kind, when):
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = None if when == "construction" else wrap(model)
    PartialState._shared_state["distributed_type"] = DistributedType[kind]  # where Accelerate itself keeps it
    plugins, message = REFUSED[kind]
    AcceleratorState._shared_state.update(plugins)
    chances = {
        "construction": lambda: wrap(model),
        "prepare": lambda: accelerator.prepare_optimizer(optimizer),
        "forward": lambda: model(inputs(1)[0]),
    }
    with pytest.raises(NotImplementedError, match=message):
        chances[when]()


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"_fsdp_flattened": True}, "FSDP of version 1.*fsdp_version: 2"),
        ({"ds_id": 0}, "ZeRO-3"),
        ({"allreduce": False, "group_name": "ep_size_2"}, "mixture of experts"),
    ],
)
def test_parameters_of_engines_that_cut_weights_anywhere_are_refused(marks, message):
    model = network()
    for name, value in marks.items():
        setattr(model[0].weight, name, value)
    with pytest.raises(NotImplementedError, match=message):
        wrap(model)


def test_sequence_parallelism_without_a_mesh_is_refused():
    Accelerator(cpu=True)
    AcceleratorState().parallelism_config = SimpleNamespace(sp_size=2)
    with pytest.raises(NotImplementedError, match=r"sequence parallelism.*context parallelism under FSDP2"):
        wrap(network())


def test_data_parallel_is_refused():
    model = network()
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        wrap(nn.DataParallel(model))
    optimizer = wrap(model)
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()(inputs(1)[0])
    optimizer.eval()


# Loops, as people write them


ARMINGS = {
    "never": (lambda o: None, lambda o: None, lambda o: None),
    "once": (lambda o: o.train(), lambda o: None, lambda o: None),
    "once an epoch": (lambda o: None, lambda o: o.train(), lambda o: None),
    "before every forward": (lambda o: None, lambda o: None, lambda o: o.train()),
    "twice before every forward": (lambda o: None, lambda o: None, lambda o: (o.train(), o.train())),
    "all": (lambda o: o.train(), lambda o: o.train(), lambda o: o.train()),
}


@pytest.mark.parametrize(("start", "epoch", "forward"), ARMINGS.values(), ids=ARMINGS)
def test_train_may_be_called_as_often_as_one_likes(start, epoch, forward):
    def train(start, epoch, forward):
        model = network()
        optimizer = wrap(model, alpha=0.8)
        watch = Watch(model, optimizer.base)
        start(optimizer)
        for _ in range(2):
            epoch(optimizer)
            for x in inputs(4):
                forward(optimizer)
                (loss_of(model, x) / 2).backward()
                if len(watch.passes) % 2 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        watch.check(0.8, [2] * 4)
        return tensors(model)

    assert_same(train(start, epoch, forward), train(*ARMINGS["never"]))


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("protocol", [True, False], ids=["with optimizer.eval()", "model.eval() alone"])
def test_evaluation_anywhere_in_an_epoch_changes_nothing(period, protocol):
    def train(evaluates):
        model = network()
        optimizer = wrap(model, alpha=0.8)
        for index, x in enumerate(inputs(12)):
            (loss_of(model, x) / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
            if evaluates and index % period == 0:
                if protocol:
                    optimizer.eval()
                evaluate(model, torch.no_grad)
                if protocol:
                    optimizer.train()
        return tensors(model), optimizer.report()["slots"]

    assert_same(train(True), train(False))


def test_accumulation_by_hand_in_an_accelerate_loop():
    accelerator = Accelerator(cpu=True)
    model = network()
    rwp = wrap(model, alpha=0.8, accumulation_steps=3)
    watch = Watch(model, rwp.base)
    loader = DataLoader(inputs(6), batch_size=1, collate_fn=lambda b: b[0])
    model, optimizer, loader = accelerator.prepare(model, rwp, loader)
    for index, x in enumerate(loader):
        with accelerator.no_sync(model) if (index + 1) % 3 else contextlib.nullcontext():
            accelerator.backward(loss_of(model, x) / 3)
        if (index + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    watch.check(0.8, [3, 3])


def test_a_weight_that_took_the_place_of_the_optimizers_is_told_once(caplog):
    model = network()
    optimizer = wrap(model)
    run_windows(model, optimizer, inputs(4))
    assert not caplog.records
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    run_windows(model, optimizer, inputs(4))
    (record,) = caplog.records
    assert "0.weight (of 1 in all)" in record.getMessage()


def test_a_loop_that_searches_its_batch_size_gets_a_fresh_wrapper_each_time():
    """accelerate's examples/by_feature/automatic_gradient_accumulation.py."""
    model, tried, watches = network(), [], []

    @find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda: 4)
    def train(batch_size):
        tried.append(batch_size)
        micro_steps = 16 // batch_size
        model.zero_grad()
        optimizer = wrap(model, accumulation_steps=micro_steps, alpha=0.8)
        watches.append(Watch(model, optimizer.base))
        if batch_size == 8:
            loss_of(model, inputs(1)[0]).backward()
            model(inputs(1)[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run_windows(model, optimizer, inputs(8), micro_steps)

    train()
    (_, size), micro_steps = tried, 16 // tried[1]  # 4, or 7 where Accelerate takes no function
    assert tried == [8, size]
    watches[-1].check(0.8, [micro_steps] * (8 // micro_steps))


def test_accelerates_schedule_free_loop():
    """accelerate's examples/by_feature/schedule_free.py: train() once an epoch, eval() before evaluation."""
    run = accelerated(2, inputs(4), alpha=0.8)
    for _ in range(3):
        run.model.train()
        run.optimizer.train()
        accumulate(run, run.loader)
        run.model.eval()
        run.optimizer.eval()
        with torch.no_grad():
            before = snapshot(run.watch.model)
            run.model(inputs(1)[0])
            assert_same(snapshot(run.watch.model), before)
    run.watch.check(0.8, [2] * 6)


def test_an_accelerate_checkpoint_resumes_bit_exactly(tmp_path):
    """accelerate's examples/by_feature/checkpointing.py: save_state, load_state, skip_first_batches."""

    def start():
        AcceleratorState._reset_state(True)
        return accelerated(2, inputs(7), alpha=0.8)

    def finish(run):
        accumulate(run, run.loader)
        return tensors(run.watch.model), run.rwp.state_dict()

    through = start()
    accumulate(through, through.loader)
    expected = finish(through)
    first = start()
    accumulate(first, itertools.islice(first.loader, 4))
    first.accelerator.save_state(tmp_path / "state")
    second = start()
    second.accelerator.load_state(tmp_path / "state")
    accumulate(second, skip_first_batches(second.loader, 4))
    assert_same(finish(second), expected)


class WithLoss(nn.Module):
    """A model as Trainer likes it: named inputs, the loss among the outputs."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, globals()["labels"](x)), "logits": logits}


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_an_unmodified_trainer_takes_the_mix(tmp_path, alpha):
    from transformers import Trainer, TrainingArguments

    rows = torch.cat(inputs(6))
    data = [{"x": x, "labels": 0} for x in rows]
    model = WithLoss()
    optimizer = wrap(model, alpha=alpha)
    watch = Watch(model, optimizer.base)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_grad_norm=0,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], optimizers=(optimizer, scheduler))
    trainer.train()
    assert optimizer.report()["slots"] == {"clean": 6, "perturbed": 6}
    assert optimizer.base.param_groups[0]["lr"] == 0.1 * 0.5**3
    watch.check(alpha, [2] * 6, loss=lambda output, _: output["loss"])

    resumed = WithLoss()
    again = wrap(resumed, alpha=alpha, seed=5)
    scheduler = torch.optim.lr_scheduler.StepLR(again, 2, gamma=0.5)
    trainer = Trainer(resumed, arguments, train_dataset=data, eval_dataset=data[:8], optimizers=(again, scheduler))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(tensors(resumed), tensors(model))


# A loop that knows its windows: begin_window


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_windows_of_announced_lengths_are_mixed_exactly(alpha):
    model = network()
    optimizer = wrap(model, alpha=alpha, accumulation_steps=None)
    watch = Watch(model, optimizer.base)
    lengths = [2, 3, 2, 4]
    batches = iter(inputs(sum(lengths)))
    for length in lengths:
        optimizer.begin_window(length)
        run_windows(model, optimizer, list(itertools.islice(batches, length)), length)
    watch.check(alpha, lengths)


def test_shares_weigh_the_roles_where_the_loop_weighs_its_losses():
    model = network()
    optimizer = wrap(model, alpha=0.3, accumulation_steps=None)
    watch = Watch(model, optimizer.base)
    parts = [0.1, 0.6, 0.3]  # of the clean, perturbed and clean slots
    optimizer.begin_window(3, (parts[0] + parts[2], parts[1]))
    for part, x in zip(parts, inputs(3), strict=True):
        (part * loss_of(model, x)).backward()
    optimizer.step()
    ((weights, gradients),) = watch.steps
    eps = noises([seen for seen, _ in watch.passes], weights)
    expected = dict.fromkeys(gradients, 0.0)
    for factor, noise, (_, x) in zip([0.7 * 0.25, 0.3, 0.7 * 0.75], eps, watch.passes, strict=True):
        at = {name: weight + (noise[name] if noise else 0.0) for name, weight in weights.items()}
        slot = gradient(model, at, (x, labels(x)), F.cross_entropy)
        expected = {name: expected[name] + factor * slot[name] for name in slot}
    for name, got in gradients.items():
        torch.testing.assert_close(got, expected[name], rtol=1e-12, atol=1e-14)


def test_an_announced_window_holds_once_and_replaces_one_that_was_cut_off():
    model = network()
    optimizer = wrap(model, alpha=0.3, accumulation_steps=2)
    optimizer.begin_window(3)
    loss_of(model, inputs(1)[0]).backward()
    loss_of(model, inputs(1)[0])  # an interrupt leaves it open, perturbed
    clean = tensors(network())
    optimizer.begin_window(4)
    assert_same(tensors(model)["0.weight"], clean["0.weight"])
    optimizer.zero_grad()
    watch = Watch(model, optimizer.base)
    run_windows(model, optimizer, inputs(4), 4)
    run_windows(model, optimizer, inputs(2), 2)
    watch.check(0.3, [4, 2])


def test_one_gradient_announced_has_nothing_to_mix():
    model = network()
    optimizer = wrap(model, alpha=0.3)
    optimizer.begin_window(1)
    with pytest.raises(RuntimeError, match="nothing to mix"):
        model(inputs(1)[0])
    with pytest.raises(ValueError, match=r"^micro_steps must be .*, got 0"):
        optimizer.begin_window(0)


def test_disarm_gives_up_an_open_micro_step_and_leaves_the_base_alone():
    model = network()
    before = tensors(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.eval = lambda: pytest.fail("the base is not to be told")
    optimizer = wrap(model, base, alpha=0.3)
    loss_of(model, inputs(1)[0]).backward()
    optimizer.base.zero_grad()
    loss_of(model, inputs(1)[0])  # perturbed, and never to see its backward pass
    assert differs(tensors(model), before)
    optimizer.disarm()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    x = inputs(1, seed=1)[0]
    loss_of(model, x).backward()  # an ordinary gradient, of no weight but its own
    for name, expected in gradient(model, snapshot(model), (x, labels(x)), F.cross_entropy).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected)
    optimizer.base.zero_grad()
    optimizer.train()
    watch = Watch(model, base)
    run_windows(model, optimizer, inputs(2))
    watch.check(0.3, [2])


# Frozen weights, perturbed on demand


def test_frozen_weights_are_perturbed_where_asked_for_and_bit_equal_afterwards():
    model = network()
    model[0].requires_grad_(False)
    before = tensors(model)
    optimizer = wrap(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), frozen=True)
    optimizer.scale_gamma(0.5)
    with seen_weights(model) as seen:
        run_windows(model, optimizer, inputs(4))
    assert_same(*({name: value[name] for name in ("0.weight", "0.bias")} for value in (tensors(model), before)))
    for weights in (seen[1], seen[3]):
        size = (weights["0.weight"] - before["0.weight"]).norm() / before["0.weight"].norm()
        assert 0.5 * GAMMA < size / 6**0.5 * 2 < 1.5 * GAMMA  # half of gamma, times the square root of 6 inputs
    assert not torch.equal(seen[1]["0.weight"], seen[3]["0.weight"])
    assert torch.equal(seen[0]["0.weight"], before["0.weight"])


def test_a_trained_weight_gets_the_same_noise_whether_frozen_ones_get_any_or_not():
    weights = []
    for frozen in (False, True):
        model = network()
        model[0].requires_grad_(False)
        optimizer = wrap(model, torch.optim.SGD(model[1:].parameters(), lr=0.1), frozen=frozen)
        with seen_weights(model) as seen:
            run_windows(model, optimizer, inputs(2))
        weights.append(seen[1])
    assert torch.equal(weights[0]["3.weight"], weights[1]["3.weight"])
    assert torch.equal(weights[0]["0.weight"], network()[0].weight)
    assert not torch.equal(weights[1]["0.weight"], network()[0].weight)


def test_quantized_frozen_weights_are_refused_by_name():
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.int8), requires_grad=False)
    base = torch.optim.SGD(model[1:].parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"perturb 0\.weight, which is of torch\.int8.*unquantized"):
        wrap(model, base, frozen=True)
    wrap(model, base)


# What is reported


def test_the_loss_tracker_keeps_clean_and_perturbed_losses_apart():
    model = network()
    optimizer = wrap(model, accumulation_steps=4)
    tracker = LossTracker(optimizer)
    assert tracker.compute() == {}
    losses = {False: [], True: []}
    for epoch in range(2):
        for count, x in enumerate(inputs(4, seed=epoch), start=1):
            loss = loss_of(model, x)
            tracker.update(loss, count)
            losses[optimizer.role.perturbed].append((loss.item() * count, count))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clean, perturbed = ([sum(column) for column in zip(*losses[kind], strict=True)] for kind in (False, True))
    assert clean[1] == 8
    assert perturbed[1] == 12
    got = tracker.compute()
    assert got == pytest.approx(
        {
            "loss": (clean[0] + perturbed[0]) / 20,
            "loss_clean": clean[0] / 8,
            "loss_perturbed": perturbed[0] / 12,
            "loss_gap": perturbed[0] / 12 - clean[0] / 8,
        },
        rel=1e-5,
        abs=1e-6,
    )
    assert tracker.compute() == {}


@pytest.mark.parametrize(("alpha", "gamma", "keys"), [(1.0, GAMMA, "loss_perturbed"), (0.5, 0.0, "loss")])
def test_the_loss_tracker_names_only_what_there_was(alpha, gamma, keys):
    model = network()
    optimizer = wrap(model, alpha=alpha, gamma=gamma)
    tracker = LossTracker(optimizer)
    loss = loss_of(model, inputs(1)[0])
    tracker.update(loss)
    assert tracker.compute() == pytest.approx({"loss": loss.item(), keys: loss.item()})


@pytest.mark.parametrize("mode", ["filter", "filter_normalized"])
def test_the_report_tells_what_the_weights_saw(mode, caplog):
    model = network()
    optimizer = wrap(model, noise=mode, accumulation_steps=3)
    assert optimizer.report()["relative_noise"] == {}
    clean = snapshot(model)
    with seen_weights(model) as seen, caplog.at_level(logging.INFO):
        run_windows(model, optimizer, inputs(6), 3)
    eps = noises(seen[:3], clean)[1]
    report = optimizer.report()
    assert {key: report[key] for key in ("placement", "replicas", "alpha", "windows", "slots")} == {
        "placement": "sequential",
        "replicas": 1,
        "alpha": 0.5,
        "windows": 2,
        "slots": {"clean": 4, "perturbed": 2},
    }
    sizes = sorted((p.numel() for p in model.parameters()), reverse=True)
    expected = dict(zip(("largest", "median", "smallest"), (sizes[0], sizes[len(sizes) // 2], sizes[-1]), strict=True))
    for rank, entry in report["relative_noise"].items():
        assert entry["elements"] == expected.pop(rank)
        assert entry["size"] == pytest.approx((eps[entry["name"]].norm() / clean[entry["name"]].norm()).item())
        assert entry["name"] in caplog.text
    assert not expected


def test_the_report_measures_anew_after_it_was_read():
    model = network()
    optimizer = wrap(model, alpha=1.0)
    run_windows(model, optimizer, inputs(2))
    first = optimizer.report()["relative_noise"]["largest"]["size"]
    optimizer.scale_gamma(3.0)
    run_windows(model, optimizer, inputs(2))
    assert optimizer.report()["relative_noise"]["largest"]["size"] > 2 * first


def test_a_step_after_too_few_gradients_is_announced_once(caplog):
    model = network()
    optimizer = wrap(model, accumulation_steps=3)
    for _ in range(2):
        run_windows(model, optimizer, inputs(2))
    assert caplog.text.count("a step after 2 gradients where 3 were due") == 1


def test_an_interrupt_while_a_micro_step_begins_leaves_nothing_behind(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.0), model, alpha=0.8, accumulation_steps=3)
    inputs = torch.ones(1, 3, dtype=torch.float64)
    clean = snapshot(model)
    model(inputs).sum().backward()
    registered = []

    def interrupted(parameter, hook):
        if len(registered) == 2:
            raise KeyboardInterrupt
        registered.append(torch.Tensor.register_hook(parameter, hook))
        return registered[-1]

    monkeypatch.setattr(nn.Parameter, "register_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(inputs)
    monkeypatch.undo()
    optimizer.zero_grad()  # the loop starts over, with a clean slot
    with seen_weights(model) as seen:
        model(inputs).sum().backward()
    assert optimizer.role is not None
    assert not optimizer.role.perturbed
    assert all(torch.equal(weight, clean[name]) for name, weight in seen[0].items())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("look", ["zero_grad", "evaluation under no_grad"])
def test_a_weight_that_the_loss_uses_outside_the_model_gets_the_right_gradient(look):
    model = network()
    model.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.5, alpha=1.0)

    start = optimizer.state_dict()

    def gradients(action):
        torch.manual_seed(0)
        loss = (model(inputs(1)[0]) * model.scale).square().mean()
        action()
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        optimizer.load_state_dict(start)  # the same noise once more
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(lambda: None)
    assert_same(gradients(lambda: BETWEEN[look](model, optimizer)), expected)


def test_a_loop_that_forgets_accumulate_is_stopped():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(x):
        accelerator.backward(loss_of(model, x))
        optimizer.step()
        optimizer.zero_grad()

    step(inputs(1)[0])  # could be an epoch's last
    with pytest.raises(RuntimeError, match=r"accelerator\.accumulate"):
        step(inputs(1)[0])


def test_a_base_wrapped_again_takes_the_new_gamma_and_keeps_a_groups_own():
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "rwp_gamma": 0.3}]
    base = torch.optim.SGD(groups, lr=0.1)
    for gamma in (0.01, 0.5):
        RWP(base, model, gamma=gamma).scale_gamma(2.0)
        assert [group["rwp_gamma"] for group in base.param_groups] == [2 * gamma, 0.6]
    RWP(base, model, noise="filter_normalized")
    assert [group["rwp_gamma"] for group in base.param_groups] == [0.2, 0.3]


def test_a_pass_of_a_frozen_model_is_an_ordinary_one():
    model = network()
    optimizer = wrap(model, alpha=1.0)
    model.requires_grad_(False)
    weights = snapshot(model)
    x = inputs(1)[0].requires_grad_()
    with seen_weights(model) as seen:
        loss_of(model, x).backward()
    assert_same(seen, [weights])
    assert x.grad is not None
    assert optimizer.report()["slots"] == {"clean": 0, "perturbed": 0}


def test_windows_that_no_step_ends_are_announced(caplog):
    model = network()
    held = wrap(model, alpha=0.8)  # by a notebook's history, say
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in inputs(3):
        loss_of(model, x).backward()
        plain.step()
    assert "before this optimizer's step()" in caplog.text
    held.remove()


def test_a_gradient_of_a_gradient_is_refused():
    model = network()
    optimizer = wrap(model, alpha=0.8)
    x = inputs(1)[0].requires_grad_()
    output = model(x).sum()
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(output, x, create_graph=True)
    assert optimizer.role is not None


@pytest.mark.parametrize("off", [{"gamma": 0.0}, {"alpha": 0.0}])
def test_what_only_noise_forbids_is_allowed_without(off):
    model = network()
    optimizer = RWP(torch.optim.LBFGS(model.parameters()), model, **off)

    def closure():
        optimizer.zero_grad()
        loss = checkpoint(model, inputs(1)[0], use_reentrant=False).square().mean()
        loss.backward()
        return loss

    before = snapshot(model)
    optimizer.step(closure)
    assert differs(before, snapshot(model))


def test_a_weight_that_another_replaced_is_let_go():
    model = nn.Linear(2, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = RWP(base, model, alpha=1.0)
    replaced = weakref.ref(model.weight)
    model.weight = nn.Parameter(torch.ones(2, 2))
    base.param_groups[0]["params"] = list(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    assert replaced() is None
