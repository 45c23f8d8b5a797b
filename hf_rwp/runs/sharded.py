"""Runs whose weights a mesh of processes holds together, under Accelerate's FSDP2: what a recipe does otherwise there.

    refuse_sharded(accelerator, {"--method sam": args.method == "sam"})   # with the flags
    copy = whole_copy(accelerator, module)                                # before `accelerator.prepare`
    model, optimizer = accelerator.prepare(module, optimizer)
    shard_alike(accelerator, average)                                     # an average of the weights
    for images, labels in in_lockstep(accelerator, loader, filler): ...   # evaluation
    gather_into(copy, module)                                             # before the model is written

All but the first are called on all processes. Where the weights are whole in every process they change nothing.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_rwp.core.sharding import gatherers, is_sharded, whole_of

Batch = TypeVar("Batch")


def is_mesh(accelerator: Accelerator) -> bool:
    """Whether `accelerator.prepare` gives each process only a part of the weights."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def processes_per_replica(accelerator: Accelerator) -> int:
    """How many processes hold one copy of the weights together, once they are prepared."""
    if not is_mesh(accelerator):
        return 1
    mesh = accelerator.parallelism_config
    replicas: int = mesh.dp_replicate_size if mesh is not None else 1
    return int(accelerator.num_processes) // replicas


def replicas_of_run(accelerator: Accelerator) -> int:
    """The copies of the weights, whose gradients are averaged: clean and perturbed ones alternate between them."""
    return int(accelerator.num_processes) // processes_per_replica(accelerator)


def refuse_sharded(accelerator: Accelerator, flags: Mapping[str, bool] | None = None) -> None:
    """Raise ValueError for ways of sharding that a recipe does not take, and for flags that sharded weights do not.

    flags: what each is, as a user writes it, and whether it was given.
    """
    mesh = accelerator.parallelism_config
    cut = [name for name in ("tp", "cp", "sp") if mesh is not None and getattr(mesh, f"{name}_size", 1) > 1]
    works = "FSDP2 (fsdp_version: 2), with parallelism_config_dp_replicate_size for more than one replica, or plain DDP"
    if cut:
        raise ValueError(
            f"parallelism_config sets {cut[0]}_size > 1, which images and these models do not have: take {works}"
        )
    if not is_mesh(accelerator):
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and accelerator.num_processes > 1:
            raise ValueError(
                f"FSDP is set, and Accelerate leaves it aside on {accelerator.distributed_type.value}: each "
                "process would have all weights. Without GPUs take recipes/accelerate/cpu_2.yaml"
            )
        return
    if not accelerator.is_fsdp2:
        raise ValueError(f"fsdp_version is 1, Accelerate's default, which cuts weights anywhere: take {works}")
    given = [flag for flag, was_given in (flags or {}).items() if was_given]
    if given:
        raise ValueError(
            f"{given[0]} does not work where FSDP2 holds the weights: leave it out, or take plain DDP "
            "(recipes/accelerate/gpu_8.yaml)"
        )


def shard_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """Have a model with lists of modules sharded by what they list, where SIZE_BASED_WRAP is set.

    Before it is prepared: Accelerate would shard the list itself, which FSDP2 refuses, since nothing calls a list.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin if is_mesh(accelerator) else None
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if lists and plugin is not None and plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(module).__name__ for some in lists for module in some})


def whole_copy(accelerator: Accelerator, module: nn.Module) -> nn.Module | None:
    """A copy in the main process's memory of a model that will be sharded; None on others, and if it will not be."""
    if not (is_mesh(accelerator) and accelerator.is_main_process):
        return None
    return copy.deepcopy(module).cpu()


@torch.no_grad()
def gather_into(whole: nn.Module | None, module: nn.Module) -> None:
    """Put a sharded model's weights and buffers into `whole`. Collective. None: just take part."""
    own = {} if whole is None else whole.state_dict()
    for name, tensor in module.state_dict().items():
        value = whole_of(tensor)
        if whole is not None:
            own[name].copy_(value)


def gathered(accelerator: Accelerator, whole: nn.Module | None, module: nn.Module) -> nn.Module:
    """The model to write: `whole` with a sharded model's weights on the main process, the model itself elsewhere."""
    if is_mesh(accelerator):
        gather_into(whole, module)
    return module if whole is None else whole


def whole_weights(module: nn.Module, kept: bool = True) -> dict[str, torch.Tensor]:
    """A model's weights and buffers as plain tensors on the CPU. Collective where sharded. kept: False: empty."""
    weights = ((name, whole_of(tensor)) for name, tensor in module.state_dict().items())
    return {name: tensor.cpu().contiguous() for name, tensor in weights if kept}


def is_sharded_model(module: nn.Module) -> bool:
    """Whether a mesh of processes holds the weights, though FSDP2 may have them whole after an evaluation."""
    return bool(gatherers(module)) or any(is_sharded(parameter) for parameter in module.parameters())


def load_whole(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load plain weights into a model, sharded or not. Collective where sharded, with the same weights on all."""
    from torch.distributed.tensor import distribute_tensor

    placed = {}
    for name, tensor in module.state_dict().items():
        value = weights[name]
        if is_sharded(tensor):
            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
        placed[name] = value
    module.load_state_dict(placed)


def shard_alike(accelerator: Accelerator, average: Any) -> None:
    """Shard an average of the weights, timm's ModelEmaV3, as `accelerator.prepare` did the model. None: nothing to do.

    `prepare` takes one model, with its optimizer.
    """
    if average is not None and is_mesh(accelerator):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        fsdp2_prepare_model(accelerator, average.module)
        average.foreach = False  # it would take weights of a mesh and buffers of none in one call


def in_lockstep(accelerator: Accelerator, batches: Iterable[Batch], filler: Batch) -> Iterator[Batch]:
    """`batches`, and where weights are sharded `filler` after the last one until no process has more.

    Each forward pass gathers weights there, so that no process may take one more than another. Collective: one small
    all-reduce a batch.
    """
    if not is_mesh(accelerator):
        yield from batches
        return
    waiting = iter(batches)
    while True:
        batch = next(waiting, None)
        more = torch.tensor(float(batch is not None), device=accelerator.device)
        if not accelerator.reduce(more).item():
            return
        yield filler if batch is None else batch
