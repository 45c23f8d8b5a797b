"""Random Weight Perturbation (arXiv 2211.11489) for Accelerate, Trainer and timm."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported when it is asked for
    from hf_rwp.analysis.finder import find_gamma
    from hf_rwp.core.arguments import RWPArguments
    from hf_rwp.core.losses import LossTracker
    from hf_rwp.core.optimizer import RWP
    from hf_rwp.hub.push import push_to_hub
    from hf_rwp.trainer.arguments import RWPTrainingArguments
    from hf_rwp.trainer.factory import RWPFactory
    from hf_rwp.trainer.trainer import RWPTrainer, RWPTrainerMixin

__version__ = "0.1.0"

_HOME = {
    "RWP": "core.optimizer",
    "LossTracker": "core.losses",
    "find_gamma": "analysis.finder",
    "RWPArguments": "core.arguments",
    "RWPTrainingArguments": "trainer.arguments",
    "RWPFactory": "trainer.factory",
    "RWPTrainer": "trainer.trainer",
    "RWPTrainerMixin": "trainer.trainer",
    "push_to_hub": "hub.push",
}
EXTRAS = {  # of pyproject.toml: the packages that each brings beyond those of `hf-rwp` itself, as they are imported
    "trainer": ("transformers", "filelock"),
    "hub": ("huggingface_hub", "jinja2", "safetensors", "filelock"),
    "recipes": (
        *("datasets", "evaluate", "filelock", "huggingface_hub", "jinja2", "matplotlib", "PIL", "safetensors"),
        *("scipy", "sklearn", "tensorboard", "timm", "tqdm", "transformers", "yaml"),
    ),
    "compare": ("pytorch_optimizer",),
    "lora": ("peft", "trl"),
}

__all__ = [
    "RWP",
    "LossTracker",
    "RWPArguments",
    "RWPFactory",
    "RWPTrainer",
    "RWPTrainerMixin",
    "RWPTrainingArguments",
    "__version__",
    "find_gamma",
    "push_to_hub",
]


def missing(what: str, package: str, extra: str) -> str:
    """The line that tells how to install a package that `what` needs."""
    return f"{what} needs {package}, which is not installed: pip install 'hf-rwp[{extra}]'"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        room = _HOME[name].partition(".")[0]
        if error.name not in EXTRAS.get(room, ()):
            raise
        raise ModuleNotFoundError(missing(name, error.name, room), name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)
