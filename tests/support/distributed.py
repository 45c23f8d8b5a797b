"""Run a function on the ranks of a real gloo group on this machine.

`run(3, function, *args)` calls `function(*args)` in three processes and returns what it returned, by rank. The
processes are forked once, from a server that has imported torch already, and serve all tests; each call gets a process
group of its own, unless it is told to keep one, so that a failure leaves nothing behind. Nothing hangs: a collective
fails after `timeout` seconds, anything else a little later, and `run` raises with what every rank said.
"""

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_context = multiprocessing.get_context("forkserver")
_HEAVY = {"accelerate", "datasets", "evaluate", "lightning", "matplotlib.pyplot", "peft", "sklearn.datasets", "timm"}
_HEAVY |= {"torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"}
_HEAVY |= {"transformers.trainer", "trl"}
_pools: dict[int, list[tuple[BaseProcess, Connection]]] = {}  # by the world of the group that they keep, 0 for none
_kept: dict[int, tempfile.TemporaryDirectory[str]] = {}  # by world: the store of that group
_LONGEST = 120  # seconds of a collective of a group that calls share
_GRACE = 30  # seconds beyond the collectives' own timeout


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 30, keep_group: bool = False
) -> list[Any]:
    """What `function(*args)` returned on each of `world` ranks, by rank.

    function: importable by name; it finds a gloo group and the environment variables of torchrun. timeout: seconds, of
    every collective where the group is its own, and with _GRACE of the whole call. keep_group: calls of this kind have
    processes of their own and share a process group, and what DTensor keeps by its name. Raises RuntimeError with the
    tracebacks where a rank raised, died or did not answer.
    """
    pool = world if keep_group else 0
    folder = _kept.pop(pool, None)
    fresh = folder is None
    if keep_group and fresh:
        stop(pool)  # plans of DTensor name groups of the past
    folder = folder or tempfile.TemporaryDirectory()
    workers = _pools.setdefault(pool, [])
    while len(workers) < world:
        ours, theirs = _context.Pipe()
        process = context().Process(target=_serve, args=(theirs, len(workers)), daemon=True)
        process.start()
        theirs.close()
        workers.append((process, ours))
    workers = workers[:world]
    wait = max(timeout, _LONGEST) if keep_group else timeout
    job = pickle.dumps((function, args, world, os.path.join(folder.name, "store") if fresh else None, wait))
    for _, connection in workers:
        connection.send_bytes(job)
    deadline = time.monotonic() + timeout + _GRACE
    outcomes = [_answer(connection, deadline) for _, connection in workers]
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(outcomes) if failure]
    if any("no answer" in failure for failure in failures):
        stop(pool)
    if failures:
        raise RuntimeError(f"{function.__name__} failed on {len(failures)} of {world} ranks\n" + "\n".join(failures))
    if keep_group:
        _kept[pool] = folder
    return [value for value, _ in outcomes]


def context() -> ForkServerContext:
    """Of processes that are forked from the server, which imports once what these tests have imported."""
    imported = [name for name in sys.modules if name in _HEAVY or name.startswith("hf_rwp.")]
    _context.set_forkserver_preload(["torch._dynamo", *imported])  # which DistributedDataParallel needs
    return _context


def run_each(world: int, function: Callable[..., Any], cases: Iterable[tuple[Any, ...]], **options: Any) -> list[Any]:
    """`run` of `function(*case)` for each of `cases`, in one process group: what it returned by case, then by rank."""
    return [list(ranks) for ranks in zip(*run(world, _each, function, list(cases), **options), strict=True)]


def night(values: Iterable[Any], later: Iterable[Any]) -> list[Any]:
    """Values to parametrize a test with, or tuples for several arguments; those of `later` wait for the nightly run.

    The rest cover each part, though not every combination.
    """
    values, later = list(values), list(later)
    assert all(value in values for value in later), later
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] * (value in later))
        for value in values
    ]


def chosen(request: pytest.FixtureRequest, *names: str) -> set[Any]:
    """For a module's fixture: with which values of the arguments `names` this session runs the module's tests."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return {
        tuple(call.params[name] for name in names) if len(names) > 1 else call.params[names[0]]
        for call in calls
        if call is not None and all(name in call.params for name in names)
    }


def rank() -> int:
    """In a function that `run` calls: which rank this is."""
    return int(os.environ["RANK"])


def stop(pool: int | None = None) -> None:
    """End processes; the next `run` starts new ones. pool: the world of those that keep a group, 0 for those that keep
    none, None for all."""
    for own in [*_pools] if pool is None else [pool]:
        _kept.pop(own, None)
        workers = _pools.pop(own, [])
        for process, connection in workers:
            connection.close()
            process.kill()
        for process, _ in workers:
            process.join()


def _answer(connection: Connection, deadline: float) -> tuple[Any, str]:
    try:
        if connection.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(connection.recv_bytes())
    except EOFError:
        return None, "no answer: the process died"
    return None, "no answer in time: it hangs"


def _each(function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    answers = []
    for case in cases:
        _begin()
        answers.append(function(*case))
    return answers


def _serve(connection: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    multiprocessing.set_start_method(None, force=True)  # or its own children would come from a fork server
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate asks for them, and finds the group made
    while True:
        function, args, world, store, timeout = pickle.loads(connection.recv_bytes())
        gc.collect()
        gc.freeze()  # what is imported by now: the garbage collector need not go over it
        os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        if store:
            _leave_group()  # not before: a rank that is done may still be needed by the others
        options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=timeout)}
        _begin()
        try:
            if store:
                dist.init_process_group("gloo", init_method=f"file://{store}", **options)
            answer = pickle.dumps((function(*args), ""))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
            _leave_group()  # the others fail at once, rather than wait for this rank
        connection.send_bytes(answer)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _begin() -> None:
    """What a function finds does not depend on what the process did before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)


class Collectives(TorchDispatchMode):
    """Counts the operations of torch.distributed, DDP's own included, by name and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[f"{function} {[tuple(t.shape) for t in tree_leaves(args) if isinstance(t, Tensor)]}"] += 1
        return function(*args, **(kwargs or {}))
