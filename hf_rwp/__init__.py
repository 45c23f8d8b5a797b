"""Random Weight Perturbation (arXiv 2211.11489) for Accelerate, Trainer and timm."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "RWP": "core.optimizer",
    "LossTracker": "core.losses",
    "RWPArguments": "trainer.arguments",
    "RWPTrainingArguments": "trainer.arguments",
    "RWPTrainer": "trainer.trainer",
    "RWPTrainerMixin": "trainer.trainer",
    "push_to_hub": "hub.push",
}

__all__ = [
    "RWP",
    "LossTracker",
    "RWPArguments",
    "RWPTrainer",
    "RWPTrainerMixin",
    "RWPTrainingArguments",
    "__version__",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
