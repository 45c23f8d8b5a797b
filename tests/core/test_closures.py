"""`RWP.step(closure)`: what the base steps with is the paper's mix, and a base that needs several gradients is refused.

A closure runs at the start of the base's step, so that hooks on that step see nothing of it: `Recording` writes down
what the base itself steps with.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import rank, run_each
from reference import mixed_gradient, noises, snapshot
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_rwp import RWP

GAMMA = 0.2  # large, so that no gradient at clean weights passes for one at perturbed weights


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.to(dtype)


def inputs(count, seed=0, dtype=torch.float64):
    return list(torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype))


def labels(x):
    return (x.float().sum(1) * 2).long() % 3


def loss_of(model, x):
    return F.cross_entropy(model(x), labels(x))


class Recording(torch.optim.SGD):
    """SGD that writes down the weights and gradients of every step, after its closure.

    watch: the module whose forward passes it writes down too, weights and inputs; once a wrapper is on it.
    """

    def __init__(self, model, lr=0.1):
        super().__init__(model.parameters(), lr=lr, momentum=0.9)
        self.model, self.passes, self.steps = model, [], []

    def watch(self, module=None):
        (module or self.model).register_forward_pre_hook(self._forward)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()  # RWP is to see to it that gradients are enabled
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.steps.append((snapshot(self.model), gradients))
        super().step()
        return loss

    def _forward(self, module, args):
        if module.training and torch.is_grad_enabled():
            self.passes.append((snapshot(self.model), args[0]))

    def check(self, alpha, lengths, change=lambda mix: mix):
        """Every step's gradient is the paper's mix of its window's passes. lengths: of the windows."""
        check(self.model, self.passes, self.steps, alpha, lengths, change)


def check(model, passes, steps, alpha, lengths, change=lambda mix: mix):
    passes = iter(passes)
    for (weights, gradients), length in zip(steps, lengths, strict=True):
        window = list(itertools.islice(passes, length))
        eps = noises([seen for seen, _ in window], weights)
        assert [noise is not None for noise in eps] == [alpha == 1 or slot % 2 == 1 for slot in range(length)]
        batches = [(x, labels(x)) for _, x in window]
        mix = change(mixed_gradient(model, weights, eps, batches, F.cross_entropy, alpha))
        for name, got in gradients.items():
            torch.testing.assert_close(got, mix[name], rtol=1e-12, atol=1e-14)
    assert next(passes, None) is None


def recorded(alpha, micro_steps=1, **kwargs):
    model = network()
    base = Recording(model)
    optimizer = RWP(base, model, gamma=GAMMA, alpha=alpha, accumulation_steps=micro_steps, **kwargs)
    base.watch()
    return model, base, optimizer


def one_pass(model, x, micro_steps=1, then=lambda: None):
    """A micro-step. then: between its forward and its backward pass."""
    loss = loss_of(model, x) / micro_steps
    then()
    loss.backward()
    return loss


# 1. What the base steps with


def last_in_closure(model, optimizer, window):
    optimizer.zero_grad()
    for x in window[:-1]:
        one_pass(model, x, len(window))
    return optimizer.step(lambda: one_pass(model, window[-1], len(window)))


def zeroed_between_passes(model, optimizer, window):
    """As Lightning does, in the first micro-step."""
    micro_steps = [
        lambda x=x, first=first: one_pass(model, x, len(window), optimizer.zero_grad if first else lambda: None)
        for x, first in zip(window, [True, *[False] * len(window)], strict=False)
    ]
    for micro_step in micro_steps[:-1]:
        micro_step()
    return optimizer.step(micro_steps[-1])


def all_in_closure(model, optimizer, window):
    """As Composer does, and torch's documentation for a window of one."""

    def closure():
        optimizer.zero_grad()
        return sum(one_pass(model, x, len(window)).detach() for x in window)

    return optimizer.step(closure)


def none_in_closure(model, optimizer, window):
    """As Lightning's manual optimization does."""
    optimizer.zero_grad()
    loss = sum(one_pass(model, x, len(window)).detach() for x in window)
    return optimizer.step(lambda: loss)


def backward_in_closure(model, optimizer, window):
    optimizer.zero_grad()
    for x in window[:-1]:
        one_pass(model, x, len(window))
    loss = loss_of(model, window[-1]) / len(window)

    def closure():
        loss.backward()
        return loss

    return optimizer.step(closure)


