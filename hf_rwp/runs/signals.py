"""SIGTERM and Ctrl-C while a run trains: the first is noted, for the run to save and stop; a second Ctrl-C ends it."""

import os
import shlex
import signal
from types import FrameType

PREEMPTED = 75  # the exit status after SIGTERM, once a checkpoint is saved: EX_TEMPFAIL, "try again later"
INTERRUPTED = 130  # after Ctrl-C, as shells have it
_SAID = b"\nCtrl-C: saves a checkpoint and stops, at the next step that all replicas agree on; again to stop at once\n"


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
