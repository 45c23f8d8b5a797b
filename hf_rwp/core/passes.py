"""The passes over a model: a forward pass begins a micro-step, the end of its backward pass ends it.

    wrapper     ARMED <--eval/train--> DISARMED ----remove, newer wrapper----> REMOVED
    micro-step  PENDING --an output's hook--> BACKWARD --end of the backward pass--> OVER

1. A forward pass in training mode with gradients enabled begins a micro-step, or joins the one that is pending. Any
   other sees clean weights.
2. Between the two passes whoever looks (`state_dict`, copies, evaluation, `zero_grad`) finds clean weights, and so does
   an evaluation's own backward pass, or it raises.
3. The gradient's weight goes on as a hook of every parameter, ahead of DDP's reduction; under FSDP2, where modules
   compute with other parameters than the optimizer's, as one of those.
"""

import functools
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rwp.core import registry
from hf_rwp.core.hooks import Hook, Same, at_end_of_backward, in_backward, tensors_in, with_tensors
from hf_rwp.core.perturbation import Noise, Perturbation
from hf_rwp.core.placement import Role
from hf_rwp.core.sharding import copied_dims, gather, gathered_weights, gatherers, hook_on, in_use, times
from hf_rwp.core.window import Windows

logger = logging.getLogger(__name__)

State = Enum("State", ["ARMED", "DISARMED", "REMOVED"])
Stage = Enum("Stage", ["PENDING", "BACKWARD", "OVER"])
_Entry = Enum("_Entry", ["BEGAN", "JOINED", "LOOKED", "SUSPENDED"])  # what a forward pass did to the micro-step


@dataclass(eq=False)
class MicroStep:
    """One forward and one backward pass. differentiable: whether an output can have a backward pass."""

    role: Role
    stage: Stage = Stage.PENDING
    differentiable: bool = False


