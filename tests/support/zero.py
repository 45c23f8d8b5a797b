"""Training runs under DeepSpeed ZeRO-0/1/2 on gloo ranks, as every rank does them, and their oracle.

`record(case)` trains through the engine, or as an Accelerate script does, and returns what a rank saw: the weights of
every forward pass and after every backward pass, the gradient that the engine's step takes, and what that step did.
`assert_mixed` compares it with `reference.mixed_gradient`. The figures are in float32: DeepSpeed has no float64.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import distributed
import reference
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DistributedType
from sharded import IMAGES, TARGETS, TOKENS, WIDTH, Net, assert_same
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from hf_rwp import RWP

RATE = 0.5


def deepspeed_on_cpus() -> Any:
    """The package, on this process's gloo group; without its shared-memory collectives, compiled for minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


@dataclass(frozen=True)
class Case:
    """stage: of ZeRO. route: what the loop is, "engine" or "accelerate". client: the engine's optimizer, "rwp" or
    "base". gammas: by the model's children, each in a group of its own; the others have `gamma`. clipping: the norm, 0
    for none, None for DeepSpeed's default. config: of DeepSpeed, beside that."""

    stage: int = 2
    route: str = "engine"
    client: str = "rwp"
    dtype: torch.dtype = torch.float32
    alpha: float = 0.3
    gamma: float = 0.2
    gammas: dict[str, float] = field(default_factory=dict)
    accumulation: int = 1
    windows: int = 3
    momentum: float = 0.0
    clipping: float | None = 0.0
    world: int = 2
    between: Callable[[Any, nn.Module], None] | None = None  # called with engine and model ahead of each backward pass
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def deepspeed(self) -> dict[str, Any]:
        config = {
            "train_micro_batch_size_per_gpu": IMAGES,
            "gradient_accumulation_steps": self.accumulation,
            **({} if self.clipping is None else {"gradient_clipping": self.clipping}),
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.dtype is torch.bfloat16},
            **self.config,
        }
        return {**config, "zero_optimization": {"stage": self.stage, **self.config.get("zero_optimization", {})}}


@dataclass
class Window:
    """An optimizer step as one rank saw it. gradient: averaged over the replicas, ahead of clipping. moved: what the
    step took from the weights, by the rate. looks: the weights after each backward pass and when the base stepped."""

    weights: reference.Tensors
    seen: list[reference.Tensors] = field(default_factory=list)
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    looks: list[reference.Tensors] = field(default_factory=list)
    gradient: reference.Tensors = field(default_factory=dict)
    moved: reference.Tensors = field(default_factory=dict)


@dataclass
class Run:
    """What a rank saw. clipping: the norm that the engine clips to. state: the wrapper's seed and windows afterwards.
    last: the weights then."""

    windows: list[Window]
    clipping: float
    report: dict[str, Any]
    state: dict[str, Any]
    last: reference.Tensors


def build(case: Case) -> tuple[nn.Module, RWP]:
    torch.manual_seed(0)
    model = Net()
    groups = [
        {"params": list(model.get_submodule(name).parameters()), "rwp_gamma": gamma}
        for name, gamma in case.gammas.items()
    ]
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    groups.insert(0, {"params": [p for p in model.parameters() if id(p) not in apart]})
    base = torch.optim.SGD(groups, lr=RATE, momentum=case.momentum)
    given = case.accumulation if case.route == "engine" and case.accumulation > 1 else None
    return model, RWP(base, model, gamma=case.gamma, alpha=case.alpha, accumulation_steps=given, **case.options)


def engine_of(case: Case, model: nn.Module, optimizer: RWP) -> Any:
    client = optimizer if case.client == "rwp" else optimizer.base
    return deepspeed_on_cpus().initialize(model=model, optimizer=client, config=case.deepspeed)[0]


def batch(case: Case, index: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    rank = distributed.rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * rank + index)
    x = torch.randn(IMAGES, TOKENS, WIDTH, generator=generator)
    return x.to(case.dtype), torch.randn(IMAGES, TARGETS, generator=generator).to(case.dtype)


def gradient_of(model: nn.Module) -> reference.Tensors:
    """What the engine has averaged over the replicas, between the backward pass and its step."""
    from deepspeed.utils import safe_get_full_grad

    flat = any(getattr(parameter, "_hp_mapping", None) is not None for parameter in model.parameters())
    named = list(model.named_parameters())
    return {name: (safe_get_full_grad(p) if flat else p.grad).detach().clone() for name, p in named}


class Recorder:
    """Fills the windows of a run."""

    def __init__(self, case: Case, model: nn.Module, optimizer: RWP) -> None:
        self.case, self.model = case, model
        self.windows = [Window(reference.snapshot(model))]
        self._stepping = False
        optimizer.base.register_step_pre_hook(self._base_steps)

    def forward(self, x: Tensor, y: Tensor, seen: list[reference.Tensors]) -> None:
        self.windows[-1].batches.append((x, y))
        self.windows[-1].seen = list(seen)

    def backward(self, seen: list[reference.Tensors], gradient: bool) -> None:
        self.windows[-1].looks.append(reference.snapshot(self.model))
        if gradient:
            self.windows[-1].gradient, self._stepping = gradient_of(self.model), True

    def step(self, seen: list[reference.Tensors]) -> None:
        after = reference.snapshot(self.model)
        window, self._stepping = self.windows[-1], False
        window.moved = {name: (w.double() - after[name].double()) / RATE for name, w in window.weights.items()}
        seen.clear()
        self.windows.append(Window(after))

    def _base_steps(self, *_: Any) -> None:
        if self._stepping:  # ZeRO steps the groups one by one; the others' weights are new by the second
            self.windows[-1].looks.append(reference.snapshot(self.model))
        self._stepping = False


