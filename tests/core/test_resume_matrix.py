"""Guarantee 7 in a loop of Accelerate's: a state saved anywhere in a window resumes bit for bit, and so does what other
formats keep of it. The plain optimizer in the same loop is the oracle of what can be exact.
"""

import copy
import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from distributed import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.data import DataLoader

from hf_rwp import RWP
from hf_rwp.core.gamma import gamma_factor

INSIDE = ["first forward", "first backward", "second forward", "second backward", "step pre-hook"]
BEYOND = ["step", "zero_grad"]  # resumed with the next window
POST_HOOK = "step post-hook"  # of the base, within its step: as BEYOND
OPTIONS = {"gamma": 0.2, "alpha": 0.7, "eta": 10.0, "beta": 0.9, "seed": 5}
WINDOWS = 10  # of two batches, five in an epoch; the fifth has one


def network(keeps=False):
    """keeps: whether a forward pass leaves a trace, in BatchNorm's buffers and in the generator of dropout."""
    torch.manual_seed(0)
    extras = (nn.BatchNorm1d(8), nn.Dropout(0.3)) if keeps else ()
    return nn.Sequential(nn.Linear(6, 8), *extras, nn.Tanh(), nn.Linear(8, 3))


def equal(got, expected):
    """Bit for bit, in whatever order."""
    ours, theirs = (dict(tree_flatten_with_path(tree)[0]) for tree in (got, expected))
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) if isinstance(ours[key], torch.Tensor) else ours[key] == theirs[key]
        for key in ours
    )


# Accelerate's loop