class Passes:
    """The hooks on a model, and the micro-step that they are in. windows: begins micro-steps, and counts them."""

    def __init__(self, model: nn.Module, windows: Windows, perturbation: Perturbation) -> None:
        self.state = State.ARMED
        self.micro_step: MicroStep | None = None  # that is not over
        self.role: Role | None = None  # of the latest; None where it was an ordinary pass
        self._windows, self._perturbation = windows, perturbation
        self._entries: list[_Entry] = []  # of the forward passes that run now: a model may call itself
        self._weight_hooks: dict[int, RemovableHandle] = {}  # on the parameters by id, while a micro-step is open
        for hook in list(model._forward_pre_hooks.values()):
            if isinstance(hook, Hook) and isinstance(hook.owner, Passes):
                hook.owner.remove()
        self.handles: list[Any] = [  # of all hooks of the wrapper, those on its base too
            # Ahead of hooks that compute weights from others, as weight_norm's, and of FSDP2's, which gathers them.
            model.register_forward_pre_hook(Hook(self._before_forward), prepend=True),
            model.register_forward_hook(Hook(self._after_forward), always_call=True),
        ]
        for module in model.modules():
            self.handles.append(module.register_state_dict_pre_hook(Hook(self.suspend)))
            self.handles.append(module.register_load_state_dict_pre_hook(Hook(self.close)))

    @property
    def pending(self) -> bool:
        """Whether a backward pass is to come."""
        return self.micro_step is not None and self.micro_step.stage is Stage.PENDING

    def suspend(self, *_: Any) -> bool:
        """Make the weights clean until the backward pass, or `resume`; whether there was noise in them."""
        if self.micro_step is not None and self.micro_step.stage is Stage.BACKWARD and not in_backward():
            self.close()  # the backward pass raised, and no other may follow
        return self._perturbation.suspend()

    def resume(self) -> None:
        """Undo `suspend`."""
        self._perturbation.resume()

    def close(self, *_: Any) -> None:
        """Give up the open micro-step: clean weights, and a backward pass of it raises."""
        self._entries.clear()
        self._say(self._finish())

    def settle(self) -> None:
        """Close ahead of a step. Raises RuntimeError where weights were written to while noise was in them."""
        self._entries.clear()
        self._refuse(self._finish())

    def disarm(self) -> None:
        """Begin no more micro-steps."""
        if self.state is State.ARMED:
            self.state = State.DISARMED

    def remove(self) -> None:
        """Clean weights, no hooks left."""
        self.state = State.REMOVED
        registry.release(self)
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.close()

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        hooks: Any = module._forward_pre_hooks
        hooks.move_to_end(self.handles[0].id, last=False)  # FSDP2's may have come since
        self._entries.append(_Entry.LOOKED)
        used = in_use(gatherers(module))  # by a module around this one, or this one's first hook of FSDP2
        self._begin(module)
        gather(used)

    def _begin(self, module: nn.Module) -> None:
        """Begin a micro-step, join one or make the weights clean, by what kind of forward pass is to come."""
        if not self._trains(module):
            if self.suspend():
                self._entries[-1] = _Entry.SUSPENDED
        elif self.pending and not in_backward() and not self._windows.stale:
            self._entries[-1] = _Entry.JOINED
            self._perturbation.resume()
        else:
            self._refuse(self._finish())  # what an interrupt left behind
            self.role = None
            if in_backward() and self._windows.active:
                raise RuntimeError(_INSIDE)
            self.role = self._windows.begin(module)
            if self.role is not None:
                self._entries[-1] = _Entry.BEGAN
                self.micro_step = MicroStep(self.role)
                self._weigh(self.micro_step, module.parameters())

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> Any:
        entry = self._entries.pop() if self._entries else _Entry.LOOKED
        micro_step = self.micro_step
        if entry in (_Entry.LOOKED, _Entry.SUSPENDED) and torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._before_looked_backward)
        if entry is _Entry.LOOKED or micro_step is None:
            return None
        if entry is _Entry.SUSPENDED:
            self._perturbation.resume()  # the backward pass of an earlier one is still to come
            if not self._entries:
                self._perturbation.guard_copies()
            return None
        self._weigh(micro_step, gathered_weights(self._windows.gatherers, module))
        if self._windows.gatherers:
            # An output may be that of a layer, too, for which FSDP2 then gathers weights ahead of our hook.
            output = with_tensors(output, lambda t: Same.apply(t) if t.grad_fn is not None else t)
        outputs = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        for tensor in outputs:
            tensor.register_hook(functools.partial(self._before_backward, micro_step))
        micro_step.differentiable = micro_step.differentiable or bool(outputs)
        if entry is _Entry.BEGAN and not micro_step.differentiable:
            self._say(self._finish())  # it raised, or no backward pass can come of it
        elif output is None and sys.exc_info()[0] is not None:
            self._perturbation.suspend()
        elif not self._entries:
            self._perturbation.guard_copies()
        return output if self._windows.gatherers else None

    def _weigh(self, micro_step: MicroStep, parameters: Iterable[Tensor]) -> None:
        """Multiply the gradients of `parameters` by the micro-step's weight, once each."""
        weight, window = micro_step.role.weight, self._windows.current
        group = None if window is None or window.gatherers else window.replicas.group  # FSDP2 averages by itself

        def scale(gradient: Tensor) -> Tensor:
            if copied_dims(gradient, group):
                raise RuntimeError(_NOT_AVERAGED)
            return gradient if weight == 1 else times(gradient, weight)

        for parameter in parameters:
            weighs = parameter.requires_grad and (weight != 1 or copied_dims(parameter, group))
            if weighs and id(parameter) not in self._weight_hooks:
                self._weight_hooks[id(parameter)] = hook_on(parameter, scale)

    def _before_backward(self, micro_step: MicroStep, _: Tensor) -> None:
        if micro_step.stage is Stage.OVER:
            raise RuntimeError(
                "a second backward pass in one micro-step, or one after step() or load_state_dict() ended it: the "
                "weights that its forward pass saw are gone. Add the losses up and call backward once, before step()"
            )
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a backward pass with create_graph=True: RWP cannot weight a gradient of a gradient, whose weights are "
                "gone by then. Take such penalties between optimizer.eval() and optimizer.train(), or without RWP"
            )
        used = in_use(self._windows.gatherers)  # if a module around this one was asked ahead of it
        self._perturbation.resume()
        gather(used)
        micro_step.stage = Stage.BACKWARD
        at_end_of_backward(functools.partial(self._after_backward, micro_step))

    def _before_looked_backward(self, _: Tensor) -> None:
        """A forward pass that saw clean weights has a backward pass, which must find them."""
        if self._perturbation.noise is not Noise.SHOWN:
            return
        if self.micro_step is None or self.micro_step.stage is not Stage.PENDING:
            raise RuntimeError(_LOOKED)
        used = in_use(self._windows.gatherers)
        self.suspend()  # the training pass's own backward pass is later, in this one too: autograd goes back in time
        gather(used)

    def _after_backward(self, micro_step: MicroStep) -> None:
        if micro_step is not self.micro_step:
            return
        written = self._finish()
        self._windows.completed(micro_step.role)
        self._refuse(written)

    def _trains(self, module: nn.Module) -> bool:
        trains = self.state is State.ARMED and module.training and torch.is_grad_enabled()
        return trains and any(parameter.requires_grad for parameter in module.parameters())

    def _finish(self) -> list[str]:
        """End the micro-step; the weights that were written to while noise was in them."""
        micro_step, self.micro_step = self.micro_step, None
        if micro_step is not None:
            micro_step.stage = Stage.OVER
        try:
            return self._perturbation.restore()
        finally:
            while self._weight_hooks:
                self._weight_hooks.popitem()[1].remove()

    def _say(self, written: list[str]) -> None:
        if written:
            logger.warning(_WRITTEN, ", ".join(written[:3]), len(written))

    def _refuse(self, written: list[str]) -> None:
        if written:
            raise RuntimeError(_WRITTEN % (", ".join(written[:3]), len(written)))


_INSIDE = (
    "a forward pass of the whole model inside a backward pass: the noise would differ between the two. Activation "
    "checkpointing of the whole model makes one. Checkpoint its layers instead. So do cached contrastive losses "
    "(GradCache, CachedMultipleNegativesRankingLoss): take the plain loss, with fewer pairs to a batch or "
    "checkpointed layers for memory"
)
_LOOKED = (
    "an output of a forward pass in eval mode, at clean weights, is in the loss of a perturbed training pass that came "
    "after it: its backward pass would find noisy weights. Take it after the training pass, or in training mode as "
    "well, or under torch.no_grad() where it is a mere target"
)
_NOT_AVERAGED = (
    "the gradient of a weight that all processes of a mesh have whole is not a sum over them that is yet to be taken: "
    "clean and perturbed ones would not be mixed, and the processes drift apart. Cut the batch along the mesh, as "
    "DTensors of Shard(0); or let each process be a replica of its own: "
    "RWP(process_group=torch.distributed.new_subgroups(1)[0], accumulation_steps=2)"
)
_WRITTEN = (
    "something wrote into %s while noise was in it (weights in all: %d). What it wrote is lost, since it belongs to "
    "the noisy weight, and replicas would drift apart. Neither a forward nor a backward pass may change a perturbed "
    "weight: constrain weights after optimizer.step(), or by torch.nn.utils.parametrize (this replaces clamp_, a norm "
    "or a mask in forward, and Embedding(max_norm=)); use an optimizer that steps after the backward pass (not "
    "layerwise GaLore or LOMO); or exclude the weight, with rwp_gamma=0 for its param group"
)
