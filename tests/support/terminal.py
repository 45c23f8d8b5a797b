"""A terminal that is none: what a process, or this one, draws on its stderr."""

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import forked
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


def drawn_by(*arguments: Any, until: str = "", columns: int = 80, **environment: str) -> tuple[int, str]:
    """The exit status of `python *arguments` on a terminal, and all that it drew there.

    until: what it draws before it gets Ctrl-C's signal, if any.
    """
    drawn = ""
    with opened(columns) as (ours, theirs):
        screen = Path(os.ttyname(theirs))
        program = forked.start((screen, screen), *arguments, **environment)
        try:
            while program.status is None:  # a terminal that nobody reads fills up
                select.select([ours], [], [], 0.02)
                drawn += everything(ours)
                if until and until in drawn:
                    os.kill(program.pid, signal.SIGINT)
                    until = ""
        finally:
            program.stop()
        return program.status, drawn + everything(ours)
