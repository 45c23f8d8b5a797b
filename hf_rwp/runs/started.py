"""The first line of a recipe, ahead of imports that take seconds."""

import os
import sys

_STARTED = "HF_RWP_STARTED"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "LOCAL_RANK")


def announce(command: str) -> None:
    """Say that a recipe was started: once, on the main process; of --help only where somebody waits for it."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    helps = bool({"-h", "--help"} & {*sys.argv})
    if rank == "0" and _STARTED not in os.environ and (not helps or sys.stderr.isatty()):
        what = "what its flags need" if helps else "PyTorch and what else it needs"
        print(f"hf-rwp {command}: loading {what}", file=sys.stderr, flush=True)
    os.environ[_STARTED] = command  # for the processes that this one starts
