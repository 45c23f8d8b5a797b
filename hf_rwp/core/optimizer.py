"""RWP: any `torch.optim.Optimizer`, given the gradient of Random Weight Perturbation (arXiv 2211.11489).

A *micro-step* is one forward and one backward pass of the model; a *window* is the micro-steps of one optimizer step.

1. A forward pass begins a micro-step (`passes`): `placement.role` says whether it is clean or perturbed, `Perturbation`
   adds the noise, and a gradient weight other than 1 goes on as a hook of every parameter.
2. The end of its backward pass ends it: the weights are restored.
3. `step` ends the window: the base optimizer steps, at clean weights, with the mixed gradient.
"""

import functools
import logging
import math
import weakref
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_rwp.core import registry
from hf_rwp.core.buffers import sync_buffers
from hf_rwp.core.checks import check
from hf_rwp.core.damping import Damping, taken
from hf_rwp.core.gamma import DEFAULT_GAMMA
from hf_rwp.core.groups import Groups
from hf_rwp.core.hooks import in_backward
from hf_rwp.core.layers import Layers
from hf_rwp.core.passes import Passes, State
from hf_rwp.core.perturbation import Perturbation
from hf_rwp.core.placement import Role
from hf_rwp.core.quantized import refuse_other_quantized
from hf_rwp.core.refusals import (
    innermost,
    refuse_lone_processes,
    refuse_optimizer,
    refuse_unsupported,
)
from hf_rwp.core.replicas import Replicas, replicas_of
from hf_rwp.core.report import Report
from hf_rwp.core.sharding import cut_weights, gatherers
from hf_rwp.core.window import Options, Windows
from hf_rwp.core.wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)

_FORMAT = 2  # of what `state_dict` has of its own; the first had no version, and seed and windows only under "rwp"


