"""Run a program as `python ...` would, in a process of its own that need not import what is slow anew.

`run("recipe.py", "--flag")` forks it from the server of `distributed`, which has imported torch and the like already.
It has arguments, environment, folder, screen and exit status of its own. Not for what a program imports, nor for
variables that libraries read when they are imported: `subprocess` is.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import distributed


def run(
    *arguments: Any, cwd: str | Path | None = None, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` ended with; arguments: a script, `-c CODE` or `-m MODULE`, and its flags.

    environment: variables beside this process's. timeout: seconds, after which it is killed, and TimeoutExpired raised.
    """
    words = [str(argument) for argument in arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with TemporaryDirectory() as folder:
        for name in ("stdout", "stderr"):
            Path(folder, name).touch()
        process = distributed.context().Process(target=_run, args=(words, variables, str(cwd or Path.cwd()), folder))
        process.start()
        process.join(timeout)
        status, output, error = process.exitcode, *(Path(folder, name).read_text() for name in ("stdout", "stderr"))
        process.kill()  # where it did not end
        process.join()
    if status is None:
        raise subprocess.TimeoutExpired(words, timeout, output, error)
    return subprocess.CompletedProcess(words, status, output, error)


def _run(words: list[str], environment: Mapping[str, str], cwd: str, folder: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
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
