"""An evaluation by itself: of weights, or of a checkpoint's and of their average."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_rwp.runs.distributed_checkpoints import load_weights
from hf_rwp.runs.divergence import refuse_meaningless
from hf_rwp.runs.files import as_json, write
from hf_rwp.runs.records import aligned

Evaluate = Callable[[nn.Module], dict[str, Any]]


def evaluate_only(
    accelerator: Accelerator, folder: Path, module: nn.Module, checkpoint: Path | None, evaluate: Evaluate
) -> None:
    """The figures of the model, or of a checkpoint's weights and, as `..._ema`, of their average: `write_evaluation`.

    Raises FloatingPointError where they mean nothing.
    """
    if checkpoint is not None:
        load_weights(module, checkpoint)
    figures = evaluate(module)
    if checkpoint is not None and (checkpoint / "ema.safetensors").exists():
        load_weights(module, checkpoint, "ema")
        figures |= {f"{name}_ema": value for name, value in evaluate(module).items()}
    refuse_meaningless(figures, None)
    if accelerator.is_main_process:
        write_evaluation(folder, figures)


def write_evaluation(folder: Path, figures: Mapping[str, Any]) -> None:
    """eval.json in the folder, and two columns on the screen: all but the figures by class."""
    write(folder / "eval.json", as_json(figures))
    shown = {name.removeprefix("eval_"): value for name, value in figures.items() if "by_class" not in name}
    print(aligned({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in shown.items()}))
