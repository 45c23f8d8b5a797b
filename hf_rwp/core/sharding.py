"""What of a weight is in this process's memory, and which replica of the weights this process is.

The one module that knows process groups, DistributedDataParallel and sharded parameters. All others work on a `Block`,
and ask for `Replicas` once a window.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Block(NamedTuple):
    """The part of a weight that this process holds, the weight as a matrix: filters x elements.

    A filter is a slice along dim 0, after leading dimensions of size 1 are dropped: a convolution (64, 3, 7, 7) has 64
    of 147 elements, a ViT's position embedding (1, 197, 384) has 197 of 384. A tensor with at most one dimension of its
    own is a single filter. A complex number counts as two elements.

    memory: a view of the weight, (rows, columns) in the order of the elements and not of the memory; (rows, ...) where
        no view flattens them, as in channels_last. filters, length: of the whole weight. row, column: where `memory`
        begins in it. reals: how many real numbers make up a number of the weight's, 1 or 2.
    """

    memory: Tensor
    filters: int
    length: int
    row: int = 0
    column: int = 0
    reals: int = 1


def block_of(weight: Tensor) -> Block:
    """The block of `weight` in this process's memory; for now every weight is whole."""
    memory = weight.detach()
    shape = list(memory.shape)
    while shape and shape[0] == 1:
        del shape[0]
    if len(shape) < 2:
        shape.insert(0, 1)
    reals = 2 if memory.is_complex() else 1
    if reals == 2:
        memory = torch.view_as_real(memory)
        shape.append(2)
    filters, length = shape[0], math.prod(shape[1:])
    memory = memory.view(shape)
    if memory.ndim != 2:
        with suppress(RuntimeError):
            memory = memory.view(filters, length)
    return Block(memory, filters, length, reals=reals)


@dataclass(frozen=True)
class Replicas:
    """The sets of processes that hold one whole copy of the weights each, and whose gradients are averaged.

    index: this process's, in [0, count). group: None for the world, and without torch.distributed.
    broadcasts_buffers: whether something gives all of them the buffers of replica 0 ahead of a forward pass.
    """

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    broadcasts_buffers: bool = False


def replicas_of(process_group: dist.ProcessGroup | None = None) -> Replicas:
    """Those of `process_group`; None: of the DDP whose forward pass is running, else of the world, else one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Replicas()
    ddp = running_ddp()
    group = process_group if process_group is not None or ddp is None else ddp.process_group
    return Replicas(dist.get_rank(group), dist.get_world_size(group), group, ddp is not None and ddp.broadcast_buffers)


def broadcast(tensors: Iterable[Tensor], replicas: Replicas) -> None:
    """Give all replicas the tensors of replica 0, in place. Collective: one for all of a dtype and device."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.device, tensor.dtype].append(tensor)
    for own in alike.values():
        values = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.broadcast(values, group=replicas.group, group_src=0)
        for tensor, part in zip(own, values.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def running_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running now. A private call: torch has no public one."""
    return DistributedDataParallel._get_active_ddp_module() if dist.is_available() else None


def synchronizes() -> bool:
    """Whether the gradients of the forward pass that is running now will be averaged over the replicas.

    Raises NotImplementedError where some replicas may have run out of data.
    """
    ddp = running_ddp()
    if ddp is None:  # by the loop itself, if there are others at all
        return True
    if ddp._join_config.enable:
        raise NotImplementedError(
            "RWP does not work inside DistributedDataParallel.join() or accelerator.join_uneven_inputs(): once a "
            "replica is out of data, its clean or perturbed gradient is missing from the mix. Give all replicas the "
            "same number of batches (drop_last=True, or Accelerate's even_batches), or set alpha=1"
        )
    return bool(ddp.require_backward_grad_sync)


def innermost(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile: the one whose forward pass they all end in.

    Raises NotImplementedError for DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        refuse_data_parallel()
    if isinstance(model, DistributedDataParallel):
        return innermost(model.module)
    return innermost(model._orig_mod) if is_compiled_module(model) else model  # type: ignore[arg-type]


def refuse_data_parallel() -> None:
    """Raise NotImplementedError for nn.DataParallel."""
    raise NotImplementedError(
        "RWP does not work with DataParallel, whose replicas are copies of the weights that it cannot perturb: use "
        "DistributedDataParallel (accelerate launch --multi_gpu), one process for each GPU"
    )


def refuse_unsupported(parameters: Iterable[Tensor]) -> None:
    """Raise NotImplementedError where replicas do not hold whole weights of their own, or RWP cannot reach them."""
    what = None
    if is_initialized():
        state = AcceleratorState()
        parallelism = state.parallelism_config
        if not (state.distributed_type.value == "NO" or state.distributed_type.value.startswith("MULTI_")):
            what = state.distributed_type.value
        elif parallelism is not None and parallelism.non_data_parallel_size * parallelism.dp_shard_size > 1:
            what = "sharded, tensor, context or sequence parallelism"
    for parameter in parameters:
        if what is not None:
            break
        if not (parameter.__dict__ or parameter.device.type == "xla" or type(parameter) is not nn.Parameter):
            continue  # most are ordinary ones
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


def refuse_quantized(model: nn.Module) -> None:
    """Raise NotImplementedError for a frozen parameter that Gaussian noise cannot be added to."""
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or parameter.is_floating_point()):
            raise NotImplementedError(
                f"frozen=True would perturb {name}, which is of {parameter.dtype}: Gaussian noise needs floating-point "
                "weights. Load the base weights unquantized (bfloat16), or leave frozen=False to perturb the others"
            )


_RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_lone_processes(decided: bool | None = None) -> None:
    """Raise RuntimeError where a launcher started processes, or was told to, and each trains by itself.

    decided: whether the process group would have been made by now; None: if Accelerate has looked for one.
    """
    if decided is None:
        decided = PartialState._shared_state != {}
    if not decided or (dist.is_available() and dist.is_initialized()):
        return
    launched = os.environ.get("WORLD_SIZE", "1")
    found = None
    if launched.isdigit() and int(launched) > 1:
        found = f"{launched} processes were launched (WORLD_SIZE={launched}), and each would train by itself"
    elif (
        # accelerate launch sets the one for every run and the other for more than one process; on a CPU it starts one
        {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys()
        and not any(name in os.environ for name in _RANKS)
        and not torch.cuda.is_available()
    ):
        found = "accelerate launch was told to start more than one process and started one"
    if found:
        raise RuntimeError(
            f"{found}: there is no process group. On a machine where torch finds no GPU, Accelerate makes one with "
            "ACCELERATE_USE_CPU=true in the environment and `accelerate launch --multi_gpu --num_processes 2`; a loop "
            "of one's own calls torch.distributed.init_process_group first. For a single process launch one "
            "(--num_processes 1)"
        )
