"""Which replica of the weights this process is, and what replicas tell each other.

A replica is a set of processes that hold one whole copy of the weights, and whose gradients are averaged with the
others': one process under DistributedDataParallel; under FSDP2 and tensor parallelism those along the mesh dimensions
that cut some weight. They share role and noise.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_rwp.core.sharding import all_reduced, is_sharded, sharded_dims


@dataclass(frozen=True)
class Replicas:
    """The replicas, and this process among them.

    index: of this process's replica, in [0, count). group: of the processes that hold the same part in each; None for
    the world, and without torch.distributed. peers: groups of the processes that hold this replica together, one for
    every mesh dimension that cuts weights. broadcasts_buffers: whether something gives all of them the buffers of
    replica 0 ahead of a forward pass.
    """

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    broadcasts_buffers: bool = False
    peers: tuple[dist.ProcessGroup, ...] = ()

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """What a collective goes over to reach all replicas' processes, one group after the other."""
        return [*self.peers, *([self.group] if self.count > 1 else [])]


def replicas_of(process_group: dist.ProcessGroup | None = None, parameters: Iterable[Tensor] = ()) -> Replicas:
    """The replicas of the weights `parameters`.

    Those of `process_group`; where it is None of the DDP whose forward pass is running, else of the mesh that holds the
    parameters together, else of DeepSpeed's data parallelism, else of the world, else one. Raises NotImplementedError
    where more than one dimension of the mesh replicates all of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Replicas()
    ddp = running_ddp()
    if process_group is None and ddp is not None:
        process_group = ddp.process_group
    meshes = {(weight.device_mesh, weight.placements): weight for weight in parameters if is_sharded(weight)}  # type: ignore[attr-defined]
    if meshes and process_group is None:
        return _mesh_replicas(list(meshes.values()))
    group = process_group if process_group is not None else _deepspeed_group()
    return Replicas(dist.get_rank(group), dist.get_world_size(group), group, ddp is not None and ddp.broadcast_buffers)


def _mesh_replicas(weights: Sequence[Any]) -> Replicas:
    """weights: DTensors, one of every mesh and placements."""
    cutting: dict[tuple[int, ...], dist.ProcessGroup] = {}  # by their ranks: meshes may be parts of one another
    copying: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for weight in weights:
        cut = [mesh_dim for mesh_dim, _ in sharded_dims(weight)]
        for mesh_dim in range(weight.device_mesh.ndim):
            group = weight.device_mesh.get_group(mesh_dim)
            ranks = tuple(dist.get_process_group_ranks(group))
            if len(ranks) > 1:
                (cutting if mesh_dim in cut else copying)[ranks] = group
    copies = [group for ranks, group in copying.items() if ranks not in cutting]
    peers = tuple(cutting.values())
    if len(copies) > 1:
        names = sorted({name for weight in weights for name in weight.device_mesh.mesh_dim_names or ()})
        raise NotImplementedError(
            f"{len(copies)} dimensions of the mesh ({', '.join(names) or 'without names'}) replicate all weights, and "
            "RWP needs one, along which clean and perturbed replicas alternate: flatten them into one dimension"
        )
    if not copies:
        return Replicas(peers=peers)
    return Replicas(dist.get_rank(copies[0]), dist.get_world_size(copies[0]), copies[0], peers=peers)


def _deepspeed_group() -> dist.ProcessGroup | None:
    """DeepSpeed's data-parallel group, where that is not the world's. It may be imported and not in use."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if getattr(groups, "mpu", None) is None and getattr(groups, "mesh_device", None) is None:
        return None
    return groups._get_data_parallel_group()  # type: ignore[union-attr, no-any-return]


def broadcast(tensors: Iterable[Tensor], replicas: Replicas) -> None:
    """Give all processes the tensors of the first, in place. Collective: one for all of a dtype and device."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not is_sharded(tensor):
            alike[tensor.device, tensor.dtype].append(tensor)
    for own in alike.values():
        values = torch.cat([tensor.reshape(-1) for tensor in own])
        for group in replicas.groups:
            dist.broadcast(values, group=group, group_src=0)
        for tensor, part in zip(own, values.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def add_over(tensor: Tensor, replicas: Replicas) -> None:
    """Add a tensor up over all processes, in place. Collective."""
    for group in replicas.groups:
        dist.all_reduce(tensor, group=group)


def gathered(value: Any, replicas: Replicas) -> list[Any]:
    """What every process has. Collective. value: it must be possible to pickle it."""
    values = [value]
    for group in replicas.groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, values, group=group)
        values = [value for part in parts for value in part]
    return values


def running_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running now. A private call: torch has no public one."""
    return DistributedDataParallel._get_active_ddp_module() if dist.is_available() else None


def synchronizes(gatherers: Iterable[Any] = ()) -> bool:
    """Whether the gradients of the forward pass that is running now will be averaged over the replicas.

    gatherers: `sharding.gatherers`. Raises NotImplementedError where some replicas may have run out of data.
    """
    ddp = running_ddp()
    if ddp is None:  # by FSDP2 or by the loop itself, if there are others at all
        return all_reduced(gatherers)
    if ddp._join_config.enable:
        raise NotImplementedError(
            "RWP does not work inside DistributedDataParallel.join() or accelerator.join_uneven_inputs(): once a "
            "replica is out of data, its clean or perturbed gradient is missing from the mix. Give all replicas the "
            "same number of batches (drop_last=True, or Accelerate's even_batches), or set alpha=1"
        )
    return bool(ddp.require_backward_grad_sync)
