"""How far the work is, for whoever watches: one bar on a terminal; lines in a pipe, a batch job or a notebook.

    progress = Progress(steps=epochs * updates, part=updates, images=64)   # on a main process
    progress.begin("epoch 1/10")       # what comes next, for the bar and the lines
    progress.advance()                 # after each step
    progress.note(loss=0.4121)         # for the bar from now on, and for the next line
    progress.say("warning: ...")       # any line, beside the bar
    progress.close()

A line is due a tenth of an epoch after the last one, but ten seconds after it at the earliest and a minute at the
latest: epochs of three seconds show one line each, at their end, and epochs of three hours one a minute.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hf_rwp.runs.records import Row
from hf_rwp.runs.screen import fitted

EARLIEST, LATEST = 10.0, 60.0  # seconds from one line to the next
_HAVE_HANDLERS = ("transformers", "datasets", "huggingface_hub")  # and may hand on to the root's as well
PARTS = 10  # lines in an epoch, where they are due between these two


class Progress:
    """What is done of a number of steps, and how long the rest will take.

    Args:
        steps (`int`):
            All of them, of all epochs.
        part (`int`, *optional*):
            Steps in an epoch, or in whatever takes its place; all if not set.
        done (`int`, *optional*, defaults to 0):
            Steps that are behind already, in an earlier session.
        images (`int`, *optional*, defaults to 1):
            How many of `unit` a step has.
        unit (`str`, *optional*, defaults to `"images"`):
            What speed is counted in.
        step (`str`, *optional*, defaults to `"step"`):
            What a step is called; `None` for percents in place of steps.
        shown (`bool`, *optional*, defaults to `True`):
            Whether anything is shown: on one process of many.
        bar (`bool`, *optional*):
            Whether it is a bar; where stderr is a terminal if not set.
        clock (`Callable`, *optional*):
            Seconds, from any beginning.
    """

    def __init__(
        self,
        steps: int,
        *,
        part: int | None = None,
        done: int = 0,
        images: int = 1,
        unit: str = "images",
        step: str | None = "step",
        shown: bool = True,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.done, self.images, self.unit, self.step, self.shown = steps, done, images, unit, step, shown
        self.part = part or max(1, steps)
        self._clock, self._figures, self.label = clock, dict[str, str](), ""
        self._bar: tqdm[Any] | None = None
        self._redirected = ExitStack()
        self._has_bar = shown and (sys.stderr.isatty() if bar is None else bar)
        now = clock()
        self._session = now, done  # whose pace the rest is foretold from: evaluations and what else comes between count
        self._begun = self._said = now, done

    def begin(self, label: str) -> None:
        """What comes next; the speed is that of steps from here on."""
        self.label, self._begun = label, (self._clock(), self.done)
        if self._bar is None and self._has_bar:
            form = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
            options: dict[str, Any] = {"smoothing": 0, "leave": False, "dynamic_ncols": True, "bar_format": form}
            self._bar = tqdm(total=self.steps, initial=self.done, desc=label, file=sys.stderr, **options)
            loggers = [logging.getLogger(name) for name in (None, *_HAVE_HANDLERS)]
            self._redirected.enter_context(logging_redirect_tqdm(loggers))  # warnings have lines of their own
            logging.getLogger().handlers[-1].addFilter(
                lambda record: record.name.partition(".")[0] not in _HAVE_HANDLERS
            )
        elif self._bar is not None:
            self._bar.set_description_str(label)
        else:
            self._figures = {}  # the line at the end of what came before had them

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._shown()), refresh=False)
            self._bar.update(steps)
        elif self.shown and self._is_due():
            self.say(self.line())
            self._figures = {}

    def skip(self, steps: int) -> None:
        """Steps that need not be done: they take no time, and tell nothing of the others' pace."""
        self.done += steps
        (session, first), (begun, at), (said, last) = self._session, self._begun, self._said
        self._session, self._begun, self._said = (session, first + steps), (begun, at + steps), (said, last + steps)
        if self._bar is not None:
            self._bar.initial += steps
            self._bar.update(steps)

    def note(self, **figures: float) -> None:
        """Figures by their names, which the bar has from now on, and the next line: no line repeats them."""
        self._figures = {name: f"{name} {value:.4f}" for name, value in figures.items()}

    def say(self, line: str) -> None:
        """Print a line to stdout, beside the bar."""
        if not self.shown:
            return
        if self._bar is not None:
            tqdm.write(fitted(line), file=sys.stdout)
            sys.stdout.flush()
        else:
            print(fitted(line), flush=True)
        self._said = self._clock(), self.done

    def line(self, figures: Mapping[str, str] | None = None) -> str:
        """Where the work is. figures: of a part that is done, by any names, in place of what was noted."""
        shown = self._shown() if figures is None else list(figures.values())
        at = f"{self.step} {self.done:,}/{self.steps:,}" if self.step else f"{self.done / self.steps:.0%}"
        where = f"{self.label}, {at}" if figures is None else f"{self.label} done"
        if self.done < self.steps and (left := self.seconds_left()) is not None:
            shown.append(f"{tqdm.format_interval(round(left))} left")
        return f"{where}: {', '.join(shown)}".removesuffix(": ")

    def seconds_left(self) -> float | None:
        """At the pace of this session; None before its first step."""
        began, before = self._session
        return (self._clock() - began) / (self.done - before) * (self.steps - self.done) if self.done > before else None

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._redirected.close()
            self._bar.close()
            self._bar = None

    def speed(self) -> float:
        """Images per second, or of another unit, since `begin`."""
        began, before = self._begun
        seconds = self._clock() - began
        return (self.done - before) * self.images / seconds if seconds > 0 else 0.0

    def _shown(self) -> list[str]:
        speed = self.speed()
        return [*self._figures.values(), *([_per_second(speed, self.unit)] if speed else [])]

    def _is_due(self) -> bool:
        when, at = self._said
        since = self._clock() - when
        enough = PARTS * (self.done - at) >= self.part and self.done % self.part > 0  # an epoch's end has its own line
        return since >= LATEST or (since >= EARLIEST and enough)


def nothing_left(all_of_it: str, flag: str) -> str:
    """What to say of a run that goes on where there is nothing to train."""
    return f"nothing is left to train: {all_of_it} are behind this run. A larger {flag} goes on"


def epoch_figures(row: Row, unit: str = "images") -> dict[str, str]:
    """The figures of an epoch that its line has; those per second are of its training. unit: what a second has."""
    shown = {"train_loss": "loss {:.4f}", "top1": "top-1 {:.2%}", "top1_ema": "of averaged weights {:.2%}"}
    shown |= {} if row.get("top1") is not None else {"eval_loss": "held-out loss {:.4f}"}
    values: dict[str, Any] = {**row}
    figures = {name: text.format(values[name]) for name, text in shown.items() if values.get(name) is not None}
    speed = row.get("images_per_second")
    return figures | ({"images_per_second": _per_second(speed, unit)} if speed else {})


def _per_second(speed: float, unit: str) -> str:
    return f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s"
