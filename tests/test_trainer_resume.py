"""Guarantee 7 with Trainer: a checkpoint saved at any event of training resumes bit for bit, on one replica and on two.

Plain Trainer is the oracle of what can be exact: it starts a window anew, so that a checkpoint from inside one has drawn
its dropout masks and counted its batch statistics already, and one from `on_optimizer_step` has stepped already.
"""

import json
import os
import pickle
import random
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run
from torch import nn
from torch.utils._pytree import tree_flatten
from trainer_runs import make, tensors
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

EVENTS = sorted(name for name in dir(TrainerCallback) if name.startswith("on_"))
ELSEWHERE = {"on_init_end", "on_predict", "on_push_begin"}  # not between the first and the last line of training
MOVED = {"on_optimizer_step"}  # the weights have stepped, `global_step` has not
INSIDE = {"on_substep_end", "on_pre_optimizer_step"}  # of a window
REPRESENTATIVE = {"on_substep_end", "on_pre_optimizer_step", "on_step_end"}
RWP = {"rwp": True, "rwp_gamma": 0.2, "rwp_alpha": 0.7, "rwp_eta": 10.0, "rwp_beta": 0.9}
RWP |= {"rwp_schedule": "cosine", "rwp_growth": 2.0, "rwp_seed": 5}


class Net(nn.Module):
    """keeps: whether a forward pass leaves a trace, in BatchNorm's buffers and in the generator of dropout."""

    accepts_loss_kwargs = False

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        extras = (nn.BatchNorm1d(8), nn.Dropout(0.3)) if keeps else ()
        self.net = nn.Sequential(nn.Linear(6, 8), *extras, nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Everywhere(TrainerCallback):
    """Calls `at(event, state, control)` at each event that there is."""

    def __init__(self, at) -> None:
        for event in EVENTS:
            setattr(self, event, lambda _, state, control, event=event, **__: at(event, state, control))


def trainer_of(folder, rwp, keeps, **options):
    """Ten steps of two batches each on one replica, an epoch's last of one batch; six on two replicas."""
    rows = torch.randn(36, 6, generator=torch.Generator().manual_seed(1))
    data = [{"x": x, "labels": index % 3} for index, x in enumerate(rows)]
    fixed = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    fixed |= {"optim": "adamw_torch", "learning_rate": 0.02, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
    fixed |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4}
    fixed |= {"train_dataset": data, "eval_dataset": data[:8]}
    return make(Net(keeps), folder, **{**fixed, **(RWP if rwp else {}), **options})


def final(trainer):
    return tensors(trainer.model), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()


def equal(got, expected):
    """Bit for bit."""
    (ours, our_tree), (theirs, their_tree) = tree_flatten(got), tree_flatten(expected)
    return our_tree == their_tree and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


def resumed(folder, rwp, keeps, checkpoint):
    trainer = trainer_of(folder, rwp, keeps)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return final(trainer)


def save_at(trainer, place):
    """Save a checkpoint as `place`."""
    trainer._save_checkpoint(trainer.model, trial=None)
    barrier()
    if trainer.is_world_process_zero():
        shutil.rmtree(place, ignore_errors=True)
        Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}").rename(place)
    barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def save_everywhere(folder, rwp, keeps, events=None):
    """What the same run does with and without saves; by event, what one resumed from its save does."""
    done = set()

    def save(event, state, _):
        if event not in done | ELSEWHERE and (events is None or event in events):
            save_at(trainer, folder / event)
            if state.global_step >= 3:
                done.add(event)

    plain = trainer_of(folder / "through", rwp, keeps)
    plain.train()
    through = final(plain)
    trainer = trainer_of(folder / "saving", rwp, keeps)
    trainer.add_callback(Everywhere(save))
    trainer.train()
    saved = sorted(path.name for path in folder.iterdir() if path.name in EVENTS)
    barrier()
    results = {event: resumed(folder / "again", rwp, keeps, folder / event) for event in saved}
    return through, final(trainer), results


def inexact(through, saving, results):
    """The events whose checkpoint does not resume exactly."""
    assert equal(saving, through)
    return {event for event, result in results.items() if not equal(result, through)}


def where_plain_is_not(keeps):
    return MOVED | INSIDE if keeps else MOVED


@pytest.mark.parametrize("rwp", [False, True], ids=["plain", "rwp"])
@pytest.mark.parametrize("keeps", [False, True], ids=["weights-alone", "batchnorm-dropout"])
def test_resume_is_exact_from_every_event_from_which_plain_trainer_is(tmp_path, keeps, rwp):
    through, saving, results = save_everywhere(tmp_path, rwp, keeps)
    assert results.keys() == set(EVENTS) - ELSEWHERE  # all of them fired
    assert inexact(through, saving, results) == where_plain_is_not(keeps)
    if rwp:
        assert through[1]["rwp"]["windows"] == 10
        assert through[1]["rwp"]["fisher"].keys() == dict(Net(keeps).named_parameters()).keys()


@pytest.mark.parametrize("rwp", [False, True], ids=["plain", "rwp"])
@pytest.mark.parametrize("keeps", [False, True], ids=["weights-alone", "batchnorm-dropout"])
def test_resume_is_exact_on_two_replicas(tmp_path, keeps, rwp):
    for results in run(2, save_everywhere, tmp_path, rwp, keeps, REPRESENTATIVE):
        assert results[2].keys() == REPRESENTATIVE
        assert inexact(*results) == where_plain_is_not(keeps) & REPRESENTATIVE


