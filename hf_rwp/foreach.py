"""The norms and the noise of many weights at once: what `noise` says of one, as fast as their devices allow.

1. On a CPU several threads take their shares: torch's generator fills a tensor on one, whatever their number.
2. On a GPU fused kernels (`kernels`) take all weights in a launch or two, where Triton is there and its noise passes a
   check; `noise` alone costs about four small launches a weight.
3. Any other weight goes through `noise`, one after the other.

A weight's noise is a function of its seed in each of these ways: how many threads there are changes nothing.
"""

import functools
import logging
import os
from collections.abc import Sequence
from threading import Event, Thread

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
    fused, single = _apart(weights)
    stds = {place: noise.noise_std(weights[place], gammas[place], mode, dampings[place]) for place in single}
    if fused:
        from hf_rwp import kernels

        norms = kernels.filter_norms([weights[place] for place in fused])
        torch._foreach_mul_(norms, [noise.std_factor(weights[place].shape, gammas[place], mode) for place in fused])
        for place, std in zip(fused, norms, strict=True):
            damping = dampings[place]
            stds[place] = std if damping is None else std.mul_(damping)
    return [stds[place] for place in range(len(weights))]


class NoiseAdder:
    """Adds noise to weights; scratch and generators are kept from one call to the next."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}  # by thread, as the generators
        self._generators: dict[tuple[int, torch.device], torch.Generator] = {}
        self._threads: list[Thread] = []
        self._stop = Event()  # ends the threads ahead of their next weight

    @torch.no_grad()
    def add_(self, draws: Sequence[Draw]) -> None:
        """Add every draw's noise to its weight in place. After an exception, an interrupt too, `stop` has to follow."""
        fused, single = _apart([weight for weight, _, _ in draws])
        if fused:
            from hf_rwp import kernels

            weights, stds, seeds = zip(*(draws[place] for place in fused), strict=True)
            kernels.add_noise_(weights, stds, seeds)
        self._add_on_threads([draws[place] for place in single])

    def stop(self) -> None:
        """Return when no thread writes noise any more."""
        self._stop.set()  # first: a thread that is_alive() does not see yet finds it set
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _add_on_threads(self, draws: Sequence[Draw]) -> None:
        stop, errors = Event(), list[BaseException]()

        @torch.no_grad()
        def add(number: int, share: Sequence[Draw]) -> None:
            try:
                for weight, std, seed in share:
                    if stop.is_set():
                        return
                    generator = self._generator(number, weight.device).manual_seed(seed)
                    noise.add_noise_(weight, std, generator, self._scratch_for(number, weight))
            except BaseException as error:
                errors.append(error)
                stop.set()

        mine, *others = _shares(draws)
        threads = [Thread(target=add, args=(number, share)) for number, share in enumerate(others, start=1)]
        self._stop, self._threads = stop, threads
        for thread in threads:
            thread.start()
        add(0, mine)
        for thread in threads:
            thread.join()
        self._threads = []
        if errors:
            raise errors[0]

    def _generator(self, thread: int, device: torch.device) -> torch.Generator:
        if (thread, device) not in self._generators:
            self._generators[thread, device] = torch.Generator(device)
        return self._generators[thread, device]

    def _scratch_for(self, thread: int, weight: Tensor) -> Tensor:
        key = thread, weight.device, torch.promote_types(weight.dtype, torch.float32)
        if key not in self._scratch:
            self._scratch[key] = noise.new_scratch(weight)
        return self._scratch[key]


def _shares(draws: Sequence[Draw]) -> list[list[Draw]]:
    """The draws in shares of about equal size, one for a thread; a single one where a weight is not on the CPU."""
    elements = sum(weight.numel() for weight, _, _ in draws)
    count = max(1, min(torch.get_num_threads(), MAX_THREADS, elements // ELEMENTS_PER_THREAD))
    if count == 1 or any(weight.device.type != "cpu" for weight, _, _ in draws):
        return [list(draws)]
    shares: list[list[Draw]] = [[] for _ in range(count)]
    sizes = [0] * count
    for draw in sorted(draws, key=lambda draw: -draw[0].numel()):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(draw)
        sizes[smallest] += draw[0].numel()
    return shares


def _apart(weights: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Places in the list: of the weights that the fused kernels take, and of the others."""
    places: tuple[list[int], list[int]] = [], []
    for place, weight in enumerate(weights):
        places[0 if _fuses(weight) else 1].append(place)
    return places


def _fuses(weight: Tensor) -> bool:
    if not _has_kernels(weight.device, weight.dtype):
        return False
    from hf_rwp import kernels

    return bool(kernels.supports(weight))


@functools.cache
def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels run on a device, and their noise is what it has to be."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from hf_rwp import kernels
    except ImportError:  # a torch without Triton
        return False
    try:
        kernels.check(device, dtype)
    except Exception as error:  # no C compiler, a GPU that Triton does not know: training goes on all the same
        logger.warning("no fused kernels for %s on %s, so that the noise takes longer: %s", dtype, device, error)
        return False
    return True
