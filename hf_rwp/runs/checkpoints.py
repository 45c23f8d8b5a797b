"""Checkpoints on disk: each exists whole or not at all, and the last good one outlives whatever happens to the next.

A run keeps them in one folder, as `step_N`, N the optimizer steps behind it. A name with a suffix (`.partial`,
`.removed`) is not a checkpoint but what a kill left of writing or removing one.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.other import load
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from hf_rwp.runs.deepspeed import FOLDER, is_engine, refuse_engine_code, refuse_other_partitions
from hf_rwp.runs.distributed_checkpoints import METADATA, refuse_code
from hf_rwp.runs.sharded import is_mesh, is_sharded_model, load_whole, whole_weights

STATE = "state.json"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: dict[str, Any], modules: Mapping[str, nn.Module] | None = None
) -> None:
    """Write `accelerator.save_state`, `state` (JSON) and further modules, by name, to `folder`. Collective.

    Raises OSError on all replicas if one could not write (a full disk), and leaves nothing of the new checkpoint.
    """
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()

    def write() -> None:
        accelerator.save_state(str(partial))
        for name, module in (modules or {}).items():
            file = str(partial / f"{name}.safetensors")
            if is_sharded_model(module):
                weights = whole_weights(module, accelerator.is_main_process)
                if weights:
                    save_file(weights, file)
            elif accelerator.is_main_process:
                save_model(module, file)

    def publish() -> None:
        """When all have written their part: say what it must be like when it is read, and give it its name."""
        if not accelerator.is_main_process:
            return
        (partial / STATE).write_text(json.dumps({"state": state, "sha256": _digests(partial)}))
        for file in partial.rglob("*"):
            _flush(file)
        if folder.exists():  # by a run on other replicas, at this same step
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
            _flush(folder.parent)

    for part in (write, publish):
        failure = None
        try:
            part()
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # torch has errors of its own
            failure = f"{type(error).__name__}: {error}"
        failures = [text for text in gather_object([failure]) if text]
        if failures:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            last = newest(folder.parent)
            intact = f"{last.name} is intact: make room and go on with --resume_from_checkpoint latest" if last else ""
            raise OSError(f"{folder.name} could not be written ({failures[0]}): is the disk full? {intact}")


def read_state(folder: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """The `state` that `save_checkpoint` wrote. needed: what it must hold.

    Raises ValueError, with the names of the files, where the folder is not as it was written: cut short, changed, with
    a file that does not belong there, or of something else.
    """
    try:
        written = json.loads((folder / STATE).read_text())
        state: dict[str, Any] = written["state"]
        expected: dict[str, str] = written["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a complete checkpoint ({type(error).__name__}: {error}): name a folder step_N "
            "that a run wrote"
        ) from error
    found = _digests(folder)
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} does not belong there" for name in found.keys() - expected.keys()]
    wrong += [f"{name} has changed" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    if wrong:
        raise ValueError(
            f"{folder} is not the checkpoint that was written: {', '.join(sorted(wrong))}. Resume from another one"
        )
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            f"{folder} was written by another recipe or version: it lacks {', '.join(missing)}. Resume it with "
            "that one, or start without --resume_from_checkpoint"
        )
    return state


def load_checkpoint(accelerator: Accelerator, folder: Path, modules: Mapping[str, nn.Module] | None = None) -> None:
    """Load what `save_checkpoint` wrote beside the state, without running any code that a file may hold.

    Raises ValueError, with the file's name, for one that cannot be loaded: pickles of anything but tensors and plain
    data are refused.
    """
    _refuse_code(folder, ".pkl")  # which accelerate goes on without if it cannot read them
    _refuse_other_layout(accelerator, folder)
    try:
        accelerator.load_state(str(folder))
        for name, module in (modules or {}).items():
            file = str(folder / f"{name}.safetensors")
            if is_sharded_model(module):
                load_whole(module, load_file(file))
            else:
                load_model(module, file)
    except (OSError, EOFError, RuntimeError, SafetensorError, CheckpointException, pickle.UnpicklingError) as error:
        _refuse_code(folder, ".bin")
        raise ValueError(f"{folder} cannot be resumed from: {type(error).__name__}: {error}") from error


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by step, the oldest first."""
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


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file != folder / STATE and file.is_file():
            sha = hashlib.sha256()
            with file.open("rb") as content:
                while block := content.read(2**20):
                    sha.update(block)
            digests[file.relative_to(folder).as_posix()] = sha.hexdigest()
    return digests


def _refuse_other_layout(accelerator: Accelerator, folder: Path) -> None:
    """Raise ValueError for weights that were saved whole and are sharded now, or the other way round, or hold code."""
    layouts = {"whole": "model.safetensors", "sharded by FSDP2": "pytorch_model_fsdp*", "in DeepSpeed's engine": FOLDER}
    now = "sharded by FSDP2" if is_mesh(accelerator) else "in DeepSpeed's engine" if is_engine(accelerator) else "whole"
    was = next((layout for layout, pattern in layouts.items() if list(folder.glob(pattern))), now)
    if was != now:
        raise ValueError(
            f"{folder} cannot be resumed from: its weights were {was}, and are {now} here. Start as it was started, or "
            "begin anew from the weights that a finished run wrote"
        )
    if is_engine(accelerator):
        refuse_other_partitions(accelerator, folder)
    parts = [(refuse_code, file.parent, file.parent.name) for file in sorted(folder.glob(f"*/{METADATA}"))]
    for refuse, place, name in [*parts, (refuse_engine_code, folder, FOLDER)]:
        try:
            refuse(place)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{folder} cannot be resumed from: {name} holds more than tensors and plain data, or "
                f"is cut short ({error})"
            ) from error


def _refuse_code(folder: Path, suffix: str) -> None:
    """Raise ValueError for files that cannot be read without running code in them."""
    for file in sorted(folder.glob(f"*{suffix}")):
        try:
            load(file, map_location="cpu")
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{folder} cannot be resumed from: {file.name} holds more than tensors and plain data, or is cut short"
            ) from error


def _flush(file: Path) -> None:
    """Have the file on disk, not only in memory, before a rename says that it is."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
