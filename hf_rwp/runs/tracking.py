"""Where figures go while a run trains: TensorBoard, Weights & Biases, Trackio; one run there, also after resuming."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_rwp.runs.files import write

PROJECT = "hf_rwp"
IDENTITY = "_tracking.json"  # a name that pushes leave out


def begin_tracking(accelerator: Accelerator, folder: Path, flags: Mapping[str, Any], step: int, resumed: bool) -> None:
    """Start the trackers of `Accelerator(log_with=...)` for the run in `folder`. Collective.

    flags: what they show as its configuration. step: optimizer steps behind the run. resumed: whether it goes on from
    a checkpoint. TensorBoard leaves out what an earlier session logged beyond `step`.
    """
    name, own = identity(folder, resumed, accelerator.is_main_process)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1} if resumed else {},
        "wandb": {"id": own, "name": name, "resume": "allow"},
        "trackio": {"name": f"{name}-{own}", "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=options)
    config = {key: str(value) for key, value in flags.items()}
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            _add_hparams(tracker.tracker, config)
        else:
            tracker.store_init_configuration(config)


def track_trainer(trainer: Any, folder: Path, resumed: bool) -> None:
    """The same for transformers' Trainer: one folder for TensorBoard, `logs`, and one run elsewhere."""
    main = trainer.is_world_process_zero()
    name, own = identity(folder, resumed, main)
    if trainer.args.run_name is None:
        trainer.args.run_name = f"{name}-{own}"  # Trackio goes by it
    if main and "wandb" in trainer.args.report_to:
        import wandb

        wandb.init(project=os.getenv("WANDB_PROJECT", PROJECT), id=own, name=name, resume="allow")
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder / "logs")


def identity(folder: Path, resumed: bool, is_main: bool) -> tuple[str, str]:
    """The name of the run in `folder` and its id, which is kept there, and new for a run that begins."""
    parts = folder.absolute().parts
    name = "_".join(parts[-2:]) if folder.name.isdigit() else folder.name  # outputs/NAME/2
    file = folder / IDENTITY
    try:
        own = str(json.loads(file.read_text(encoding="utf-8"))["id"]) if resumed else ""
    except (OSError, ValueError, KeyError, TypeError):
        own = ""  # of an earlier version, or damaged
    if not own:
        own = secrets.token_hex(4)
        if is_main:
            write(file, json.dumps({"id": own}))
    return name, own


def _add_hparams(writer: Any, config: Mapping[str, str]) -> None:
    """`SummaryWriter.add_hparams` without the further run that it makes for them."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(config), {}):
        writer.file_writer.add_summary(summary)
