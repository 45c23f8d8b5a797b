"""A benchmark whose layers are small where their size is nothing to what a test looks at."""

import json
from pathlib import Path
from typing import Any

import benchmark
import torch

from hf_rwp.analysis import frozen_cost
from hf_rwp.runs import parsing

SMALL = {
    "frozen": lambda: frozen_cost.linear_layers(tokens=64, width=512),
    "llama": lambda: frozen_cost.llama(tokens=16, num_hidden_layers=2, vocab_size=64),
}


def run_frozen(name: str, _: int, __: int, args: Any, folder: str) -> None:
    """As the benchmark's own, which takes minutes."""
    torch.manual_seed(0)
    _, _, kinds = frozen_cost.MODELS[name]
    found = frozen_cost.frozen_costs(*SMALL[name](), args.rounds, kinds)
    Path(folder, "0").write_text(json.dumps(found))


if __name__ == "__main__":
    benchmark.run_frozen = run_frozen
    parsing.start(benchmark.main, benchmark.Arguments, benchmark.__doc__)
