"""A plugin for Axolotl: RWP by the keys of its YAML, in whichever Trainer it builds.

1. The keys, `rwp_gamma` and so on, are those of [`RWPArguments`]: Axolotl's configuration and its arguments get them.
2. Once Axolotl has built a Trainer, its class gets [`RWPTrainerMixin`] in front. `BasePlugin.create_optimizer` would be
   the place for an optimizer, but Axolotl (up to 0.19) asks no plugin for one; and an optimizer neither splits batches
   nor mixes by token. What is wrapped is what Axolotl builds by itself: its own optimizers and parameter groups, too.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, create_model

from hf_rwp.core.arguments import RWPArguments
from hf_rwp.trainer.checks import check_batches
from hf_rwp.trainer.trainer import RWPTrainerMixin

_FIELDS = {field.name: field for field in dataclasses.fields(RWPArguments)}
_TYPES = typing.get_type_hints(RWPArguments)

RWPInputArgs: type[BaseModel] = create_model(  # the keys of the YAML; what is not set is left to RWPArguments
    "RWPInputArgs",
    **{
        name: (_TYPES[name] | None, Field(default=None, description=field.metadata["help"]))
        for name, field in _FIELDS.items()
    },
)  # type: ignore[call-overload]


class RWPPlugin(BasePlugin):
    """
    Random Weight Perturbation in Axolotl:

        plugins:
          - hf_rwp.integrations.axolotl.RWPPlugin
        rwp_gamma: 0.01

    `rwp: false` switches it off. Raises ValueError for a key that begins as those of RWP and is none, and whatever
    [`RWPTrainerMixin`] refuses, before training begins.
    """

    def register(self, cfg: Mapping[str, Any]) -> None:
        for name in cfg:
            if str(name).startswith("rwp") and name not in _FIELDS:
                near = difflib.get_close_matches(name, _FIELDS, n=1)
                meant = f"; did you mean {near[0]}?" if near else f". There are {', '.join(_FIELDS)}"
                raise ValueError(f"RWP has no key {name}{meant}")

    def get_input_args(self) -> str:
        return f"{__name__}.RWPInputArgs"

    def get_training_args_mixin(self) -> str:
        return f"{RWPArguments.__module__}.{RWPArguments.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        given = {name: cfg[name] for name in _FIELDS if cfg.get(name) is not None}
        return {"rwp": True, **given}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        kind = type(trainer)
        if issubclass(kind, RWPTrainerMixin) or cfg.get("rwp") is False:
            return
        trainer.__class__ = type(f"RWP{kind.__name__}", (RWPTrainerMixin, kind), {})
        trainer.check_rwp()
        check_batches(trainer.args, kind)
