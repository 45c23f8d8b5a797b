"""Lightning's Trainer and Fabric around RWP: the base steps with the paper's mix, whoever runs the loop.

What to give to RWP in `configure_optimizers` is the module that `training_step` calls. `self.net` is right everywhere,
if all the optimizer's parameters are in it. `self` is right as well where `training_step` calls `self(x)`. Where it
calls `self.net(x)`, only DistributedDataParallel (strategy="ddp") sends a batch through `self`: in one process `step`
raises, and in manual optimization always, since there the backward pass is over before `self` has returned.
"""

import pytest
import torch
import torch.nn.functional as F
from distributed import run, run_each
from reference import snapshot
from test_closures import GAMMA, Recording, check, inputs, labels, loss_of, network, one_pass
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, TensorDataset

from hf_rwp import RWP

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # on workers, logging and sizes
MIXES = [(0.3, 2), (0.3, 3), (1.0, 1), (1.0, 2)]


class Task(lightning.LightningModule):
    """wrapped, called: "self" or "net", what RWP gets and what `training_step` calls. manual: see `training_step`."""

    def __init__(self, alpha, micro_steps, wrapped="net", called="net", manual="", make=RWP):
        super().__init__()
        self.net = network()
        self.alpha, self.micro_steps, self.wrapped, self.called, self.make = alpha, micro_steps, wrapped, called, make
        self.manual, self.automatic_optimization = manual, not manual
        self.rates, self.validated = [], []

    def forward(self, x):
        return self.net(x)

    def loss(self, x):
        return F.cross_entropy(self(x) if self.called == "self" else self.net(x), labels(x))

    def configure_optimizers(self):
        self.base = Recording(self.net)
        model = self if self.wrapped == "self" else self.net
        accumulation_steps = self.micro_steps if self.micro_steps > 1 else None
        self.optimizer = self.make(
            self.base, model, gamma=GAMMA, alpha=self.alpha, accumulation_steps=accumulation_steps
        )
        self.base.watch()
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, index):
        (x,) = batch
        if not self.manual:
            return self.loss(x)
        optimizer = self.optimizers()

        def closure():
            loss = self.loss(x) / self.micro_steps
            self.manual_backward(loss)
            return loss

        if (index + 1) % self.micro_steps:
            return closure()
        if self.manual == "closure":
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        optimizer.zero_grad()
        return loss

    def validation_step(self, batch, index):
        self.validated.append((len(self.base.steps), snapshot(self.net), self.loss(batch[0])))


def loader(count, seed=0):
    return DataLoader(TensorDataset(torch.cat(inputs(count, seed))), batch_size=5)


def trainer(task, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    accumulate = 1 if task.manual else task.micro_steps
    kwargs = {"max_epochs": 1, "accumulate_grad_batches": accumulate, **quiet, **kwargs}
    return lightning.Trainer(accelerator="cpu", **{"devices": 1, **kwargs})


def rates(task):
    return [group["lr"] for group in task.base.param_groups]


@pytest.mark.parametrize(("wrapped", "called"), [("net", "net"), ("net", "self"), ("self", "self")])
@pytest.mark.parametrize(("alpha", "micro_steps"), MIXES)
def test_the_gradient_of_a_step_in_trainer_is_the_mix(alpha, micro_steps, wrapped, called):
    task = Task(alpha, micro_steps, wrapped, called)
    loop = trainer(task)
    loop.fit(task, loader(3 * micro_steps))
    task.base.check(alpha, [micro_steps] * 3)
    assert loop.global_step == 3
    assert rates(task) == [0.1 / 8]
    assert task.optimizer.report()["windows"] == 3


def test_a_model_that_trainer_does_not_call_is_an_error():
    task = Task(1.0, 1, wrapped="self", called="net")
    with pytest.raises(RuntimeError, match="call the model itself"):
        trainer(task).fit(task, loader(1))


def test_trainer_without_options_of_its_own_works_too():
    task = Task(1.0, 1)
    lightning.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=1).fit(task, loader(2))
    task.base.check(1.0, [1, 1])