def loop(folder, rwp, keeps, save=(), resume=None, at=3):
    """Train. save: points of the window `at` to save a state at; resume: the point to go on from, in a new loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = network(keeps)
    base = torch.optim.AdamW(net.parameters(), lr=0.02)
    optimizer = RWP(base, net, **OPTIONS) if rwp else base
    rows = torch.randn(36 * accelerator.num_processes, 9, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(rows, 4, shuffle=True, generator=torch.Generator())  # of its own: dropout's stays as it is
    set_seed(accelerator.process_index)
    model, prepared, loader = accelerator.prepare(net, optimizer, loader)
    begin = window = 0
    if resume:
        accelerator.load_state(folder / resume)
        accelerator.step = 0  # the state may be from a window's middle
        begin = at + (resume not in INSIDE)

    def reach(point):
        if window == at and point in save:
            accelerator.save_state(folder / point)

    base.register_step_pre_hook(lambda *_: reach("step pre-hook"))
    base.register_step_post_hook(lambda *_: reach(POST_HOOK))
    for epoch in range(begin // 5, WINDOWS // 5):
        loader.set_epoch(epoch)
        done = begin - 5 * epoch if epoch == begin // 5 else 0
        batches = skip_first_batches(loader, 2 * done) if done else loader
        for micro_step, batch in enumerate(batches, 2 * done):
            window = 5 * epoch + micro_step // 2
            if micro_step % 2 == 0:
                factor = gamma_factor(window / WINDOWS, "cosine", growth=2.0)
                for group in optimizer.param_groups:
                    group["lr"] = 0.02 / (1 + window)
                if rwp:
                    optimizer.scale_gamma(factor)
            with accelerator.accumulate(model):
                loss = (model(batch[:, :6]) - batch[:, 6:]).square().mean()
                reach(f"{'second' if micro_step % 2 else 'first'} forward")
                accelerator.backward(loss)
                reach(f"{'second' if micro_step % 2 else 'first'} backward")
                prepared.step()
                if accelerator.sync_gradients:
                    reach("step")
                prepared.zero_grad()
                if accelerator.sync_gradients:
                    reach("zero_grad")
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return state, copy.deepcopy(optimizer.state_dict())


def save_and_resume(folder, rwp, keeps, points):
    """The points from which the loop does not resume exactly."""
    through = loop(folder, rwp, keeps)
    assert equal(loop(folder, rwp, keeps, save=points), through)
    assert sorted(path.name for path in folder.iterdir()) == sorted(points)
    if rwp:
        assert through[1]["rwp"]["windows"] == WINDOWS
    return [point for point in points if not equal(loop(folder, rwp, keeps, resume=point), through)]


@pytest.mark.parametrize("rwp", [False, True], ids=["plain", "rwp"])
@pytest.mark.parametrize("keeps", [False, True], ids=["weights-alone", "batchnorm-dropout"])
def test_resume_is_exact_from_every_point_from_which_the_plain_loop_is(tmp_path, keeps, rwp):
    assert save_and_resume(tmp_path, rwp, keeps, INSIDE + BEYOND) == (INSIDE if keeps else [])


@pytest.mark.parametrize("rwp", [False, True], ids=["plain", "rwp"])
@pytest.mark.parametrize("keeps", [False, True], ids=["weights-alone", "batchnorm-dropout"])
def test_resume_is_exact_from_a_post_hook_of_the_base(tmp_path, keeps, rwp):
    assert save_and_resume(tmp_path, rwp, keeps, [POST_HOOK]) == []


@pytest.mark.parametrize("rwp", [False, True], ids=["plain", "rwp"])
def test_resume_is_exact_on_two_replicas(tmp_path, rwp):
    points = ["first backward", "second backward", "step"]
    assert run(2, save_and_resume, tmp_path, rwp, False, points) == [[], []]


# What other formats keep


class Run:
    """A run of its own, of windows of two gradients."""

    def __init__(self, base=torch.optim.AdamW, groups=1, **options):
        self.net = network()
        parameters = list(self.net.parameters())
        split = [{"params": parameters[:2]}, {"params": parameters[2:], "rwp_gamma": 0.4}]
        options = {"gamma": 0.2, "alpha": 0.7, "seed": 5, "accumulation_steps": 2, **options}
        self.optimizer = RWP(base(split if groups == 2 else parameters, lr=0.02), self.net, **options)

    def train(self, begin, end, half=False):
        """Windows `begin` to `end`; half: and the first gradient of the next one."""
        for number in range(2 * begin, 2 * end + half):
            x, y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(number))
            (self.net(x) - y[:, :3]).square().mean().backward()
            if number % 2:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    @property
    def state(self):
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}, self.optimizer.state_dict()


def saved(one):
    """As from a file."""
    return copy.deepcopy((one.net.state_dict(), one.optimizer.state_dict()))


def said(caplog, word):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING and word in record.message]


@pytest.mark.parametrize("half", [False, True], ids=["boundary", "middle"])
@pytest.mark.parametrize("eta", [0.0, 10.0])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_distributed_checkpoint_keeps_seed_windows_and_gamma(tmp_path, caplog, base, flat, eta, half):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_of(one):
        optim = get_optimizer_state_dict(one.net, one.optimizer, options=options)
        return {"model": get_model_state_dict(one.net), "optim": optim}

    first, through = Run(base, eta=eta).train(0, 2), Run(base, eta=eta).train(0, 2)
    first.optimizer.scale_gamma(1.5)
    through.optimizer.scale_gamma(1.5)
    dcp.save(state_of(first.train(2, 3, half=half)), checkpoint_id=tmp_path, no_dist=True)
    again = Run(base, eta=eta)
    state = state_of(again)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(again.net, state["model"])
    caplog.clear()
    set_optimizer_state_dict(again.net, again.optimizer, state["optim"], options=options)
    own = again.optimizer.state_dict()["rwp"]
    assert (own["seed"], own["windows"]) == (5, 3)
    assert again.optimizer.param_groups[0]["rwp_gamma"] == 1.5 * again.optimizer.param_groups[0]["initial_rwp_gamma"]
    assert equal(again.train(3, 6).state, through.train(2, 6).state) == (eta == 0)
    assert len(said(caplog, "F of ARWP")) == (eta > 0)
    assert len(said(caplog, "")) == (eta > 0)


@pytest.mark.parametrize("eta", [0.0, 10.0])
def test_distributed_checkpoint_restores_another_seed_and_says_so(caplog, eta):
    first = Run(eta=eta).train(0, 3)
    again = Run(eta=eta, seed=6, gamma=0.3)
    set_model_state_dict(again.net, get_model_state_dict(first.net))
    state = copy.deepcopy(get_optimizer_state_dict(first.net, first.optimizer))
    set_optimizer_state_dict(again.net, again.optimizer, state)
    assert len(said(caplog, "rwp_seed")) == len(said(caplog, "rwp_gamma")) == 1
    assert equal(again.train(3, 6).state, first.train(3, 6).state) == (eta == 0)


def of_the_first_format(state):
    """What was saved before there were versions: the wrapper's own under "rwp" alone, F with its kept dimensions."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        del group["rwp_seed"], group["rwp_windows"]
    own = state["rwp"]
    assert own.pop("version") == 2
    own["fisher"] = {name: f[:, None] if name.endswith("weight") else f for name, f in own["fisher"].items()}
    return state


