"""The progress of trainings that take turns: on a terminal a line for each, in place; in a pipe a line now and then."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

SILENCE = 60  # seconds, in a pipe


class Lanes:
    """A lane for each name, and an epoch of all of them at a time, between `with` and its end.

    epochs: of each. In a pipe there is a line every tenth of them, and wherever a minute has passed without one.
    """

    def __init__(self, names: Sequence[str], epochs: int, label: str = "") -> None:
        self.epochs, self._label = epochs, f"{label}, " if label else ""
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._start = self._said = time.monotonic()
        self._bars = {}
        if sys.stdout.isatty():
            width = max(map(len, names))
            form = "{desc} {bar} {n_fmt:>2}/{total_fmt}{postfix}, {remaining} left"
            for place, name in enumerate(names):
                self._bars[name] = tqdm(
                    desc=name.ljust(width),
                    total=epochs,
                    bar_format=form,
                    position=place,
                    dynamic_ncols=True,
                    mininterval=0,
                    file=sys.stdout,
                )

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, name: str, row: Mapping[str, Any]) -> None:
        """An epoch of `name` is over. row: its figures, top1, gradients (of an image) and seconds (of training)."""
        self._rows[name] = row
        if name in self._bars:
            bar = self._bars[name]
            bar.set_postfix_str(
                f"{100 * row['top1']:5.1f} % right, {row['gradients']:.0f} gradients, {row['seconds']:.1f} s",
                refresh=False,
            )
            bar.update()

    def end_epoch(self, epoch: int) -> None:
        """All lanes have ended this epoch, counted from 1."""
        now = time.monotonic()
        tenths = [round(self.epochs * part / 10) for part in range(1, 11)]
        if self._bars or (epoch not in tenths and now - self._said < SILENCE):
            return
        self._said, taken = now, now - self._start
        right = ", ".join(f"{name} {100 * row['top1']:.1f} %" for name, row in self._rows.items())
        left = f"{taken * (self.epochs - epoch) / epoch:.0f} s left" if epoch < self.epochs else "done"
        print(f"{self._label}epoch {epoch:>2}/{self.epochs}: {right}; {taken:.0f} s, {left}", flush=True)