def record(case: Case, save: str = "", load: str = "") -> Run:
    """Train. save: after half of the windows. load: first, and the other half follows."""
    return (_by_engine if case.route == "engine" else _by_accelerate)(case, save, load)


def _by_engine(case: Case, save: str, load: str) -> Run:
    model, optimizer = build(case)
    engine = engine_of(case, model, optimizer)
    begin = 0
    if load:
        engine.load_checkpoint(load)
        begin = case.windows // 2
    recorder = Recorder(case, model, optimizer)
    with reference.seen_weights(model) as seen:
        for index in range(begin * case.accumulation, case.windows * case.accumulation):
            x, y = batch(case, index)
            loss = mse_loss(engine(x), y)
            recorder.forward(x, y, seen)
            if case.between:
                case.between(engine, model)
            engine.backward(loss)
            last = (index + 1) % case.accumulation == 0
            recorder.backward(seen, last)
            engine.step()
            if last:
                recorder.step(seen)
            if save and index + 1 == case.windows // 2 * case.accumulation:
                engine.save_checkpoint(save)
    return _run(recorder, engine, optimizer)


def _run(recorder: Recorder, engine: Any, optimizer: RWP) -> Run:
    state = {key: value for key, value in optimizer.state_dict()["rwp"].items() if key != "fisher"}
    state["groups"] = [(group["rwp_seed"], group["rwp_windows"]) for group in optimizer.param_groups]
    last = reference.snapshot(recorder.model)
    return Run(recorder.windows[:-1], engine.gradient_clipping(), optimizer.report(), state, last)


def accelerate_on_cpus() -> None:
    """Accelerate believes in this process's gloo group where it would look for GPUs: DeepSpeed is for these alone."""
    deepspeed_on_cpus()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def accelerator_of(case: Case) -> Accelerator:
    accelerate_on_cpus()
    config = {**case.deepspeed, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def _by_accelerate(case: Case, save: str, load: str) -> Run:
    accelerator = accelerator_of(case)
    model, optimizer = build(case)
    count = case.windows * case.accumulation
    rows = [batch(case, index, rank) for index in range(count) for rank in range(case.world)]
    data = TensorDataset(*(torch.cat(column) for column in zip(*rows, strict=True)))
    engine, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=IMAGES))
    recorder = Recorder(case, model, optimizer)
    begin = 0
    if load:
        accelerator.load_state(load)
        begin = case.windows // 2
        recorder.windows = [Window(reference.snapshot(model))]
    step = engine.step
    engine.step = lambda *args: (recorder.backward(seen, True), step(*args), recorder.step(seen))
    with reference.seen_weights(model) as seen:
        for index, (x, y) in enumerate(loader):
            if index < begin * case.accumulation:
                continue
            with accelerator.accumulate(engine):
                loss = mse_loss(engine(x), y)
                recorder.forward(x, y, seen)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
            if save and index + 1 == case.windows // 2 * case.accumulation:
                accelerator.save_state(save)
    return _run(recorder, engine, optimizer)


@dataclass(frozen=True)
class Errors:
    """The largest of all windows and replicas, with the largest element of a gradient."""

    gradient: float
    moved: float
    size: float


def errors(case: Case, ranks: list[Run]) -> Errors:
    """How far gradients and steps are from the paper's. Raises where weights are not clean or roles are others."""
    assert {len(run.windows) for run in ranks} == {case.windows}
    found = [0.0, 0.0, 0.0]
    looks = 2 if case.route == "accelerate" else case.accumulation + 1
    for windows in zip(*(run.windows for run in ranks), strict=True):
        clean = windows[0].weights
        for window in windows:
            assert len(window.looks) == looks
            for look in [window.weights, *window.looks]:
                assert_same(look, clean)
        noises = [reference.noises(window.seen, clean) for window in windows]
        for index, own in enumerate(noises):
            slots = [(index if case.world > 1 else micro_step) % 2 == 1 for micro_step in range(case.accumulation)]
            assert [noise is not None for noise in own] == [case.alpha == 1 or slot for slot in slots]
        batches = [one for window in windows for one in window.batches]
        eps = [noise for own in noises for noise in own]
        expected = reference.mixed_gradient(Net().double(), clean, eps, batches, mse_loss, case.alpha)
        norm = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
        limit = ranks[0].clipping
        factor = min(1.0, limit / norm) if limit else 1.0
        for window in windows:
            for name, gradient in expected.items():
                off = (window.gradient[name].double() - gradient, window.moved[name] - factor * gradient, gradient)
                found = [max(before, float(value.abs().max())) for before, value in zip(found, off, strict=True)]
    return Errors(*found)


def assert_mixed(case: Case, ranks: list[Run], tolerance: float = 1e-6) -> Errors:
    """Every step used the paper's mix at clean weights, and the replicas are equal."""
    found = errors(case, ranks)
    assert found.gradient < tolerance
    assert case.dtype is not torch.float32 or found.moved < tolerance
    for run in ranks:
        assert_same(run.last, ranks[0].last)
        assert run.report["placement"] == ("parallel" if case.world > 1 else "sequential")
        assert run.report["windows"] == case.windows
    return found