@pytest.mark.parametrize("eta", [0.0, 10.0])
def test_a_checkpoint_of_the_first_format_resumes_exactly(tmp_path, caplog, eta):
    first = Run(eta=eta, groups=2).train(0, 3)
    net, state = saved(first)
    old = of_the_first_format(state)
    assert eta == 0 or old["rwp"]["fisher"]["0.weight"].shape == (8, 1)
    torch.save(old, tmp_path / "old.pt")
    again = Run(eta=eta, groups=2)
    again.net.load_state_dict(net)
    again.optimizer.load_state_dict(torch.load(tmp_path / "old.pt", weights_only=True))
    assert not said(caplog, "")
    assert equal(again.optimizer.state_dict(), state)
    assert equal(again.train(3, 6).state, first.train(3, 6).state)


def test_a_later_format_is_refused_by_name_and_nothing_is_loaded():
    _, state = saved(Run().train(0, 3))
    state["rwp"]["version"] += 1
    again, other = Run().train(0, 1), Run().train(0, 1)
    with pytest.raises(ValueError, match=r"format 3, and this hf_rwp knows up to 2: update it"):
        again.optimizer.load_state_dict(state)
    assert equal(again.train(1, 3).state, other.train(1, 3).state)


@pytest.mark.parametrize("half", [False, True], ids=["boundary", "middle"])
@pytest.mark.parametrize("through_base", [False, True], ids=["wrapper", "base"])
def test_a_plain_checkpoint_leaves_gamma_seed_and_windows_as_they_are(through_base, half):
    parameters = list(network().parameters())
    plain = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    one = Run(groups=2, seed=7).train(0, 2, half=half)
    one.optimizer.scale_gamma(2.0)
    loading = one.optimizer.base if through_base else one.optimizer
    loading.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group["rwp_gamma"] for group in one.optimizer.param_groups] == [0.4, 0.8]
    assert [group["initial_rwp_gamma"] for group in one.optimizer.param_groups] == [0.2, 0.4]
    assert [(group["rwp_seed"], group["rwp_windows"]) for group in one.optimizer.param_groups] == [(7, 2)] * 2
    assert [group["lr"] for group in one.optimizer.param_groups] == [0.1, 0.1]
    assert equal(loading.state_dict()["state"], plain.state_dict()["state"])
    one.optimizer.zero_grad()
    one.train(2, 4)
    assert one.optimizer.report()["slots"]["perturbed"] == 4
    one.optimizer.scale_gamma(1.0)
    assert [group["rwp_gamma"] for group in one.optimizer.param_groups] == [0.2, 0.4]


@pytest.mark.parametrize("through_base", [False, True], ids=["wrapper", "base"])
@pytest.mark.parametrize("given", [{"gamma": 0.3}, {"seed": 6}], ids=str)
def test_resuming_with_another_gamma_or_seed_is_said_once(caplog, given, through_base):
    first = Run().train(0, 3)
    net, state = saved(first)
    again = Run(**given)
    again.net.load_state_dict(net)
    if through_base:
        state.pop("rwp")
    (again.optimizer.base if through_base else again.optimizer).load_state_dict(state)
    resumed = again.train(3, 6).state
    assert len(said(caplog, "rwp_" + next(iter(given)))) == len(said(caplog, "")) == 1
    assert equal(resumed, first.train(3, 6).state)


def test_resuming_with_the_same_ones_says_nothing(caplog):
    _, state = saved(Run(eta=10.0).train(0, 3))
    again = Run(eta=10.0)
    again.optimizer.load_state_dict(state)
    again.optimizer.load_state_dict(again.optimizer.state_dict())  # as accelerator.prepare does
    assert not said(caplog, "")
