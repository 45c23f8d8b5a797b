"""What recipes refuse of the way they were launched, ahead of any work."""

from collections.abc import Mapping

from accelerate import Accelerator

from hf_rwp.core.refusals import refuse_lone_processes
from hf_rwp.runs.deepspeed import is_engine
from hf_rwp.runs.sharded import is_mesh, refuse_sharded


def check_comparison(accelerator: Accelerator) -> None:
    """Raise RuntimeError for processes that train each by itself, ValueError for what not all methods can work with."""
    refuse_lone_processes()
    if is_mesh(accelerator) or is_engine(accelerator):
        raise ValueError(
            f"{accelerator.distributed_type.value} holds the weights, and SAM needs whole ones: methods are compared "
            "on one device or under plain DDP (recipes/accelerate/gpu_8.yaml)"
        )
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}, and methods are "
            "compared without it: set it to 1"
        )
    _refuse_scaler(accelerator)


def check_launch(accelerator: Accelerator, method: str, flags: Mapping[str, bool]) -> None:
    """Raise RuntimeError for processes that train each by itself, ValueError for what the method cannot work with.

    What DeepSpeed's engine does not take, `set_up_engine` refuses. flags: those that sharded weights do not take, as a
    user writes them, and whether each was given.
    """
    refuse_lone_processes()
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}, and would count "
            "beside the recipe's: set it to 1, and --gradient_accumulation_steps to that"
        )
    refuse_sharded(accelerator, {"--method sam": method == "sam", **flags})
    if method == "sam":
        _refuse_scaler(accelerator)


def _refuse_scaler(accelerator: Accelerator) -> None:
    if accelerator.scaler is not None:
        raise ValueError("fp16's gradient scaler cannot work between SAM's two passes: set --mixed_precision bf16")
