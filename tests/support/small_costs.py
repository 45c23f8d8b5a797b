"""A benchmark whose layers are small where their size is nothing to what a test looks at.

With FORKS=1 its processes are forks of it, which need not import anew what it has.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import torch

from hf_rwp.analysis import frozen_cost, pieces
from hf_rwp.experiments import lora_costs
from hf_rwp.runs import parsing

SMALL = {
    "frozen": lambda: frozen_cost.linear_layers(tokens=64, width=512),
    "llama": lambda: lora_costs.llama(tokens=16, num_hidden_layers=2, vocab_size=64),
}


def run_lora(name: str, _: int, __: int, args: Any, folder: str) -> None:
    """As the benchmark's own, which takes minutes."""
    torch.manual_seed(0)
    found = frozen_cost.frozen_costs(*SMALL[name](), args.rounds, lora_costs.MODELS[name].kinds)
    Path(folder, "0").write_text(json.dumps(found))


def forking(start: Any, *args: Any, start_method: str, **options: Any) -> Any:
    assert start_method == "forkserver"
    return start(*args, start_method="fork", **options)


def run(command: list[str], **options: Any) -> Any:
    """As `subprocess.run`; the recipe is a fork."""
    if command[1] != str(benchmark.RECIPE):
        return subprocess.run(command, **options)
    process = multiprocessing.get_context("fork").Process(target=train, args=(command[1:],))
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode, stderr="")


def train(words: list[str]) -> None:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    benchmark.run_lora = run_lora
    if os.environ.get("FORKS"):
        pieces.start_processes = partial(forking, pieces.start_processes)
        benchmark.subprocess = SimpleNamespace(run=run)
    parsing.start(benchmark.main, benchmark.Arguments, benchmark.__doc__)
