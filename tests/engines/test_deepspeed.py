"""The guarantees under DeepSpeed ZeRO-0/1/2, and what of DeepSpeed is refused.

deepspeed is optional. Without it the tests of its engine are skipped, and stand-ins show what RWP would see. To run
all of them on a CPU, in an environment of its own, with the extra `test`:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed && python -m pytest tests/engines/test_deepspeed.py
"""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DummyOptim
from distributed import Collectives, run, stop
from safetensors.torch import load_file
from sharded import assert_same
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from zero import Case, Run, accelerator_of, assert_mixed, batch, build, deepspeed_on_cpus, engine_of, record

from hf_rwp import RWP
from hf_rwp.core.replicas import replicas_of
from hf_rwp.hub.export import save_any

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed; see the module's docstring")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def grouped(model: nn.Module, **options) -> RWP:
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rwp_gamma": 0.1}]
    return RWP(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model, **{"gamma": 0.3, "alpha": 1.0, **options})


# Without deepspeed: what RWP sees of it


def step_by_groups(optimizer: torch.optim.Optimizer) -> None:
    """As ZeRO-1/2 steps the optimizer that it was given."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups


def test_groups_that_are_stepped_one_by_one_are_one_step():
    ends = []
    for step in (step_by_groups, lambda optimizer: optimizer.step()):
        model = network()
        optimizer = grouped(model)
        for x in torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)):
            model(x).square().sum().backward()
            step(optimizer)
            optimizer.zero_grad()
        ends.append((reference.snapshot(model), optimizer.report(), optimizer.state_dict()["param_groups"]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_a_step_by_groups_without_a_forward_pass_of_the_model_raises():
    model = network()
    optimizer = grouped(model)
    model(torch.randn(5, 6)).sum().backward()
    step_by_groups(optimizer)
    with pytest.raises(RuntimeError, match="no forward pass of the model began"):
        step_by_groups(optimizer)


def test_damping_is_refused_where_the_groups_hold_flat_partitions():
    model = network()
    optimizer = grouped(model, eta=0.1)
    for group in optimizer.param_groups:
        group["params"] = [torch.cat([p.detach().flatten() for p in group["params"]])]
    with pytest.raises(NotImplementedError, match=r"eta > 0 .*flat partitions.*What works is eta=0"):
        model(torch.randn(5, 6))


def not_initialized() -> None:
    raise AssertionError("dist is not initialized")


def imported_and_idle() -> list[int]:
    groups = ModuleType("deepspeed.utils.groups")
    groups.mpu = groups.mesh_device = None
    groups._get_data_parallel_group = not_initialized
    sys.modules[groups.__name__] = groups
    try:
        found = replicas_of()
        return [found.index, found.count]
    finally:
        del sys.modules[groups.__name__]


def test_replicas_are_the_world_where_deepspeed_is_imported_and_not_in_use():
    assert run(2, imported_and_idle) == [[0, 2], [1, 2]]


def data_parallel_of_four() -> list[int]:
    """Ranks {0, 2} and {1, 3} average gradients, as under a Megatron mpu with two model-parallel ranks."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    groups = ModuleType("deepspeed.utils.groups")
    groups.mpu, groups.mesh_device = object(), None
    groups._get_data_parallel_group = lambda: pairs[dist.get_rank() % 2]
    sys.modules[groups.__name__] = groups
    try:
        found = replicas_of()
        return [found.index, found.count]
    finally:
        del sys.modules[groups.__name__]


def test_replicas_are_those_of_deepspeeds_data_parallel_group():
    assert run(4, data_parallel_of_four) == [[0, 2], [0, 2], [1, 2], [1, 2]]


CONFIGURATIONS = {
    "optimizer": (
        {"optimizer": {"type": "AdamW"}},
        'an "optimizer" in DeepSpeed\'s configuration.*What works is a torch optimizer.*delete the entry',
    ),
    "onebit": ({"optimizer": {"type": "OneBitAdam"}}, "nothing to wrap.*What works is a torch optimizer"),
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        'DeepSpeedCPUAdam in the place.*What works is "zero_force_ds_cpu_optimizer": false',
    ),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism.*What works.*tp_plan"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
@pytest.mark.parametrize("when", ["construction", "forward"])
def test_configurations_that_leave_rwp_nothing_to_wrap_or_perturb_are_refused(what, when):
    config, message = CONFIGURATIONS[what]
    model = network()
    optimizer = None if when == "construction" else grouped(model)
    Accelerator(cpu=True)
    plugin = SimpleNamespace(zero_stage=2, selected=True, deepspeed_config=config)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state["deepspeed_plugins"] = {"one": plugin}
    with pytest.raises(NotImplementedError, match=message):
        grouped(model) if optimizer is None else model(torch.randn(5, 6))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_force_ds_cpu_optimizer": False,
        },
    ],
)
def test_other_configurations_are_not_refused(config):
    Accelerator(cpu=True)
    plugin = SimpleNamespace(zero_stage=2, selected=True, deepspeed_config=config)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    AcceleratorState._shared_state["deepspeed_plugins"] = {"one": plugin}
    grouped(network())