LOOPS = [last_in_closure, zeroed_between_passes, all_in_closure, none_in_closure, backward_in_closure]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("alpha", "micro_steps"), [(0.3, 2), (0.3, 3), (1.0, 1), (1.0, 3)])
def test_the_gradient_of_a_step_with_a_closure_is_the_mix(loop, alpha, micro_steps):
    model, base, optimizer = recorded(alpha, micro_steps)
    batches = inputs(3 * micro_steps)
    for start in range(0, len(batches), micro_steps):
        assert loop(model, optimizer, batches[start : start + micro_steps]) > 0
    base.check(alpha, [micro_steps] * 3)
    assert optimizer.report()["windows"] == 3


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("eta", [0.0, 1e4])
def test_a_step_with_a_closure_is_one_without(alpha, eta):
    def train(loop):
        model, _, optimizer = recorded(alpha, 2, eta=eta)
        for seed in range(3):
            loop(model, optimizer, inputs(2, seed))
        return snapshot(model)

    def plain(model, optimizer, window):
        optimizer.zero_grad()
        for x in window:
            one_pass(model, x, 2)
        optimizer.step()

    expected = train(plain)
    for loop in LOOPS:
        assert all(torch.equal(got, expected[name]) for name, got in train(loop).items())


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
@pytest.mark.parametrize(
    "result", [torch.tensor(2.5), 2.5, None, {"loss": 2.5}], ids=["tensor", "float", "none", "dict"]
)
def test_step_returns_what_the_closure_returned(gamma, result):
    model = network()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=gamma, alpha=1.0)

    def closure():
        one_pass(model, inputs(1)[0])
        return result

    assert optimizer.step(closure) is result


def test_a_closure_that_skips_its_batch_steps_with_nothing():
    model, base, optimizer = recorded(1.0)
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=GAMMA, alpha=1.0)
    before = snapshot(model)
    assert optimizer.step(lambda: None) is None
    assert all(torch.equal(weight, before[name]) for name, weight in snapshot(model).items())
    assert base.steps == []


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(*_):
        raise ArithmeticError("in the backward pass")


@pytest.mark.parametrize(
    ("alpha", "micro_steps", "where"),
    [(0.3, 2, "forward"), (0.3, 2, "backward"), (1.0, 1, "forward"), (1.0, 1, "between"), (1.0, 1, "backward")],
)
def test_a_closure_that_raises_leaves_clean_weights_and_the_next_step_is_right(alpha, micro_steps, where):
    model, base, optimizer = recorded(alpha, micro_steps)
    last_in_closure(model, optimizer, inputs(micro_steps))
    before = snapshot(model)
    optimizer.zero_grad()
    for x in inputs(micro_steps - 1, seed=1):
        one_pass(model, x, micro_steps)

    def closure():
        handle = model[1].register_forward_hook(lambda _, __, y: Failing.apply(y) if where == "backward" else 1 / 0)
        if where == "between":
            handle.remove()
        try:
            loss = loss_of(model, inputs(1, seed=2)[0])
        finally:
            handle.remove()
        if where == "between":
            raise ArithmeticError
        loss.backward()

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert len(base.steps) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    optimizer.zero_grad()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    del base.passes[micro_steps:]
    last_in_closure(model, optimizer, inputs(micro_steps, seed=3))
    base.check(alpha, [micro_steps] * 2)


def test_gradients_that_no_pass_of_the_model_began_are_refused_in_a_closure():
    model, base, optimizer = recorded(1.0)
    before = snapshot(model)

    def closure():
        F.cross_entropy(model.forward(inputs(1)[0]), labels(inputs(1)[0])).backward()

    with pytest.raises(RuntimeError, match="call the model itself"):
        optimizer.step(closure)
    assert base.steps == []
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


# 2. Bases that need more than one gradient


class Twice(torch.optim.SGD):
    """SAM, with two passes or, where the caller has done the first, with one. Autograd may not see its writes."""

    first = True
    weights = staticmethod(lambda p: p.data)

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        if self.first:
            closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            self.weights(p).add_(p.grad, alpha=0.05)
        gradients = [p.grad for p in parameters]
        loss = closure()
        for p, gradient in zip(parameters, gradients, strict=True):
            self.weights(p).sub_(gradient, alpha=0.05)
        super().step()
        return loss


class Once(Twice):
    first = False
    weights = staticmethod(lambda p: p)


def several(model, base, **kwargs):
    make = {"LBFGS": torch.optim.LBFGS, "Twice": Twice, "Once": Once}[base]
    return RWP(make(model.parameters(), lr=0.1), model, gamma=kwargs.pop("gamma", GAMMA), **kwargs)


