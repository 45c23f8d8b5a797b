"""How a program ends at its user's mistake: one line, `error: ...`, the last on the screen, and exit status 2.

A mistake is what this package or the script itself refuses: an exception that a `raise` of theirs begins. So are files
that may not be written, a full disk, a file that was typed and is not there, what Hugging Face's libraries cannot find
or reach, and too little memory. What else fails is a bug, and keeps its traceback; HF_RWP_TRACEBACK=1 shows that of
mistakes as well.

Of processes that were started together the main one says it. What torch's elastic agent starts (torchrun, `accelerate
launch`, `hf-rwp --processes`) leaves it in the agent's error file too, so that what only another process has seen is
in the agent's report; `hf-rwp` says it in their place, once all of them have ended.
"""

import argparse
import contextlib
import difflib
import errno
import json
import linecache
import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, NoReturn

from hf_rwp.runs.hints import no_such_flags
from hf_rwp.runs.out_of_memory import advice
from hf_rwp.runs.signals import Terminated, name_and_status, raised_at_sigterm

STATUS = 2  # argparse's own
PROGRAM = "HF_RWP_PROGRAM"  # how the program was called, where that is not its file
OF_THE_LAUNCHER = "HF_RWP_LAUNCHER"  # set where `hf-rwp` says what its processes leave in the agent's error files
_SHOWS_ALL = "HF_RWP_TRACEBACK"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_REFUSALS = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)
_OF_A_NAME = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}  # for a file that was typed
_SOURCES = ("transformers", "datasets", "huggingface_hub", "peft", "trl")
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def shows_all() -> bool:
    """Whether HF_RWP_TRACEBACK turns tracebacks and launchers' reports on."""
    return os.environ.get(_SHOWS_ALL, "0") not in ("", "0")


@contextlib.contextmanager
def told_in_a_line(arguments: Any = None, ahead: bool = False) -> Iterator[None]:
    """What fails within is told and ends the process, if it is a mistake. So does Ctrl-C, and SIGTERM in a recipe.

    arguments: a recipe's flags, for what to try where memory ends; their method `kept`, if they have one, says what a
    recipe that is stopped has kept and how to go on, or None. ahead: whether what is within only reads what a user
    wrote, so that whatever is refused is a mistake, and every process refuses it.
    """
    try:
        with raised_at_sigterm() if arguments is not None else contextlib.nullcontext():
            yield
    except KeyboardInterrupt as stopped:
        if shows_all():
            raise
        name, status = name_and_status(stopped)
        kept = getattr(arguments, "kept", lambda: None)()
        by_agent = isinstance(stopped, Terminated) and _ERROR_FILE in os.environ  # at another process's failure, too
        if os.environ.get("RANK", "0") == "0" and (kept or not by_agent):
            tell(f"\nstopped by {name}: {kept or 'what was not saved before is lost'}")
        raise SystemExit(status) from None
    except Exception as error:
        line = _line(error, arguments, ahead)
        if line is None or shows_all():
            raise
        refuse(line, ahead)


def refuse(line: str, everywhere: bool = False) -> NoReturn:
    """Tell a mistake and exit. everywhere: whether all processes do."""
    line = f"error: {' '.join(line.split())}"
    file, is_main = os.environ.get(_ERROR_FILE), os.environ.get("RANK", "0") == "0"
    if file:
        with contextlib.suppress(OSError):
            message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    if not (file and OF_THE_LAUNCHER in os.environ) and (is_main or not (file or everywhere)):
        tell(line)
    raise SystemExit(STATUS)


def tell(line: str) -> None:
    """Print a line on stderr below all that is on the screen, bars of progress included."""
    sys.stdout.flush()
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr, flush=True)


def told_by_processes(failures: Iterable[Any]) -> str | None:
    """The line that the first of them left in the agent's error file; None where none has.

    failures: those of `ChildFailedError`.
    """
    said = [(failure.timestamp, failure.message) for failure in failures if isinstance(failure.message, dict)]
    return min(said, key=itemgetter(0))[1]["message"] if said else None


class Parser(argparse.ArgumentParser):
    """Raises ValueError, with what was meant, where argparse would print its usage and exit."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ValueError(
                no_such_flags(unknown, [flag[2:] for flag in self._option_string_actions if flag[:2] == "--"])
            )
        return options

    def error(self, message: str) -> NoReturn:
        raise ValueError(in_words(message))


def in_words(message: str) -> str:
    """What argparse says of a value, with the flag as a user writes it, and what was probably meant."""
    found = re.fullmatch(r"argument (-[^/:]*)(?:/[^:]*)?: (.*)", message, re.DOTALL)
    if not found:
        return message
    flag, said = found.groups()
    choice = re.fullmatch(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", said, re.DOTALL)
    if choice:
        value, listed = choice[1], [name.strip(" '\"") for name in choice[2].split(",")]
        meant = difflib.get_close_matches(value.lower(), listed, 1)
        return f"{flag} must be one of {', '.join(listed)}, got {value!r}" + "".join(
            f"; did you mean {name}?" for name in meant
        )
    kind = re.fullmatch(r"invalid (\w+) value: (.*)", said, re.DOTALL)
    kinds = {"int": "a whole number", "float": "a number"}
    if kind and kind[1] in kinds:
        return f"{flag} must be {kinds[kind[1]]}, got {kind[2]}"
    truth = re.match(r"Truthy value expected: got (.*) but expected one of", said)
    if truth:
        return f"{flag} must be true or false, got {truth[1]!r}"
    return f"{flag} {said}" if said.startswith("expected") else f"{flag}: {said}"


def _line(error: Exception, arguments: Any, ahead: bool) -> str | None:
    """What to say of an error; None for a bug."""
    said = advice(error, arguments)
    if said is not None:
        return said
    if isinstance(error, _REFUSALS) and (ahead or _is_refusal(error.__traceback__)):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        typed = {word.rpartition("=")[2] for word in sys.argv[1:]}
        if error.errno in _OF_THE_MACHINE or (error.errno in _OF_A_NAME and str(error.filename) in typed):
            return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno is None and _raised_in(error, _SOURCES):
        return str(error)  # what they could not find or reach, in their words
    return None


def _raised_in(error: Exception, packages: Collection[str]) -> bool:
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] in packages


def _is_refusal(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is a `raise` in this package or beside the script, and not a failure elsewhere."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = Path(traceback.tb_frame.f_code.co_filename).absolute()
    line = linecache.getline(str(file), traceback.tb_lineno).strip()
    ours = Path(__file__).parents[1] in file.parents or file.parent == Path(sys.argv[0]).absolute().parent
    return line.startswith("raise") and ours
