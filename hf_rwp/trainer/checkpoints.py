"""Trainer's checkpoints in a run's folder, `checkpoint-STEP`: which are complete, and which a run goes on from."""

import re
import shutil
from pathlib import Path
from typing import Any

from hf_rwp.runs.resuming import RESULTS, checkpoint_to_resume


def find_trainer_checkpoint(args: Any) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None without the flag.

    args: Trainer's, with overwrite_output_dir and eval_only. Raises FileNotFoundError for one that is not there or not
    complete, FileExistsError where a run would be lost.
    """
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted not in (None, "latest") and (inside := complete_checkpoints(Path(wanted))):  # a run's folder
        wanted = str(next(reversed(inside.values())))
    if wanted not in (None, "latest") and Path(wanted) not in complete_checkpoints(Path(wanted).parent).values():
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r} is neither a run's folder with checkpoints, nor a folder "
            "checkpoint-STEP with a trainer_state.json: set one that this recipe wrote, or latest"
        )
    last = next(reversed(complete_checkpoints(folder).values()), None)
    return checkpoint_to_resume(
        wanted,
        folder,
        folder,
        last,
        finished=(folder / RESULTS).exists(),
        overwrite=args.overwrite_output_dir or args.eval_only,
    )


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """By step, the oldest first. Trainer writes its state last: a kill in the middle of a save leaves none."""
    found = {step_of(path): path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()}
    return {step: found[step] for step in sorted(found) if step}


def remove_later_checkpoints(folder: Path, checkpoint: Path | None) -> None:
    """Delete those of steps beyond `checkpoint`'s, all of them without one: they are of another run."""
    for path in folder.glob("checkpoint-*"):
        if step_of(path) > (step_of(checkpoint) if checkpoint else 0):
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """0 for a folder of another kind."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else 0
