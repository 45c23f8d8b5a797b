"""What of Axolotl 0.19 a plugin meets, as it meets it: the interface, the registry, merged arguments, and a builder.

`installed` puts it in the place of the package, which has needs of its own. Its parts do what Axolotl's do in the same
order: a configuration is a mapping whose missing keys are None; `register` sees it as the YAML has it, all else once
pydantic has read it; plugins' classes become bases of the configuration's and of the arguments'; a Trainer is built,
and then shown to the plugins. As in Axolotl, nobody calls `create_optimizer`.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

from pydantic import BaseModel
from transformers import Trainer, TrainingArguments

SEES_CONFIGURATION = ("register", "on_config_validation_error", "load_datasets", "pre_model_load", "post_train_unload")
HOOKS = (
    *SEES_CONFIGURATION,
    *(
        "get_input_args",
        "get_training_args_mixin",
        "get_adapter_capabilities",
        "get_lora_config_kwargs",
        "load_adapter",
    ),
    *("post_model_build", "pre_lora_load", "post_lora_load", "post_model_load", "get_trainer_cls", "get_training_args"),
    *("post_trainer_create", "get_collator_cls_and_kwargs", "create_optimizer", "create_lr_scheduler"),
    *("add_callbacks_pre_trainer", "add_callbacks_post_trainer", "on_rollouts_scored", "post_train"),
)


class Configuration(dict[str, Any]):
    """Axolotl's DictDefault."""

    def __missing__(self, key: str) -> None:
        return None

    def __getattr__(self, key: str) -> Any:
        return self[key]


def nothing(self: Any, *_: Any, **__: Any) -> None:
    """What every hook of BasePlugin does."""


class InputConfig(BaseModel):
    base_model: str
    plugins: list[str] | None = None
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    sample_packing: bool | None = None


@dataclass
class TrainingMixins:
    sample_packing: bool = False
    include_tkps: bool = False


class AxolotlTrainer(Trainer):
    def __init__(self, *args: Any, bench_data_collator: Any = None, dataset_tags: Any = None, **kwargs: Any) -> None:
        self.bench_data_collator, self.dataset_tags = bench_data_collator, dataset_tags
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        return super().create_optimizer(model=model)


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def read(yaml: Mapping[str, Any]) -> tuple[Configuration, list[Any]]:
    """A configuration as Axolotl reads it, and its plugins."""
    plugins = [named(path)() for path in yaml.get("plugins", ())]
    for plugin in plugins:
        plugin.register(Configuration(yaml))
    merged = [named(plugin.get_input_args()) for plugin in plugins if plugin.get_input_args() is not None]
    kind = type("AxolotlInputConfig", (InputConfig, *merged), {})
    return Configuration(kind(**yaml).model_dump(exclude_none=True)), plugins


def build(
    yaml: Mapping[str, Any], model: Any, folder: str, kind: type[Trainer] = AxolotlTrainer, **given: Any
) -> Trainer:
    """A Trainer as Axolotl builds it. given: data, callbacks, and further arguments of Trainer."""
    cfg, plugins = read(yaml)
    mixins = [named(plugin.get_training_args_mixin()) for plugin in plugins if plugin.get_training_args_mixin()]
    merged = type("AxolotlTrainingMixins", (TrainingMixins, *mixins), {})
    arguments = dataclass(type("AxolotlTrainingArguments", (merged, TrainingArguments), {}))
    own = {name: given.pop(name) for name in ("train_dataset", "callbacks") if name in given}
    names = {
        "per_device_train_batch_size": cfg.micro_batch_size,
        "optim": cfg.optimizer,
        "learning_rate": cfg.learning_rate,
    }
    names |= {
        "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
        "sample_packing": bool(cfg.sample_packing),
    }
    for plugin in plugins:
        names.update(plugin.get_training_args(cfg) or {})
    kind = next((found for plugin in plugins if (found := plugin.get_trainer_cls(cfg)) is not None), kind)
    trainer = kind(model=model, args=arguments(output_dir=folder, **names, **given), **own)
    for plugin in plugins:
        plugin.post_trainer_create(cfg, trainer)
    return trainer


@contextmanager
def installed() -> Iterator[None]:
    """`axolotl.integrations.base` is this one, and the plugin's module is imported anew."""
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].BasePlugin = type("BasePlugin", (), dict.fromkeys(HOOKS, nothing))  # type: ignore[attr-defined]
    with patch.dict(sys.modules, modules):
        sys.modules.pop("hf_rwp.integrations.axolotl", None)
        yield
    sys.modules.pop("hf_rwp.integrations.axolotl", None)
