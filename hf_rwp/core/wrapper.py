"""A `torch.optim.Optimizer` around another one, with one set of groups, state, defaults and hooks between the two.

Schedulers, GradScaler, Accelerate and Trainer read and replace these through whichever of the two they hold, so nothing
is copied: calling `Optimizer.__init__` here would give the wrapper groups of its own, and a scheduler would move a
learning rate that the base never sees.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hf_rwp.core.hooks import Hook


class OptimizerWrapper(torch.optim.Optimizer):
    """Passes everything on to `base`; a subclass changes what it must."""

    # GradScaler is to look for an overflow before `step`: a fused base that looks for itself would be told to step.
    _step_supports_amp_scaling = False

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # __init__ did not get that far
            raise AttributeError(name)
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} is bound to a model and cannot be copied or pickled: save state_dict()")

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def _hook_base(
        self, before_load: Callable[..., None], after_load: Callable[..., None], stepped: Callable[..., None]
    ) -> list[RemovableHandle]:
        """Call the methods, held weakly, around loading of the base, and first of all when it has stepped."""
        hooks = getattr(self.base, "_optimizer_step_post_hooks", None)
        if hooks is None:  # a base that never called Optimizer.__init__
            return []
        step = self.base.register_step_post_hook(Hook(stepped))
        hooks.move_to_end(step.id, last=False)
        before = self.base.register_load_state_dict_pre_hook(Hook(before_load))
        return [step, before, self.base.register_load_state_dict_post_hook(Hook(after_load))]

    def _step_once(self, closure: Callable[[], Any], then: Callable[[], None]) -> Any:
        """Step with a closure and call `then` after it, ahead of the step itself.

        ValueError: the base calls it again, or after it has changed the weights.
        """
        calls = 0
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        versions = [parameter._version for parameter in parameters]
        refusal = (
            f"{type(self.base).__name__} calls its closure more than once in a step, or at weights that it changed, "
            "and RWP has one gradient to a step: take a base optimizer that needs no closure"
        )
        if isinstance(self.base, torch.optim.LBFGS):
            raise ValueError(refusal)

        def once() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1 or [parameter._version for parameter in parameters] != versions:
                raise ValueError(refusal)
            with torch.enable_grad():
                loss = closure()
            then()
            return loss

        return self.base.step(once)

    def train(self) -> None:
        """Pass schedule-free's protocol on to a base that speaks it."""
        self._call_if_any("train")

    def eval(self) -> None:
        self._call_if_any("eval")

    def _call_if_any(self, name: str) -> None:
        method = getattr(self.base, name, None)
        if method is not None:
            method()
