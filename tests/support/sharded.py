"""Training runs with weights that a mesh of processes holds together, as every rank does them, and their oracle.

`record(case)` runs on every rank of `distributed.run` and returns what each saw as whole tensors: the weights of every
forward pass as the layers found them (after FSDP2's gathers), the gradient at `step`, the weights before and after.
`assert_mixed` compares the gradients with `reference.mixed_gradient` at those weights. `follow(case)` returns no more
than the parts of gradients and weights that each rank has, to be compared with another run's, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from hf_rwp import RWP

IMAGES, TOKENS, WIDTH, HIDDEN, TARGETS = 3, 5, 6, 8, 3

# Engine: the mesh's shape and the names of its dimensions.
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "plain": ((), ()),
    "hsdp": ((2, 2), ("replicate", "shard")),
    "replicate": ((4, 1), ("replicate", "shard")),
    "fsdp": ((4,), ("shard",)),
    "fsdp2ranks": ((2,), ("shard",)),
    "tp": ((4,), ("tp",)),
    "tp2ranks": ((2,), ("tp",)),
    "fsdp_tp": ((2, 2), ("shard", "tp")),
    "hsdp_tp": ((2, 1, 2), ("replicate", "shard", "tp")),
    "replicated": ((4,), ("replicate",)),
    "two replicate": ((2, 2, 1), ("east", "north", "shard")),
    "half": ((2, 2), ("elsewhere", "shard")),  # the other half of the world trains by itself
}
PARALLEL = {"hsdp", "replicate", "hsdp_tp", "replicated"}
_meshes: dict[str, Any] = {}


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """A parameter of the root, 1-D ones, matrices of odd width (hidden), fewer filters than ranks (head: 3 of 4)."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.layers = nn.ModuleList([Layer(hidden), Layer(hidden)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TARGETS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Case:
    """engine: of MESHES. wrapped_first: RWP comes before the weights are sharded, as with accelerator.prepare."""

    engine: str = "hsdp"
    alpha: float = 0.3
    gamma: float = 0.2
    accumulation: int = 1
    windows: int = 3
    wrapped_first: bool = False
    sync_each: bool = True  # whether every micro-step's gradients are reduced, not the last one's alone
    keep: bool = False  # whether FSDP2's weights stay gathered from one micro-step to the next
    ahead: Callable[[nn.Module], Any] | None = None  # called before every forward pass
    between: Callable[[nn.Module, Any], None] | None = None  # called between the forward and the backward pass
    after: Callable[[nn.Module], Any] | None = None  # called after every backward pass
    clip: float | None = None
    excluded: str = ""  # beginning of the names of the weights in a group without noise
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)  # of RWP
    sharding: dict[str, Any] = field(default_factory=dict)  # of fully_shard
    change: Callable[[nn.Module], nn.Module] | None = None  # of the model, ahead of the sharding
    shard: Callable[["Case", nn.Module, DeviceMesh | None], None] | None = None  # in place of `shard`
    loss: Callable[[Any, Tensor, Tensor], Tensor] | None = None  # of (model, inputs, targets)
    scale: float = 1.0  # of the loss, which gradients are divided by ahead of the step

    @property
    def world(self) -> int:
        shape, _ = MESHES[self.engine]
        return int(torch.tensor(shape).prod()) if shape else 1


@dataclass
class Window:
    """An optimizer step as one rank saw it; tensors are whole."""

    weights: reference.Tensors
    seen: list[reference.Tensors] = field(default_factory=list)
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    roles: list[Any] = field(default_factory=list)
    stepped: reference.Tensors = field(default_factory=dict)
    gradient: reference.Tensors = field(default_factory=dict)


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a tensor. Collective for a DTensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def snapshot(model: nn.Module) -> reference.Tensors:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def mesh_of(case: Case) -> DeviceMesh | None:
    """One for all cases of an engine, while the process group lasts: a mesh makes groups of its own."""
    shape, names = MESHES[case.engine]
    if not shape:
        return None
    world = dist.group.WORLD
    if _meshes.get("world") is not world:
        _meshes.clear()
        _meshes["world"] = world
    if case.engine not in _meshes:
        _meshes[case.engine] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[case.engine]