@pytest.mark.parametrize("manual", ["step", "closure"])
@pytest.mark.parametrize(("alpha", "micro_steps"), MIXES)
def test_manual_optimization(alpha, micro_steps, manual):
    task = Task(alpha, micro_steps, manual=manual)
    loop = trainer(task)
    loop.fit(task, loader(3 * micro_steps))
    task.base.check(alpha, [micro_steps] * 3)
    assert loop.global_step == 3


@pytest.mark.parametrize(("alpha", "micro_steps"), MIXES)
def test_trainer_clips_the_mix(alpha, micro_steps):
    def clipped(mix):
        norm = get_total_norm(mix.values())
        assert norm > 0.01
        parameters = [torch.nn.Parameter(gradient) for gradient in mix.values()]
        for parameter, gradient in zip(parameters, mix.values(), strict=True):
            parameter.grad = gradient.clone()
        clip_grads_with_norm_(parameters, 0.01, norm)
        return {name: parameter.grad for name, parameter in zip(mix, parameters, strict=True)}

    task = Task(alpha, micro_steps)
    trainer(task, gradient_clip_val=0.01).fit(task, loader(2 * micro_steps))
    task.base.check(alpha, [micro_steps] * 2, clipped)


def test_validation_in_the_middle_of_a_window_sees_clean_weights():
    task = Task(0.3, 2)
    trainer(task, val_check_interval=1, num_sanity_val_steps=1).fit(task, loader(6), loader(1, seed=1))
    task.base.check(0.3, [2, 2, 2])
    weights = [weights for weights, _ in task.base.steps] + [snapshot(task.net)]
    assert [steps for steps, *_ in task.validated] == [0, 0, 1, 1, 2, 2, 3]
    for steps, seen, _ in task.validated:
        assert all(torch.equal(weight, weights[steps][name]) for name, weight in seen.items())


