"""What a run goes on from: the checkpoint that its flags name, and whether those flags fit it."""

import shlex
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from hf_rwp.runs.arguments import RunArguments
from hf_rwp.runs.checkpoints import newest, read_state
from hf_rwp.runs.folders import latest_folder, new_folder, unfinished
from hf_rwp.runs.given import FLAGS
from hf_rwp.runs.sharded import processes_per_replica

RESULTS = "results.json"
STATE = ("method", "arguments", "replicas", "step", "images", "seconds", "slots", "losses", "history")


def checkpoint_to_resume(
    wanted: str | None, output_dir: Path, checkpoints: Path, last: Path | None, *, finished: bool, overwrite: bool
) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None without the flag.

    wanted: the flag's value, not a run's folder. checkpoints: the folder that this run's checkpoints lie in, last: the
    newest of them. finished: whether output_dir holds a run's results. overwrite: whether a run that is there may
    be lost. Raises FileNotFoundError where there is no last one, FileExistsError where a run would be lost.
    """
    if wanted == "latest":
        if last is None:
            others = ", ".join(map(str, runs_beside(output_dir)))
            named = f"name another run's folder (there are {others}), or " if others else ""
            raise FileNotFoundError(
                f"{output_dir} holds no complete checkpoint: {named}start without --resume_from_checkpoint"
            )
        return last
    resume_from = Path(wanted) if wanted else None
    inside = resume_from is not None and resume_from.resolve().parent == checkpoints.resolve()
    if (last or finished) and not (inside or overwrite):
        what = "a finished run" if finished else "the checkpoints of an unfinished run"
        raise FileExistsError(
            f"{output_dir} holds {what}: set another --output_dir, or --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to delete it"
        )
    return resume_from


def settle_folder(args: Any) -> None:
    """Set `args.output_dir`, where no flag did, to the folder that all processes of this run share. Collective.

    args: `numbered` says whether no flag named it; output_dir is the first of its folders then, and stays so for what
    goes on there, evaluates or overwrites. Raises ValueError on all processes where nothing can be written.
    """
    if not args.numbered:
        return
    first, state, failure = Path(args.output_dir), PartialState(), ""
    folder = first
    if state.is_main_process and not (args.overwrite_output_dir or args.eval_only):
        try:
            check_writable(first)
            if args.resume_from_checkpoint is None:
                before, folder = latest_folder(first), new_folder(first)
                if unfinished(before):
                    where = shlex.quote(str(before))
                    print(f"{before} has a run that was cut: --resume_from_checkpoint {where} goes on")
            elif args.resume_from_checkpoint == "latest":
                folder = latest_folder(first)
        except (OSError, ValueError) as error:
            failure = str(error)
    said = [str(folder), failure]
    broadcast_object_list(said)
    if said[1]:
        raise ValueError(said[1])
    args.output_dir, args.numbered = said[0], False


def name_of(folder: Path) -> str:
    """Of a run's row of folders: NAME for outputs/NAME and, of the second run there, outputs/NAME/2."""
    folder = folder.absolute()
    return folder.parent.name if folder.name.isdigit() and (folder.parent / FLAGS).is_file() else folder.name


def runs_beside(output_dir: Path) -> list[Path]:
    """The folders beside one that hold a run's flags, at most five, the last written first."""
    files = [*output_dir.parent.glob(f"*/{FLAGS}"), *output_dir.parent.glob(f"*/[0-9]*/{FLAGS}")]
    found = sorted(files, key=lambda file: -file.stat().st_mtime)
    return [file.parent for file in found[:5]]


def find_checkpoint(args: RunArguments) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that the flags name and what a `Run` saved in it; None and {} for a run from the start.

    Raises as `checkpoint_to_resume` does, and ValueError for a checkpoint that is not as it was written and for an
    output_dir that cannot be written to.
    """
    folder = Path(str(args.output_dir))
    checkpoints = folder / "checkpoints"
    wanted = args.resume_from_checkpoint
    if wanted not in (None, "latest") and (last := newest(Path(str(wanted)) / "checkpoints")):
        wanted = str(last)
    found = checkpoint_to_resume(
        wanted,
        folder,
        checkpoints,
        newest(checkpoints),
        finished=(folder / RESULTS).exists(),
        overwrite=args.overwrite_output_dir or args.eval_only,
    )
    state = read_state(found, needed=STATE) if found else {}
    check_writable(folder)
    return found, state


def changed_flags(flags: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The names of the flags whose values are not those that were saved, as far as both know them."""
    return [name for name in flags if name in saved and flags[name] != saved[name]]


def refuse_other_flags(flags: Mapping[str, Any], saved: Mapping[str, Any], kept: Collection[str], weights: str) -> None:
    """Raise ValueError for a flag whose old value comes back with the checkpoint.

    kept: their names. weights: the flag that starts from nothing but weights, as a user writes it.
    """
    changed = [name for name in changed_flags(flags, saved) if name in kept]
    if changed:
        raise ValueError(
            f"the checkpoint was written with {', '.join(f'{name}={saved[name]!r}' for name in changed)}, and keeps "
            f"that: resume with the same, or start again from the weights ({weights})"
        )


def check_flags(
    accelerator: Accelerator,
    flags: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    kept: Collection[str],
    harmless: Collection[str],
    weights: str,
) -> None:
    """Raise ValueError for flags that a checkpoint would silently override, warn of others that changed.

    state: as `find_checkpoint` gives. kept, weights: as `refuse_other_flags` takes them. harmless: what may change.
    """
    if not state:
        return
    saved, replicas, each = state["arguments"], accelerator.num_processes, processes_per_replica(accelerator)
    refuse_other_flags(flags, saved, kept, weights)
    was = [f"{state['replicas']} replicas and not {replicas}"] if replicas != state["replicas"] else []
    if (before := state.get("processes_per_replica", 1)) != each:
        was += [f"{before} processes to a copy of the weights and not {each}"]
    changed = [name for name in changed_flags(flags, saved) if name not in harmless]
    was += [f"{name}={saved[name]!r} and not {flags[name]!r}" for name in changed]
    if was:
        accelerator.print(
            f"warning: the checkpoint was written with {', '.join(was)}. Training goes on after the images that were "
            "seen; what else depends on it (batches, the schedule, noise, which gradients are perturbed) changes, and "
            "it will not end in the same bits",
            file=sys.stderr,
        )


def check_writable(output_dir: Path) -> None:
    """Raise ValueError now, not after the first epoch. The folder is made only once there is something to write."""
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} cannot be written to ({error}): set another one") from error
