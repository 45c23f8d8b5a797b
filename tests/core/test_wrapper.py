"""The surface of a `torch.optim.Optimizer` that schedulers, GradScaler, Accelerate and checkpoints take hold of.

Whatever they read, replace or hook through the wrapper is the base's own, so that the base never steps with a copy.
The parts of guarantees 1, 7 and 10 that rest on this.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from timm.scheduler import create_scheduler_v2
from torch import nn

from hf_rwp import RWP
from hf_rwp.core.wrapper import OptimizerWrapper


def base_of(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kwargs})


def wrapped(**kwargs):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return RWP(base_of(model, **kwargs), model, alpha=1.0)


def step(optimizer, scale=1.0):
    (scale * optimizer.model(torch.ones(2, 4)).square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(params=["RWP", "OptimizerWrapper"])
def pair(request):
    """A wrapper and its base."""
    if request.param == "RWP":
        optimizer = wrapped()
        return optimizer, optimizer.base
    base = base_of(nn.Linear(4, 3))
    return OptimizerWrapper(base), base


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_groups_state_and_defaults_are_the_bases_own(pair, name):
    wrapper, base = pair
    assert isinstance(wrapper, torch.optim.Optimizer)
    assert getattr(wrapper, name) is getattr(base, name)
    replacement = copy.copy(getattr(base, name))
    setattr(wrapper, name, replacement)
    assert getattr(base, name) is replacement
    replacement = copy.copy(replacement)
    setattr(base, name, replacement)
    assert getattr(wrapper, name) is replacement
    assert name not in vars(wrapper)


def test_what_only_the_base_has_is_found(pair):
    wrapper, base = pair
    base.anything = object()
    assert wrapper.anything is base.anything
    assert not hasattr(wrapper, "nothing of the kind")
    assert not hasattr(type(wrapper).__new__(type(wrapper)), "anything")  # no recursion before __init__
    assert repr(base) in repr(wrapper)


def test_hooks_put_on_the_wrapper_fire(pair):
    wrapper, _ = pair
    fired = []
    wrapper.register_step_pre_hook(lambda *_: fired.append("before step"))
    wrapper.register_step_post_hook(lambda *_: fired.append("after step"))
    wrapper.register_state_dict_pre_hook(lambda *_: fired.append("before state_dict"))
    wrapper.register_load_state_dict_post_hook(lambda *_: fired.append("after load_state_dict"))
    if isinstance(wrapper, RWP):
        step(wrapper)
    else:
        wrapper.base.step()
    wrapper.load_state_dict(wrapper.state_dict())
    assert fired == ["before step", "after step", "before state_dict", "after load_state_dict"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_the_base(pair, set_to_none):
    wrapper, base = pair
    (p, *_) = base.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    wrapper.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else not p.grad.any()


def test_a_base_without_train_and_eval_needs_none(pair):
    wrapper, _ = pair
    wrapper.eval()
    wrapper.train()


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())])
def test_a_wrapper_says_that_it_cannot_be_copied(pair, copier):
    wrapper, _ = pair
    with pytest.raises(TypeError, match=r"bound to a model.*save state_dict\(\)"):
        copier(wrapper)


@pytest.mark.parametrize("wrong", ["wrapper", "prepared", "model"])
def test_only_a_plain_optimizer_can_be_wrapped(wrong):
    optimizer = wrapped()
    choices = {
        "wrapper": lambda: optimizer,
        "prepared": lambda: Accelerator(cpu=True).prepare_optimizer(base_of(optimizer.model)),
        "model": lambda: optimizer.model,
    }
    with pytest.raises(TypeError, match=r"wrap the base optimizer, once, before accelerator.prepare"):
        RWP(choices[wrong](), optimizer.model)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda index: 1 / (1 + index)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=6),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_scheduler_moves_the_learning_rate_that_the_base_steps_with(make, prepared):
    def run(optimizer, base, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # "lr_scheduler.step() before optimizer.step()"
            warnings.filterwarnings("ignore", "The epoch parameter")  # which SequentialLR of torch 2.8 passes
            scheduler = make(optimizer)
            if prepared:
                accelerator = Accelerator(cpu=True)
                model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
            used = []
            base.register_step_pre_hook(lambda o, *_: used.append([o.param_groups[0][k] for k in ("lr", "momentum")]))
            for _ in range(5):
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        return used, scheduler.get_last_lr()

    optimizer = wrapped()
    plain = nn.Linear(4, 3)
    base = base_of(plain)
    expected = run(base, base, plain)
    assert run(optimizer, optimizer.base, optimizer.model) == expected
    assert len({lr for lr, _ in expected[0]}) > 1


def test_schedulers_that_look_at_a_metric_and_timms_move_it_too():
    optimizer = wrapped()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    optimizer = wrapped()
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=4, warmup_epochs=0)
    scheduler.step(epochs // 2)
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.05, rel=1e-3)


def test_gamma_and_the_learning_rate_live_in_the_same_groups_after_prepare():
    optimizer = wrapped()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    Accelerator(cpu=True).prepare(optimizer)  # replaces the group dicts
    optimizer.scale_gamma(3.0)
    step(optimizer)
    scheduler.step()
    (group,) = optimizer.base.param_groups
    assert (group["lr"], group["rwp_gamma"], group["initial_rwp_gamma"]) == (0.05, 0.03, 0.01)


def test_prepare_keeps_one_set_of_groups():
    optimizer = wrapped()
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.param_groups[0]["lr"] = 0.7
    assert optimizer.param_groups is prepared.param_groups is optimizer.base.param_groups
    assert optimizer.base.param_groups[0]["lr"] == 0.7
    before = optimizer.model.weight.detach().clone()
    step(optimizer)
    saved = prepared.state_dict()
    assert len(saved["state"]) == 2
    assert saved["rwp"]["windows"] == 1
    assert not torch.equal(optimizer.model.weight, before)


def test_accelerates_train_and_eval_reach_the_wrapper():
    optimizer = wrapped()
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.eval()
    optimizer.model(torch.ones(2, 4))
    assert optimizer.role is None
    prepared.train()
    optimizer.model(torch.ones(2, 4))
    assert optimizer.role.perturbed


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    ],
    ids=["SGD", "AdamW", "fused AdamW", "fused SGD"],
)
@pytest.mark.parametrize("unscales", [True, False])
def test_grad_scaler_skips_an_overflow_and_steps_otherwise(base, unscales):
    def train(gamma):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = base(model.parameters())
        if gamma is not None:
            optimizer = RWP(optimizer, model, gamma=gamma, alpha=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        history = [model.weight.detach().clone()]
        for scale in (1.0, float("inf"), 1.0):
            scaler.scale(scale * model(torch.ones(2, 4)).square().sum()).backward()
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append(model.weight.detach().clone())
        assert scaler.get_scale() == 4.0
        return history

    perturbed, inert, plain = train(0.5), train(0.0), train(None)
    for start, first, skipped, last in (perturbed, inert, plain):
        assert torch.equal(first, skipped)
        assert not torch.equal(start, first)
        assert not torch.equal(skipped, last)
    assert torch.equal(inert[-1], plain[-1])
    assert not torch.equal(perturbed[-1], plain[-1])


def test_parameters_added_later_are_the_bases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = RWP(base_of(model[1]), model, gamma=0.3, alpha=1.0)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.1, 0.5]
    assert [group["rwp_gamma"] for group in optimizer.base.param_groups] == [0.3, 0.3]
    before = model[0].weight.detach().clone()
    step(optimizer)
    assert not torch.equal(model[0].weight, before)


def test_step_returns_what_the_base_returns():
    class Telling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            return "done"

    model = nn.Linear(4, 3)
    assert RWP(Telling(model.parameters(), lr=0.1), model, alpha=1.0).step() == "done"


def test_the_wrapper_s_own_state_is_apart_from_the_base_s():
    optimizer = wrapped()
    step(optimizer)
    state = optimizer.state_dict()
    own = state.pop("rwp")
    assert own == {"version": 2, "seed": 0, "windows": 1, "fisher": {}}
    assert state.keys() == optimizer.base.state_dict().keys()
    assert all(set(entry) == {"momentum_buffer"} for entry in optimizer.base.state.values())
