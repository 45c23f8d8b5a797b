"""What of a weight is in this process's memory.

The one module that knows sharded parameters (DTensor) and those who gather them (FSDP2). All others work on a `Block`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Block(NamedTuple):
    """The part of a weight that this process holds, the weight as a matrix: filters x elements.

    A filter is a slice along dim 0, after leading dimensions of size 1 are dropped: a convolution (64, 3, 7, 7) has 64
    of 147 elements, a ViT's position embedding (1, 197, 384) has 197 of 384. A tensor with at most one dimension of its
    own is a single filter. A complex number counts as two elements.

    memory: a view of the weight, (rows, columns) in the order of the elements and not of the memory; (rows, ...) where
        no view flattens them, as in channels_last. filters, length: of the whole weight. row, column: where `memory`
        begins in it. reals: how many real numbers make up a number of the weight's, 1 or 2. groups: of the processes
        that hold the other columns of the same rows, one for every mesh dimension that cuts filters.
    """

    memory: Tensor
    filters: int
    length: int
    row: int = 0
    column: int = 0
    reals: int = 1
    groups: tuple[dist.ProcessGroup, ...] = ()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: one that a mesh of processes holds together, or each of them whole."""
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process's memory; the tensor itself if whole.

    Of a parameter it is the same object each time, which `to_local` makes anew.
    """
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor._local_tensor if isinstance(tensor, nn.Parameter) else tensor.to_local()  # type: ignore[attr-defined]
    return local


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """A tensor as a plain one, itself if it is. Collective for a DTensor: its shards are gathered, on its mesh's device
    where they are kept elsewhere (CPU offload)."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole


def hook_on(parameter: Tensor, call: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """`register_hook`, also of a DTensor that was moved after it had hooks.

    `Module.to` puts another tensor behind a DTensor, and autograd calls none of the hooks that it had, nor later ones:
    they are registered again, a user's own with ours.
    """
    if is_sharded(parameter) and parameter._backward_hooks is not None:
        parameter._backward_hooks = parameter._backward_hooks
    handle: RemovableHandle = parameter.register_hook(call)
    return handle


def block_of(weight: Tensor) -> Block:
    """The block of `weight`, a plain tensor or a DTensor, in this process's memory.

    Raises NotImplementedError for a DTensor that is cut within its filters other than along their first dimension.
    """
    memory, shape = local_of(weight).detach(), list(weight.shape)
    own, offset = list(memory.shape), [0] * len(shape)
    first, begin = _dims_of_filters(shape)
    groups: tuple[dist.ProcessGroup, ...] = ()
    if is_sharded(weight):
        offset, groups = _offset_and_groups(weight, begin)
    rows = math.prod(own[:begin])
    reals = 2 if memory.is_complex() else 1
    if reals == 2:
        memory = torch.view_as_real(memory)
    columns, filters, length = (
        math.prod(own[begin:]) * reals,
        math.prod(shape[:begin]),
        math.prod(shape[begin:]) * reals,
    )
    row = offset[first] if begin > first else 0
    column = sum(at * math.prod(shape[dim + 1 :]) for dim, at in enumerate(offset) if dim >= begin) * reals
    memory = memory.view(rows, *memory.shape[begin:])
    if memory.ndim != 2:
        with suppress(RuntimeError):
            memory = memory.view(rows, columns)
    return Block(memory, filters, length, row, column, reals, groups)


def filters_like(weight: Any, values: Tensor) -> Tensor:
    """A number for each filter in this process's memory, (rows,), as a tensor of the weight's dimensions that number
    filters, at least one; cut as the weight is."""
    _, begin = _dims_of_filters(weight.shape)
    shape = weight.shape[:begin] or torch.Size([1])
    if not is_sharded(weight):
        return values.view(shape)
    cut = {mesh_dim for mesh_dim, dim in sharded_dims(weight) if dim < begin}
    whole = torch.distributed.tensor.Replicate()
    placements = [one if mesh_dim in cut else whole for mesh_dim, one in enumerate(weight.placements)]
    own, stride = local_of(weight).shape[:begin] or torch.Size([1]), torch.empty(shape, device="meta").stride()
    made: Tensor = torch.distributed.tensor.DTensor.from_local(
        values.view(own), weight.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return made


def _dims_of_filters(shape: Sequence[int]) -> tuple[int, int]:
    """The dimension that numbers filters, or the only one, and the first of those within a filter."""
    first = next((dim for dim, size in enumerate(shape) if size != 1), len(shape))
    return first, first + 1 if len(shape) - first > 1 else first


def block_like(block: Block, tensor: Tensor) -> Block:
    """The same part of another tensor of the same shape. tensor: a copy of what is in this process's memory, say."""
    memory = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return block._replace(memory=memory.view(block.memory.shape))


def _offset_and_groups(weight: Any, begin: int) -> tuple[list[int], tuple[dist.ProcessGroup, ...]]:
    """Where a DTensor's local part begins, and the groups of the mesh dimensions that cut its filters.

    begin: the first of its dimensions within a filter. What is refused depends on what all processes know.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, groups = weight.device_mesh, []
    cut = next((dim for dim in range(begin, weight.ndim) if weight.shape[dim] > 1), begin)
    for mesh_dim, dim in sharded_dims(weight):
        if dim > cut:
            raise NotImplementedError(
                f"a weight of shape {tuple(weight.shape)} is cut along dim {dim} ({weight.placements}), inside its "
                "filters: RWP works with weights cut along their first or second dimension, as fully_shard, "
                "ColwiseParallel and RowwiseParallel do. Shard it along dim 0, or exclude it with rwp_gamma=0"
            )
        if dim == cut and mesh.size(mesh_dim) > 1:
            groups.append(mesh.get_group(mesh_dim))
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    return list(offset), tuple(groups)


def sharded_dims(weight: Any) -> list[tuple[int, int]]:
    """The mesh dimensions that cut a DTensor, each with the dimension of the tensor that it cuts."""
    dims = [(mesh_dim, getattr(placement, "dim", None)) for mesh_dim, placement in enumerate(weight.placements)]
    return [(mesh_dim, dim % weight.ndim) for mesh_dim, dim in dims if dim is not None]


@torch.no_grad()
def times(tensor: Any, factor: float) -> Tensor:
    """A tensor times a number. Of a DTensor each process's part: its own product adds parts up first in torch 2.8."""
    if not is_sharded(tensor):
        return torch.mul(tensor, factor)
    layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    part: Tensor = type(tensor).from_local(tensor.to_local() * factor, tensor.device_mesh, tensor.placements, **layout)
    return part


def copied_dims(tensor: Any, group: dist.ProcessGroup | None) -> list[int]:
    """The mesh dimensions along `group` in which every process has a DTensor whole, and no sum is left to be taken."""
    if group is None or not is_sharded(tensor):
        return []
    ranks = dist.get_process_group_ranks(group)
    along = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return [dim for dim in along if dist.get_process_group_ranks(tensor.device_mesh.get_group(dim)) == ranks]


def add_up(parts: Sequence[Tensor], groups: Sequence[Sequence[dist.ProcessGroup]]) -> list[Tensor]:
    """The sums of tensors over the processes of each one's groups. Collective: one for all that share a group.

    parts: of one dtype and device. groups: as long, and alike on all processes.
    """
    parts = list(parts)
    alike: dict[tuple[int, ...], dict[int, dist.ProcessGroup]] = {}  # meshes may have groups of their own
    for index, one in enumerate(groups):
        for group in one:
            alike.setdefault(tuple(dist.get_process_group_ranks(group)), {})[index] = group
    for own in alike.values():
        indices, group = list(own), next(iter(own.values()))
        total = torch.cat([parts[index].flatten() for index in indices])
        dist.all_reduce(total, group=group)
        for index, part in zip(indices, total.split([parts[index].numel() for index in indices]), strict=True):
            parts[index] = part.view_as(parts[index])
    return parts


def gatherers(model: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters in a model: each gathers its weights ahead of a pass, and frees them after it.

    Also those of a module around the model, such as torch.compile's, which hold its weights.
    """
    return [group for state in _states(model) for group in _groups(state)]


def make_ready(model: nn.Module) -> list[Any]:
    """`gatherers`, ready for shards that change ahead of a forward pass."""
    for state in _states(model):
        if state._is_root is None:
            state._lazy_init()  # the first forward pass does, and may move the shards to memory of another size
        state._state_ctx.post_optim_event = None  # a gather waits for whatever is under way, our noise too
    return gatherers(model)


def _states(model: nn.Module) -> list[Any]:
    """FSDP2's states of the modules around a model that hold its parameters, and of its own modules, outermost first.

    There is no public way to the former.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    known = {} if composable is None else composable._module_state_mapping
    states = {module: state() for module, state in known.items() if hasattr(state(), "_comm_ctx")}
    if not states:
        return []
    modules = dict.fromkeys(model.modules())
    around = [
        state
        for module, state in states.items()
        if module not in modules
        and any(held._module_info.module in modules for group in _groups(state) for held in group.fsdp_params)
    ]
    return list(dict.fromkeys([*around, *[states[module] for module in modules if module in states]]))


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def gathered_weights(groups: Iterable[Any], model: nn.Module) -> list[nn.Parameter]:
    """The whole weights that a model computes with, once FSDP2's `groups` gathered them: the same objects each time.

    Not those of modules around it, which one group may gather together with its own.
    """
    modules = set(model.modules())
    held = [held for group in groups for held in group.fsdp_params if hasattr(held, "_unsharded_param")]
    return [one._unsharded_param for one in held if not modules.isdisjoint(_holders(one))]


def cut_weights(groups: Iterable[Any]) -> list[nn.Parameter]:
    """The weights of FSDP2's `groups` as an optimizer knows them, gathered or not."""
    return [held.sharded_param for group in groups for held in group.fsdp_params]


def _holders(held: Any) -> list[nn.Module]:
    """The modules that have one of FSDP2's parameters: several where it is tied."""
    return [held._module_info.module, *held._module_info.shared_modules]


def gathered_as_held(groups: Iterable[Any]) -> Mapping[int, Any]:
    """Those of FSDP2's parameters whose values are gathered as they are and whole, by the id of what an optimizer has:
    not in another dtype (MixedPrecisionPolicy), nor as parts of tensor parallelism."""
    return {
        id(held.sharded_param): held
        for group in groups
        for held in group.fsdp_params
        if group.mp_policy.param_dtype in (None, held.sharded_param.dtype) and not held.is_dtensor
    }


def whole_of_gathered(held: Any) -> nn.Parameter | None:
    """What FSDP2 puts in modules once one of its parameters is gathered: the same object each time. None: never yet."""
    return getattr(held, "_unsharded_param", None)


def after_each_put(held: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Call this whenever FSDP2 has put a parameter's whole weight, or its shards, in modules; returns what ends that.

    A private call: there is no public way to learn of a gather, which may come in any pass, and ahead of it.
    """
    put = held._setattr_on_modules

    def put_and_call(parameter: nn.Parameter) -> None:
        put(parameter)
        call()

    held._setattr_on_modules = put_and_call
    return lambda: vars(held).pop("_setattr_on_modules", None)


def gathered_dtype(groups: Iterable[Any]) -> torch.dtype | None:
    """What FSDP2's `groups` gather weights in, if that is another dtype than the weights': a MixedPrecisionPolicy's."""
    return next((group.mp_policy.param_dtype for group in groups if group.mp_policy.param_dtype is not None), None)


def in_use(groups: Iterable[Any]) -> list[Any]:
    """Those of FSDP2's `groups` that have gathered their weights for a pass that runs now; see `gather`."""
    running = ("FORWARD", "PRE_BACKWARD")
    return [group for group in groups if group.is_unsharded and group._training_state.name in running]


def reshard(groups: Iterable[Any]) -> None:
    """Let FSDP2's `groups` hold their shards only, so that the next use gathers what is in these by then.

    Private calls: the public `reshard` does nothing while a forward pass runs.
    """
    for group in groups:
        if group._all_gather_result is not None:  # asked for ahead of time, and not waited for
            group.wait_for_unshard()
        group._to_sharded()


def gather(groups: Iterable[Any]) -> None:
    """Gather the weights of FSDP2's `groups` where they are not. Collective."""
    for group in groups:
        group.unshard()
        group.wait_for_unshard()


def all_reduced(groups: Iterable[Any]) -> bool:
    """Whether FSDP2's `groups` average the gradients of the pass that runs now over all replicas."""
    return all(group.reduce_grads and group.all_reduce_grads for group in groups)
