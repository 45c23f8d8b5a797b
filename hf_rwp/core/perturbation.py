"""The one place that writes noise into weights, and the way back.

    absent --add--> shown <--suspend/resume--> suspended --restore--> absent

1. `add` copies the weights (and buffers) aside and adds the noise in place.
2. `suspend` makes the weights clean for a while, `resume` ends that: between a forward pass and its backward pass
   anybody may look at the weights. Autograd then finds what its forward pass saw: no in-place change is counted.
3. `restore` copies the clean values back, which is exact in every dtype; subtracting the noise is not. What somebody
   else wrote into a noisy weight is lost by that, and `restore` says so.

Where FSDP2 gathers the weights, all of this is done to the shards, and the next pass gathers them anew. Frozen weights
need no copy: `layers` has their noise drawn wherever something computes with them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hf_rwp.core.buffers import Guarded, put_back, replaced, unexpanded
from hf_rwp.core.draws import Draws, Target
from hf_rwp.core.layers import Layers
from hf_rwp.core.sharding import reshard
from hf_rwp.core.watch import Copies, Writes

Noise = Enum("Noise", ["ABSENT", "SHOWN", "SUSPENDED"])


class Perturbation:
    """Noise in the weights of a model, at most once at a time.

    One copy of the perturbed weights, kept from one perturbation to the next, is all the memory it holds beside a
    bounded scratch, and a second copy while suspended. A model that is never perturbed costs none.
    At every moment the copy or the weights are whole, so that an interrupt anywhere leaves something to restore from.
    layers: draws the noise of those weights that need no copy.
    """

    def __init__(self, layers: Layers | None = None) -> None:
        self.noise = Noise.ABSENT
        self.layers = layers or Layers()
        self._targets: Sequence[Target] = ()  # those with a copy
        self._tensors: list[Tensor] = []  # the targets' weights, then the guarded buffers
        self._clean: list[Tensor] = []  # copies of their clean values; the memory is kept
        self._noisy: list[Tensor] = []  # their noisy values, while suspended
        self._guarded: Sequence[Guarded] = ()
        self._gatherers: Sequence[Any] = ()
        self._draws, self._writes, self._copies = Draws(), Writes(), Copies()

    @torch.no_grad()
    def add(
        self,
        targets: Sequence[Target],
        factors: Sequence[float],
        seeds: Sequence[int],
        dampings: Sequence[Tensor | None] | None = None,
        guarded: Sequence[Guarded] = (),
        gatherers: Sequence[Any] = (),
    ) -> None:
        """Add noise to weights, see `Draws.add_`. guarded: the buffers that `restore` also puts back. gatherers: those
        of the weights (`sharding.gatherers`), which hold shards only."""
        self.restore()
        self._gatherers = gatherers
        targets, factors, seeds, dampings = self.layers.take(targets, factors, seeds, dampings)
        if targets is not self._targets:
            weights = [target.local for target in targets]
            self._clean = _room(weights, self._tensors, self._clean)
            self._tensors, self._targets = weights, targets
        buffers = [unexpanded(buffer) for *_, buffer in guarded]
        count = len(targets)
        self._clean[count:] = _room(buffers, self._tensors[count:], self._clean[count:])
        self._tensors[count:] = buffers
        _copy_all(self._clean, self._tensors)
        self._guarded, self.noise = guarded, Noise.SHOWN
        try:
            stds = self._draws.add_(targets, factors, seeds, dampings, self._clean[:count])
            self._writes.begin(targets, stds, seeds)
            self.layers.show()
        except BaseException:  # an interrupt too: half the noise is neither clean nor the paper's
            self._writes.end()
            self.restore()
            raise
        torch.clear_autocast_cache()  # autocast may hold a low-precision copy of the clean weights

    @torch.no_grad()
    def suspend(self) -> bool:
        """Make the weights clean until `resume`; False, and nothing done, where no noise is in them."""
        if self.noise is not Noise.SHOWN:
            return False
        self.layers.hide()
        self._copies.release()
        reshard(self._gatherers)
        self._writes.look(self._clean, self._draws)
        noisy = [tensor.clone() for tensor in self._tensors]
        try:
            _copy_all(*self._alike(self._tensors, self._clean), unseen=True)
            put_back(self._guarded)
            self._noisy, self.noise = noisy, Noise.SUSPENDED
        except BaseException:  # an interrupt too: a backward pass may follow, which must not find half the noise
            if self.noise is Noise.SHOWN:
                _copy_all(*self._alike(self._tensors, noisy), unseen=True)
            raise
        torch.clear_autocast_cache()
        return True

    @torch.no_grad()
    def resume(self) -> None:
        """Undo `suspend`: the weights hold the same noise again, bit for bit."""
        self._copies.release()
        if self.noise is Noise.SUSPENDED:
            reshard(self._gatherers)
            _copy_all(*self._alike(self._clean, self._tensors))  # what was written to the weights meanwhile is kept
            self._writes.resumed()
            noisy, self.noise = self._noisy, Noise.SHOWN
            _copy_all(*self._alike(self._tensors, noisy), unseen=True)
            self._noisy = []
            torch.clear_autocast_cache()
        self.layers.show()

    @torch.no_grad()
    def restore(self) -> list[str]:
        """End the perturbation: the weights and guarded buffers are what they were before it, bit for bit.

        Returns the names of the weights that somebody else wrote to while noise was in them, which is lost. A buffer
        that has another shape by now keeps that, and its values. RuntimeError: a weight could not be restored; the
        perturbation is over all the same.
        """
        written = self.layers.end()
        if self.noise is Noise.ABSENT:
            return written
        self._copies.release()
        reshard(self._gatherers)
        failures = []
        if self.noise is Noise.SHOWN:
            self._writes.look(self._clean, self._draws)
            failures = self._copy_back()
        put_back(self._guarded)
        self.noise, self._noisy, self._guarded = Noise.ABSENT, [], ()
        torch.clear_autocast_cache()
        written += self._writes.end()
        if failures:
            raise RuntimeError(f"noise is left in {len(failures)} weights or buffers: {failures[0]}") from failures[0]
        return written

    def guard_copies(self) -> None:
        """Until the noise is suspended, resumed or restored, whoever copies or pickles a noisy tensor suspends it."""
        self.layers.hide()
        if self.noise is Noise.SHOWN:
            buffers = [(buffer, buffer) for *_, buffer in self._guarded]
            buffers += [(now, buffer) for (*_, buffer), now in replaced(self._guarded) if now is not None]
            weights = [(target.weight, target.weight) for target in self._targets]
            self._copies.guard([*weights, *buffers], self.suspend)

    def values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy and the clean values of a perturbed weight."""
        drawn = self.layers.values(weight)
        if drawn is not None:
            return drawn
        clean = next(clean for tensor, clean in zip(self._tensors, self._clean, strict=True) if tensor is weight)
        return weight.detach(), clean

    @staticmethod
    def _alike(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Without buffers that a pass gave another shape."""
        pairs = [pair for pair in zip(targets, sources, strict=True) if pair[0].shape == pair[1].shape]
        return [target for target, _ in pairs], [source for _, source in pairs]

    def _copy_back(self) -> list[Exception]:
        failures: list[Exception] = []
        alike = self._alike(self._tensors, self._clean)
        if len(alike[0]) < len(self._tensors):
            failures += [
                RuntimeError(f"a parameter of shape {tuple(clean.shape)} has shape {tuple(target.local.shape)} now")
                for target, clean in zip(self._targets, self._clean, strict=False)
                if target.local.shape != clean.shape
            ]
        try:
            _copy_all(*alike)
        except Exception:  # whatever one tensor's is: it must not leave noise in the others
            for tensor, clean in zip(*alike, strict=True):
                try:
                    tensor.copy_(clean)
                except Exception as failure:  # which `restore` raises once the perturbation is over
                    failures.append(failure)
        return failures


def _room(tensors: Sequence[Tensor], earlier: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """Memory for a copy of each tensor: that of an earlier one, where it fits."""
    known = {id(tensor): copy for tensor, copy in zip(earlier, copies, strict=False)}  # an interrupt may have cut one
    room = []
    for tensor in tensors:
        copy, kind = known.get(id(tensor)), (tensor.shape, tensor.dtype, tensor.device)
        if copy is None or (copy.shape, copy.dtype, copy.device) != kind:
            copy = torch.empty_like(tensor, requires_grad=False)
        room.append(copy)
    return room


def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor], unseen: bool = False) -> None:
    """Copy each source into its target, all of one device and dtype at once. unseen: autograd does not notice."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype]
        group[0].append(target.data if unseen else target)
        group[1].append(source)
    for target_list, source_list in groups.values():
        torch._foreach_copy_(target_list, source_list)
