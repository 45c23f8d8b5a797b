"""Guarantee 7 of the design: a run that is killed anywhere and resumed ends as the uninterrupted one, bit for bit."""

import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from distributed import context, run
from torch import nn
from torch.utils._pytree import tree_flatten

from hf_rwp import RWP
from hf_rwp.core.gamma import gamma_factor

EVERY = 4  # steps from one checkpoint to the next


def train(
    folder: Path, steps: int, store: str | None = None, tell: Any = lambda step: None, pause: float = 0.0
) -> None:
    """Train for `steps` from the last checkpoint in `folder`. tell: takes each step that is done, the first one that
    it begins with. pause: seconds in every micro-step, for the killer."""
    options = InitProcessGroupKwargs(init_method=store and f"file://{store}", timeout=timedelta(seconds=30))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = 2 if world == 1 else 1
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, kwargs_handlers=[options])
    set_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = RWP(torch.optim.AdamW(net.parameters(), lr=0.02), net, gamma=0.1, alpha=0.7, eta=10.0, beta=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=world * steps)
    model, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    done = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    if done:
        accelerator.load_state(folder / str(done))
    else:
        set_seed(accelerator.process_index)  # of dropout
    tell(done)
    for step in range(done, steps):
        optimizer.scale_gamma(gamma_factor(step / steps, "cosine", growth=2.0, start=0.1))
        for micro_step in range(accumulation):
            key = (step * accumulation + micro_step) * world + accelerator.process_index
            x, y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(key))
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y[:, :3]).square().mean())
                time.sleep(pause)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
        tell(step + 1)
        if (step + 1) % EVERY == 0:
            accelerator.save_state(folder / "unfinished")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (folder / "unfinished").rename(folder / str(step + 1))
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        slots = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(slots, folder / "final.pt")


def train_in_process(folder: Path, steps: int, store: str, rank: int, world: int, ours: Connection) -> None:
    """As one of `world` processes, which the launcher has told who they are; rank 0 says to `ours` what it does."""
    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({key: str(value) for key, value in group.items()} if world > 1 else {})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sys.stderr = (folder.parent / f"stderr-{rank}").open("w", buffering=1)
    train(folder, steps, store, tell=ours.send if rank == 0 else lambda step: None, pause=0.01)


def launch(folder: Path, steps: int, world: int) -> tuple[list[BaseProcess], Connection]:
    """The training on `world` ranks, each a process of its own, and what rank 0 says it does."""
    store = folder.parent / f"store-{time.monotonic_ns()}"
    said, ours = context().Pipe(duplex=False)
    processes = []
    for rank in range(world):
        arguments = (folder, steps, str(store), rank, world, ours)
        processes.append(context().Process(target=train_in_process, args=arguments))
        processes[-1].start()
    ours.close()
    return processes, said


def train_and_kill(folder: Path, steps: int, world: int, chance: random.Random | None) -> int:
    """Train; with `chance`, SIGKILL all ranks at a random step after the first checkpoint. The step it began with."""
    processes, said = launch(folder, steps, world)
    watchdog = threading.Timer(120, lambda: [process.kill() for process in processes])
    watchdog.start()
    try:
        began = received(said)
        began = -1 if began is None else began  # it died, see below
        victim = began + chance.randint(EVERY + 1, 2 * EVERY) if chance else steps + 1
        for step in iter(lambda: received(said), None):
            if step == victim:
                time.sleep(chance.uniform(0, 0.02))
                for process in chance.sample(processes, world):
                    process.kill()
        for process in processes:
            process.join()
    finally:
        watchdog.cancel()
        for process in processes:
            process.kill()
            process.join()
    complaints = "\n".join(path.read_text() for path in sorted(folder.parent.glob("stderr-*")))
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if chance else 0] * world, complaints
    assert (folder / "final.pt").exists() == (chance is None)
    return began


def received(said: Connection) -> int | None:
    """None when the other side is gone."""
    try:
        return said.recv()
    except EOFError:
        return None


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_exact(tmp_path, world, kills):
    chance, steps = random.Random(kills), 2 * EVERY * (kills + 1)
    killed, uninterrupted = tmp_path / "killed" / "run", tmp_path / "uninterrupted"
    killed.mkdir(parents=True)
    uninterrupted.mkdir()
    began = [train_and_kill(killed, steps, world, chance) for _ in range(kills)]
    began.append(train_and_kill(killed, steps, world, None))
    assert began == sorted(set(began))
    run(world, train, uninterrupted, steps)
    actual, expected = (torch.load(folder / "final.pt") for folder in (killed, uninterrupted))
    assert expected["optimizer"]["rwp"]["windows"] == steps - sum(step / steps < 0.1 for step in range(steps))
    (ours, our_tree), (theirs, their_tree) = tree_flatten(actual), tree_flatten(expected)
    assert our_tree == their_tree
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True))
