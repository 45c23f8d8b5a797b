"""Guarantee 7 of the design: a run that is killed anywhere and resumed ends as the uninterrupted one, bit for bit.

This file is also the script that is killed: `python tests/runs/test_resume.py FOLDER STEPS STORE`, one process a rank.
"""

import os
import random
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from distributed import run
from torch import nn
from torch.utils._pytree import tree_flatten

from hf_rwp import RWP
from hf_rwp.core.gamma import gamma_factor

EVERY = 4  # steps from one checkpoint to the next


def train(folder: Path, steps: int, store: str | None = None, pause: float = 0.0) -> None:
    """Train for `steps` from the last checkpoint in `folder`; pause: seconds in every micro-step, for the killer."""
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
    print(done, flush=True)
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
        print(step + 1, flush=True)
        if (step + 1) % EVERY == 0:
            accelerator.save_state(folder / "unfinished")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (folder / "unfinished").rename(folder / str(step + 1))
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        slots = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(slots, folder / "final.pt")


def launch(folder: Path, steps: int, world: int) -> list[subprocess.Popen[str]]:
    """The script on `world` ranks, each in an interpreter of its own; rank 0 says what it does on its stdout."""
    store = folder.parent / f"store-{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = []
    for rank in range(world):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder), str(steps), str(store)],
                env=environment | ({key: str(value) for key, value in group.items()} if world > 1 else {}),
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=(folder.parent / f"stderr-{rank}").open("w"),
                text=True,
            )
        )
    return processes


def train_and_kill(folder: Path, steps: int, world: int, chance: random.Random | None) -> int:
    """Run the script; with `chance`, SIGKILL it at a random step after its first checkpoint. The step it began with."""
    processes = launch(folder, steps, world)
    watchdog = threading.Timer(120, lambda: [process.kill() for process in processes])
    watchdog.start()
    try:
        lines = (line for line in processes[0].stdout if line[0] != "[")  # as gloo's "[Gloo] Rank 0" of torch 2.8
        began = int(next(lines, -1))
        victim = began + chance.randint(EVERY + 1, 2 * EVERY) if chance else steps + 1
        for line in lines:
            if int(line) == victim:
                time.sleep(chance.uniform(0, 0.02))
                for process in chance.sample(processes, world):
                    process.kill()
        codes = [process.wait() for process in processes]
    finally:
        watchdog.cancel()
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
    said = "\n".join(path.read_text() for path in sorted(folder.parent.glob("stderr-*")))
    assert codes == [-9 if chance else 0] * world, said
    assert (folder / "final.pt").exists() == (chance is None)
    return began


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


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pause=0.01)