def test_an_optimizer_that_deepspeed_builds_is_refused_with_what_to_do():
    model = network()
    with pytest.raises(TypeError, match=r'got DummyOptim.*delete "optimizer" from.*build a torch optimizer'):
        RWP(DummyOptim(model.parameters()), model)


def made_in(module: str, kind: type, name: str) -> type:
    return type(name, (kind,), {"__module__": module})


def test_one_bit_optimizers_are_refused():
    model = network()
    adam = made_in("deepspeed.runtime.fp16.onebit.adam", torch.optim.Adam, "OnebitAdam")
    with pytest.raises(NotImplementedError, match=r"OnebitAdam, which averages.*What works is torch.optim.AdamW"):
        RWP(adam(model.parameters()), model)


def test_pipelines_and_engines_are_refused():
    pipeline = made_in("deepspeed.runtime.pipe.module", nn.Sequential, "PipelineModule")(nn.Linear(6, 3))
    engine = made_in("deepspeed.runtime.engine", nn.Sequential, "DeepSpeedEngine")(nn.Linear(6, 3))
    with pytest.raises(NotImplementedError, match=r"pipelines.*What works is DeepSpeed ZeRO up to stage 2"):
        RWP(torch.optim.SGD(pipeline.parameters()), pipeline)
    with pytest.raises(TypeError, match=r"RWP\(base, model\), then call deepspeed.initialize"):
        RWP(torch.optim.SGD(engine.parameters()), engine)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 1), "sequence parallelism.*context parallelism under FSDP2"), ((1, 2), "tensor parallelism.*tp_plan")],
)
def test_parallelism_inside_of_a_replica_is_refused(monkeypatch, sizes, message):
    groups = ModuleType("deepspeed.utils.groups")
    groups.mpu, groups.mesh_device = object(), None
    groups._get_sequence_parallel_world_size = lambda: sizes[0]
    groups._get_model_parallel_world_size = lambda: sizes[1]
    model = network()
    optimizer = grouped(model)
    monkeypatch.setitem(sys.modules, groups.__name__, groups)
    with pytest.raises(NotImplementedError, match=message):
        model(torch.randn(5, 6))
    optimizer.remove()
    with pytest.raises(NotImplementedError, match=message):
        grouped(model)


