"""A terminal that is none: what a process, or this one, draws on its stderr."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest


def everything(file: int) -> str:
    """What can be read without waiting: a terminal gives it in pieces."""
    text = b""
    while select.select([file], [], [], 0)[0]:
        text += os.read(file, 2**16)
    return text.decode()


@contextmanager
def opened(columns: int) -> Iterator[tuple[int, int]]:
    """Our end of a terminal, and the other."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    yield ours, theirs
    for end in (ours, theirs):
        os.close(end)


@contextmanager
def on_stderr(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Iterator[Callable[[], str]]:
    """stderr is a terminal; gives a function that reads what was drawn there."""
    with opened(columns) as (ours, theirs), os.fdopen(os.dup(theirs), "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield partial(everything, ours)


def drawn_by(command: list[Any], columns: int = 80, **environment: str) -> tuple[int, str]:
    """The exit status of a process whose stderr is a terminal, and all that it drew there."""
    drawn = ""
    with opened(columns) as (ours, theirs):
        options: dict[str, Any] = {"stderr": theirs, "stdout": subprocess.DEVNULL, "env": os.environ | environment}
        with subprocess.Popen([*map(str, command)], **options) as process:
            while process.poll() is None:  # a terminal that nobody reads fills up
                select.select([ours], [], [], 0.1)
                drawn += everything(ours)
        return process.returncode, drawn + everything(ours)
