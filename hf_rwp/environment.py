"""What torch.distributed and Accelerate know about the run: replicas, accumulation, and what RWP cannot work with."""

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import is_compiled_module
from torch import nn


def this_replica() -> tuple[int, int]:
    """This process among the data-parallel replicas: (index, count)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def innermost(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile: the one whose forward pass they all end in.

    Raises NotImplementedError for DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        refuse_data_parallel()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return innermost(model.module)
    return innermost(model._orig_mod) if is_compiled_module(model) else model  # type: ignore[arg-type]


def refuse_data_parallel() -> None:
    raise NotImplementedError(
        "RWP does not work with DataParallel, whose replicas are copies of the weights that it cannot perturb: use "
        "DistributedDataParallel (accelerate launch --multi_gpu), one process for each GPU"
    )


def refuse_unsupported(model: nn.Module) -> None:
    """Raise NotImplementedError where replicas do not hold whole weights of their own, or RWP cannot reach them."""
    what = None
    if is_initialized():
        state = AcceleratorState()
        parallelism = state.parallelism_config
        if not (state.distributed_type.value == "NO" or state.distributed_type.value.startswith("MULTI_")):
            what = state.distributed_type.value
        elif parallelism is not None and parallelism.non_data_parallel_size * parallelism.dp_shard_size > 1:
            what = "sharded, tensor, context or sequence parallelism"
    for parameter in model.parameters():
        if what is not None:
            break
        if hasattr(parameter, "device_mesh"):
            what = "FSDP2 or tensor parallelism"
        elif getattr(parameter, "_fsdp_flattened", False):
            what = "FSDP"
        elif hasattr(parameter, "ds_id"):
            what = "DeepSpeed ZeRO-3"
        elif parameter.device.type == "xla":
            what = "XLA"
    if what:
        raise NotImplementedError(
            f"RWP does not work with {what}: it needs a whole copy of the weights on every replica. What works is one "
            "process, or DistributedDataParallel on any number of CPUs or GPUs (accelerate launch --multi_gpu)"
        )


class Accumulation:
    """How many micro-steps a window has by Accelerate's `gradient_accumulation_steps`; a loader's last may be short."""

    def __init__(self) -> None:
        self._pass: tuple[int, int, int] | None = None
        self._batches = 0

    def advance(self) -> None:
        """Count one more batch of this pass over the loader that Accelerate prepared."""
        if is_initialized():
            state = GradientState()
            loader = state.active_dataloader
            this_pass = (id(loader), getattr(loader, "iteration", 0), len(state.dataloader_references))
            self._batches = self._batches + 1 if this_pass == self._pass else 1
            self._pass = this_pass

    @property
    def steps(self) -> int:
        """Micro-steps in a full window; 1 without Accelerate."""
        return GradientState().num_steps if is_initialized() else 1

    @property
    def length(self) -> int:
        """Micro-steps in the window that begins with the batch just counted, as far as the loader's length is known."""
        steps = self.steps
        if steps == 1 or not GradientState().sync_with_dataloader:
            return steps
        try:
            left = len(GradientState().active_dataloader) - self._batches + 1
        except TypeError:  # no loader, or one without a length
            return steps
        return min(steps, left) if left > 0 else steps
