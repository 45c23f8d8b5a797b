"""Runs on DeepSpeed's engine, under Accelerate's ZeRO-0, 1 and 2: what a recipe does otherwise there.

    set_up_engine(accelerator, args, micro_steps)                     # with the flags
    model, optimizer = accelerator.prepare(module, optimizer)
    clip = None if is_engine(accelerator) else clip                   # `accelerator.backward` has clipped and stepped

Each process has all weights. The engine averages gradients, clips, and steps flat partitions, inside of
`accelerator.backward`, which must therefore be called once to a step. Its checkpoints are read without running any code
that they may hold, and without deepspeed itself. Elsewhere nothing here changes anything.
"""

from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

FOLDER = "pytorch_model"  # accelerate's name for it
_WEIGHTS = f"{FOLDER}/mp_rank_00_model_states.pt"
_PARTITIONS = f"{FOLDER}/*_optim_states.pt"
# timm's names of optimizers that treat each weight by itself, so that they may step partitions of many flattened ones.
ELEMENTWISE = [*("sgd", "nesterov", "momentum", "sgdw", "nesterovw", "adam", "adamw", "nadam", "nadamw")]
ELEMENTWISE += ["radam", "radamw", "adamax", "rmsprop", "rmsproptf", "adagrad", "lion"]
_WORKS = "plain DDP (recipes/accelerate/gpu_8.yaml) or FSDP2 (recipes/accelerate/fsdp2_8.yaml)"


class Flags(Protocol):
    """The flags of a recipe that the engine must know, or does not take."""

    batch_size: int
    clip_grad: float | None
    clip_mode: str
    opt: str
    method: str
    gradient_accumulation_steps: int
    rwp_eta: float
    channels_last: bool
    sync_bn: bool
    torch_compile: bool


def is_engine(accelerator: Accelerator) -> bool:
    """Whether `accelerator.prepare` gives DeepSpeed's engine, which steps inside of `accelerator.backward`."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def set_up_engine(accelerator: Accelerator, flags: Flags, micro_steps: int) -> None:
    """Tell the engine the flags that are its own: batch size, clipping. micro_steps: gradients to a step, per process.

    Raises ValueError, with what works, for flags that do not work there, for more than one gradient to a step, and for
    a configuration of DeepSpeed that says otherwise.
    """
    if not is_engine(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    _refuse_flags(flags, plugin.zero_stage)
    _refuse_configuration(accelerator, plugin)
    processes = accelerator.num_processes
    if processes < 2 or micro_steps > 1:
        raise ValueError(
            f"DeepSpeed's engine steps with each backward pass, and here a step takes {micro_steps} on {processes} "
            "process(es): take two processes or more, four or more with --rwp_antithetic, and no "
            f"--gradient_accumulation_steps; or {_WORKS}"
        )
    own = {
        "train_micro_batch_size_per_gpu": flags.batch_size,
        "train_batch_size": flags.batch_size * processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": flags.clip_grad or 0.0,  # which Accelerate would make 1
    }
    for name, value in own.items():
        if (found := plugin.deepspeed_config.get(name, "auto")) not in ("auto", value):
            raise ValueError(
                f'DeepSpeed\'s configuration has {name}={found}, and the flags come to {value}: set it to "auto" '
                "there, and --batch_size or --clip_grad here"
            )
    plugin.deepspeed_config.update(own)


def is_engine_checkpoint(folder: Path) -> bool:
    """Whether the engine wrote the weights of a checkpoint."""
    return (folder / _WEIGHTS).exists()


def engine_weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights and buffers in a checkpoint, on the CPU. Raises as `refuse_engine_code` does."""
    weights: dict[str, Tensor] = _read(folder / _WEIGHTS)["module"]
    return weights


def refuse_engine_code(folder: Path) -> None:
    """Raise pickle.UnpicklingError, or what torch.load does, where a checkpoint holds more than tensors and plain data.

    The engine unpickles what it finds.
    """
    for file in sorted(folder.glob(f"{FOLDER}/*")):
        _read(file)


def refuse_other_partitions(accelerator: Accelerator, folder: Path) -> None:
    """Raise ValueError for a checkpoint that another number of processes wrote, or without ZeRO's partitions."""
    found = len(list(folder.glob(_PARTITIONS)))
    expected = accelerator.num_processes if accelerator.state.deepspeed_plugin.zero_stage > 0 else 0
    if found != expected:
        raise ValueError(
            f"{folder} cannot be resumed from: its optimizer's state is in {found} partitions, and ZeRO-"
            f"{accelerator.state.deepspeed_plugin.zero_stage} on {accelerator.num_processes} processes takes "
            f"{expected}. Start as it was started, or begin anew from the weights that a finished run wrote"
        )


def _refuse_flags(flags: Flags, stage: int) -> None:
    given = {
        "--method sam": flags.method == "sam",
        "--gradient_accumulation_steps": flags.gradient_accumulation_steps > 1,
        f"--clip_mode {flags.clip_mode}": bool(flags.clip_grad) and flags.clip_mode != "norm",
        "--rwp_eta": stage > 0 and flags.method == "rwp" and flags.rwp_eta > 0,
        "--channels_last": flags.channels_last,
        "--sync_bn": flags.sync_bn,
        "--torch_compile": flags.torch_compile,
    }
    for flag, was_given in given.items():
        if was_given:
            raise ValueError(
                f"{flag} does not work on DeepSpeed's engine, which averages, clips and steps by itself: leave it out, "
                "or take plain DDP (recipes/accelerate/gpu_8.yaml)"
            )
    if stage > 0 and flags.opt.lower() not in ELEMENTWISE:
        raise ValueError(
            f"--opt {flags.opt} may depend on the shape of weights, and ZeRO-{stage} steps partitions of many "
            f"flattened ones: take one of {', '.join(ELEMENTWISE)}, or plain DDP (recipes/accelerate/gpu_8.yaml)"
        )


def _refuse_configuration(accelerator: Accelerator, plugin: Any) -> None:
    if plugin.zero_stage == 3:
        raise ValueError(f"ZeRO-3 cuts weights anywhere: take zero_stage 2 or less, or {_WORKS}")
    low = [kind for kind in ("bf16", "fp16") if _is_true(plugin.deepspeed_config.get(kind, {}).get("enabled"))]
    if low or accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed precision {(low or [accelerator.mixed_precision])[0]} makes DeepSpeed's weights themselves of that "
            f"type, which this loop does not feed: take --mixed_precision no, vit_rwp.py --bf16, or {_WORKS}"
        )
    for name in ("optimizer", "scheduler"):
        if name in plugin.deepspeed_config:
            raise ValueError(f'the recipe makes the {name}: delete "{name}" from DeepSpeed\'s configuration')


def _is_true(value: object) -> bool:
    return str(value).lower() == "true"


class _Plain:
    """Stands for a class of DeepSpeed's in its checkpoints, of which only the fields are read."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


class _Number(Enum):
    """Stands for DeepSpeed's stages, by number."""

    disabled, optimizer_states, gradients, weights = range(4)


_CLASSES = [
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _read(file: Path) -> Any:
    with torch.serialization.safe_globals(_CLASSES):  # type: ignore[arg-type]
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