@pytest.mark.parametrize(("alpha", "micro_steps"), [(0.3, 2), (1.0, 1)])
@pytest.mark.parametrize("wrapped", ["net", "self"])
def test_a_resumed_run_is_bit_exact(tmp_path, alpha, micro_steps, wrapped):
    def task():
        return Task(alpha, micro_steps, wrapped, called="self")

    def fit(task, epochs, **kwargs):
        loop = trainer(task, max_epochs=epochs)
        loop.fit(task, loader(3 * micro_steps), **kwargs)
        return loop

    whole, first, second = task(), task(), task()
    fit(whole, 2)
    fit(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    loop = fit(second, 2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert loop.global_step == 6
    assert rates(second) == rates(whole)
    torch.testing.assert_close(first.base.steps + second.base.steps, whole.base.steps, rtol=0, atol=0)
    torch.testing.assert_close(first.base.passes + second.base.passes, whole.base.passes, rtol=0, atol=0)
    torch.testing.assert_close(snapshot(second), snapshot(whole), rtol=0, atol=0)


def test_a_second_fit_of_a_module_draws_other_noise():
    task = Task(1.0, 1)
    trainer(task).fit(task, loader(1))
    first = task.base
    trainer(task).fit(task, loader(1))
    del first.passes[1:]  # its hook is still there
    for base in first, task.base:
        base.check(1.0, [1])
    drawn = [base.passes[0][0]["0.weight"] - base.steps[0][0]["0.weight"] for base in (first, task.base)]
    assert (drawn[0] / drawn[1]).std() > 0.1


def train_replicas(alpha, micro_steps, wrapped, called, manual):
    task = Task(alpha, micro_steps, wrapped, called, manual)
    loop = trainer(task, strategy="ddp", devices=2)
    loop.fit(task, loader(6 * micro_steps))
    return task.base.passes, task.base.steps, loop.global_step


TWO = [
    (*pair, manual)
    for pair in [("net", "net"), ("net", "self"), ("self", "self")]
    for manual in ["", "step", "closure"]
]


@pytest.mark.parametrize(("wrapped", "called", "manual"), [*TWO, ("self", "net", "")])
def test_the_gradient_of_two_replicas_in_trainer_is_the_mix(wrapped, called, manual):
    cases = [(alpha, micro_steps, wrapped, called, manual) for alpha, micro_steps in [(0.3, 1), (0.3, 2), (1.0, 2)]]
    for (alpha, micro_steps, *_), ranks in zip(cases, run_each(2, train_replicas, cases), strict=True):
        (passes, steps, global_step), (others, same, _) = ranks
        torch.testing.assert_close(same, steps, rtol=0, atol=0)
        order = [one for pair in zip(passes, others, strict=True) for one in pair]
        check(network(), order, steps, alpha, [2 * micro_steps] * 3)
        assert global_step == 3


@pytest.mark.parametrize("manual", ["step", "closure"])
def test_a_backward_pass_inside_the_wrapped_module_is_an_error(manual):
    with pytest.raises(RuntimeError, match="call the model itself"):
        run(2, train_replicas, 0.3, 2, "self", "net", manual)


# Fabric


def with_fabric(alpha, micro_steps):
    model = network()
    base = Recording(model)
    optimizer = RWP(base, model, gamma=GAMMA, alpha=alpha, accumulation_steps=micro_steps)
    base.watch()
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return fabric, base, optimizer, *fabric.setup(model, optimizer)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("alpha", "micro_steps"), MIXES)
def test_fabric(alpha, micro_steps, closure):
    fabric, base, optimizer, model, prepared = with_fabric(alpha, micro_steps)
    for seed in range(3):
        *first, last = inputs(micro_steps, seed)

        def one(x):
            loss = loss_of(model, x) / micro_steps
            fabric.backward(loss)
            return loss

        for x in first:
            one(x)
        if closure:
            assert prepared.step(lambda: one(last)) > 0  # noqa: B023
        else:
            one(last)
            prepared.step()
        prepared.zero_grad()
    base.check(alpha, [micro_steps] * 3)
    assert optimizer.report()["windows"] == prepared.state_dict()["rwp"]["windows"] == 3


def test_fabrics_optimizer_disarms_and_arms():
    _, base, optimizer, model, prepared = with_fabric(1.0, 1)
    clean = snapshot(base.model)
    loss = loss_of(model, inputs(1)[0])
    prepared.eval()
    assert all(torch.equal(weight, clean[name]) for name, weight in base.model.named_parameters())
    loss.backward()
    prepared.step()
    prepared.zero_grad()
    clean = snapshot(base.model)
    loss_of(model, inputs(1)[0])
    assert all(torch.equal(weight, clean[name]) for name, weight in base.passes[-1][0].items())
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\)"):
        [one_pass(model, inputs(1)[0]), prepared.step()]
    prepared.zero_grad()
    prepared.train()
    del base.passes[1:]
    one_pass(model, inputs(1)[0])
    prepared.step()
    base.check(1.0, [1, 1])
    prepared.alpha = 0.0
    assert not optimizer.active


def test_a_checkpoint_of_fabric_resumes_bit_exactly(tmp_path):
    def run_on(model, optimizer, seeds):
        for seed in seeds:
            for x in inputs(2, seed):
                one_pass(model, x, 2)
            optimizer.step()
            optimizer.zero_grad()

    fabric, _, _, model, optimizer = with_fabric(0.3, 2)
    run_on(model, optimizer, range(2))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    run_on(model, optimizer, range(2, 4))
    fabric, _, _, resumed, optimizer = with_fabric(0.3, 2)
    fabric.load(tmp_path / "half.ckpt", {"model": resumed, "optimizer": optimizer})
    run_on(resumed, optimizer, range(2, 4))
    torch.testing.assert_close(snapshot(resumed), snapshot(model), rtol=0, atol=0)
