"""The folder of a run whose flags name none: outputs/NAME, then outputs/NAME/2, outputs/NAME/3, ..., a new one each."""

import atexit
import contextlib
import itertools
from pathlib import Path

_CHECKPOINTS = ("checkpoints/step_*[0-9]", "checkpoint-*[0-9]/trainer_state.json")


def new_folder(first: Path) -> Path:
    """Make and return the first folder in the row that is not there: no two processes get the same one.

    It goes again when this process ends, if nothing was written into it, and so do those above it that were made.
    """
    made = list(itertools.takewhile(lambda parent: not parent.exists(), first.parents))
    first.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = _numbered(first, number)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        atexit.register(_remove_empty, folder, *made)
        return folder


def unfinished(folder: Path) -> bool:
    """Whether a run is there that was cut, and can go on."""
    return not (folder / "results.json").exists() and any(any(folder.glob(pattern)) for pattern in _CHECKPOINTS)


def latest_folder(first: Path) -> Path:
    """The last in the row that holds a checkpoint; the first where none does."""
    there = itertools.takewhile(Path.is_dir, (_numbered(first, number) for number in itertools.count(1)))
    resumable = [folder for folder in there if any(any(folder.glob(pattern)) for pattern in _CHECKPOINTS)]
    return resumable[-1] if resumable else first


def _numbered(first: Path, number: int) -> Path:
    return first if number == 1 else first / str(number)


def _remove_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that is not empty, or gone
        for folder in folders:
            folder.rmdir()
