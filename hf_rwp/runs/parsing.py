"""How a recipe is started, and reads its flags: from the command line, a file, and the run that it goes on from."""

import linecache
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from transformers import HfArgumentParser

from hf_rwp.runs.configs import read_config
from hf_rwp.runs.given import join_flags, split_flags, with_those_of_the_run
from hf_rwp.runs.hints import no_such_flags
from hf_rwp.runs.signals import INTERRUPTED

Arguments = TypeVar("Arguments")
_REFUSALS = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """An instance of the dataclass `kind` from the command line, and from the file that `--config FILE.yaml` names.

    The file maps the same names to values, or timm's (`configs.RENAMED`); a flag on the command line overrides it.
    Where `--resume_from_checkpoint` names a run, that run's flags come first (`given.Given`, which the instance has as
    `given`). argv: None is the process's own. Exits with a usage message for a flag or value that argparse refuses;
    raises ValueError for an unknown flag and for a file of something else.
    """
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="A file of flags, `name: value`; flags given here win.")
    parser.add_argument(
        "--config_ignore_unknown", action="store_true", help="Whether to pass over names in it that are not flags."
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [flag.name for flag in fields(kind) if flag.init]  # type: ignore[arg-type]
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(no_such_flags(unknown, [*names, "config", "config_ignore_unknown"]))
    settings = read_config(options.config, names, ignore=options.config_ignore_unknown) if options.config else {}
    # As flags ahead of the others they are checked and converted alike, and the later flag wins.
    words = [*join_flags(settings), *argv]

    def parsed(words: Sequence[str]) -> Any:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]

    def default_folder() -> str:
        return str(parsed([word for word in words if word.partition("=")[0] != "--eval_only"]).output_dir)

    given = with_those_of_the_run(settings | split_flags(argv, names), default_folder, names)
    instance: Arguments = parsed([*join_flags(given.of_the_run), *words])
    vars(instance)["given"] = given
    return instance


def start(
    main: Callable[[Any], None], kind: type[Any], description: str = "", argv: Sequence[str] | None = None
) -> None:
    """Run a recipe's `main` as a script does: what is refused by name takes a line, and Ctrl-C none of a traceback.

    argv: as `parse_arguments` has it. Exits with status 2 where flags are wrong, and with 1 for what `main` refuses.
    """
    status = 2
    try:
        arguments = parse_arguments(kind, argv, description=description)
        status = 1
        main(arguments)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C: what was not saved before is lost", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except _REFUSALS as error:
        if not _is_refusal(error.__traceback__):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status) from None


def _is_refusal(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is a `raise` in this package or beside the script, and not a failure elsewhere."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = traceback.tb_frame.f_code.co_filename
    ours = (Path(__file__).parents[1], Path(sys.argv[0]).absolute().parent)
    line = linecache.getline(file, traceback.tb_lineno).strip()
    return line.startswith("raise") and any(folder in Path(file).absolute().parents for folder in ours)
