"""How many micro-steps a window will have where Accelerate counts them: `Accelerator(gradient_accumulation_steps=K)`.

`Accelerator.accumulate` ends a window at its K-th micro-step, and at every one on the loader's last batch. Which batch
a loader is at, nothing says but `batch_index`, a local variable of the generator that the loop iterates over: it is
looked for once a pass, among the garbage collector's objects. Counting micro-steps is not a substitute: loops skip
batches, also before the first micro-step, and split them.

Inexact, as it cannot be known ahead, is a window near an epoch's end if batches that it counts on are skipped or never
drawn, or if their split into micro-steps changes or was not seen yet, in a run's first batch. So is one in which K
changes, or `accumulate` is entered without a forward pass.
"""

import gc
from dataclasses import dataclass
from types import FunctionType, GeneratorType
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.data_loader import SkipDataLoader
from accelerate.state import GradientState, is_initialized

Begun = tuple[int, int, int]  # loader, passes over it that it completed, loaders begun: changes as a pass begins


@dataclass
class _Pass:
    """batches: that it had yielded at the last micro-step, 0 if unknown. micro_steps: that the last of them had."""

    begun: Begun | None = None
    batches: int = 0
    micro_steps: int = 0


class Accumulation:
    """Call `advance` as a micro-step begins; `length` is then that of a window that begins with it."""

    def __init__(self) -> None:
        self._passes: WeakKeyDictionary[GeneratorType[Any, Any, Any], _Pass] = WeakKeyDictionary()
        self._pass = _Pass()
        self._found = False  # whether it is one of those
        self._split = 1  # micro-steps of the last whole batch

    def advance(self) -> None:
        """Count one more micro-step."""
        if self.steps == 1 or not GradientState().sync_with_dataloader:
            return
        loaders = GradientState().dataloader_references
        loader = loaders[-1]
        begun = (id(loader), getattr(loader, "iteration", 0), len(loaders))
        running = self._running(begun)
        if not running and (self._found or begun != self._pass.begun):
            for generator in _generators(loader) if _has_index(loader) else []:
                self._passes.setdefault(generator, _Pass()).begun = begun
            running = self._running(begun)
            self._pass = _Pass(begun)
        self._found = bool(running)
        batches = 0
        if running:  # more than one where an iterator was left half way and kept: a new one, else the one that moved
            self._pass, batches = max(running, key=lambda one: self._rank(*one))
        elif not _has_index(loader) and not isinstance(loader, SkipDataLoader):  # that one never says that it ends
            batches = self._pass.batches + 1
        if batches == self._pass.batches:
            self._pass.micro_steps += 1
        else:
            self._split = self._pass.micro_steps or self._split
            self._pass.micro_steps = 1
        for one, now in [*running, (self._pass, batches)]:
            one.batches = now

    def _rank(self, one: _Pass, batches: int) -> tuple[bool, bool, bool]:
        return one.batches == 0, one.batches != batches, one is self._pass

    def _running(self, begun: Begun) -> list[tuple[_Pass, int]]:
        found = [(one, _yielded(generator)) for generator, one in self._passes.items() if one.begun == begun]
        return [(one, batches) for one, batches in found if batches]

    @property
    def steps(self) -> int:
        """Micro-steps of a full window; 1 without Accelerate."""
        return GradientState().num_steps if is_initialized() else 1

    @property
    def length(self) -> int:
        """Micro-steps of the window that begins with the one just counted, as well as can be known."""
        steps = self.steps
        if steps == 1 or not (state := GradientState()).sync_with_dataloader:
            return steps
        if state.end_of_dataloader:
            return 1
        try:
            to_come = len(state.active_dataloader) - self._pass.batches
        except (TypeError, NotImplementedError):  # no loader, or one without a length
            return steps
        if self._pass.batches == 0 or to_come < 1:
            return steps
        split = max(self._split, self._pass.micro_steps)
        return min(steps, split * to_come - self._pass.micro_steps + 2)


def _generators(loader: Any) -> "list[GeneratorType[Any, Any, Any]]":
    """Those of the passes over the loader that are going on, as a rule the newest first."""
    for generation in range(3):  # the youngest objects first: of those there are few, in all it can be a million
        generators = [one for one in gc.get_objects(generation) if type(one) is GeneratorType]
        generators = [one for one in generators if "batch_index" in one.gi_code.co_varnames]
        found = [one for one in generators if _locals(one).get("self") is loader and _yielded(one)]
        if found:
            return found[::-1]
    return []


def _locals(generator: "GeneratorType[Any, Any, Any]") -> Any:
    return generator.gi_frame.f_locals if generator.gi_frame else {}


def _yielded(generator: "GeneratorType[Any, Any, Any]") -> int:
    """Batches that the loop got, with those it skipped; 0 if the pass did not begin, or has ended."""
    names: dict[str, Any] = _locals(generator)
    # A resumed stateful loader counts from 0 again; its iterator does not, which is a batch ahead, as torch's is.
    ahead = int(getattr(names.get("dataloader_iter"), "_num_yielded", 0))
    return max(int(names.get("batch_index", -1)) + 1, ahead - 1)


def _has_index(loader: Any) -> bool:
    functions = [vars(one).get("__iter__") for one in type(loader).__mro__]
    return any("batch_index" in one.__code__.co_varnames for one in functions if isinstance(one, FunctionType))
