"""The one place that writes noise into weights, and the way back.

1. `add` copies the weights (and buffers) aside and adds the noise in place.
2. `hide` makes the weights clean for a while, `show` ends that: between a forward pass and its backward pass anybody
   may look at the weights. Autograd then finds what its forward pass saw: no in-place change is counted.
3. `restore` copies the clean values back, which is exact in every dtype; subtracting the noise is not.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_rwp import noise
from hf_rwp.foreach import Draw, NoiseAdder


class Perturbation:
    """Noise in the weights of a model, at most once at a time.

    One copy of the perturbed weights, kept from one perturbation to the next, is all the memory it holds beside a
    bounded scratch for each thread (`noise.new_scratch`) and, on a CPU, a table of 2^16 numbers for the process; and a
    second copy while hidden. A model that is never perturbed costs none.
    At every moment the copy or the weights are whole, so that an interrupt anywhere leaves something to restore from.
    """

    def __init__(self) -> None:
        self._clean: dict[Tensor, Tensor] = {}  # weight or buffer -> copy of its clean values; the memory is kept
        self._noisy: list[Tensor] | None = None  # the noisy values, in the same order, while hidden
        self._present = False
        self._replaceable: list[tuple[nn.Module, str, Tensor]] = []
        self._adder = NoiseAdder()

    @torch.no_grad()
    def add(self, draws: Iterable[Draw], guarded: nn.Module | None = None) -> None:
        """Add noise to weights.

        draws: (weight, std, seed) each; std as `noise.noise_std` gives. guarded: the model whose buffers `restore` also
        puts back (BatchNorm statistics are to come from clean weights), None where they are to stay.
        """
        self.restore()
        draws = list(draws)
        buffers = _buffers(guarded) if guarded else []
        # A non-persistent buffer that a forward pass replaces is a cache, whose module knows what it holds.
        self._replaceable = [entry for entry in buffers if entry[1] not in entry[0]._non_persistent_buffers_set]
        tensors = [weight for weight, _, _ in draws] + [unexpanded(buffer) for *_, buffer in buffers]
        self._clean = {tensor: self._copy_of(tensor) for tensor in tensors}
        _copy_all(self._clean.values(), self._clean)
        self._noisy, self._present = None, True
        try:
            self._adder.add_(draws)
        except BaseException:  # an interrupt too: half the noise is neither clean nor the paper's
            self.restore()
            raise
        torch.clear_autocast_cache()  # autocast may hold a low-precision copy of the clean weights

    @torch.no_grad()
    def hide(self) -> bool:
        """Make the weights clean until `show`; False, and nothing done, where no noise is in them."""
        hides = self._present and self._noisy is None
        if hides:
            self._adder.stop()  # two interrupts may have left it at work
            noisy = [tensor.clone() for tensor in self._clean]
            _copy_all(self._clean, self._clean.values(), unseen=True)
            self._put_buffers_back()
            self._noisy = noisy
            torch.clear_autocast_cache()
        return hides

    @torch.no_grad()
    def show(self) -> None:
        """Undo `hide`: the weights hold the same noise again, bit for bit."""
        if self._present and self._noisy is not None:
            _copy_all(self._clean.values(), self._clean)  # what was written to the weights meanwhile is kept
            noisy, self._noisy = self._noisy, None
            _copy_all(self._clean, noisy, unseen=True)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """End the perturbation: the weights and guarded buffers are what they were before it, bit for bit."""
        if not self._present:
            return
        self._adder.stop()
        if self._noisy is None:
            _copy_all(self._clean, self._clean.values())
        self._put_buffers_back()
        self._present, self._noisy, self._replaceable = False, None, []
        torch.clear_autocast_cache()

    @torch.no_grad()
    def relative_sizes(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """||noise|| / ||weight|| of perturbed weights, 0-dim each, measured on what is in memory now."""
        return [noise.relative_size(weight, self._clean[weight]) for weight in weights]

    def _put_buffers_back(self) -> None:
        for module, name, buffer in self._replaceable:
            module._buffers[name] = buffer

    def _copy_of(self, tensor: Tensor) -> Tensor:
        copy = self._clean.get(tensor)
        if copy is not None and (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device):
            return copy
        return torch.empty_like(tensor, requires_grad=False)


def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor], unseen: bool = False) -> None:
    """Copy each source into its target, all of one device and dtype at once. unseen: autograd does not notice."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype]
        group[0].append(target.data if unseen else target)
        group[1].append(source)
    for target_list, source_list in groups.values():
        torch._foreach_copy_(target_list, source_list)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def unexpanded(tensor: Tensor) -> Tensor:
    """The view of an expanded tensor that can be written to in place: no two of its elements share memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
