"""The window: the micro-steps of one optimizer step.

1. `Windows.begin` is called ahead of a forward pass. The first one opens a window, which says once for all its
   micro-steps how many there are, which weights get noise, and which replica this is.
2. Each micro-step has a role (`placement.role`); a perturbed one has its noise added here.
3. `step`, `zero_grad`, `begin_window`, loading and `disarm` end the window. It counts only then, so that a state saved
   in the middle, between backward and step, resumes with the same noise.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hf_rwp.core import registry
from hf_rwp.core.accumulation import Accumulation
from hf_rwp.core.buffers import guarded_buffers
from hf_rwp.core.checks import check
from hf_rwp.core.damping import Damping
from hf_rwp.core.draws import Target
from hf_rwp.core.groups import Groups
from hf_rwp.core.noise import check_noise, noise_seeds, std_factor
from hf_rwp.core.perturbation import Perturbation
from hf_rwp.core.placement import Role, antithetic, role
from hf_rwp.core.refusals import refuse_data_parallel, refuse_lone_processes
from hf_rwp.core.replicas import Replicas, replicas_of, synchronizes
from hf_rwp.core.report import Report
from hf_rwp.core.sharding import local_of, make_ready, reshard

logger = logging.getLogger(__name__)

Shares = tuple[float, float]  # of the clean and of the perturbed slots, see `placement.role`


@dataclass
class Options:
    """What `RWP` was given, but for what lives in the param groups."""

    alpha: float
    noise: str
    noise_1d: bool
    frozen: bool | str
    antithetic: bool
    accumulation_steps: int | None
    process_group: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        check("alpha", self.alpha, Real, lambda value: 0 <= value <= 1, "a number in [0, 1]")
        check_noise(self.noise)
        check("frozen", self.frozen, (bool, str), lambda value: value in (False, True, "copy"), 'a bool or "copy"')
        steps = self.accumulation_steps
        if steps is not None:
            check("accumulation_steps", steps, Integral, lambda value: value >= 1, "an integer >= 1")


@dataclass
class Window:
    """number: of all windows, from 1 on. length: micro-steps that it is to have. gatherers: of the model, see
    `sharding.gatherers`. completed: micro-steps that it had so far. synchronized: whether the gradients of one of them
    were averaged over the replicas."""

    number: int
    length: int
    shares: Shares | None
    replicas: Replicas
    targets: Sequence[Target]
    factors: Sequence[float]
    gatherers: Sequence[Any]
    completed: int = 0
    synchronized: bool = False


@dataclass
class Windows:
    """The window that is open, and what is known of the next one.

    announced: its length and shares, once. replicas: of the latest window. plain: whether a forward pass since the last
    step was the base optimizer's own. stale: whether the window's gradients were zeroed with a backward pass still to
    come; if a forward pass comes instead, a new window begins. early: windows in a row that ended after one gradient
    where more were due.
    """

    model: nn.Module
    options: Options
    groups: Groups
    damping: Damping
    report: Report
    perturbation: Perturbation
    current: Window | None = None
    announced: tuple[int, Shares | None] | None = None
    replicas: Replicas | None = None
    plain: bool = False
    stale: bool = False
    early: int = 0
    accumulation: Accumulation = field(default_factory=Accumulation)
    warned: set[str] = field(default_factory=set)

    @property
    def active(self) -> bool:
        """Whether the next window will be perturbed."""
        return self.options.alpha > 0 and any(gamma > 0 for gamma in self.groups.gammas())

    @property
    def gatherers(self) -> Sequence[Any]:
        """Of the window that is open, see `Window`."""
        return () if self.current is None else self.current.gatherers

    def begin(self, module: nn.Module) -> Role | None:
        """Begin a micro-step, its noise in the weights; None: an ordinary one. module: that is called."""
        self.accumulation.advance()
        if self.stale:
            self.end()
        window, alpha = self.current, self.options.alpha
        if window is None or not 0 < window.completed < window.length:
            if window is not None and window.completed and alpha < 1 and window.replicas.count == 1:
                self._warn_once(
                    f"{window.completed} gradients made a step's worth, and another one begins before this optimizer's "
                    "step(). Give accumulation_steps their true number; take backward passes that are not training, "
                    "such as an attack's, in eval mode; and call remove() before another optimizer takes the model"
                )
            self.end()
            if not self.active:
                self.plain = True
                return None
            gathering = make_ready(self.model)
            reshard(gathering)  # or the weights that FSDP2 has gathered would hide the optimizer's
            window = self.current = self._open(module, gathering)
        replicas = window.replicas
        if alpha < 1:
            window.synchronized |= synchronizes(window.gatherers)
        if replicas.count == window.length == 1 and alpha < 1:
            self._warn_once(
                "an epoch ends with a step of one gradient, an ordinary step: take a number of batches that "
                "gradient_accumulation_steps divides to avoid it"
            )
            return Role(False, 1.0)
        this = role(replicas.index, window.completed, replicas.count, window.length, alpha, window.shares)
        if this.perturbed:
            reshard(window.gatherers)
            self._perturb(window)
        return this

    def completed(self, this: Role) -> None:
        """A micro-step's backward pass has ended."""
        self.report.slots["perturbed" if this.perturbed else "clean"] += 1
        if self.current is not None:
            self.current.completed += 1
        self.stale = False

    def end(self) -> None:
        """End the open window, if there is one; it counts if it had a gradient."""
        window, self.current, self.stale = self.current, None, False
        if window is not None and window.completed:
            self.groups.windows = window.number
            registry.count_windows(self.model, window.number)

    def stepped(self, *_: Any) -> None:
        """The base has stepped: called ahead of users' hooks on it, who may save. As often as you like."""
        self.damping.commit()
        self.plain = False
        self.end()

    def zeroed(self, in_micro_step: bool) -> None:
        """Gradients were zeroed. in_micro_step: after a forward pass, and before the end of its backward pass."""
        if in_micro_step:
            self.stale = self.current is not None and self.current.completed > 0
        else:
            self.end()  # after an overflow GradScaler skips `step`, and the window is over all the same

    def discard(self) -> None:
        """End the open window, which does not count: other counters were loaded."""
        self.current, self.stale = None, False

    def check(self, armed: bool, parameters: Iterable[Tensor]) -> None:
        """Ahead of a step: RuntimeError, or a warning, where the gradients of `parameters` are not a mix."""
        window, alpha = self.current, self.options.alpha
        if self.plain or not self.active or self.groups.later:
            return
        if window is None or window.completed == 0:
            if any(_is_nonzero(parameter.grad) for parameter in parameters):
                remedy = (
                    "call the model itself, in training mode, and return tensors (in tuples, mappings or dataclasses)"
                    if armed
                    else "eval() has disarmed RWP: call optimizer.train() before training goes on"
                )
                raise RuntimeError(f"step() found gradients that no forward pass of the model began: {remedy}")
            return
        if alpha < 1 and window.replicas.count == 1:
            self._check_length(window)
        elif alpha < 1 and not window.synchronized:
            raise RuntimeError(
                "step() found gradients that were never averaged over the replicas: every backward pass was inside "
                "no_sync(), as LocalSGD has it, or after FSDP2's set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False), so that clean and perturbed ones are not mixed. Take the last one "
                "outside of it; or, where processes train by themselves, make each a replica of its own: "
                "RWP(process_group=torch.distributed.new_subgroups(1)[0], accumulation_steps=2)"
            )
        self.damping.note(window.targets)

    def _open(self, module: nn.Module, gathering: Sequence[Any]) -> Window:
        if module is not self.model:
            refuse_data_parallel()
        refuse_lone_processes(decided=True)
        registry.refuse_overlap(self.model)
        options = self.options
        named = self.perturbation.layers.named_parameters(self.model)
        targets, gammas = self.groups.targets(named, options.noise_1d, bool(options.frozen))
        if not targets:
            raise RuntimeError(self.groups.why_no_target())
        if self.damping.eta and self.groups.swapped:
            raise NotImplementedError(
                "eta > 0 (ARWP's damping) follows the gradient of every weight, and the optimizer's groups hold "
                "something else by now, as the flat partitions of DeepSpeed's ZeRO. What works is eta=0, or eta > 0 "
                "under DistributedDataParallel and FSDP2"
            )
        self.replicas = replicas = replicas_of(options.process_group, self.model.parameters())
        announced, self.announced = self.announced, None
        given = options.accumulation_steps
        steps = announced[0] if announced else given or self.accumulation.steps
        if steps == 1 and options.alpha < 1 and replicas.count == 1:
            raise RuntimeError(
                f"nothing to mix: alpha={options.alpha} mixes a clean and a perturbed gradient, but on one process "
                "this step has only one. Use two or more gradients per step "
                "(Accelerator(gradient_accumulation_steps=2), or RWP(accumulation_steps=2) where the loop counts them "
                "itself), two or more processes, or alpha=1 to perturb every gradient"
            )
        length, shares = announced or (given or self.accumulation.length, None)
        factors = [
            std_factor(target.block, gamma, options.noise) for target, gamma in zip(targets, gammas, strict=True)
        ]
        return Window(self.groups.windows + 1, length, shares, replicas, targets, factors, gathering)

    def _perturb(self, window: Window) -> None:
        alpha, replicas = self.options.alpha, window.replicas
        index, micro_step, sign = replicas.index, window.completed, 1
        if self.options.antithetic:
            index, micro_step, sign = antithetic(index, micro_step, replicas.count, window.length, alpha)
        positions = [target.position for target in window.targets]
        seeds = noise_seeds(self.groups.seed, window.number, micro_step, index, positions)
        factors = [sign * factor for factor in window.factors]
        guarded, updated = guarded_buffers(self.model, replicas, alpha)
        if updated and alpha < 1:
            self._warn_once(
                "nothing gives this replica the buffers of replica 0 (DistributedDataParallel does, without "
                "broadcast_buffers=False): its running statistics are those of its perturbed passes. Call "
                "sync_buffers() before evaluation and saving, where no average over all replicas is taken"
            )
        dampings = self.damping.factors(window.targets)
        self.perturbation.add(window.targets, factors, seeds, dampings, guarded, window.gatherers)
        self.report.measure(window.targets, self.perturbation, window.gatherers)

    def _check_length(self, window: Window) -> None:
        """Warn, or raise where it cannot be an accident, if a step comes when not all its gradients are there."""
        if window.completed == window.length:
            self.early = 0
            return
        self.early = self.early + 1 if window.completed == 1 else 0
        found = f"a step after {window.completed} gradients where {window.length} were due"
        if self.early == 2:
            raise RuntimeError(
                f"{found}, and so was the last: no gradient is perturbed. With Accelerate wrap the loop's body in "
                "`with accelerator.accumulate(model):`; elsewhere give RWP the accumulation_steps that the loop has"
            )
        if self.groups.windows == 0 and window.completed == 1 and self.options.accumulation_steps:
            remedy = (
                "It is the first step of all: a loop that steps `if step % K == 0`, with step counted from 0, takes it "
                "too early, and `if (step + 1) % K == 0` does not"
            )
        else:
            remedy = (
                "Take a number of batches per epoch that accumulation_steps divides, or a loader of known length "
                "prepared by Accelerate"
            )
        self._warn_once(f"{found}: its gradients are not mixed as alpha={self.options.alpha} says. {remedy}")

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(local_of(gradient.to_dense() if gradient.is_sparse else gradient).any())
