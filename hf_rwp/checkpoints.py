"""Checkpoints on disk: each exists whole or not at all, and the last good one outlives whatever happens to the next.

A run keeps them in one folder, as `step_N`, N the optimizer steps behind it. A name with a suffix (`.partial`,
`.removed`) is no checkpoint: it is what a kill left of writing or removing one.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

STATE = "state.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, Any]) -> None:
    """Write `accelerator.save_state` and `state` (JSON) to `folder`. Collective: call it on all replicas.

    Raises OSError on all replicas if one could not write (a full disk), and leaves nothing of the new checkpoint.
    """
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()

    def write() -> None:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps(state))
        for file in partial.iterdir():
            _flush(file)

    def publish() -> None:
        if not accelerator.is_main_process:
            return
        if folder.exists():  # by a run on other replicas, at this same step
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
            _flush(folder.parent)

    for part in (write, publish):
        failure = None
        try:
            part()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            failure = f"{type(error).__name__}: {error}"
        failures = [text for text in gather_object([failure]) if text]
        if failures:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            last = newest(folder.parent)
            intact = f"{last.name} is intact: make room and go on with --resume_from_checkpoint latest" if last else ""
            raise OSError(f"{folder.name} could not be written ({failures[0]}): is the disk full? {intact}")


def read_state(folder: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """The `state` that `save_checkpoint` wrote. needed: what it has to hold.

    Raises ValueError where the folder holds no whole checkpoint, or one of something else.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no whole checkpoint ({type(error).__name__}: {error}): name a folder step_N that a run wrote"
        ) from error
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"{folder} was written by another recipe or version: it lacks {', '.join(missing)}")
    return state


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in a folder by step, the oldest first."""
    found = ((path.name.removeprefix("step_"), path) for path in folder.glob("step_*"))
    return dict(sorted((int(step), path) for step, path in found if step.isdigit()))


def newest(folder: Path) -> Path | None:
    return next(reversed(checkpoints_in(folder).values()), None)


def remove_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Delete all but the steps in `keep`, and what kills left; a kill on the way leaves nothing that looks whole."""
    old = [path for step, path in checkpoints_in(folder).items() if step not in keep]
    left = [path for kind in ("partial", "removed") for path in folder.glob(f"step_*.{kind}")]
    for path in [*left, *old]:
        shutil.rmtree(path if path.suffix else path.rename(path.with_suffix(".removed")))


def _flush(file: Path) -> None:
    """Have the file on disk, not in memory alone, before a rename says that it is."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
