"""Run a program as `python ...` would, in a process of its own that need not import what is slow anew.

`run("recipe.py", "--flag")` forks it from the server of `distributed`, which has imported torch and the like already.
It has arguments, environment, folder, screen and exit status of its own, and leads a session, as of a shell. Not for
what a program imports, nor for variables that libraries read when they are imported: `subprocess` is.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import distributed
import torch


class Started:
    """A program that runs, with `pid`, that of its process group too."""

    def __init__(self, words: list[str], environment: Mapping[str, str], cwd: str, screens: tuple[Path, Path]) -> None:
        self.words, self._screens = words, screens
        self._process = distributed.context().Process(target=_run, args=(words, environment, cwd, screens))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def wait_for(self, text: str, timeout: float = 400) -> None:
        """Until its stdout has `text`. Raises AssertionError where it ended without, or did not get there in time."""
        deadline = time.monotonic() + timeout
        while text not in self._said()[0]:
            assert self.status is None, "\n".join(self._said())
            assert time.monotonic() < deadline, "\n".join(self._said())
            time.sleep(0.02)

    def end(self, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """What it ended with. Raises TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        status, said = self._process.exitcode, self._said()
        if status is None:
            raise subprocess.TimeoutExpired(self.words, timeout, *said)
        return subprocess.CompletedProcess(self.words, status, *said)

    def stop(self) -> None:
        """It and its children, where they did not end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()  # before it led a group
        self._process.join()

    def _said(self) -> tuple[str, str]:
        return self._screens[0].read_text(), self._screens[1].read_text()


@contextmanager
def started(*arguments: Any, cwd: str | Path | None = None, **environment: str) -> Iterator[Started]:
    """`python *arguments` while the block runs; arguments: a script, `-c CODE` or `-m MODULE`, and its flags.

    environment: variables beside this process's.
    """
    with TemporaryDirectory() as folder:
        screens = Path(folder, "stdout"), Path(folder, "stderr")
        for screen in screens:
            screen.touch()
        program = start(screens, *arguments, cwd=cwd, **environment)
        try:
            yield program
        finally:
            program.stop()


def start(screens: tuple[Path, Path], *arguments: Any, cwd: str | Path | None = None, **environment: str) -> Started:
    """`started` without an end. screens: files, or terminals, for its stdout and stderr."""
    words = [str(argument) for argument in arguments]
    return Started(words, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, str(cwd or Path.cwd()), screens)


def run(
    *arguments: Any, cwd: str | Path | None = None, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` ended with. timeout: seconds, after which it is killed, and TimeoutExpired raised."""
    with started(*arguments, cwd=cwd, **environment) as program:
        return program.end(timeout)


def _run(words: list[str], environment: Mapping[str, str], cwd: str, screens: tuple[Path, Path]) -> None:
    os.setsid()
    gc.freeze()  # what the server imported
    multiprocessing.set_start_method(None, force=True)  # or its own children would come from a fork server
    for descriptor, screen in enumerate(screens, 1):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which is read when torch is imported
    status = 1
    try:
        _as_python(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    multiprocessing.util._exit_function()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _as_python(words: list[str]) -> None:
    kind, *rest = words
    if kind == "-m":
        sys.argv = rest
        for name in (rest[0], f"{rest[0]}.__main__"):  # which tests may have imported
            sys.modules.pop(name, None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
