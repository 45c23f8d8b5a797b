"""RWP: a wrapper that gives any `torch.optim.Optimizer` the gradient of Random Weight Perturbation (arXiv 2211.11489).

A *micro-step* is one forward and one backward pass of the model; a *window* is the micro-steps of one optimizer step.

1. The forward pass begins the micro-step: `placement.role` says whether it is clean or perturbed, `Perturbation` adds
   the noise, and a gradient weight other than 1 goes on as a hook of every parameter, ahead of DDP's reduction.
2. The end of the backward pass ends it: the weights are restored. Further forward passes before that belong to it.
3. `step` ends the window and calls the wrapped optimizer, at clean weights, with the mixed gradient.
"""

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rwp import noise as _noise
from hf_rwp.perturbation import Perturbation
from hf_rwp.placement import Role, role

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _MicroStep:
    role: Role
    handles: list[RemovableHandle] = field(default_factory=list)


class RWP(torch.optim.Optimizer):
    """Random Weight Perturbation around `optimizer`; the training loop stays as it is.

        optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)

    optimizer: the base optimizer, any `torch.optim.Optimizer` that needs no closure.
    model: the module that the optimizer's parameters belong to and that the loop calls, before `accelerator.prepare`.
        A parameter that is frozen, or not in the optimizer, is never perturbed.
    gamma: size of the noise, >= 0 and finite. Relative to each filter's norm in mode `filter` (None: 0.01), to its rms
        in mode `filter_normalized` (None: 0.2). It lives in the param groups as `rwp_gamma`: set it there for a group
        of its own, 0 excludes the group. 0 everywhere is the base optimizer, bit for bit.
    alpha: the perturbed gradient's share of the mix, in [0, 1]. 1 perturbs every gradient; 0 is the base optimizer.
    seed: of the noise. The noise is a function of it and of (window, micro-step, replica, parameter); torch's global
        generator is not touched.
    accumulation_steps: gradients to an optimizer step, >= 1, where the loop counts them itself. None: what Accelerate's
        `gradient_accumulation_steps` says, 1 without Accelerate.
    noise: `filter` (the paper's) or `filter_normalized`, see `hf_rwp.noise.noise_std`.
    noise_1d: whether parameters with one dimension or none (biases, norm weights) are perturbed as well.
    eta, beta: ARWP's damping (arXiv 2404.00357): noise shrinks where gradients are large. eta >= 0, 0 for none; beta
        in [0, 1).

    On two or more data-parallel replicas the odd ones are perturbed, and the framework's all-reduce mixes the
    gradients. On one, the micro-steps of a window alternate, so `accumulation_steps` has to be 2 or more.

    `eval()` disarms it and leaves clean weights, `train()` arms it; a new one is armed. Wrapping a model again retires
    the earlier wrapper.

    Raises ValueError for a value out of range and for optimizer parameters that the model does not have,
    NotImplementedError under FSDP, DeepSpeed, DataParallel, tensor parallelism and XLA. In a loop, RuntimeError: where
    a step holds one gradient and nothing can be mixed; for a second backward pass in one micro-step; at `step` for
    gradients that no forward pass of the model began.
    """

    _step_supports_amp_scaling = False  # GradScaler is to find an overflow before `step`, whatever the base says

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
        eta: float = 0.0,
        beta: float = 0.99,
    ) -> None:
        # No super().__init__(): groups and state are the base's, and everything that reads them must see the same.
        if noise not in _noise.MODES:
            raise ValueError(f"noise={noise!r} is no mode of noise: choose one of {', '.join(_noise.MODES)}")
        gamma = _noise.DEFAULT_GAMMA[noise] if gamma is None else gamma
        _check_range("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        _check_range("gamma", gamma, 0 <= gamma < math.inf, "finite and at least 0")
        _check_range("eta", eta, 0 <= eta < math.inf, "finite and at least 0")
        _check_range("beta", beta, 0 <= beta < 1, "in [0, 1)")
        if accumulation_steps is not None:
            _check_range("accumulation_steps", accumulation_steps, accumulation_steps >= 1, "at least 1")
        if isinstance(optimizer, (RWP, AcceleratedOptimizer)) or not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"RWP wraps a plain torch.optim.Optimizer, and got {type(optimizer).__name__}: "
                "wrap the base optimizer, once, before accelerator.prepare"
            )
        self.base = optimizer
        self.model = _unwrap(model)
        self.alpha = alpha
        self._gamma, self._seed, self._accumulation_steps = gamma, seed, accumulation_steps
        self._mode, self._noise_1d, self._eta, self._beta = noise, noise_1d, eta, beta

        self._armed = True
        self._open: _MicroStep | None = None  # between the first forward pass and the end of the backward pass
        self._role: Role | None = None  # of the latest micro-step
        self._windows = 0  # begun so far
        self._completed = 0  # micro-steps of this window
        self._length = 1  # micro-steps that this window will have
        self._plain = False  # whether a forward pass since the last step was the base optimizer's own
        self._fisher: dict[str, Tensor] = {}  # ARWP's F, by parameter name
        self._position = _LoaderPosition()
        self._warned: set[str] = set()
        self._slots = {"clean": 0, "perturbed": 0}  # micro-steps completed on this replica
        self._relative_noise: list[tuple[str, int, float]] = []  # name, elements, size; measured when asked for
        self._measure = True

        own = {id(parameter) for parameter in self.model.parameters()}
        foreign = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the optimizer's parameters are not the model's (shapes {foreign[:3]}...): RWP would "
                "leave them clean unnoticed. Give it the module that the optimizer was built from, before it is wrapped"
            )
        for group in optimizer.param_groups:
            self._init_group(group)
        self._refuse_unsupported()
        self._perturbation = Perturbation()
        # A wrapper that goes while its noise is in the weights leaves them clean.
        weakref.finalize(self, self._perturbation.restore).atexit = False
        self._handles = self._hook()

    # The base's surface: one set of groups, state, defaults and hooks, whoever looks.

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not yet set: an attribute of an object that __init__ never finished
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def __repr__(self) -> str:
        return f"RWP(gamma={self._gamma}, alpha={self.alpha}, noise={self._mode!r}, {self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an RWP wrapper is bound to its model and cannot be copied or pickled: save its state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)
        self._init_group(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """The base's, and under `rwp` the wrapper's own: seed, windows begun, ARWP's F. `weights_only`-safe.

        Training resumed from one saved between two optimizer steps continues bit for bit.
        """
        own = {"seed": self._seed, "windows": self._windows, "fisher": dict(self._fisher)}
        return {**self.base.state_dict(), "rwp": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a checkpoint of the base optimizer alone loads as well."""
        self._refuse_unsupported()
        state_dict = dict(state_dict)
        own = state_dict.pop("rwp", None)
        kept = [{key: group[key] for key in ("rwp_gamma", "initial_rwp_gamma")} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, gammas in zip(self.param_groups, kept, strict=True):
            group.update(gammas | {key: group[key] for key in gammas if key in group})
        if own is not None:
            self._seed, self._windows, self._fisher = own["seed"], own["windows"], dict(own["fisher"])
            self._completed = 0

    # What a loop calls.

    def train(self) -> None:
        """Arm: forward passes in training mode may be perturbed from now on. As often as you like."""
        self._raise_if_retired()
        self._perturbation.hide()
        self._armed = True
        _call_if_any(self.base, "train")

    def eval(self) -> None:
        """Disarm: the weights are clean, bit for bit, and stay so until `train`."""
        self._perturbation.hide()
        self._armed = False
        _call_if_any(self.base, "eval")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._raise_if_retired()
        self._perturbation.hide()  # until the backward pass, where a loop zeroes between forward and backward
        if self._open is None:
            self._completed = 0  # GradScaler skips `step` after an overflow, and the window has ended all the same
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """The base optimizer's step, at clean weights, with the mixed gradient. Takes no closure."""
        self._raise_if_retired()
        self._close()
        if closure is not None:
            raise ValueError("RWP takes its two gradients in ordinary backward passes and has no use for a closure")
        if self.active and not self._plain:
            self._check_window()
            if self._eta:
                self._update_fisher()
        self._completed, self._plain = 0, False
        return self.base.step()

    @property
    def active(self) -> bool:
        """Whether gradients are perturbed at present: alpha and some group's `rwp_gamma` are above 0."""
        return self.alpha > 0 and any(group["rwp_gamma"] > 0 for group in self.param_groups)

    @property
    def role(self) -> Role | None:
        """The latest micro-step's role; None where it was an ordinary one of the base optimizer."""
        return self._role

    def scale_gamma(self, factor: float) -> None:
        """Set every group's `rwp_gamma` to `factor` (>= 0) times what it began with; see `noise.gamma_factor`."""
        for group in self.param_groups:
            group["rwp_gamma"] = group["initial_rwp_gamma"] * factor

    def sync_buffers(self) -> None:
        """Give every replica the buffers (BatchNorm statistics) of replica 0. Collective: call it on all replicas,
        before evaluation and before saving."""
        if _replica()[1] > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)

    def report(self) -> dict[str, Any]:
        """What really happened so far, over all replicas. Collective: call it on all replicas.

        Returns windows begun; slots (micro-steps completed), clean and perturbed; placement, replicas and alpha; and
        `relative_noise`: ||noise|| / ||weight||, measured in the weights at the first perturbed micro-step since the
        last report, for the largest, the median and the smallest perturbed tensor (by number of elements).
        """
        replicas = _replica()[1]
        parts = [(self._slots, self._relative_noise)]
        if replicas > 1:
            parts = [None] * replicas  # type: ignore[list-item]
            dist.all_gather_object(parts, (self._slots, self._relative_noise))
        measured = next((sizes for _, sizes in parts if sizes), [])
        self._measure = True
        return {
            "placement": "parallel" if replicas > 1 else "sequential",
            "replicas": replicas,
            "alpha": self.alpha,
            "windows": self._windows,
            "slots": {kind: sum(slots[kind] for slots, _ in parts) for kind in self._slots},
            "relative_noise": {
                rank: {"name": name, "elements": elements, "size": size}
                for rank, (name, elements, size) in zip(("largest", "median", "smallest"), measured, strict=False)
            },
        }

    def remove(self) -> None:
        """Take the wrapper off the model: clean weights, no hooks left. Using it afterwards raises."""
        self._close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The micro-step: begun by a forward pass, ended by the end of its backward pass.

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        if not (self._armed and module.training and torch.is_grad_enabled()):
            self._perturbation.hide()
        elif self._open is not None:
            self._perturbation.show()
        else:
            self._begin(module)

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._open is None or not (self._armed and module.training and torch.is_grad_enabled()):
            return
        outputs = [tensor for tensor in _tensors(output) if tensor.grad_fn is not None]
        for tensor in outputs:
            tensor.register_hook(functools.partial(self._before_backward, self._open))
        if not outputs:  # the forward pass raised, or nothing can flow back through it
            self._close()

    def _before_backward(self, micro_step: _MicroStep, _: Tensor) -> None:
        if micro_step is not self._open:
            raise RuntimeError(
                "a second backward pass in one micro-step: the weights of its forward pass are gone. RWP takes one "
                "backward pass for each forward pass of the model; add the losses up and call backward once"
            )
        self._perturbation.show()
        _at_end_of_backward(functools.partial(self._end, micro_step))

    def _begin(self, module: nn.Module) -> None:
        self._position.advance()
        if not 0 < self._completed < self._length:
            self._completed = 0
            if not self.active:
                self._role, self._plain = None, True
                return
            if module is not self.model:
                raise NotImplementedError(
                    "this forward pass runs in a DataParallel replica, whose copy of the weights RWP cannot perturb: "
                    "use DistributedDataParallel (accelerate launch), one process for each GPU"
                )
            self._refuse_unsupported()
            self._length = self._window_length()
            self._windows += 1
        replica, replicas = _replica()
        if replicas == 1 and self._length == 1 and self.alpha < 1:
            self._role = Role(False, 1.0)
            self._warn_once("the loader's last window holds one gradient: an ordinary step. drop_last=True avoids it")
        else:
            self._role = role(replica, self._completed, replicas, self._length, self.alpha)
        self._open = _MicroStep(self._role)
        if self._role.perturbed:
            keep_buffers = self.alpha == 1 and replica == 0  # with no clean slot at all, somebody has to update them
            weights = list(self._perturbable())
            if not weights:
                raise RuntimeError(
                    "nothing to perturb: no trainable parameter of the model is in a group with rwp_gamma above 0"
                )
            self._perturbation.add(self._draws(weights, replica), None if keep_buffers else self.model)
            if self._measure:
                self._measure_noise(weights)
        if self._role.weight != 1:
            scale = functools.partial(torch.mul, other=self._role.weight)
            self._open.handles = [p.register_hook(scale) for p in self.model.parameters() if p.requires_grad]

    def _end(self, micro_step: _MicroStep) -> None:
        if micro_step is self._open:
            self._close()
            self._completed += 1
            self._slots["perturbed" if micro_step.role.perturbed else "clean"] += 1

    def _close(self, *_: Any) -> None:
        self._perturbation.restore()
        if self._open is not None:
            for handle in self._open.handles:
                handle.remove()
            self._open = None

    def _hide(self, *_: Any) -> None:
        self._perturbation.hide()

    def _perturbable(self) -> Iterator[tuple[int, str, nn.Parameter, float]]:
        """(position, name, parameter, gamma) of every parameter that noise belongs on, looked up afresh."""
        gammas = {id(p): float(group["rwp_gamma"]) for group in self.param_groups for p in group["params"]}
        for position, (name, parameter) in enumerate(self.model.named_parameters()):
            gamma = gammas.get(id(parameter), 0.0)
            if gamma > 0 and parameter.requires_grad and (self._noise_1d or parameter.ndim > 1):
                yield position, name, parameter, gamma

    def _draws(
        self, weights: list[tuple[int, str, nn.Parameter, float]], replica: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        for position, name, weight, gamma in weights:
            damping = None
            if self._eta and name in self._fisher:
                damping = _noise.arwp_damping(self._fisher[name].to(weight.device), self._eta)
            std = _noise.noise_std(weight.detach(), gamma, self._mode, damping)
            yield weight, std, _noise.noise_seed(self._seed, self._windows, self._completed, replica, position)

    def _measure_noise(self, weights: list[tuple[int, str, nn.Parameter, float]]) -> None:
        by_size = sorted(((weight.numel(), name, weight) for _, name, weight, _ in weights), key=lambda entry: -entry[0])
        chosen = [by_size[index] for index in (0, len(by_size) // 2, -1)] if by_size else []
        sizes = self._perturbation.relative_sizes(weight for *_, weight in chosen)
        self._relative_noise = [
            (name, elements, size.item()) for (elements, name, _), size in zip(chosen, sizes, strict=True)
        ]
        self._measure = False
        logger.info("noise relative to the weights (name, elements, size): %s", self._relative_noise)

    # The window: how long it is, and whether what `step` finds is what it should be.

    def _window_length(self) -> int:
        if self._accumulation_steps is not None:
            steps = length = self._accumulation_steps
        elif is_initialized():
            steps, length = GradientState().num_steps, self._position.window_length()
        else:
            steps = length = 1
        if steps == 1 and self.alpha < 1 and _replica()[1] == 1:
            raise RuntimeError(
                f"one process and one gradient to a step: RWP has nothing to mix for alpha={self.alpha}. Take two or "
                "more gradients to a step (Accelerator(gradient_accumulation_steps=2), or RWP(accumulation_steps=2) "
                "where the loop counts them itself), or two or more processes, or alpha=1 to perturb every gradient"
            )
        return length

    def _check_window(self) -> None:
        if not self._completed:
            if any(_is_nonzero(p.grad) for group in self.param_groups for p in group["params"]):
                raise RuntimeError(
                    "step() finds gradients that no perturbed or clean forward pass began. "
                    + (
                        "Call the model itself, not its forward() or a submodule, in training mode"
                        if self._armed
                        else "eval() has disarmed RWP: call optimizer.train() before training goes on"
                    )
                )
        elif self._completed != self._length and _replica()[1] == 1:
            self._warn_once(
                f"a step after {self._completed} gradients where {self._length} were due: its mix is not the one that "
                f"alpha={self.alpha} asks for. Use drop_last=True, a loader of known length prepared by Accelerate, or "
                "the right accumulation_steps"
            )

    @torch.no_grad()
    def _update_fisher(self) -> None:
        for _, name, parameter, _ in self._perturbable():
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                fisher = self._fisher.get(name)
                fisher = None if fisher is None else fisher.to(gradient.device)
                self._fisher[name] = _noise.arwp_fisher(fisher, gradient, self._beta)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # Taking hold of the model and the groups, and refusing what cannot work.

    def _init_group(self, group: dict[str, Any]) -> None:
        gamma = group.setdefault("rwp_gamma", self._gamma)
        _check_range("rwp_gamma", gamma, 0 <= gamma < math.inf, "finite and at least 0")
        group.setdefault("initial_rwp_gamma", gamma)

    def _hook(self) -> list[RemovableHandle]:
        for hook in list(self.model._forward_pre_hooks.values()):
            if isinstance(hook, _Hook):
                hook.remove_owner()
        handles = [
            self.model.register_forward_pre_hook(_Hook(self._before_forward)),
            self.model.register_forward_hook(_Hook(self._after_forward), always_call=True),
        ]
        for module in self.model.modules():
            handles.append(module.register_state_dict_pre_hook(_Hook(self._hide)))
            handles.append(module.register_load_state_dict_pre_hook(_Hook(self._close)))
        return handles

    def _raise_if_retired(self) -> None:
        if not self._handles:
            raise RuntimeError(
                "this RWP wrapper was removed from its model, by remove() or by a newer RWP on the same model: use the "
                "newer one, or wrap the model again"
            )

    def _refuse_unsupported(self) -> None:
        """FSDP, DeepSpeed, tensor parallelism and XLA: replicas of the weights that RWP could perturb do not exist, or
        are out of its reach."""
        kind = PartialState().distributed_type if is_initialized() else DistributedType.NO
        parallelism = AcceleratorState().parallelism_config if is_initialized() else None
        sharded = parallelism is not None and parallelism.non_data_parallel_size * parallelism.dp_shard_size > 1
        parameter = next(self.model.parameters(), None)
        if sharded or not (kind == DistributedType.NO or kind.value.startswith("MULTI_")):
            what = "sharded, tensor, context or sequence parallelism" if sharded else kind.value
        elif parameter is not None and hasattr(parameter, "device_mesh"):
            what = "FSDP2 or tensor parallelism"
        elif getattr(parameter, "_fsdp_flattened", False):
            what = "FSDP"
        elif hasattr(parameter, "ds_id"):
            what = "DeepSpeed ZeRO-3"
        elif parameter is not None and parameter.device.type == "xla":
            what = "XLA"
        else:
            return
        raise NotImplementedError(
            f"RWP does not work with {what}: it needs a whole copy of the weights on every replica. What works is one "
            "process, or DistributedDataParallel on any number of CPUs or GPUs (accelerate launch --multi_gpu)"
        )


class LossTracker:
    """Averages the loss of clean and of perturbed micro-steps; replicas talk only when asked.

        tracker = LossTracker(optimizer)       # the RWP wrapper
        tracker.update(loss)                   # after every forward pass
        accelerator.log(tracker.compute())     # at logging time, on all replicas
    """

    def __init__(self, optimizer: RWP) -> None:
        self._optimizer = optimizer
        self._totals: Tensor | None = None

    @torch.no_grad()
    def update(self, loss: Tensor, count: int = 1) -> None:
        """Add the latest micro-step's unweighted loss. loss: 0-dim, a mean. count: what it is a mean over (images)."""
        if self._totals is None:
            self._totals = torch.zeros(2, 2, device=loss.device)  # clean, perturbed x sum, count
        role = self._optimizer.role
        row = self._totals[int(role is not None and role.perturbed)]
        row[0] += loss.detach().float() * count
        row[1] += count

    def compute(self) -> dict[str, float]:
        """Means since the last call, over all replicas: `loss`, and where there were such micro-steps `loss_clean`,
        `loss_perturbed` and their difference `loss_gap`, a free measure of sharpness. Empty before any update.
        Collective: call it on all replicas."""
        if self._totals is None:
            return {}
        if _replica()[1] > 1:
            dist.all_reduce(self._totals)
        (clean, n_clean), (perturbed, n_perturbed) = self._totals.tolist()
        self._totals = None
        means = {"loss": (clean + perturbed) / (n_clean + n_perturbed)}
        if n_clean:
            means["loss_clean"] = clean / n_clean
        if n_perturbed:
            means["loss_perturbed"] = perturbed / n_perturbed
        if n_clean and n_perturbed:
            means["loss_gap"] = means["loss_perturbed"] - means["loss_clean"]
        return means


class _Hook:
    """A method of a wrapper as a module's hook. It holds the wrapper weakly, and where it is copied or pickled with its
    module it stays behind: the copy does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        method = self._method and self._method()
        if method:
            method(*args)

    def remove_owner(self) -> None:
        method = self._method and self._method()
        if method:
            method.__self__.remove()


class _LoaderPosition:
    """Where a loop stands in the loader that Accelerate prepared, whose last window may be short."""

    def __init__(self) -> None:
        self._pass: tuple[int, int, int] | None = None
        self._batches = 0

    def advance(self) -> None:
        """Count one more batch of this pass over the loader."""
        if is_initialized():
            state = GradientState()
            loader = state.active_dataloader
            this_pass = (id(loader), getattr(loader, "iteration", 0), len(state.dataloader_references))
            self._batches = self._batches + 1 if this_pass == self._pass else 1
            self._pass = this_pass

    def window_length(self) -> int:
        """Micro-steps in the window that the batch just counted begins."""
        state = GradientState()
        try:
            left = len(state.active_dataloader) - self._batches + 1
        except TypeError:  # no loader, or one without a length
            return state.num_steps
        return min(state.num_steps, left) if state.sync_with_dataloader and left > 0 else state.num_steps


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, whose forward pass all of them end in."""
    if isinstance(model, nn.DataParallel):
        raise NotImplementedError(
            "RWP does not work with DataParallel, whose replicas are copies that it cannot perturb: use "
            "DistributedDataParallel (accelerate launch), one process for each GPU"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if isinstance(model, torch._dynamo.OptimizedModule) else model


def _replica() -> tuple[int, int]:
    """This process among the data-parallel replicas: (index, count)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call `callback` once, when the backward pass that is running now has ended, nested ones of reentrant
    checkpointing included. A private call: autograd offers no public one that is right for those."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output, however nested in mappings, sequences and objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__"):
        yield from _tensors(vars(output))


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient.to_dense() if gradient.is_sparse else gradient).any())


def _call_if_any(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Pass `train` or `eval` on to a base optimizer that has one, such as schedule-free's."""
    method = getattr(optimizer, name, None)
    if method is not None:
        method()


def _check_range(name: str, value: float, valid: bool, valid_range: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r} is out of range: it has to be {valid_range}")
