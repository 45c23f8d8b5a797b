"""What RWP keeps in the base's param groups, where frameworks that save only groups and state keep it too.

    rwp_gamma, initial_rwp_gamma      of the group, now and before any schedule
    rwp_seed, rwp_windows             of the wrapper, alike in all groups: the noise's seed, optimizer steps so far

A weight's group is found by the weight, or, where a framework has put something else into the groups (flat partitions,
master copies), by the name that it had when the group came.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from hf_rwp.core.checks import check
from hf_rwp.core.draws import Target
from hf_rwp.core.refusals import refuse_unsupported
from hf_rwp.core.sharding import block_of, gathered_weights, gatherers, local_of, reshard

logger = logging.getLogger(__name__)

_KEYS = ("rwp_gamma", "initial_rwp_gamma", "rwp_seed", "rwp_windows")


class Groups:
    """The param groups of `base`, whose parameters must be `model`'s.

    gamma, seed: of groups that do not say. windows: optimizer steps that the model has been perturbed for already.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module, gamma: float, seed: int, windows: int) -> None:
        check("gamma", gamma, Real, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        check("seed", seed, Integral, lambda value: -(2**63) <= value < 2**63, "an integer of 64 bits")
        self._base, self._model = base, model
        self._groups = base.param_groups  # as they were when a window opened
        # By name: the weight, None once another took its place, and its group's number. Not by weak references, with
        # which torch refuses to move a DTensor.
        self._homes: dict[str, tuple[Tensor | None, int]] = {}
        self._seen: Any = None  # what the targets below rest on
        self._targets: list[Target] = []
        self._numbers: list[int] = []  # of the targets' groups
        self._kept: list[dict[str, Any]] = []
        earlier_default, base.defaults["rwp_gamma"] = base.defaults.get("rwp_gamma"), gamma
        for group in base.param_groups:
            if "initial_rwp_gamma" in group:  # from an earlier wrapper of the same base: keep only what a user set
                group["rwp_gamma"] = group.pop("initial_rwp_gamma")
                if group["rwp_gamma"] == earlier_default:
                    del group["rwp_gamma"]
            windows = max(windows, group.get("rwp_windows", 0))
        for group in base.param_groups:
            group.update(rwp_seed=seed, rwp_windows=windows)
            self.take(group)

    def take(self, group: dict[str, Any]) -> None:
        """Take up a group. ValueError: its parameters are not the model's, or its gamma is out of range."""
        gathering = gatherers(self._model)
        reshard(gathering)  # an evaluation leaves some gathered, in the place of those that optimizers have
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        foreign = [tuple(parameter.shape) for parameter in group["params"] if id(parameter) not in names]
        gathered = {id(parameter) for parameter in gathered_weights(gathering, self._model)}
        if any(id(parameter) in gathered for parameter in group["params"]):
            raise ValueError(
                "the optimizer was given weights that FSDP2 had gathered for a pass, as an evaluation leaves them, and "
                "would not train them: build it ahead of the first pass, or after model.reshard()"
            )
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the optimizer's parameters are not the model's (shapes {foreign[:3]}): RWP could "
                "not perturb them. Give it the module that the optimizer was built from"
            )
        gamma = group.setdefault("rwp_gamma", self._base.defaults["rwp_gamma"])
        check("rwp_gamma", gamma, Real, lambda value: 0 <= value < math.inf, "a finite number >= 0")
        group.setdefault("initial_rwp_gamma", gamma)
        first = self._base.param_groups[0]
        group.update(rwp_seed=first["rwp_seed"], rwp_windows=first["rwp_windows"])
        number = next(number for number, other in enumerate(self._base.param_groups) if other is group)
        for parameter in group["params"]:
            self._homes[_plain(names[id(parameter)])] = parameter, number

    @property
    def seed(self) -> int:
        return int(self._base.param_groups[0]["rwp_seed"])

    @property
    def windows(self) -> int:
        return int(self._base.param_groups[0]["rwp_windows"])

    @windows.setter
    def windows(self, value: int) -> None:
        for group in self._all:
            group["rwp_windows"] = value

    @property
    def _all(self) -> list[dict[str, Any]]:
        """The groups; DeepSpeed's ZeRO steps them one by one, each in the place of all."""
        now, before = self._base.param_groups, self._groups
        part = len(now) < len(before) and {id(group) for group in now} <= {id(group) for group in before}
        return before if part else now

    @property
    def later(self) -> bool:
        """Whether the base has a part of the groups now, without the first: a step of them goes on."""
        return self._base.param_groups[0] is not self._all[0]

    @property
    def swapped(self) -> bool:
        """Whether the groups hold something else in place of the weights that `targets` found."""
        held = {id(parameter) for group in self._all for parameter in group["params"]}
        return any(target.weight.requires_grad and id(target.weight) not in held for target in self._targets)

    def gammas(self, initial: bool = False) -> list[float]:
        return [float(group["initial_rwp_gamma" if initial else "rwp_gamma"]) for group in self._all]

    def scale(self, factor: float) -> None:
        for group in self._base.param_groups:
            group["rwp_gamma"] = group["initial_rwp_gamma"] * factor

    def keep(self, *_: Any) -> None:
        """Ahead of loading: a checkpoint of just the base has none of RWP's keys, and replaces the groups."""
        self._kept = [{key: group[key] for key in _KEYS if key in group} for group in self._base.param_groups]

    def fill(self, *_: Any) -> None:
        """After loading: what the checkpoint does not say stays as it was, and what it says otherwise is told."""
        kept, self._kept = self._kept, []
        for group, before in zip(self._base.param_groups, kept, strict=False):
            group.update({**before, **group})
        if kept:
            gammas = [group.get("initial_rwp_gamma") for group in kept]
            _tell("rwp_gamma", gammas, [group.get("initial_rwp_gamma") for group in self._base.param_groups])
            _tell("rwp_seed", kept[0].get("rwp_seed"), self.seed)

    def load(self, load: Callable[[], None], own: dict[str, Any] | None) -> None:
        """Call `load`, which loads the base; own: the seed and windows of a checkpoint that has them apart, or None."""
        self.keep()
        load()
        self.fill()  # for a base without hooks
        if own is not None:
            _tell("rwp_seed", self.seed, own["seed"])
            for group in self._base.param_groups:
                group.update(rwp_seed=own["seed"], rwp_windows=own["windows"])

    def targets(
        self, named: Iterable[tuple[str, nn.Parameter]], noise_1d: bool, frozen: bool
    ) -> tuple[Sequence[Target], list[float]]:
        """The weights that noise goes on, of all `named`, and the gamma of each. Frameworks swap parameters and groups.

        The list is the same object as before where it holds the same. NotImplementedError: see `refuse_unsupported`.
        """
        self._groups = self._base.param_groups
        gammas, named = self.gammas(), list(named)
        numbers = {id(p): number for number, group in enumerate(self._base.param_groups) for p in group["params"]}
        layouts = [
            (name, id(p), p.requires_grad, id(local), local.data_ptr(), p.dtype, p.shape, local.shape, local.stride())
            for name, p, local in ((name, p, local_of(p)) for name, p in named if p.requires_grad or frozen)
        ]  # all that a `Block` rests on
        seen = layouts, numbers, [gamma > 0 for gamma in gammas], noise_1d, frozen
        if seen != self._seen:
            refuse_unsupported(parameter for _, parameter in named)
            self._seen, self._targets, self._numbers = seen, [], []
            there = {id(parameter) for _, parameter in named} | numbers.keys()
            self._homes = {
                name: (weight if id(weight) in there else None, number)
                for name, (weight, number) in self._homes.items()
            }
            for position, (name, weight) in enumerate(named):
                number = self._number(name, weight, numbers) if weight.requires_grad else 0 if frozen else None
                if number is not None and gammas[number] > 0 and (noise_1d or weight.ndim > 1):
                    self._targets.append(Target(position, _plain(name), weight, local_of(weight), block_of(weight)))
                    self._numbers.append(number)
            lost = [name for name, p in named if p.requires_grad and self._is_lost(name, p, numbers)]
            if lost and self._targets:
                logger.warning(
                    "%s (of %d in all) took the place of a weight that the optimizer was given, and gets neither noise "
                    "nor a step: build the optimizer and RWP after parameters are replaced, and load without assign",
                    lost[0],
                    len(lost),
                )
        return self._targets, [gammas[number] for number in self._numbers]

    def named(self) -> list[tuple[str | None, Tensor]]:
        """All parameters of the groups, in order, with the names that they had when their groups came. None: the group
        holds something else by now."""
        found: list[tuple[str | None, Tensor]] = []
        for number, group in enumerate(self._base.param_groups):
            names = [name for name, (_, home) in self._homes.items() if home == number]
            known = len(names) == len(group["params"])
            found += zip(names if known else [None] * len(group["params"]), group["params"], strict=True)
        return found

    def _number(self, name: str, weight: Tensor, numbers: dict[int, int]) -> int | None:
        """The number of a weight's group: by what the groups hold now, else by its name."""
        home = self._homes.get(_plain(name))
        return numbers.get(id(weight), home[1] if home and home[0] is weight else None)

    def _is_lost(self, name: str, weight: Tensor, numbers: dict[int, int]) -> bool:
        """Whether a weight stands where one of the optimizer's was, and is not the optimizer's."""
        return _plain(name) in self._homes and self._number(name, weight, numbers) is None

    def why_no_target(self) -> str:
        """Why `targets` finds none: what was seen, and what to do."""
        ours = {id(parameter) for parameter in self._model.parameters()}
        replaced = [name for name, (weight, _) in self._homes.items() if id(weight) not in ours]
        if replaced:
            return (
                f"nothing to perturb: {len(replaced)} of the model's parameters ({', '.join(replaced[:3])}) are others "
                "than the optimizer's by now. fully_shard, load_state_dict(assign=True), an assignment to a parameter "
                "or a layer, and torch.func.functional_call put others in their place, and the optimizer would not "
                "train them: shard first, load without assign, build the optimizer and RWP after the parameters are "
                "replaced, and call the model itself"
            )
        return (
            "nothing to perturb: no trainable parameter has an rwp_gamma above 0. Set one in a param group, unfreeze a "
            "weight of the optimizer's, or set noise_1d=True if all are biases or norm weights"
        )


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _tell(name: str, before: Any, now: Any) -> None:
    if before != now:
        logger.warning("the checkpoint's %s, %s, takes the place of %s, given at construction", name, now, before)
