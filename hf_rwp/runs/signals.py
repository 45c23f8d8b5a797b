"""SIGTERM and Ctrl-C while a run trains: the first is noted, for the run to save and stop; a second Ctrl-C ends it.

Elsewhere a recipe ends at SIGTERM as it does at Ctrl-C.
"""

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PREEMPTED = 75  # the exit status after SIGTERM, once a checkpoint is saved: EX_TEMPFAIL, "try again later"
INTERRUPTED, TERMINATED = 130, 143  # after Ctrl-C and SIGTERM, as shells have it
_SAID = b"\nCtrl-C: saves a checkpoint and stops; again to stop at once, without it\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `raised_at_sigterm`: what ends at Ctrl-C ends at it in the same way."""


def name_and_status(stopped: KeyboardInterrupt) -> tuple[str, int]:
    """What ended a program, and what it exits with."""
    return ("SIGTERM", TERMINATED) if isinstance(stopped, Terminated) else ("Ctrl-C", INTERRUPTED)


@contextlib.contextmanager
def raised_at_sigterm() -> Iterator[None]:
    """Within, the first SIGTERM to this process raises `Terminated`, unless something handles it already."""
    is_free = threading.current_thread() is threading.main_thread()
    if not is_free or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == process:
            raise Terminated
        os.kill(os.getpid(), number)  # a worker that was forked ends without a word

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Signals:
    """Between `with` and its end, signals to this process are noted in `seen`; then they do what they did before.

    After a Ctrl-C a second one, or a SIGTERM, which launchers send when they get a second one, is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None

    def __enter__(self) -> "Signals":
        self.seen = None
        self._process = os.getpid()
        kinds = (signal.SIGTERM, signal.SIGINT)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.seen is signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = signal.Signals(number)
        if self.seen is signal.SIGINT and os.getpid() == self._process:  # and not in a worker that was forked
            os.write(2, _SAID)  # print could be interrupted in a print

    @property
    def status(self) -> int:
        """What the process exits with, once it has saved; of a replica that was told by another, that of SIGTERM."""
        return INTERRUPTED if self.seen is signal.SIGINT else PREEMPTED

    def saved(self, step: int, folder: object) -> str:
        """What to say once a checkpoint of the run in `folder` is saved."""
        name = "Ctrl-C" if self.seen is signal.SIGINT else "SIGTERM"
        return f"{name}: saved step {step}; --resume_from_checkpoint {shlex.quote(str(folder))} goes on"
