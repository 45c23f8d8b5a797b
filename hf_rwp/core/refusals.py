"""What RWP does not work with, refused by name ahead of any work; and the module inside of wrappers."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_rwp.core.replicas import deepspeed_groups


def innermost(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile: the one whose forward pass they all end in.

    Raises NotImplementedError for DataParallel and DeepSpeed's pipelines; TypeError for DeepSpeed's engine.
    """
    if isinstance(model, nn.DataParallel):
        refuse_data_parallel()
    if _is_of(model, "deepspeed.runtime.pipe"):
        _refuse("DeepSpeed's pipelines, whose forward passes overlap", _UP_TO_2)
    if _is_of(model, "deepspeed.runtime.engine"):
        raise TypeError(
            "RWP was given DeepSpeed's engine, whose optimizer is already made: wrap the base optimizer and the module "
            "first, RWP(base, model), then call deepspeed.initialize(model=model, optimizer=...) with what that gave"
        )
    if isinstance(model, DistributedDataParallel):
        return innermost(model.module)
    return innermost(model._orig_mod) if is_compiled_module(model) else model  # type: ignore[arg-type]


def refuse_data_parallel() -> None:
    """Raise NotImplementedError for nn.DataParallel."""
    raise NotImplementedError(
        "RWP does not work with DataParallel, whose replicas are copies of the weights that it cannot perturb: use "
        "DistributedDataParallel (accelerate launch --multi_gpu), one process for each GPU"
    )


def refuse_optimizer(optimizer: Any) -> None:
    """Raise TypeError for an optimizer yet to be built, NotImplementedError for one that averages by itself."""
    if type(optimizer).__name__ == "DummyOptim":
        raise TypeError(
            "RWP wraps a plain torch.optim.Optimizer and got DummyOptim, which stands for one that DeepSpeed builds: "
            'delete "optimizer" from DeepSpeed\'s configuration, and build a torch optimizer'
        )
    if _is_of(optimizer, "deepspeed.runtime.fp16.onebit"):
        _refuse(
            f"{type(optimizer).__name__}, which averages compressed momenta in place of gradients",
            "torch.optim.AdamW and the like",
        )


def refuse_unsupported(parameters: Iterable[Tensor]) -> None:
    """Raise NotImplementedError where RWP cannot reach the weights, or does not know whose gradients are averaged."""
    found = (_refused_by_accelerate() if is_initialized() else None) or _refused_by_deepspeed()
    for parameter in parameters:
        if found is not None:
            break
        if not (parameter.__dict__ or parameter.device.type == "xla"):
            continue  # most are ordinary ones
        if getattr(parameter, "_fsdp_flattened", False):
            found = _FSDP1
        elif hasattr(parameter, "ds_id"):
            found = _ZERO3
        elif hasattr(parameter, "_st_info"):
            found = _DDP_OVER_PARTS
        elif getattr(parameter, "allreduce", True) is False and hasattr(parameter, "group_name"):
            found = "DeepSpeed's mixture of experts, whose experts have replicas of their own", "a dense model"
        elif parameter.device.type == "xla":
            found = "XLA", "CPUs and GPUs"
    if found:
        _refuse(*found)


def _refuse(what: str, works: str) -> None:
    raise NotImplementedError(f"RWP does not work with {what}. What works is {works}")


def _is_of(value: object, package: str) -> bool:
    """Whether a class of the value's is from a package, which need not be imported or installed."""
    return any(kind.__module__.startswith(package) for kind in type(value).__mro__)


_ELSEWHERE = "DistributedDataParallel, FSDP2 (fsdp_version: 2), tensor parallelism and DeepSpeed ZeRO up to stage 2"
_FSDP1 = (
    "FSDP of version 1, which cuts weights anywhere; it is Accelerate's default",
    "FSDP2: `fsdp_version: 2` in Accelerate's configuration, FullyShardedDataParallelPlugin(fsdp_version=2), "
    '"fsdp_config": {"version": 2} of TrainingArguments, or torch\'s fully_shard',
)
_DDP_OVER_PARTS = (
    "DistributedDataParallel over tensor parallelism, which makes parts of weights plain ones",
    "fully_shard along a mesh of (replicas, 1) processes, over the same parallelize_module",
)
_UP_TO_2 = "DeepSpeed ZeRO up to stage 2, or FSDP2 (fsdp_version: 2), which shards the weights as well"
_ZERO3 = "DeepSpeed ZeRO-3, which cuts weights anywhere", _UP_TO_2
_SEQUENCES = "DeepSpeed's sequence parallelism", "context parallelism under FSDP2, or longer gradient accumulation"
_TENSORS = (
    "DeepSpeed's tensor parallelism, which does not say how it cuts weights",
    "torch's parallelize_module, or transformers' tp_plan, by itself or with FSDP2",
)
_BUILT_BY_DEEPSPEED = (
    'an "optimizer" in DeepSpeed\'s configuration, which DeepSpeed builds: RWP would have nothing to wrap',
    "a torch optimizer from the script, or from Trainer: delete the entry",
)
_OFFLOADED = (
    "offload_optimizer where Accelerate puts DeepSpeedCPUAdam in the place of the optimizer",
    '"zero_force_ds_cpu_optimizer": false in DeepSpeed\'s configuration: then the one that RWP wraps steps on the CPU',
)


def _refused_by_accelerate() -> tuple[str, str] | None:
    """What RWP does not work with in the state that Accelerate has set up, and what works."""
    state = AcceleratorState()
    kind, parallelism = state.distributed_type.value, state.parallelism_config
    if parallelism is not None and getattr(parallelism, "sp_size", 1) > 1:
        return _SEQUENCES
    if kind == "FSDP":
        return None if getattr(state.fsdp_plugin, "fsdp_version", 1) == 2 else _FSDP1
    if kind == "DEEPSPEED":
        if getattr(state.deepspeed_plugin, "zero_stage", 0) == 3:
            return _ZERO3
        return _refused_by_configuration(getattr(state.deepspeed_plugin, "deepspeed_config", {}))
    return None if kind == "NO" or kind.startswith("MULTI_") else (kind, _ELSEWHERE)


def _refused_by_configuration(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What RWP does not work with in DeepSpeed's configuration as Accelerate passes it on, and what works."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if "optimizer" in config:
        return _BUILT_BY_DEEPSPEED
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        return _OFFLOADED
    return _TENSORS if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1 else None


def _refused_by_deepspeed() -> tuple[str, str] | None:
    """What RWP does not work with in the groups of processes that DeepSpeed has made, and what works."""
    groups = deepspeed_groups()
    if groups is None:
        return None
    if groups._get_sequence_parallel_world_size() > 1:
        return _SEQUENCES
    return _TENSORS if groups._get_model_parallel_world_size() > 1 else None


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
