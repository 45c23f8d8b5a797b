"""What others do to weights while noise is in them: writes, which the way back would undo, and copies."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_rwp.core.draws import Draws, Target

COMPARISONS = 2  # perturbations in which every weight is compared with what it must be


class Writes:
    """Notices what others write into noisy weights.

    A change of a weight's version tells of it; so that writes through `.data` are noticed too, the first perturbations
    compare every weight. A weight counts as written if it is not, bit for bit, its clean values plus its noise.
    """

    def __init__(self) -> None:
        self.found: list[str] = []  # names of weights
        self._comparisons, self._compares = COMPARISONS, False  # left, and whether this is one
        self._open = False  # whether writes may have gone unnoticed
        self._drawn: tuple[Sequence[Target], Sequence[Tensor], Sequence[int]] = [], [], []
        self._versions: list[tuple[int, int]] = []  # of the targets' weights, with their noise
        self._others: set[int] = set()  # indices of weights whose clean values are others than the noise was added to

    def begin(self, targets: Sequence[Target], stds: Sequence[Tensor], seeds: Sequence[int]) -> None:
        """Noise is in the targets' weights now, and nothing else has happened."""
        self.found, self._drawn, self._others = [], (targets, stds, seeds), set()
        self._versions = [_version(target) for target in targets]
        self._compares, self._comparisons = self._comparisons > 0, self._comparisons - 1
        self._open = True

    def look(self, clean: Sequence[Tensor], draws: Draws) -> None:
        """Look for writes so far, with the noise in the weights, and no more until it is `resumed`.

        clean: the weights' clean values, in the same order, and perhaps more.
        """
        if not self._open:
            return
        for index, (target, std, seed, own) in enumerate(zip(*self._drawn, clean, strict=False)):
            suspect = self._compares or _version(target) != self._versions[index]
            if not suspect or target.name in self.found or own.shape != target.local.shape:
                continue  # another shape is another failure, which is told by name
            if index in self._others or not draws.holds(target, std, seed, own):
                self.found.append(target.name)
        # Writes so far are judged: only those between `look` and `resumed` replace the clean values.
        self._versions = [_version(target) for target in self._drawn[0]]
        self._open = False

    def resumed(self) -> None:
        """The noise was suspended, when weights may be written to, and is there again."""
        now = [_version(target) for target in self._drawn[0]]
        self._others |= {index for index, version in enumerate(now) if version != self._versions[index]}
        self._versions = now
        self._compares, self._open = False, True

    def end(self) -> list[str]:
        """The names of the weights that were written to."""
        found, self.found, self._drawn, self._versions = self.found, [], ([], [], []), []
        return found


def _version(target: Target) -> tuple[int, int]:
    """A DTensor counts its own changes, and its local tensor those that are made to it directly."""
    return target.weight._version, target.local._version


class Copies:
    """Whoever copies or pickles a noisy tensor between a forward and its backward pass gets a clean one."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def guard(self, pairs: Sequence[tuple[Tensor, Tensor]], clean: Callable[[], Any]) -> None:
        """Until `release`, call `clean` ahead of a copy of a tensor, which must release it, and copy its counterpart.

        pairs: tensors and their counterparts, themselves but for buffers that a pass put in the place of others.
        """
        self._tensors = [tensor for tensor, _ in pairs]
        for tensor, counterpart in pairs:  # Python asks an object itself before its class
            tensor.__dict__["__deepcopy__"] = functools.partial(_deepcopied, counterpart, clean)
            tensor.__dict__["__reduce_ex__"] = functools.partial(_reduced, counterpart, clean)

    def release(self) -> None:
        for tensor in self._tensors:
            tensor.__dict__.pop("__deepcopy__", None)
            tensor.__dict__.pop("__reduce_ex__", None)
        self._tensors = []


def _deepcopied(tensor: Tensor, clean: Callable[[], Any], memo: Any) -> Any:
    clean()
    return copy.deepcopy(tensor, memo)


def _reduced(tensor: Tensor, clean: Callable[[], Any], protocol: Any) -> Any:
    clean()
    return tensor.__reduce_ex__(protocol)
