"""RWP: any `torch.optim.Optimizer`, given the gradient of Random Weight Perturbation (arXiv 2211.11489).

A *micro-step* is one forward and one backward pass of the model; a *window* is the micro-steps of one optimizer step.

1. The forward pass begins the micro-step: `placement.role` says whether it is clean or perturbed, `Perturbation` adds
   the noise, and a gradient weight other than 1 goes on as a hook of every parameter, ahead of DDP's reduction.
2. The end of the backward pass ends it: the weights are restored. Further forward passes until then belong to it.
3. `step` ends the window: the base optimizer steps, at clean weights, with the mixed gradient.
"""

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rwp import noise as _noise
from hf_rwp.environment import Accumulation, innermost, refuse_data_parallel, refuse_unsupported, this_replica
from hf_rwp.foreach import noise_stds
from hf_rwp.hooks import Hook, at_end_of_backward, in_backward, tensors_in
from hf_rwp.perturbation import Perturbation, unexpanded
from hf_rwp.placement import Role, role
from hf_rwp.wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)


class _Target(NamedTuple):
    position: int  # in named_parameters()
    name: str
    weight: nn.Parameter
    gamma: float


class RWP(OptimizerWrapper):
    """Random Weight Perturbation around `optimizer`; the training loop stays as it is.

        optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)

    optimizer: the base optimizer, any `torch.optim.Optimizer` that needs no closure.
    model: the module that the loop calls and the optimizer's parameters belong to, before `accelerator.prepare`. A
        parameter that is frozen, or not in the optimizer, is not perturbed.
    gamma: size of the noise, finite and >= 0. Relative to each filter's norm in mode `filter` (None: 0.01), to the rms
        of its weights in mode `filter_normalized` (None: 0.2). It lives in the param groups as `rwp_gamma`: set it
        there for a group of its own, 0 to exclude the group. 0 everywhere is the base optimizer, bit for bit.
    alpha: the perturbed gradient's share of the mix, in [0, 1]. 1 perturbs every gradient; 0 is the base optimizer.
    seed: of the noise, which is a function of it and of (window, micro-step, replica, parameter). torch's global
        generator is not touched.
    accumulation_steps: gradients to an optimizer step, >= 1, where the loop counts them itself. None: Accelerate's
        `gradient_accumulation_steps`, 1 without Accelerate.
    noise: `filter` (the paper's) or `filter_normalized`, see `hf_rwp.noise.noise_std`.
    noise_1d: whether parameters of at most one dimension (biases, norm weights) are perturbed as well.
    frozen: whether frozen parameters are perturbed as well, with the first group's gamma: the base weights under LoRA,
        as in Flat-LoRA (arXiv 2409.14396). They have to be floating-point.
    eta, beta: ARWP's damping (arXiv 2404.00357), less noise where gradients are large. eta: >= 0, 0 for none. beta: in
        [0, 1).

    On two or more data-parallel replicas the odd ones are perturbed, and the framework's all-reduce mixes the
    gradients. On one, the micro-steps of a window alternate, so a step needs two or more of them.

    `eval()` disarms it and leaves clean weights, also after an interrupt or an error in a backward pass; `train()` arms
    it; a new one is armed. Wrapping a model again retires the earlier wrapper.

    Raises ValueError for a value out of range and for optimizer parameters that the model does not have;
    NotImplementedError under FSDP, DeepSpeed, DataParallel, tensor parallelism and XLA. In a loop, RuntimeError: where
    a step holds one gradient and nothing can be mixed; for a second backward pass in one micro-step; at `step`, for
    gradients that no forward pass of the model began.
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
        frozen: bool = False,
        eta: float = 0.0,
        beta: float = 0.99,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, (RWP, AcceleratedOptimizer)):
            raise TypeError(
                f"RWP wraps a plain torch.optim.Optimizer and got {type(optimizer).__name__}: wrap the base optimizer, "
                "once, before accelerator.prepare"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"RWP needs the module that it is to perturb and got {type(model).__name__}: RWP(base, model)"
            )
        if noise not in _noise.MODES:
            raise ValueError(f"noise={noise!r} is no mode of noise: choose one of {', '.join(_noise.MODES)}")
        gamma = _noise.DEFAULT_GAMMA[noise] if gamma is None else gamma
        _check("gamma", gamma, Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        _check("alpha", alpha, Real, lambda value: 0 <= value <= 1, "a number in [0, 1]")
        _check("seed", seed, Integral, lambda value: -(2**63) <= value < 2**63, "an integer of 64 bits")
        if accumulation_steps is not None:
            _check("accumulation_steps", accumulation_steps, Integral, lambda value: value >= 1, "an integer from 1 on")
        _check("eta", eta, Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        _check("beta", beta, Real, lambda value: 0 <= value < 1, "a number in [0, 1)")
        super().__init__(optimizer)
        self.model = innermost(model)
        self.alpha = alpha
        self._seed, self._accumulation_steps = seed, accumulation_steps
        self._mode, self._noise_1d, self._frozen, self._eta, self._beta = noise, noise_1d, frozen, eta, beta
        earlier_default, self.defaults["rwp_gamma"] = self.defaults.get("rwp_gamma"), gamma
        for group in self.param_groups:
            if "initial_rwp_gamma" in group:  # from an earlier wrapper of the same base: keep what a user set alone
                group["rwp_gamma"] = group.pop("initial_rwp_gamma")
                if group["rwp_gamma"] == earlier_default:
                    del group["rwp_gamma"]
            self._take_group(group)
        refuse_unsupported(self.model)
        if frozen:
            _refuse_quantized(self.model)

        self._armed = True
        self._role: Role | None = None  # of the latest micro-step; each has a role object of its own
        self._open: Role | None = None  # the same, from the first forward pass to the end of the backward pass
        self._flowing = False  # whether its backward pass began; if none is running then, it raised
        self._show_after = False  # whether the forward pass that runs now has hidden the noise
        self._plain = False  # whether a forward pass since the last step was the base optimizer's own
        self._windows = 0  # begun so far
        self._length = 1  # micro-steps that this window is to have
        self._shares: tuple[float, float] | None = None  # of its clean and perturbed slots, see `placement.role`
        self._announced: tuple[int, tuple[float, float] | None] | None = None  # the next window's length and shares
        self._completed = 0  # micro-steps that it had
        self._short = False  # whether the last window ended after one micro-step where more were due
        self._accumulation = Accumulation()
        self._fisher: dict[str, Tensor] = {}  # ARWP's F, by parameter name
        self._slots = {"clean": 0, "perturbed": 0}  # micro-steps completed on this replica
        self._relative_noise: list[tuple[str, int, float]] = []  # name, elements, size
        self._measure = True
        self._warned: set[str] = set()
        self._perturbation = Perturbation()
        self._weight_hooks: list[RemovableHandle] = []  # on the parameters, while a micro-step is open
        # A wrapper that goes while a micro-step is open leaves its model as it was.
        weakref.finalize(self, _clear, self._perturbation, self._weight_hooks).atexit = False
        self._handles = self._hook()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._take_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base's, and under `rwp` the wrapper's own: seed, windows begun, ARWP's F. `weights_only`-safe.

        Saved between two optimizer steps, it lets training go on bit for bit.
        """
        own = {"seed": self._seed, "windows": self._windows, "fisher": dict(self._fisher)}
        return {**super().state_dict(), "rwp": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the seed and the groups' gamma too, in place of those given at construction.

        A checkpoint of the base optimizer alone loads as well.
        """
        refuse_unsupported(self.model)  # accelerator.prepare comes by here
        own = state_dict.get("rwp")
        gammas = [{key: group[key] for key in ("rwp_gamma", "initial_rwp_gamma")} for group in self.param_groups]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "rwp"})
        for group, before in zip(self.param_groups, gammas, strict=True):
            group.update({**before, **group})
        if own is not None:
            self._seed, self._windows, self._fisher = own["seed"], own["windows"], dict(own["fisher"])
            self._completed = 0

    def train(self) -> None:
        """Arm: from now on forward passes in training mode may be perturbed. As often as you like."""
        self._raise_if_removed()
        self._hide()
        self._armed = True
        super().train()

    def eval(self) -> None:
        """Disarm: the weights are clean, bit for bit, and stay so until `train`."""
        self._hide()
        self._armed = False
        super().eval()

    def disarm(self) -> None:
        """End it all, after training or whatever cut it off: clean weights, no micro-step left open, until `train`.

        Unlike `eval()` it gives up a backward pass that is to come, and leaves alone a base that speaks that protocol.
        """
        self._close()
        self._armed, self._completed = False, 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._raise_if_removed()
        hid = self._hide()
        if self._open is None:
            self._completed = 0  # after an overflow GradScaler skips `step`, and the window is over all the same
        super().zero_grad(set_to_none)
        if hid:
            self._perturbation.show()  # many loops zero between the forward and the backward pass

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """The base optimizer's step, at clean weights, with the mixed gradient. Takes no closure."""
        self._raise_if_removed()
        self._close()
        if closure is not None and self.active:
            raise ValueError("RWP takes its gradients in ordinary backward passes: call step() without a closure")
        if self.active and not self._plain:
            self._check_window()
            if self._eta:
                self._update_fisher()
        self._completed, self._plain = 0, False
        return self.base.step() if closure is None else self.base.step(closure)

    def begin_window(self, micro_steps: int, shares: tuple[float, float] | None = None) -> None:
        """Say how many gradients the next step takes, where the loop knows and Accelerate does not.

        It holds for one window, which begins with the next micro-step. micro_steps: >= 1, on this replica. shares: what
        the loop's own factors on the clean and on the perturbed slots' mean gradients add up to, over all replicas;
        None where it averages all of them. See `placement.role` and `placement.shares_of`.
        """
        _check("micro_steps", micro_steps, Integral, lambda value: value >= 1, "an integer from 1 on")
        self._close()  # what an interrupt left open
        self._completed, self._announced = 0, (micro_steps, shares)

    @property
    def active(self) -> bool:
        """Whether the next window will be perturbed: alpha and some group's `rwp_gamma` are above 0."""
        return self.alpha > 0 and any(group["rwp_gamma"] > 0 for group in self.param_groups)

    @property
    def role(self) -> Role | None:
        """The latest micro-step's role; None where it was an ordinary one of the base optimizer."""
        return self._role

    def scale_gamma(self, factor: float) -> None:
        """Set every group's `rwp_gamma` to `factor` (>= 0) times what it began with; see `noise.gamma_factor`."""
        _check("factor", factor, Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        for group in self.param_groups:
            group["rwp_gamma"] = group["initial_rwp_gamma"] * factor

    def sync_buffers(self) -> None:
        """Give all replicas the buffers (BatchNorm statistics) of replica 0, before evaluation and before saving.

        Collective: call it on all replicas.
        """
        if this_replica()[1] > 1:
            self._hide()
            for buffer in map(unexpanded, self.model.buffers()):
                values = buffer.contiguous()
                dist.broadcast(values, src=0)
                buffer.copy_(values)

    def report(self) -> dict[str, Any]:
        """What really happened so far, over all replicas. Collective: call it on all of them.

        Returns windows begun; slots, the micro-steps completed since construction, clean and perturbed; placement,
        replicas and alpha; and `relative_noise`, ||noise|| / ||weight|| as last measured in the weights, which is at
        the first perturbed micro-step after a report, for the perturbed tensors with the most, the median and the
        fewest elements.
        """
        replicas = this_replica()[1]
        mine = (self._slots, self._relative_noise)
        everyone: list[Any] = [mine] * replicas
        if replicas > 1:
            dist.all_gather_object(everyone, mine)
        sizes: list[tuple[str, int, float]] = next((sizes for _, sizes in everyone if sizes), [])
        self._measure = True
        return {
            "placement": "parallel" if replicas > 1 else "sequential",
            "replicas": replicas,
            "alpha": self.alpha,
            "windows": self._windows,
            "slots": {kind: sum(slots[kind] for slots, _ in everyone) for kind in self._slots},
            "relative_noise": {
                rank: {"name": name, "elements": elements, "size": size}
                for rank, (name, elements, size) in zip(("largest", "median", "smallest"), sizes, strict=False)
            },
        }

    def remove(self) -> None:
        """Take the wrapper off its model: clean weights, no hooks left. Using it afterwards raises RuntimeError."""
        self._close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The micro-step: a forward pass begins it, the end of its backward pass ends it.

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        self._show_after = False
        if not self._trains(module):
            self._show_after = self._hide()
        elif in_backward() and self.active:
            raise RuntimeError(
                "a forward pass of the whole model inside a backward pass, as activation checkpointing of the whole "
                "model makes: the noise would differ between the two. Checkpoint its layers instead"
            )
        elif self._open is not None and not self._flowing:
            self._perturbation.show()
        else:
            self._begin(module)

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._open is None:
            return
        if not self._trains(module):
            if self._show_after:
                self._perturbation.show()  # the backward pass of an earlier one is still to come
            return
        outputs = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        for tensor in outputs:
            tensor.register_hook(functools.partial(self._before_backward, self._open))
        if not outputs:  # the forward pass raised, or no backward pass can come of it
            self._close()

    def _before_backward(self, micro_step: Role, _: Tensor) -> None:
        if micro_step is not self._open:
            raise RuntimeError(
                "a second backward pass in one micro-step, or one after step() or load_state_dict() ended it: the "
                "weights that its forward pass saw are gone. Add the losses up and call backward once, before step()"
            )
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a backward pass with create_graph=True: RWP cannot weight a gradient of a gradient, whose weights are "
                "gone by then. Take such penalties between optimizer.eval() and optimizer.train(), or without RWP"
            )
        self._perturbation.show()
        self._flowing = True
        at_end_of_backward(functools.partial(self._end, micro_step))

    def _trains(self, module: nn.Module) -> bool:
        trains = self._armed and module.training and torch.is_grad_enabled()
        return trains and any(parameter.requires_grad for parameter in module.parameters())

    def _begin(self, module: nn.Module) -> None:
        self._close()  # what an interrupt in here left behind
        self._accumulation.advance()
        if not 0 < self._completed < self._length:
            if self._completed and self.alpha < 1 and this_replica()[1] == 1:
                self._warn_once(
                    f"{self._completed} gradients made a step's worth, and another one begins before this optimizer's "
                    "step(). Give accumulation_steps their true number; take backward passes that are no training, "
                    "such as an attack's, in eval mode; and call remove() before another optimizer takes the model"
                )
            self._completed = 0
            if not self.active:
                self._role, self._plain = None, True
                return
            if module is not self.model:
                refuse_data_parallel()
            refuse_unsupported(self.model)
            if not any(self._targets()):
                raise RuntimeError(
                    "nothing to perturb: no trainable parameter has an rwp_gamma above 0. Set one in a param group, "
                    "unfreeze a weight of the optimizer's, or set noise_1d=True if all are biases or norm weights"
                )
            self._length, self._shares = self._next_window()
            self._windows += 1
        index, replicas = this_replica()
        if replicas == self._length == 1 and self.alpha < 1:
            self._role = Role(False, 1.0)
            self._warn_once(
                "an epoch ends with a step of one gradient, an ordinary step: take a number of batches that "
                "gradient_accumulation_steps divides to avoid it"
            )
        else:
            self._role = role(index, self._completed, replicas, self._length, self.alpha, self._shares)
        if self._role.perturbed:
            self._perturb(index)
        if self._role.weight != 1:
            scale = functools.partial(torch.mul, other=self._role.weight)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    self._weight_hooks.append(parameter.register_hook(scale))
        self._open = self._role

    def _perturb(self, index: int) -> None:
        targets = list(self._targets())
        stds = noise_stds(
            [target.weight.detach() for target in targets],
            [target.gamma for target in targets],
            self._mode,
            [self._damping(target) for target in targets],
        )
        draws = [
            (target.weight, std, _noise.noise_seed(self._seed, self._windows, self._completed, index, target.position))
            for target, std in zip(targets, stds, strict=True)
        ]
        keeps_buffers = self.alpha == 1 and index == 0  # with no clean slot at all, replica 0 has to update them
        self._perturbation.add(draws, guarded=None if keeps_buffers else self.model)
        if self._measure and targets:
            self._measure_noise(targets)

    def _end(self, micro_step: Role) -> None:
        if micro_step is self._open:
            self._close()
            self._completed += 1
            self._slots["perturbed" if micro_step.perturbed else "clean"] += 1

    def _close(self, *_: Any) -> None:
        _clear(self._perturbation, self._weight_hooks)
        self._open, self._flowing = None, False

    def _hide(self, *_: Any) -> bool:
        """Make the weights clean until `show`; whether there was noise to hide."""
        if self._flowing and not in_backward():
            self._close()  # the backward pass raised, and no other may follow
        return self._perturbation.hide()

    def _targets(self) -> Iterator[_Target]:
        """The parameters that noise goes on, looked up afresh: frameworks swap parameters and groups."""
        gammas = {id(p): float(group["rwp_gamma"]) for group in self.param_groups for p in group["params"]}
        frozen = float(self.param_groups[0]["rwp_gamma"]) if self._frozen else 0.0
        for position, (name, weight) in enumerate(self.model.named_parameters()):
            gamma = gammas.get(id(weight), 0.0) if weight.requires_grad else frozen
            if gamma > 0 and (self._noise_1d or weight.ndim > 1):
                yield _Target(position, name, weight, gamma)

    def _measure_noise(self, targets: list[_Target]) -> None:
        by_size = sorted(targets, key=lambda target: -target.weight.numel())
        chosen = [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
        sizes = self._perturbation.relative_sizes(target.weight for target in chosen)
        self._relative_noise = [
            (target.name, target.weight.numel(), size.item()) for target, size in zip(chosen, sizes, strict=True)
        ]
        self._measure = False
        logger.info("noise relative to the weights (name, elements, size): %s", self._relative_noise)

    # ARWP's damping, from the gradient that the step uses: the same on all replicas.

    def _damping(self, target: _Target) -> Tensor | None:
        fisher = self._fisher.get(target.name)
        return None if fisher is None else _noise.arwp_damping(fisher.to(target.weight.device), self._eta)

    @torch.no_grad()
    def _update_fisher(self) -> None:
        for _, name, weight, _ in self._targets():
            if weight.grad is not None:
                gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
                fisher = self._fisher.get(name)
                fisher = None if fisher is None else fisher.to(gradient.device)
                self._fisher[name] = _noise.arwp_fisher(fisher, gradient, self._beta)

    # The window: how long it is to be, and whether `step` finds what it should.

    def _next_window(self) -> tuple[int, tuple[float, float] | None]:
        announced, self._announced = self._announced, None
        steps = announced[0] if announced else self._accumulation_steps or self._accumulation.steps
        if steps == 1 and self.alpha < 1 and this_replica()[1] == 1:
            raise RuntimeError(
                f"one process and one gradient to a step: nothing to mix, which alpha={self.alpha} asks for. Take two "
                "or more gradients to a step (Accelerator(gradient_accumulation_steps=2), or RWP(accumulation_steps=2) "
                "where the loop counts them itself), or two or more processes, or alpha=1 to perturb every gradient"
            )
        return announced or (self._accumulation_steps or self._accumulation.length, None)

    def _check_window(self) -> None:
        if self._completed == 0:
            if any(_is_nonzero(p.grad) for group in self.param_groups for p in group["params"]):
                remedy = (
                    "call the model itself, in training mode, and return tensors (in tuples, mappings or dataclasses)"
                    if self._armed
                    else "eval() has disarmed RWP: call optimizer.train() before training goes on"
                )
                raise RuntimeError(f"step() found gradients that no forward pass of the model began: {remedy}")
        elif self._completed != self._length and self.alpha < 1 and this_replica()[1] == 1:
            found = f"a step after {self._completed} gradients where {self._length} were due"
            if self._completed == 1 and self._short:
                raise RuntimeError(
                    f"{found}, and so was the last: no gradient is perturbed. With Accelerate wrap the loop's body in "
                    "`with accelerator.accumulate(model):`; elsewhere give RWP the accumulation_steps that the loop has"
                )
            self._short = self._completed == 1
            self._warn_once(
                f"{found}: its mix is not the one that alpha={self.alpha} asks for. Take a number of batches per epoch "
                "that accumulation_steps divides, or a loader of known length prepared by Accelerate"
            )
        else:
            self._short = False

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # Taking hold of the model and of the groups.

    def _take_group(self, group: dict[str, Any]) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        foreign = [tuple(parameter.shape) for parameter in group["params"] if id(parameter) not in own]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the optimizer's parameters are not the model's (shapes {foreign[:3]}): RWP could "
                "not perturb them. Give it the module that the optimizer was built from"
            )
        gamma = group.setdefault("rwp_gamma", self.defaults["rwp_gamma"])
        _check("rwp_gamma", gamma, Real, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        group.setdefault("initial_rwp_gamma", gamma)

    def _hook(self) -> list[RemovableHandle]:
        for hook in list(self.model._forward_pre_hooks.values()):
            if isinstance(hook, Hook) and hook.owner is not None:
                hook.owner.remove()
        handles = [
            self.model.register_forward_pre_hook(Hook(self._before_forward)),
            self.model.register_forward_hook(Hook(self._after_forward), always_call=True),
        ]
        for module in self.model.modules():
            handles.append(module.register_state_dict_pre_hook(Hook(self._hide)))
            handles.append(module.register_load_state_dict_pre_hook(Hook(self._close)))
        return handles

    def _raise_if_removed(self) -> None:
        if not self._handles:
            raise RuntimeError(
                "this RWP wrapper is no longer on its model: a newer RWP took over, or remove() was called. Use the "
                "newer one, or wrap the model again"
            )


def _clear(perturbation: Perturbation, weight_hooks: list[RemovableHandle]) -> None:
    perturbation.restore()
    while weight_hooks:
        weight_hooks.pop().remove()


def _refuse_quantized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or parameter.is_floating_point()):
            raise NotImplementedError(
                f"frozen=True is to perturb {name}, which is of {parameter.dtype}: Gaussian noise needs floating-point "
                "weights. Load the base weights unquantized (bfloat16), or leave frozen=False to perturb the others"
            )


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient.to_dense() if gradient.is_sparse else gradient).any())


def _check(name: str, value: Any, kind: type, valid: Callable[[Any], bool], valid_range: str) -> None:
    if not (isinstance(value, kind) and valid(value)):
        raise ValueError(f"{name}={value!r} is out of range: it has to be {valid_range}")