class RWP(OptimizerWrapper):
    """Random Weight Perturbation around `optimizer`; the training loop stays as it is.

        optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)

    Args:
        optimizer (`torch.optim.Optimizer`):
            The base optimizer, any that takes one gradient to a step.
        model (`torch.nn.Module`):
            The module that the loop calls and the optimizer's parameters belong to, before `accelerator.prepare`. A
            parameter that is frozen, or not in the optimizer, is not perturbed.
        gamma (`float`, *optional*, defaults to 0.01 for `noise="filter"` and 0.2 for `"filter_normalized"`):
            Size of the noise, finite and >= 0. Relative to each filter's norm in mode `filter`, to the rms of its
            weights in mode `filter_normalized`. It lives in the param groups as `rwp_gamma`: set it there for a group
            of its own, 0 to exclude the group. 0 everywhere is the base optimizer, bit for bit.
        alpha (`float`, *optional*, defaults to 0.5):
            The perturbed gradient's share of the mix, in [0, 1]. 1 perturbs every gradient; 0 is the base optimizer.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise, a function of it and of (window, micro-step, replica, parameter). torch's generator is
            not touched. A new wrapper on the same model goes on where the last one ended.
        accumulation_steps (`int`, *optional*, defaults to Accelerate's `gradient_accumulation_steps`):
            Gradients to an optimizer step, >= 1, where the loop counts them itself. 1 without Accelerate.
        noise (`str`, *optional*, defaults to `"filter"`):
            `filter` (the paper's) or `filter_normalized`, see `hf_rwp.core.noise.std_factor`.
        noise_1d (`bool`, *optional*, defaults to `True`):
            Whether parameters of at most one dimension (biases, norm weights) are perturbed as well.
        frozen (`bool` or `str`, *optional*, defaults to `False`):
            Whether frozen parameters are perturbed as well, with the first group's gamma: the base weights under LoRA,
            as in Flat-LoRA (arXiv 2409.14396). Their noise is drawn wherever something computes with one, and they are
            not copied; `"copy"` copies them aside instead, as it does trainable ones: the same noise, in less time, and
            under torch.compile. Beside quantized linear layers `x @ eps^T` is added, relative to what they stand for.
        eta (`float`, *optional*, defaults to 0.0):
            ARWP's damping (arXiv 2404.00357), less noise where gradients are large, >= 0. 0 is none.
        beta (`float`, *optional*, defaults to 0.99):
            Decay of the squared gradients that the damping follows, in [0, 1).
        antithetic (`bool`, *optional*, defaults to `False`):
            Whether the perturbed slots of a step, where there are two or more, draw eps and -eps in pairs.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            Of the replicas whose gradients are averaged; if not set that of the DDP around the model, along the mesh
            dimension that copies the weights (HSDP), DeepSpeed's data-parallel one, or else the world.
            `torch.distributed.new_subgroups(1)[0]` where each process trains by itself between averages (LocalSGD).

    On two or more data-parallel replicas the odd ones are perturbed, and the framework's all-reduce mixes the
    gradients. On one, the micro-steps of a window alternate, so a step needs two or more. A replica is a process
    under DDP and DeepSpeed; under HSDP and tensor parallelism it is all processes that hold one copy of the weights
    together, and FSDP2 by itself is a single one. They share role and noise, which no layout changes. `eval()` disarms
    it and leaves clean weights, also after an interrupt or an error in a backward pass; `train()` arms it; a new one is
    armed. Wrapping a model again retires the earlier wrapper; wrapping one that shares parameters with it is refused.
    For two optimizers over one model wrap one of them, with the other's parameters in it as a group of lr=0, and step
    the other one after it. A loss's own weights outside the model (proxies) get an ordinary gradient. `step` takes a
    closure of one forward and one backward pass, as Lightning's. A forward pass inside a backward pass (GradCache;
    checkpointing of the whole model) is refused: take the plain loss, or checkpoint layers.

    Raises ValueError for a value out of range, for optimizer parameters that the model does not have and for a model
    that shares some with another wrapper's; NotImplementedError, with what works, under FSDP of version 1, DeepSpeed
    ZeRO-3, DataParallel and XLA, and for weights that a mesh cuts inside of filters. In a loop, RuntimeError: where a
    step holds one gradient and nothing can be mixed; for a second backward pass in one micro-step; where something
    writes into a noisy weight; at `step`, for gradients that no forward pass of the model began, or that were never
    averaged.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        gamma: float | None = None,
        alpha: float = 0.5,
        seed: int = 0,
        accumulation_steps: int | None = None,
        noise: str = "filter",
        noise_1d: bool = True,
        frozen: bool | str = False,
        eta: float = 0.0,
        beta: float = 0.99,
        antithetic: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        refuse_optimizer(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, (RWP, AcceleratedOptimizer)):
            raise TypeError(
                f"RWP wraps a plain torch.optim.Optimizer and got {type(optimizer).__name__}: wrap the base optimizer, "
                "once, before accelerator.prepare"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"RWP needs the module to perturb and got {type(model).__name__}: RWP(base, model)")
        super().__init__(optimizer)
        self.model = innermost(model)
        refuse_lone_processes()
        refuse_unsupported(self.model.parameters())
        if frozen:
            refuse_other_quantized(self.model, beside=frozen is True)
        registry.refuse_overlap(self.model)
        # All that changes later is in objects that are never replaced: Lightning Fabric copies this __dict__.
        self._options = Options(alpha, noise, noise_1d, frozen, antithetic, accumulation_steps, process_group)
        perturbation = Perturbation(Layers(self.model if frozen is True else None))
        self._damping = Damping(eta, beta)
        gamma = DEFAULT_GAMMA[noise] if gamma is None else gamma
        self._groups = Groups(optimizer, self.model, gamma, seed, registry.windows_of(self.model))
        self._report = Report(before=self._groups.windows)
        parts = self.model, self._options, self._groups, self._damping, self._report
        self._windows = Windows(*parts, perturbation)
        self._passes = Passes(self.model, self._windows, perturbation)
        self._passes.handles += self._hook_base(self._groups.keep, self._groups.fill, self._windows.stepped)
        # A wrapper that goes while a micro-step is open leaves its model as it was.
        weakref.finalize(self, self._passes.remove).atexit = False
        registry.claim(self._passes, self.model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._groups.take(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base's, with seed and windows in its groups, and under `rwp` the same and ARWP's F. `weights_only`-safe.

        Where a mesh holds the weights, F is in the state of each as well, for frameworks that keep no more than states
        and groups. Saved at any time, it lets training go on from the last optimizer step, bit for bit.
        """
        own = {"version": _FORMAT, "seed": self._groups.seed, "windows": self._groups.windows}
        state_dict = self._damping.put(super().state_dict(), self._groups.named())
        return {**state_dict, "rwp": {**own, "fisher": dict(self._damping.fisher)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the seed and the groups' gamma too, in place of those given at construction.

        A checkpoint of just the base optimizer loads as well. ValueError: it is of a later format than this one, or
        nothing, as DeepSpeed's ZeRO-0 finds where ZeRO-1 or 2 wrote partitions.
        """
        refuse_unsupported(self.model.parameters())  # accelerator.prepare comes by here
        if state_dict is None:
            raise ValueError(
                "the checkpoint has no state of the optimizer where it is looked for: DeepSpeed's ZeRO-1 and 2 write "
                "it in partitions, which ZeRO-0 does not read. Resume at the stage that wrote it"
            )
        own = state_dict.get("rwp")
        if own is not None and own.get("version", 1) > _FORMAT:
            raise ValueError(
                f"a checkpoint of format {own['version']}, and this hf_rwp knows up to {_FORMAT}: update it"
            )
        plain = {key: value for key, value in state_dict.items() if key != "rwp"}
        plain, fisher = taken(plain, self._groups.named())
        before = self._groups.windows
        self._groups.load(functools.partial(super().load_state_dict, plain), own)
        self._windows.discard()
        self._report.before = 0
        if own is not None or fisher:
            earlier = {} if own is None else own["fisher"]
            self._damping.fisher = {name: f.reshape(-1) for name, f in earlier.items()} | fisher
        elif self._damping.eta and self._groups.windows != before:
            self._damping.fisher = {}
            logger.warning("the checkpoint holds no F of ARWP: its damping begins anew")

    def train(self) -> None:
        """Arm: from now on forward passes in training mode may be perturbed. As often as you like."""
        self._raise_if_removed()
        self._passes.suspend()
        self._passes.state = State.ARMED
        super().train()

    def eval(self) -> None:
        """Disarm: the weights are clean, bit for bit, and stay so until `train`."""
        self._passes.suspend()
        self._passes.disarm()
        super().eval()

    def disarm(self) -> None:
        """End it all, after training or whatever cut it off. Unlike `eval()` it gives up a backward pass that is to
        come, and leaves alone a base that speaks that protocol."""
        self._passes.close()
        self._windows.end()
        self._passes.disarm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._raise_if_removed()
        suspended = self._passes.suspend()
        self._windows.zeroed(self._passes.micro_step is not None)
        super().zero_grad(set_to_none)
        if suspended:
            self._passes.resume()  # many loops zero between the forward and the backward pass

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The base's step, at clean weights, with the mixed gradient. closure: runs a window's last micro-step."""
        self._raise_if_removed()
        if in_backward():
            raise RuntimeError("step() inside a backward pass: RWP's weights are noisy until it ends. Step after it")
        if closure is not None and self.active:
            result = self._step_once(closure, self._settle)
        else:
            self._settle()
            result = self.base.step() if closure is None else self.base.step(closure)
        self._windows.stepped()
        return result

    def begin_window(self, micro_steps: int, shares: tuple[float, float] | None = None) -> None:
        """Say how many gradients the next step takes, where the loop knows and Accelerate does not.

        It holds for one window, which begins with the next micro-step. micro_steps: >= 1, on this replica. shares: what
        the loop's own factors on the clean and on the perturbed slots' mean gradients add up to, over all replicas;
        None where it averages all of them. See `placement.role` and `placement.role_shares`.
        """
        check("micro_steps", micro_steps, Integral, lambda value: value >= 1, "an integer >= 1")
        self._passes.close()  # what an interrupt left open
        self._windows.end()
        self._windows.announced = micro_steps, shares

    @property
    def alpha(self) -> float:
        """The perturbed gradient's share of the mix."""
        return self._options.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._options.alpha = value

    @property
    def active(self) -> bool:
        """Whether the next window will be perturbed: alpha and some group's `rwp_gamma` are above 0."""
        return self._windows.active

    @property
    def role(self) -> Role | None:
        """The latest micro-step's role; None where it was an ordinary one of the base optimizer."""
        return self._passes.role

    @property
    def replicas(self) -> Replicas:
        """This process among the replicas, as of the latest window; before the first one as far as is known."""
        if self._windows.replicas is not None:
            return self._windows.replicas
        held = cut_weights(gatherers(self.model))  # a pass may have left some gathered
        return replicas_of(self._options.process_group, [*self.model.parameters(), *held])

    def scale_gamma(self, factor: float) -> None:
        """Set every group's `rwp_gamma` to `factor` (>= 0) times what it began with; see `gamma.gamma_factor`."""
        check("factor", factor, Real, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        self._groups.scale(factor)

    def sync_buffers(self) -> None:
        """Give all replicas replica 0's buffers (BatchNorm's), before evaluation and saving. Call it on all of them."""
        if self.replicas.groups:
            self._passes.suspend()
            sync_buffers([self.model], self.replicas)

    def report(self) -> dict[str, Any]:
        """What really happened so far, over all replicas. Collective: call it on all of them.

        Returns windows begun; slots, the micro-steps completed since construction, clean and perturbed; placement,
        replicas and alpha; and `relative_noise`, ||noise|| / ||weight|| as measured at the first perturbed micro-step
        after a report, for the perturbed tensors with the most, the median and the fewest elements.
        """
        replicas, window = self.replicas, self._windows.current
        slots, sizes = self._report.gathered(replicas)
        return {
            "placement": "parallel" if replicas.count > 1 else "sequential",
            "replicas": replicas.count,
            "alpha": self.alpha,
            "windows": (window.number if window else self._groups.windows) - self._report.before,
            "slots": slots,
            "relative_noise": sizes,
        }

    def remove(self) -> None:
        """Take the wrapper off its model: clean weights, no hooks left. Using it afterwards raises RuntimeError."""
        self._passes.remove()

    def _settle(self) -> None:
        """Ahead of the base's step: clean weights, and gradients that are the mix."""
        self._passes.settle()
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self._windows.check(self._passes.state is State.ARMED, parameters)

    def _raise_if_removed(self) -> None:
        if self._passes.state is State.REMOVED:
            raise RuntimeError(
                "this RWP wrapper is no longer on its model: a newer RWP took over, or remove() was called. Use the "
                "newer one, or wrap the model again"
            )
