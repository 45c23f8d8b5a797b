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
    where more than one dimension of the mesh replicates all of them; ValueError where processes of `process_group` hold
    a weight together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Replicas()
    ddp = running_ddp()
    if process_group is None and ddp is not None:
        process_group = ddp.process_group
    meshes = {(weight.device_mesh, weight.placements): weight for weight in parameters if is_sharded(weight)}  # type: ignore[attr-defined]
    cutting, copying = _mesh_groups(list(meshes.values()))
    peers = tuple(group for ranks, group in cutting.items() if not any(set(ranks) < set(other) for other in cutting))
    if meshes and process_group is None:
        return _mesh_replicas(cutting, copying, peers, list(meshes))
    deepspeed = deepspeed_groups() if process_group is None else None
    group = process_group if deepspeed is None else deepspeed._get_data_parallel_group()
    if meshes and _overlaps(ranks := tuple(dist.get_process_group_ranks(group)), cutting):
        raise ValueError(
            f"the processes {ranks} of process_group hold weights together, and would add noise to no more than their "
            "own parts of them: leave process_group out, and RWP finds the replicas, or give it the group along the "
            "dimension of the mesh that copies all weights"
        )
    broadcasts = ddp is not None and ddp.broadcast_buffers
    return Replicas(dist.get_rank(group), dist.get_world_size(group), group, broadcasts, peers)


_Groups = dict[tuple[int, ...], dist.ProcessGroup]  # by their ranks: meshes may be parts of one another


def _overlaps(ranks: Iterable[int], cutting: Iterable[Iterable[int]]) -> bool:
    """Whether two or more of `ranks` hold a weight together."""
    return any(len(set(ranks) & set(cut)) > 1 for cut in cutting)


def _mesh_groups(weights: Sequence[Any]) -> tuple[_Groups, _Groups]:
    """This process's groups that cut some weight, and those that copy some. weights: DTensors."""
    cutting: _Groups = {}
    copying: _Groups = {}
    for weight in weights:
        cut = [mesh_dim for mesh_dim, _ in sharded_dims(weight)]
        for mesh_dim in range(weight.device_mesh.ndim):
            group = weight.device_mesh.get_group(mesh_dim)
            ranks = tuple(dist.get_process_group_ranks(group))
            if len(ranks) > 1:
                (cutting if mesh_dim in cut else copying)[ranks] = group
    return cutting, copying


def _mesh_replicas(
    cutting: _Groups, copying: _Groups, peers: tuple[dist.ProcessGroup, ...], meshes: Iterable[Any]
) -> Replicas:
    """Along the dimension that copies all weights: one that copies some, and whose processes hold others together (the
    root of a model over all processes, say, and its layers under HSDP), is none."""
    copies = [group for ranks, group in copying.items() if not _overlaps(ranks, cutting)]
    if len(copies) > 1:
        names = sorted({name for mesh, _ in meshes for name in mesh.mesh_dim_names or ()})
        raise NotImplementedError(
            f"{len(copies)} dimensions of the mesh ({', '.join(names) or 'without names'}) replicate all weights, and "
            "RWP needs one, along which clean and perturbed replicas alternate: flatten them into one dimension"
        )
    if not copies:
        return Replicas(peers=peers)
    return Replicas(dist.get_rank(copies[0]), dist.get_world_size(copies[0]), copies[0], peers=peers)


def deepspeed_groups() -> Any:
    """DeepSpeed's module of process groups, where it has others than the world; None elsewhere.

    It may be imported and not in use.
    """
    groups = sys.modules.get("deepspeed.utils.groups")
    divided = any(getattr(groups, name, None) is not None for name in ("mpu", "mesh_device"))
    return groups if divided else None


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