def test_resume_is_exact_where_an_event_asks_for_a_save(tmp_path):
    """`control.should_save`, which Trainer obeys at the end of the step."""
    asked, asking = set(), set()

    def ask(event, state, control):
        if event == "on_save":
            asked.update(asking)
            asking.clear()
        elif event not in asked and state.global_step >= 3:
            control.should_save = True
            asking.add(event)

    trainer = trainer_of(tmp_path / "asking", True, True, save_strategy="no", callbacks=[Everywhere(ask)])
    trainer.train()
    assert asked == set(EVENTS) - ELSEWHERE - {"on_save", "on_train_begin", "on_train_end"}
    checkpoints = list((tmp_path / "asking").glob("checkpoint-*"))
    assert len(checkpoints) > 2
    for checkpoint in checkpoints:
        assert equal(resumed(tmp_path / "again", True, True, checkpoint), final(trainer)), checkpoint


def terminate(folder, keeps, event, step):
    """SIGTERM at an event, Trainer's own checkpoint, and training from there: where it saved, and what came of it."""
    savers = []

    def kill(seen, state, _):
        if seen == event and state.global_step == step and not manager.is_checkpoint_requested:
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.001)
            barrier()

    def execute():
        savers.append(trainer.state.global_step)
        save()
        barrier()
        if trainer.is_world_process_zero():
            (folder / "stopped" / f"checkpoint-{savers[-1]}").rename(folder / "saved")
        barrier()

    trainer = trainer_of(folder / "stopped", True, keeps, save_strategy="no", enable_jit_checkpoint=True)
    callbacks = trainer.callback_handler.callbacks
    manager = next(one for one in callbacks if isinstance(one, JITCheckpointCallback)).jit_manager
    manager.kill_wait, save, manager.execute_jit_checkpoint = 0.0, manager.execute_jit_checkpoint, execute
    trainer.add_callback(Everywhere(kill))
    trainer.train()
    assert savers
    assert trainer.state.global_step < trainer.state.max_steps
    uninterrupted = trainer_of(folder / "through", True, keeps)
    uninterrupted.train()
    return savers, resumed(folder / "again", True, keeps, folder / "saved"), final(uninterrupted)


# (the event that SIGTERM comes at, whether inside a window): saved at on_pre_optimizer_step, on_step_end, on_step_begin
@pytest.mark.parametrize(
    ("event", "keeps"), [("on_substep_end", False), ("on_optimizer_step", True), ("on_log", True)], ids=str
)
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_after_sigterm(tmp_path, world, event, keeps):
    for savers, again, through in run(world, terminate, tmp_path, keeps, event, 1):
        assert savers == [2 if event == "on_optimizer_step" else 1]
        assert equal(again, through)


# SIGKILL


def long_run(folder, steps, world, rank, progress=None):
    """Train to the end, from the last whole checkpoint in `folder`. progress: gets the step, at each event."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if world > 1:
        store = folder / f"store-{len(list(folder.glob('try-*')))}"
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30))

    def say(_, state, __):
        if progress and rank == 0:
            progress.send(state.global_step)
        time.sleep(0.002)

    options = {"max_steps": steps, "save_steps": 4, "save_total_limit": 3, "callbacks": [Everywhere(say)]}
    trainer = trainer_of(folder / "run", True, True, **options)
    found = sorted((folder / "run").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    whole = next((str(path) for path in found if is_whole(path, world)), None)
    trainer.train(resume_from_checkpoint=whole)
    if rank == 0:
        torch.save(final(trainer), folder / "final.pt")
    barrier()


def is_whole(checkpoint, world):
    names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    try:
        for name in names:
            torch.load(checkpoint / name, weights_only=False)
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False


def train_and_kill(folder, steps, world, chance):
    """Train; with `chance`, SIGKILL all ranks at a random moment after the next checkpoint. The step it began with."""
    ours, theirs = distributed._context.Pipe(duplex=False)
    (folder / f"try-{time.monotonic_ns()}").touch()
    ranks = [
        distributed._context.Process(target=long_run, args=(folder, steps, world, rank, None if rank else theirs))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    theirs.close()
    began = None
    try:
        while ours.poll(60):
            step = ours.recv()
            began = step if began is None and step else began or 0
            if chance and step >= began + 5:
                time.sleep(chance.uniform(0, 0.03))
                break
    except EOFError:
        assert not chance
    for process in chance.sample(ranks, world) if chance else ():
        process.kill()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL if chance else 0] * world
    assert (folder / "final.pt").exists() == (chance is None)
    return began


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_after_sigkill(tmp_path, world, kills):
    chance, steps, finals = random.Random(kills), 10 * kills, []
    for name, times in (("through", 0), ("killed", kills)):
        (tmp_path / name).mkdir()
        began = [train_and_kill(tmp_path / name, steps, world, chance) for _ in range(times)]
        train_and_kill(tmp_path / name, steps, world, None)
        assert len(set(began)) == times
        finals.append(torch.load(tmp_path / name / "final.pt", weights_only=False))
    assert finals[0][1]["rwp"]["windows"] == steps
    assert equal(*finals)
