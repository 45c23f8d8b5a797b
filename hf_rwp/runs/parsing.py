"""How a recipe is started, and reads its flags: from the command line, a file, and the run that it goes on from.

from hf_rwp.runs.parsing import flags_first, start

@dataclass
class Arguments(...): ...

flags_first("NAME", __name__, Arguments, __doc__)  # ahead of imports that take seconds: --help, wrong flags

import torch
...
if __name__ == "__main__":
    start(main, Arguments, __doc__)
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from hf_rwp.runs.configs import read_config, where_in
from hf_rwp.runs.flags import FlagParser
from hf_rwp.runs.given import Given, existing_run, join_flags, split_flags, with_those_of_the_run
from hf_rwp.runs.hints import no_such_flags
from hf_rwp.runs.mistakes import told_in_a_line
from hf_rwp.runs.started import announce

Arguments = TypeVar("Arguments")


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """An instance of the dataclass `kind` from the command line, and from the file that `--config FILE.yaml` names.

    The file maps the same names to values, or timm's (`configs.RENAMED`); a flag on the command line overrides it.
    Where `--resume_from_checkpoint` names a run, that run's flags come first (`given.Given`, which the instance has as
    `given`). argv: None is the process's own. description: as `flags_first` has it. Where `kind` has a method
    `look_up`, it checks or settles what only imports of seconds tell; `look_ahead`, what can be told ahead of those, in
    a recipe. Raises ValueError for an unknown flag, for a value of another kind, and for a file of something else.
    """
    instance, given = _read(FlagParser(kind, description), kind, sys.argv[1:] if argv is None else argv)
    vars(instance)["given"] = given
    getattr(instance, "look_up", lambda: None)()
    found: Arguments = instance
    return found


def flags_first(
    command: str,
    module: str,
    kind: type[Any],
    description: str | None,
    argv: Sequence[str] | None = None,
    light: bool = True,
) -> None:
    """Answer `--help` and refuse wrong flags where a recipe is the program, ahead of the imports that take seconds.

    What takes those to find is left to `start`. command: the recipe's name, for the line that says it was started.
    module: its `__name__`. description: its docstring, whose first line and first commands head the help. argv: as
    `parse_arguments` has it. light: whether `kind` checks values without such imports (Trainer's arguments do not).
    """
    if module != "__main__":
        return
    with told_in_a_line(ahead=True):
        parse = _read if light else _words
        found = parse(FlagParser(kind, description or ""), kind, sys.argv[1:] if argv is None else argv, logs=False)
        _look_ahead(found[0])
    announce(command)


def values_first(module: str, kind: type[Any], argv: Sequence[str] | None = None) -> None:
    """Refuse values out of range where a recipe is the program, ahead of the imports that all of its flags need.

    kind: a dataclass of those flags that need none of them; others are passed over. Where a run goes on, its own flags
    count as well, and all of them are checked later. module, argv: as `flags_first` has them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if module != "__main__" or {"-h", "--help"} & {*words}:
        return
    with told_in_a_line(ahead=True):
        parser = FlagParser(kind)
        every, _ = _words(parser, kind, words, logs=False, others=True)
        runs = split_flags(words, ()).get("resume_from_checkpoint")
        for name in runs or ():
            if name != "latest":
                existing_run(name)
        if runs is None:
            found = parser.parse_args_into_dataclasses(every, return_remaining_strings=True, look_for_args_file=False)
            _look_ahead(found[0])


def start(
    main: Callable[[Any], None], kind: type[Any], description: str | None = "", argv: Sequence[str] | None = None
) -> None:
    """Run a recipe's `main` as a script does: a mistake takes a line (`mistakes`), and Ctrl-C none of a traceback.

    description, argv: as `flags_first` has them.
    """
    with told_in_a_line(ahead=True):
        arguments = parse_arguments(kind, argv, description or "")
    with told_in_a_line(arguments):
        main(arguments)


def _words(
    parser: FlagParser, kind: type[Any], argv: Sequence[str], logs: bool = True, others: bool = False
) -> tuple[list[str], Any]:
    """The words of the file and of the command line, each checked by itself, and the file's flags.

    others: whether flags that are not `kind`'s are passed over.
    """
    names = _names(kind)
    options, unknown = parser.parse_known_args(list(argv))
    if unknown and not others:
        raise ValueError(no_such_flags(unknown, [*names, "config", "config_ignore_unknown"]))
    settings = {}
    if options.config:
        settings = read_config(options.config, names, ignore=others or options.config_ignore_unknown, logs=logs)
        for name, values in settings.items():
            try:
                parser.parse_known_args(join_flags({name: values}))
            except ValueError as error:
                said = re.sub(r"^--", "", str(error))
                raise ValueError(f"{where_in(options.config, name)}: {said}") from None
    return [*join_flags(settings), *argv], settings  # as flags ahead of the others: the later flag wins


def _read(parser: FlagParser, kind: type[Any], argv: Sequence[str], logs: bool = True) -> tuple[Any, Given]:
    words, settings = _words(parser, kind, argv, logs)

    def default_folder() -> str:
        return str(_parsed(parser, [word for word in words if word.partition("=")[0] != "--eval_only"]).output_dir)

    given = with_those_of_the_run(settings | split_flags(argv, _names(kind)), default_folder, _names(kind))
    return _parsed(parser, [*join_flags(given.of_the_run), *words]), given


def _look_ahead(arguments: Any) -> None:
    """Have flags refuse what is not there, where they can tell without the imports that take seconds."""
    getattr(arguments, "look_ahead", lambda: None)()


def _parsed(parser: FlagParser, words: Sequence[str]) -> Any:
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]


def _names(kind: type[Any]) -> list[str]:
    return [flag.name for flag in fields(kind) if flag.init]
