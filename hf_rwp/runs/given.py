"""The flags that a run was given, kept in its folder: whoever resumes or evaluates it need not type them again.

given = with_those_of_the_run(split_flags(argv, names), default_folder)
join_flags(given.of_the_run) + argv         # what the run is, and what is said now, which wins
save_flags(folder, given.flags)             # when training begins
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from hf_rwp.runs.files import as_json, write
from hf_rwp.runs.folders import latest_folder

Flags: TypeAlias = Mapping[str, Sequence[str]]  # by name, as they were typed

FLAGS = "_flags.json"  # a name that Trainer's own pushes leave out: it has paths of this machine
OF_A_SESSION = {"config", "config_ignore_unknown", "eval_only", "output_dir", "overwrite_output_dir"}
OF_A_SESSION |= {"resume_from_checkpoint"}
# These may be a folder's or a file's bare name.
_PLACES = {"data_dir", "data_file", "dataset", "known_file", "model_name_or_path", "pretrained"}
_SECRET = re.compile(r"(^|_)token$")


@dataclass(frozen=True)
class Given:
    """flags: all that a run was given, in this session and before, by name.

    run: the folder of the run that it goes on from, or that is evaluated; None for a new one, or where none is kept.
    of_the_run: the flags kept there. anew: those of now that it did not have, or had otherwise.
    """

    flags: Flags = field(default_factory=dict)
    run: Path | None = None
    of_the_run: Flags = field(default_factory=dict)
    anew: Flags = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a user needs to know of it; empty for a new run."""
        if self.run is None:
            return []
        said = [f"flags: those of the run in {self.run}, which need not be given again"]
        for name, values in self.anew.items():
            before = self.of_the_run.get(name)
            had = "is not set there" if before is None else f"is {' '.join(before) or 'true'} there"
            said.append(f"given now: {name}={' '.join(values) or 'true'}, which {had}")
        return said


def split_flags(argv: Sequence[str], names: Collection[str]) -> dict[str, list[str]]:
    """The words of a command line by flag, the last of each; `--no_x` is x=false, where x is one of the names.

    Tokens are left out.
    """
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if given else []
        if name not in names and name.removeprefix("no_") in names:
            name, values = name.removeprefix("no_"), ["false"]
        flags.pop(name, None)
        flags[name] = values
    return {name: values for name, values in flags.items() if not _SECRET.search(name)}


def join_flags(flags: Flags) -> list[str]:
    """A command line of them."""
    words: list[str] = []
    for name, values in flags.items():
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return words


def with_those_of_the_run(flags: Flags, default_folder: Callable[[], str], names: Collection[str]) -> Given:
    """The flags given, and those kept by the run that `--resume_from_checkpoint` names.

    default_folder: the output_dir where none is given, the first of its row. names: of all flags. Raises ValueError
    for a run of flags that are not among them, and for a file that is damaged.
    """
    wanted = _last(flags, "resume_from_checkpoint")
    if wanted is None:
        return Given(flags)
    output_dir = _last(flags, "output_dir")
    if wanted == "latest":
        folder = Path(output_dir) if output_dir is not None else latest_folder(Path(default_folder()))
    else:
        place = existing_run(wanted)
        folder = next((path for path in (place, *place.absolute().parents[:2]) if (path / FLAGS).is_file()), place)
    if not (folder / FLAGS).is_file():  # of an earlier version
        return Given(flags)
    own = _read(folder / FLAGS)
    foreign = sorted(own.keys() - {*names})
    if foreign:
        raise ValueError(
            f"{folder} holds a run of another recipe or version, which was given --{foreign[0]}: resume it with that"
        )
    kept = {name: [str(_absolute(name, value)) for value in values] for name, values in _lasting(flags).items()}
    anew = {name: values for name, values in kept.items() if own.get(name) != values}
    own["output_dir"] = [str(folder)]
    return Given({**own, **flags}, folder, own, anew)


def existing_run(wanted: str) -> Path:
    """What `--resume_from_checkpoint` names by its path. Raises ValueError where nothing is there."""
    place = Path(wanted).expanduser()
    if not place.exists():
        beside = [path.name for path in place.parent.iterdir() if path.is_dir()] if place.parent.is_dir() else []
        near = difflib.get_close_matches(place.name, beside, n=1)
        meant = f"; did you mean {place.parent / near[0]}?" if near else ": name a run's folder, or latest"
        raise ValueError(f"resume_from_checkpoint={wanted!r} does not exist{meant}")
    return place


def save_flags(folder: Path, flags: Flags) -> None:
    """Keep the flags in a run's folder, without those of one session; paths become absolute."""
    kept = {name: [_absolute(name, value) for value in values] for name, values in _lasting(flags).items()}
    write(folder / FLAGS, as_json(kept))


def _read(file: Path) -> dict[str, list[str]]:
    try:
        flags = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): [str(value) for value in values] for name, values in flags.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not hold the flags of a run ({error}): remove it, and give the flags") from error


def _lasting(flags: Flags) -> dict[str, Sequence[str]]:
    return {name: values for name, values in flags.items() if name not in OF_A_SESSION}


def _absolute(name: str, value: str) -> str:
    """A path that exists, wherever one stands; all else as it is."""
    path = Path(value).expanduser()
    is_path = name in _PLACES or os.sep in value
    return str(path.absolute()) if is_path and path.exists() else value


def _last(flags: Flags, name: str) -> str | None:
    values = flags.get(name)
    return values[-1] if values else None