def test_weights_in_one_buffer_as_zero_keeps_them_are_exported_tied_ones_too(tmp_path):
    model = network()
    model.append(nn.Linear(3, 8))
    model.append(nn.Linear(8, 3))
    model[4].weight = model[2].weight
    expected = reference.snapshot(model)
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    save_any(model, tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(written.pop("4.weight"), expected["2.weight"])
    assert_same(written, expected)


# With deepspeed, on gloo ranks


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Those that have had DeepSpeed in them serve nobody else."""
    yield
    if INSTALLED:
        stop()


def trained(case: Case, **options) -> list[Run]:
    return run(case.world, record, case, *options.values(), timeout=100, keep_group=True)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("client", ["rwp", "base"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_gradient_is_the_mix(stage, client, accumulation):
    case = Case(stage, client=client, accumulation=accumulation)
    assert_mixed(case, trained(case))


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_step_gradient_of_a_script_with_accelerate_is_the_mix(stage):
    for accumulation in (1, 2):
        case = Case(stage, "accelerate", accumulation=accumulation)
        assert_mixed(case, trained(case))


@needs_deepspeed
@pytest.mark.parametrize(
    "case",
    [Case(world=3, alpha=0.5), Case(alpha=1.0), Case(world=1, accumulation=2)],
    ids=["three replicas", "all perturbed", "one replica, by turns"],
)
def test_roles_are_by_data_parallel_rank(case):
    assert_mixed(case, trained(case))


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("client", ["rwp", "base"])
def test_gamma_is_that_of_the_weights_own_group_among_flat_partitions(stage, client):
    case = Case(stage, client=client, gammas={"head": 0.0, "layers.0": 0.05})
    ranks = trained(case)
    assert_mixed(case, ranks)
    window = ranks[1].windows[0]
    sizes = {
        name: float((window.seen[0][name] - w).norm() / w.norm()) for name, w in window.weights.items() if w.ndim == 2
    }
    assert sizes["head.weight"] == 0
    assert sizes["layers.0.up.weight"] == pytest.approx(sizes["layers.1.up.weight"] / 4, rel=0.4)
    assert ranks[0].state["groups"] == [(0, case.windows)] * 3


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("clipping", [0.5, None])
def test_clipping_is_of_the_mix_and_deepspeeds_default_too(stage, clipping):
    case = Case(stage, clipping=clipping)
    ranks = trained(case)
    assert ranks[0].clipping == (clipping or 1.0)
    assert_mixed(case, ranks)


@needs_deepspeed
@pytest.mark.parametrize(
    "case",
    [
        Case(0, dtype=torch.bfloat16),
        Case(1, dtype=torch.bfloat16, gammas={"head": 0.1}),
        Case(1, dtype=torch.bfloat16, gammas={"head": 0.1}, config={"data_types": {"grad_accum_dtype": "fp32"}}),
        Case(2, dtype=torch.bfloat16, accumulation=2),
        Case(2, "accelerate", dtype=torch.bfloat16, accumulation=2),
    ],
    ids=["ZeRO-0", "ZeRO-1", "ZeRO-1, summed in float32", "ZeRO-2", "accelerate"],
)
def test_bfloat16_weights_get_the_mix_up_to_their_rounding(case):
    assert_mixed(case, trained(case), tolerance=0.01)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replicas_are_equal_after_30_steps(stage):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(stage, dtype=dtype, windows=30, momentum=0.9, clipping=1.0, gamma=0.05)
        ranks = trained(case)
        for weights in zip(*[[window.weights for window in rank.windows] for rank in ranks], strict=True):
            assert_same(weights[0], weights[1])
        assert ranks[0].report["slots"] == {"clean": 30, "perturbed": 30}


@needs_deepspeed
@pytest.mark.parametrize(("route", "client"), [("engine", "rwp"), ("engine", "base"), ("accelerate", "rwp")])
def test_resume_from_the_engines_checkpoint_is_bit_exact(tmp_path, route, client):
    for stage in (0, 1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(stage, route, client, dtype, windows=4, momentum=0.9, gammas={"head": 0.1}, options={"seed": 7})
            folder = str(tmp_path / f"{stage}{dtype}")
            whole = trained(case, save=folder)
            again = trained(replace(case, gamma=0.4, options={"seed": 8}), save="", load=folder)
            for one, other in zip(whole, again, strict=True):
                assert_same(other.last, one.last)
                assert other.state == one.state
                assert_same(other.windows[-1].seen, one.windows[-1].seen)
            assert whole[0].state == {"version": 2, "seed": 7, "windows": 4, "groups": [(7, 4)] * 2}


# Between passes


def evaluate(engine, model) -> None:
    """In the midst of a micro-step: whatever looks at the weights finds clean ones."""
    clean = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(reference.snapshot(model)))
    engine.eval()
    with torch.no_grad():
        engine(torch.randn(3, 5, 6))
    engine.train()
    handle.remove()
    assert_same(seen, [clean])


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_evaluation_between_forward_and_backward_sees_clean_weights(stage):
    case = Case(stage, between=evaluate)
    ranks = trained(case)
    twins = trained(replace(case, between=None))
    for rank, twin in zip(ranks, twins, strict=True):
        assert_same(rank.last, twin.last)


def fail(*_) -> None:
    raise ValueError("out of memory, say")


def interrupted(stage: int) -> list[str]:
    """Names of the weights that an error in a forward pass left noisy, once training has gone on."""
    case = Case(stage)
    model, optimizer = build(case)
    engine = engine_of(case, model, optimizer)
    clean = reference.snapshot(model)
    handle = model.head.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="out of memory"):
        engine(batch(case, 0)[0])
    noisy = [name for name, weight in reference.snapshot(model).items() if not torch.equal(weight, clean[name])]
    handle.remove()
    for index in range(2):
        x, y = batch(case, index)
        engine.backward(mse_loss(engine(x), y))
        engine.step()
    assert optimizer.report()["slots"] == {"clean": 2, "perturbed": 2}
    return noisy


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2])
def test_weights_are_clean_after_an_error_in_the_forward_pass_and_training_goes_on(stage):
    assert run(2, interrupted, stage, keep_group=True) == [[], []]


def collectives(case: Case) -> Counter[str]:
    """Of the second optimizer step."""
    model, optimizer = build(case)
    engine = engine_of(case, model, optimizer)
    for _ in range(2):
        with Collectives() as mode:
            for index in range(case.accumulation):
                x, y = batch(case, index)
                engine.backward(mse_loss(engine(x), y))
                engine.step()
    return mode.counts


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_has_no_collective_more_than_without_rwp(stage):
    for accumulation in (1, 2):
        case = Case(stage, accumulation=accumulation)
        ours, plain = (run(2, collectives, replace(case, gamma=gamma), keep_group=True) for gamma in (0.2, 0.0))
        assert ours == plain
        assert all(plain)


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)


def ended(stage: int, how: str) -> reference.Tensors:
    """The weights after three steps."""
    case = Case(stage)
    model, optimizer = build(case)
    if how in REENTRANT:
        checkpointed(model, REENTRANT[how])
    engine = engine_of(case, model, optimizer)
    if how == "compiled":
        engine.compile(backend="aot_eager")
    for index in range(3):
        x, y = batch(case, index)
        engine.backward(mse_loss(engine(x), y))
        engine.step()
    assert optimizer.report()["slots"] == {"clean": 3, "perturbed": 3}
    return reference.snapshot(model)


REENTRANT = {"checkpointed": False, "checkpointed, reentrant": True}


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2])
def test_activation_checkpointing_and_compiled_engines_end_with_the_same_bits(stage):
    plain, *others = (
        run(2, ended, stage, how, timeout=100, keep_group=True) for how in ("plain", *REENTRANT, "compiled")
    )
    for other in others:
        assert_same(other, plain)


@needs_deepspeed
def test_damping_follows_the_gradients_where_zero_0_leaves_them_whole():
    case = Case(0, options={"eta": 0.5})
    ranks = trained(case)
    assert_mixed(case, ranks)
    free = trained(Case(0))
    for name in ranks[1].windows[0].weights:
        damped, plain = (
            [(run.windows[number].seen[0][name] - run.windows[number].weights[name]).norm() for number in (0, 1)]
            for run in (ranks[1], free[1])
        )
        assert damped[0] == plain[0]  # no gradient has been seen yet
        assert damped[1] < plain[1]


# What is refused once the engine is there


@needs_deepspeed
def test_zero_3_is_refused_at_the_first_forward_pass_of_the_engine():
    with pytest.raises(RuntimeError, match=r"ZeRO-3, which cuts weights anywhere. What works is .*stage 2, or FSDP2"):
        trained(Case(3))


def wrapped_first() -> None:
    """The wrapper is there ahead of the Accelerator that brings ZeRO-3."""
    case = Case(3, "accelerate")
    model, optimizer = build(case)
    prepared = accelerator_of(case).prepare(model, optimizer, DataLoader(TensorDataset(*batch(case, 0)), batch_size=3))
    prepared[0](batch(case, 0)[0])


@needs_deepspeed
def test_zero_3_is_refused_under_accelerate_at_construction_and_after_prepare():
    message = r"NotImplementedError: RWP does not work with DeepSpeed ZeRO-3"
    with pytest.raises(RuntimeError, match=message):
        run(2, wrapped_first, keep_group=True)
    with pytest.raises(RuntimeError, match=message):
        trained(Case(3, "accelerate"))


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@needs_deepspeed
@pytest.mark.parametrize("route", ["engine", "accelerate"])
def test_offloaded_optimizers_work_where_they_stay_the_ones_that_rwp_wraps(route):
    case = Case(2, route, config={**OFFLOAD, "zero_force_ds_cpu_optimizer": False})
    assert_mixed(case, trained(case))
    with pytest.raises(RuntimeError, match=r'"zero_force_ds_cpu_optimizer": false'):
        trained(replace(case, config=OFFLOAD))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_damping_is_refused_by_the_engine_that_keeps_flat_partitions(stage):
    with pytest.raises(RuntimeError, match="What works is eta=0"):
        trained(Case(stage, options={"eta": 0.1}))


def mixture() -> None:
    from deepspeed.moe.layer import MoE

    deepspeed_on_cpus().init_distributed("gloo")
    model = nn.Sequential(nn.Linear(6, 8), MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2))
    RWP(torch.optim.SGD(model.parameters(), lr=0.1), model)


@needs_deepspeed
def test_mixtures_of_experts_are_refused():
    with pytest.raises(RuntimeError, match=r"DeepSpeed's mixture of experts.*What works is a dense model"):
        run(2, mixture, timeout=60)
    stop()


@needs_deepspeed
def test_sequence_parallelism_of_the_engine_is_refused():
    sizes = {"data_parallel_size": 1, "sequence_parallel_size": 2}
    with pytest.raises(RuntimeError, match=r"DeepSpeed's sequence parallelism.*What works is context parallelism"):
        trained(Case(1, config=sizes))
    stop()  # DeepSpeed keeps the mesh


def tensor_parallel() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, accumulation_steps=2)
    engine = engine_of(Case(1, config={"tensor_parallel": {"autotp_size": 2}}), model, optimizer)
    ids = torch.arange(8).view(1, 8)
    engine(input_ids=ids, labels=ids)


@needs_deepspeed
def test_tensor_parallelism_of_the_engine_is_refused():
    with pytest.raises(RuntimeError, match=r"DeepSpeed's tensor parallelism.*What works is torch's parallelize_module"):
        run(2, tensor_parallel, timeout=60, keep_group=True)
    stop()  # DeepSpeed keeps the groups
