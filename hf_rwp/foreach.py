"""The norms and the noise of many weights at once: what `noise` says of one, on what their devices have.

1. On a CPU several threads take weights in turn: torch's generator fills a tensor on one, whatever their number.
2. On a GPU fused kernels (`kernels`) take all weights in a launch or two, where Triton is there and they pass a check;
   `noise` alone costs about four small launches a weight.

A weight's noise is a function of its seed, on any number of threads. The kernels draw other numbers than torch does.
"""

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Thread
from types import ModuleType

import torch
from torch import Tensor

from hf_rwp import noise

logger = logging.getLogger(__name__)

Draw = tuple[Tensor, Tensor, int]  # weight, std as `noise.noise_std` gives, seed
MAX_THREADS = 8  # each has a scratch of its own, and all of them take turns at Python's lock
ELEMENTS_PER_THREAD = 2**18  # at least, so that its start is small beside its work


@torch.no_grad()
def noise_stds(
    weights: Sequence[Tensor], gammas: Sequence[float], mode: str, dampings: Sequence[Tensor | None]
) -> list[Tensor]:
    """`noise.noise_std` of every weight."""
    fused, single = _split(weights)
    stds = {index: noise.noise_std(weights[index], gammas[index], mode, dampings[index]) for index in single}
    if fused:
        from hf_rwp import kernels

        norms = kernels.filter_norms([weights[index] for index in fused])
        torch._foreach_mul_(norms, [noise.std_factor(weights[index].shape, gammas[index], mode) for index in fused])
        for index, std in zip(fused, norms, strict=True):
            damping = dampings[index]
            stds[index] = std if damping is None else std.mul_(damping)
    return [stds[index] for index in range(len(weights))]


class _Work:
    """What the threads of one call share with whoever stops them."""

    def __init__(self) -> None:
        self.stopped = False
        self.busy: set[int] = set()  # the threads at work but for the caller's


class NoiseAdder:
    """Adds noise to weights; scratch and generators are kept from one call to the next."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}  # by thread, as the generators
        self._generators: dict[tuple[int, torch.device], torch.Generator] = {}
        self._work = _Work()

    @torch.no_grad()
    def add_(self, draws: Sequence[Draw]) -> None:
        """Add every draw's noise to its weight in place. After an exception, an interrupt too, `stop` has to follow."""
        fused, single = _split([weight for weight, _, _ in draws])
        if fused:
            from hf_rwp import kernels

            weights, stds, seeds = zip(*(draws[index] for index in fused), strict=True)
            kernels.add_noise_(weights, stds, seeds)
        self._add_on_threads([draws[index] for index in single])

    def stop(self) -> None:
        """Return when no thread writes noise any more, nor will.

        An interrupted Thread.join() marks a thread that runs as ended (Python issue 90882), so none is asked here.
        """
        self._work.stopped = True
        while self._work.busy:
            time.sleep(1e-4)

    def _add_on_threads(self, draws: Sequence[Draw]) -> None:
        self._work = work = _Work()
        errors: dict[int, BaseException] = {}
        left = _groups(draws)

        def remaining() -> Iterator[Draw]:
            with suppress(IndexError):  # another thread took the last
                while True:
                    yield from left.pop()

        @torch.no_grad()
        def add(number: int) -> None:
            if number:
                work.busy.add(number)  # ahead of the look at `stopped`
            try:
                for weight, std, seed in remaining():
                    if work.stopped:
                        break
                    generator = self._generator(number, weight.device).manual_seed(seed)
                    noise.add_noise_(weight, std, generator, self._scratch_for(number, weight))
            except BaseException as error:
                errors[number] = error
                work.stopped = True
            finally:
                work.busy.discard(number)

        threads = []
        for number in range(1, _thread_count(draws)):
            thread = Thread(target=add, args=(number,))
            try:
                thread.start()
            except RuntimeError:  # no more threads to be had
                break
            threads.append(thread)
        add(0)
        for thread in threads:
            thread.join()
        try:
            if errors:
                raise errors[min(errors)]  # that of this thread first: an interrupt comes to no other
        finally:
            errors.clear()  # its traceback leads back here: without this cycle the weights go when they are done with

    def _generator(self, thread: int, device: torch.device) -> torch.Generator:
        if (thread, device) not in self._generators:
            self._generators[thread, device] = torch.Generator(device)
        return self._generators[thread, device]

    def _scratch_for(self, thread: int, weight: Tensor) -> Tensor:
        key = thread, weight.device, torch.promote_types(weight.dtype, torch.float32)
        if key not in self._scratch:
            self._scratch[key] = noise.new_scratch(weight)
        return self._scratch[key]


def _thread_count(draws: Sequence[Draw]) -> int:
    if any(weight.device.type != "cpu" for weight, _, _ in draws):
        return 1
    return max(1, min(torch.get_num_threads(), MAX_THREADS, _elements(draws) // ELEMENTS_PER_THREAD))


def _groups(draws: Sequence[Draw]) -> list[list[Draw]]:
    """Draws that may be made side by side, the largest last. Weights in one storage may overlap: they stay together."""
    together: dict[int, list[Draw]] = defaultdict(list)
    for draw in draws:
        together[draw[0].untyped_storage().data_ptr()].append(draw)
    return sorted(together.values(), key=_elements)


def _elements(draws: Sequence[Draw]) -> int:
    return sum(weight.numel() for weight, _, _ in draws)


def _split(weights: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The indices of the weights that the fused kernels take, of one storage one alone, and those of the others."""
    fused: dict[int, int] = {}
    single = []
    for index, weight in enumerate(weights):
        if _fuses(weight) and fused.setdefault(weight.untyped_storage().data_ptr(), index) == index:
            continue
        single.append(index)
    return list(fused.values()), single


def _fuses(weight: Tensor) -> bool:
    if weight.device.type != "cuda":
        return False
    kernels = _kernels()
    return kernels is not None and kernels.supports(weight) and _passes(weight.device, weight.dtype)


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from hf_rwp import kernels
    except ImportError:  # a torch without Triton
        return None
    return kernels


@functools.cache
def _passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels run on a device, and give what they have to."""
    from hf_rwp import kernels

    try:
        kernels.check(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, a GPU that Triton does not know: training goes on all the same
        logger.warning("no fused kernels for %s on %s, so that the noise takes longer: %s", dtype, device, error)
        return False
    return True
