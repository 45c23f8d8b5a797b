"""The first line of a recipe, ahead of imports that take seconds."""

import os
import sys

_STARTED = "HF_RWP_STARTED"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "LOCAL_RANK")


def announce(command: str) -> None:
    """Say that a recipe was started: once, on the main process, not for --help."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    if rank == "0" and _STARTED not in os.environ and not {"-h", "--help"} & {*sys.argv}:
        print(f"hf-rwp {command}: loading PyTorch and what else it needs", file=sys.stderr, flush=True)
    os.environ[_STARTED] = command  # for the processes that this one starts
