"""Guarantee 7 with Trainer: a checkpoint from any event of training resumes bit for bit, on one replica and on two.

Plain Trainer is the oracle of what can be exact: it starts a window anew, and a checkpoint from inside one has drawn
its dropout masks and counted its batch statistics already; one from `on_optimizer_step` has stepped already.
"""

import gc
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
from distributed import night, run
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


@pytest.fixture(autouse=True)
def few_objects():
    """Trainer collects garbage as training begins: half a second among all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    """keeps: whether a forward pass leaves a trace, in BatchNorm's buffers and in the generator of dropout."""

    accepts_loss_kwargs = False

    def __init__(self, keeps):
        super().__init__()
        torch.manual_seed(0)
        extras = (nn.BatchNorm1d(8), nn.Dropout(0.3)) if keeps else ()
        self.net = nn.Sequential(nn.Linear(6, 8), *extras, nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Everywhere(TrainerCallback):
    """Calls `at(event, state, control)` at each event that there is."""

    def __init__(self, at):
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
    trainer = trainer_of(folder, rwp, keeps, save_strategy="no")
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
    gc.freeze()
    done = set()

    def save(event, state, _):
        if event not in done | ELSEWHERE and (events is None or event in events):
            save_at(trainer, folder / event)
            if state.global_step >= 3:
                done.add(event)

    unsaved = trainer_of(folder / "through", rwp, keeps, save_strategy="no")
    unsaved.train()
    through = final(unsaved)
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
    forgotten = {"on_train_begin", "on_epoch_begin", "on_train_end"}  # Trainer resets it as a step begins
    assert asked == set(EVENTS) - ELSEWHERE - forgotten - {"on_save"}
    checkpoints = list((tmp_path / "asking").glob("checkpoint-*"))
    assert len(checkpoints) > 2
    for checkpoint in checkpoints:
        assert equal(resumed(tmp_path / "again", True, True, checkpoint), final(trainer)), checkpoint


def terminate(folder, keeps, event, step):
    """SIGTERM at an event, Trainer's own checkpoint, and training from there: where it saved, and what came of it."""
    gc.freeze()
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


# The events that SIGTERM comes at; Trainer saves at on_pre_optimizer_step, on_step_end, on_step_begin
@pytest.mark.parametrize(
    ("event", "keeps"), [("on_substep_end", False), ("on_optimizer_step", True), ("on_log", True)], ids=str
)
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_after_sigterm(tmp_path, world, event, keeps):
    for savers, again, through in run(world, terminate, tmp_path, keeps, event, 1):
        assert savers == [2 if event == "on_optimizer_step" else 1]
        assert equal(again, through)


# SIGKILL


def train_on(folder, steps, world, progress=None):
    """Train to the end, from the last whole checkpoint in `folder`. progress: gets the step, at each event."""

    def say(event, state, _):
        if event not in ELSEWHERE:
            if progress:
                progress.send(state.global_step)
            time.sleep(0.002)

    options = {"max_steps": steps, "save_steps": 4, "save_total_limit": 3, "callbacks": [Everywhere(say)]}
    trainer = trainer_of(folder / "run", True, True, **options)
    found = sorted((folder / "run").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    whole = next((str(path) for path in found if is_whole(path, world)), None)
    barrier()
    trainer.train(resume_from_checkpoint=whole)
    if trainer.is_world_process_zero():
        torch.save(final(trainer), folder / "final.pt")
    barrier()


def victim(folder, steps, world, rank, store, progress):
    """`train_on` in a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if world > 1:
        options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=30)}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    train_on(folder, steps, world, progress)
    if world > 1:
        dist.destroy_process_group()


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
    store = folder / f"store-{time.monotonic_ns()}"
    ranks = [
        distributed._context.Process(target=victim, args=(folder, steps, world, rank, store, None if rank else theirs))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    theirs.close()
    try:
        assert ours.poll(60)
        began = ours.recv()
        while chance and ours.recv() < began + 5:
            pass
        if chance:
            time.sleep(chance.uniform(0, 0.03))
            for process in chance.sample(ranks, world):
                process.kill()
        else:
            while ours.recv() >= 0:
                pass
    except EOFError:
        assert not chance
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL if chance else 0] * world
    assert (folder / "final.pt").exists() == (chance is None)
    return began


@pytest.mark.parametrize(("world", "kills"), night([(2, 1), (1, 1), (2, 20), (1, 20)], [(1, 1), (2, 20), (1, 20)]))
def test_resume_is_exact_after_sigkill(tmp_path, world, kills):
    chance, steps = random.Random(kills), 10 * (kills + 1)
    through, killed = tmp_path / "through", tmp_path / "killed"
    through.mkdir()
    killed.mkdir()
    run(world, train_on, through, steps, world)
    began = [train_and_kill(killed, steps, world, chance) for _ in range(kills)]
    began.append(train_and_kill(killed, steps, world, None))
    assert began == sorted(set(began))
    actual, expected = (torch.load(folder / "final.pt", weights_only=False) for folder in (killed, through))
    assert expected[1]["rwp"]["windows"] == steps
    assert equal(actual, expected)