def shard(case: Case, model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard a `Net` in place as the case's engine does."""
    names = MESHES[case.engine][1]
    if "tp" in names:
        plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"] if mesh.ndim > 1 else mesh, plan)
    if data_mesh := data_mesh_of(case, mesh):
        for layer in model.layers:
            fully_shard(layer, mesh=data_mesh, **case.sharding)
        fully_shard(model, mesh=data_mesh, **case.sharding)


def data_mesh_of(case: Case, mesh: DeviceMesh | None) -> DeviceMesh | None:
    """That fully_shard works along."""
    names = MESHES[case.engine][1]
    data = tuple(name for name in names if name not in ("tp", "elsewhere"))
    return (mesh[data] if mesh.ndim > len(data) else mesh) if data else None


def build(case: Case) -> tuple[nn.Module, RWP, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net(HIDDEN if "tp" in case.engine else 7).to(case.dtype)
    mesh = mesh_of(case)
    if case.change:
        model = case.change(model)
    if not case.wrapped_first:
        (case.shard or shard)(case, model, mesh)
    base = base_of(case, model)
    steps = case.accumulation if case.accumulation > 1 else None
    optimizer = RWP(base, model, gamma=case.gamma, alpha=case.alpha, accumulation_steps=steps, **case.options)
    if case.wrapped_first:
        (case.shard or shard)(case, model, mesh)
        base.param_groups[0]["params"] = list(model.parameters())
    return model, optimizer, base


def base_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    groups: dict[bool, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(bool(case.excluded) and name.startswith(case.excluded), []).append(parameter)
    kinds = [{"params": own, **({"rwp_gamma": 0.0} if excluded else {})} for excluded, own in groups.items()]
    return torch.optim.SGD(kinds, lr=0.1, momentum=0.9)


def batch(case: Case, index: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Of a rank, this one if None: tensor-parallel peers have the same."""
    group = rank if rank is not None else dist.get_rank() if dist.is_initialized() else 0
    if "tp" in MESHES[case.engine][1]:
        group //= MESHES[case.engine][0][-1]
    generator = torch.Generator().manual_seed(1000 * group + index)
    draw = {"dtype": torch.float64, "generator": generator}
    x, y = torch.randn(IMAGES, TOKENS, WIDTH, **draw), torch.randn(IMAGES, TARGETS, **draw)
    return x.to(case.dtype), y.to(case.dtype)


@contextmanager
def seen_weights(model: nn.Module) -> Iterator[list[reference.Tensors]]:
    """The whole weights that the layers find in each training forward pass, by name: a list that grows."""
    seen: list[reference.Tensors] = []
    names = {id(module): name for name, module in model.named_modules()}

    def begin(module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append({})

    def look(module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            if "pos" not in seen[-1]:
                seen[-1]["pos"] = whole(model.pos)
            for name, parameter in module.named_parameters(recurse=False):
                seen[-1][f"{names[id(module)]}.{name}"] = whole(parameter)

    leaves = [module for module in model.modules() if not list(module.children()) and list(module.parameters())]
    handles = [model.register_forward_pre_hook(begin)]
    handles += [module.register_forward_pre_hook(look) for module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def train(case: Case, model: nn.Module, optimizer: Any, stepped: Callable[[list[Any]], None]) -> None:
    """The loop. stepped: called after every step with the window's batches and roles."""
    batches: list[Any] = []
    gathers = hasattr(model, "set_requires_gradient_sync") and not case.sync_each
    loss_of = case.loss or (lambda model, x, y: mse_loss(model(x), y))
    for index in range(case.windows * case.accumulation):
        x, y = batch(case, index)
        last = (index + 1) % case.accumulation == 0
        if gathers:
            model.set_requires_gradient_sync(last)
        if case.keep:
            model.set_reshard_after_backward(last)
        if case.ahead:
            case.ahead(model)
        loss = loss_of(model, x, y) * (case.scale / case.accumulation)
        batches.append((x, y, optimizer.role))
        if case.between:
            case.between(model, optimizer)
        loss.backward()
        if case.after:
            case.after(model)
        if last:
            for parameter in model.parameters():
                if case.scale != 1 and parameter.grad is not None:
                    parameter.grad /= case.scale
            if case.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
            stepped(batches)
            batches = []


def record(case: Case) -> list[Window]:
    model, optimizer, base = build(case)
    windows = [Window(snapshot(model))]

    def stepping(*_: Any) -> None:
        windows[-1].stepped = snapshot(model)
        windows[-1].gradient = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}

    def stepped(batches: list[Any]) -> None:
        windows[-1].batches = [(x, y) for x, y, _ in batches]
        windows[-1].roles = [role for *_, role in batches]
        windows[-1].seen, seen[:] = seen[:], []
        windows.append(Window(snapshot(model)))

    base.register_step_pre_hook(stepping)
    with seen_weights(model) as seen:
        train(case, model, optimizer, stepped)
    return windows[:-1]


Parts = dict[str, Tensor]  # by parameter name, what one rank holds


def parts_of(model: nn.Module) -> Parts:
    return {plain_name(name): part(parameter) for name, parameter in model.named_parameters()}


def part(tensor: Tensor) -> Tensor:
    """A copy of what is in this process's memory."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def follow(case: Case) -> tuple[list[Parts], list[Parts]]:
    """Of one rank: the gradient at every step, and the weights after it."""
    return follow_built(case, *build(case))


def follow_built(
    case: Case, model: nn.Module, optimizer: Any, base: torch.optim.Optimizer
) -> tuple[list[Parts], list[Parts]]:
    gradients, weights = [], []

    def stepping(*_: Any) -> None:
        named = model.named_parameters()
        gradients.append({plain_name(name): part(p.grad) for name, p in named if p.grad is not None})

    base.register_step_pre_hook(stepping)
    train(case, model, optimizer, lambda _: weights.append(parts_of(model)))
    return gradients, weights


def assert_replicas_agree(case: Case, ranks: list[Any]) -> None:
    """What ranks of different replicas that hold the same parts returned is the same, bit for bit."""
    size = case.world // MESHES[case.engine][0][0] if case.engine in PARALLEL else case.world
    for rank, own in enumerate(ranks):
        assert_same(own, ranks[rank % size])


def replica_index(case: Case, rank: int) -> int:
    """By the coordinate along the replicating dimension, which is the first one."""
    shape, _ = MESHES[case.engine]
    return rank * shape[0] // case.world if case.engine in PARALLEL else 0


def assert_mixed(case: Case, ranks: list[list[Window]], tolerance: float = 1e-14) -> None:
    """Every step used the paper's mix, at clean weights, noise in all of them, and peers shared role and noise."""
    net = Net(HIDDEN if "tp" in case.engine else 7).double()
    parallel = case.engine in PARALLEL
    assert {len(windows) for windows in ranks} == {case.windows}
    for windows in zip(*ranks, strict=True):
        clean = windows[0].weights
        for window in windows:
            assert_same(window.weights, clean)
            assert_same(window.stepped, clean)
        noises = [reference.noises(window.seen, clean) for window in windows]
        for rank, own in enumerate(noises):
            index = replica_index(case, rank)
            perturbed = [case.alpha == 1 or (index if parallel else step) % 2 == 1 for step in range(case.accumulation)]
            assert [noise is not None for noise in own] == perturbed
            for noise in own:  # in every weight that has a norm
                assert all(eps.any() or not clean[name].any() for name, eps in (noise or {}).items())
            peer = next(other for other in range(case.world) if replica_index(case, other) == index)
            assert_same(own, noises[peer])
        expected = reference.mixed_gradient(
            net,
            clean,
            [noise for own in noises for noise in own],
            [one for window in windows for one in window.batches],
            mse_loss,
            case.alpha,
        )
        for window in windows:
            torch.testing.assert_close(window.gradient, expected, rtol=1e-12, atol=tolerance)


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class Task(nn.Module):
    """A model, and a loss's own weights around it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.proxies = nn.Parameter(torch.randn(TARGETS, TARGETS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) @ self.proxies


def buffers_of(case: Case) -> list[dict[str, Tensor]]:
    """The buffers after a step, and once they are the same everywhere."""
    model, optimizer, _ = build(case)
    for index in range(case.accumulation):
        x, y = batch(case, index)
        mse_loss(model(x), y).backward()
    optimizer.step()
    found = []
    for _ in range(2):
        found.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        optimizer.sync_buffers()
    return found