def test_lbfgs_is_refused_before_anything_happens():
    model = network()
    optimizer = several(model, "LBFGS", alpha=1.0)
    one_pass(model, inputs(1)[0])
    gradients = [p.grad.clone() for p in model.parameters()]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"LBFGS calls its closure more than once.*no closure"):
        optimizer.step(lambda: pytest.fail("called"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert not optimizer.state
    assert optimizer.state_dict()["rwp"]["windows"] == 0


@pytest.mark.parametrize("base", ["Twice", "Once"])
@pytest.mark.parametrize(("alpha", "micro_steps"), [(0.3, 2), (0.3, 3), (1.0, 1)])
def test_a_base_that_takes_gradients_at_other_weights_is_refused(base, alpha, micro_steps):
    model = network()
    optimizer = several(model, base, alpha=alpha, accumulation_steps=micro_steps)
    calls = []

    def closure():
        calls.append(1)
        return one_pass(model, inputs(1)[0], micro_steps)

    for _ in range(max(micro_steps - 1, base == "Once")):
        one_pass(model, inputs(1)[0], micro_steps)
    with pytest.raises(ValueError, match=f"{base} calls its closure more than once"):
        optimizer.step(closure)
    assert len(calls) == (base == "Twice")


@pytest.mark.parametrize("base", ["LBFGS", "Twice", "Once"])
@pytest.mark.parametrize("off", [{"gamma": 0.0}, {"alpha": 0.0}, "schedule"], ids=str)
def test_without_noise_every_base_is_itself(base, off):
    def train(wrapped):
        model = network()
        optimizer = several(model, base, **(off if isinstance(off, dict) else {}))
        if off == "schedule":
            optimizer.scale_gamma(0.0)
        if not wrapped:
            optimizer.remove()
        optimizer = optimizer if wrapped else optimizer.base

        def closure():
            optimizer.zero_grad()
            return one_pass(model, x)

        for x in inputs(3):
            one_pass(model, x)
            optimizer.step(closure)
        return snapshot(model)

    expected = train(wrapped=False)
    assert all(torch.equal(weight, expected[name]) for name, weight in train(wrapped=True).items())


# 3. timm's optimizers, as timm's own tests step them


@pytest.mark.parametrize("name", ["lion", "lamb", "adabelief", "nadamw"])
def test_timms_optimizers_take_a_closure(name):
    def train(**kwargs):
        model = network(torch.float32)
        optimizer = base = create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.05)
        if kwargs:
            optimizer = RWP(base, model, **kwargs)
        history = [snapshot(model)]
        for x in inputs(4, dtype=torch.float32):

            def closure(x=x):
                optimizer.zero_grad()
                return one_pass(model, x)

            assert optimizer.step(closure) > 0
            history.append(snapshot(model))
        return history, base.state_dict()["state"]

    plain, inert, noisy = train(), train(gamma=0.0), train(gamma=GAMMA, alpha=1.0)
    torch.testing.assert_close(inert, plain, rtol=0, atol=0)
    for before, after in itertools.pairwise(noisy[0]):
        assert all(torch.isfinite(weight).all() for weight in after.values())
        assert any(not torch.equal(weight, before[name]) for name, weight in after.items())
    assert any(not torch.equal(weight, plain[0][-1][name]) for name, weight in noisy[0][-1].items())


# 4. Replicas


def train_replicas(alpha, micro_steps, loop):
    model = network()
    base = Recording(model)
    optimizer = RWP(base, model, gamma=GAMMA, alpha=alpha, accumulation_steps=micro_steps)
    base.watch()
    ddp = DistributedDataParallel(model)
    for seed in range(3):
        loop(ddp, optimizer, inputs(2 * micro_steps, seed)[rank() :: dist.get_world_size()])
    return base.passes, base.steps, optimizer.report()["slots"]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_gradient_of_two_replicas_is_the_mix(loop):
    cases = [(0.3, 1, loop), (0.3, 2, loop), (1.0, 2, loop)]
    for (alpha, micro_steps, _), ranks in zip(cases, run_each(2, train_replicas, cases), strict=True):
        (passes, steps, slots), (others, same, _) = ranks
        torch.testing.assert_close(same, steps, rtol=0, atol=0)
        order = [one for pair in zip(passes, others, strict=True) for one in pair]
        check(network(), order, steps, alpha, [2 * micro_steps] * 3)
        assert slots["perturbed"] == (1 + (alpha == 1)) * 3 * micro_steps
