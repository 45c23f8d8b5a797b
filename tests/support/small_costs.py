"""A benchmark whose layers are small where their size is nothing to what a test looks at."""

import json
from pathlib import Path
from typing import Any

import benchmark
import torch

from hf_rwp.analysis import frozen_cost
from hf_rwp.runs import parsing


def run_frozen(_: int, __: int, args: Any, folder: str) -> None:
    """As the benchmark's own, which takes ten seconds."""
    found = frozen_cost.frozen_costs(torch.device("cpu"), args.rounds, tokens=64, width=512)
    Path(folder, "0").write_text(json.dumps(found))


if __name__ == "__main__":
    benchmark.run_frozen = run_frozen
    parsing.start(benchmark.main, benchmark.Arguments, benchmark.__doc__)
