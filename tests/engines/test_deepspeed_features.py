"""What training loops do around DeepSpeed's engine: scalers, frozen weights, buffers, other layouts, exports.

How to run these tests on a CPU is in tests/engines/test_deepspeed.py.
"""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import timm
import torch
from distributed import rank, run, run_each, stop
from engines import PreciseLlamaForCausalLM, llama, sentences
from safetensors.torch import load_file
from sharded import TARGETS, Net, assert_same
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from trainer_runs import make
from transformers import TrainerCallback
from zero import RATE, Case, Run, accelerate_on_cpus, assert_mixed, batch, build, deepspeed_on_cpus, engine_of, record

from hf_rwp import RWP, push_to_hub
from hf_rwp.hub.export import save_any

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; see tests/engines/test_deepspeed.py",
)
STAGES = [0, 1, 2]


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Those that have had DeepSpeed in them serve nobody else."""
    yield
    stop()


# fp16, with DeepSpeed's own scaler

# By stage. Under ZeRO-0 DeepSpeed divides a torch optimizer's gradients by a scale that it has not applied.
DYNAMIC = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}
HALF = {0: {"enabled": True, "loss_scale": 1.0}, 1: DYNAMIC, 2: DYNAMIC}


def in_half(function: Any, case: Case) -> Any:
    """`function(case)` where DeepSpeed believes in float16 on a CPU, which torch computes slowly."""
    deepspeed_on_cpus()
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        return function(case)


def half(stage: int, scaler: dict[str, Any]) -> Case:
    return Case(stage, dtype=torch.float16, config={"fp16": scaler}, gamma=0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_weights_get_the_mix_up_to_their_rounding(stage):
    case = half(stage, HALF[stage])
    ranks = run(case.world, in_half, record, case, timeout=100, keep_group=True)
    scale = 1024.0 if stage else 1.0
    for own in ranks:
        for window in own.windows:
            window.gradient = {name: gradient.double() / scale for name, gradient in window.gradient.items()}
    assert assert_mixed(case, ranks, tolerance=0.01).moved < 0.02


def overflowing(case: Case) -> tuple[list[tuple[float, bool]], reference.Tensors]:
    """After each step the scale, and whether the weights are as they were, and those at the end. One rank overflows."""
    model, optimizer = build(case)
    engine = engine_of(case, model, optimizer)
    seen = []
    for index in range(3):
        before = reference.snapshot(model)
        x, y = batch(case, index)
        engine.backward(mse_loss(engine(x), y) * (torch.inf if index == 0 and rank() == 1 else 1.0))
        engine.step()
        after = reference.snapshot(model)
        scale = getattr(engine.optimizer, "loss_scale_config", engine.optimizer).cur_scale
        seen.append((scale, all(torch.equal(after[name], before[name]) for name in before)))
    assert optimizer.report()["slots"] == {"clean": 3, "perturbed": 3}
    return seen, after


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_deepspeeds_scaler_skips_leaves_clean_weights_on_all_ranks(stage):
    (seen, weights), (others, twins) = run(2, in_half, overflowing, half(stage, DYNAMIC), timeout=100, keep_group=True)
    assert seen == others == [(512.0, True), (512.0, False), (512.0, False)]
    assert_same(weights, twins)


# Frozen weights and buffers


def freeze(model: nn.Module) -> None:
    model.pos.requires_grad_(False)
    model.layers[0].requires_grad_(False)


def built(case: Case, net: nn.Module) -> RWP:
    base = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    steps = case.accumulation if case.accumulation > 1 else None
    return RWP(base, net, gamma=case.gamma, alpha=case.alpha, accumulation_steps=steps, **case.options)


def whole_and_engine(case: Case) -> tuple[reference.Tensors, reference.Tensors, reference.Tensors]:
    """The weights at first, after a run with DistributedDataParallel, and after one with the engine."""
    ends = []
    for way in ("ddp", "engine"):
        torch.manual_seed(0)
        net = Net()
        freeze(net)
        start, optimizer = reference.snapshot(net), built(case, net)
        wrapped = DistributedDataParallel(net) if way == "ddp" else engine_of(case, net, optimizer)
        for index in range(case.windows):
            x, y = batch(case, index)
            loss = mse_loss(wrapped(x), y)
            if way == "engine":
                wrapped.backward(loss)
                wrapped.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(reference.snapshot(net))
    return start, *ends


@pytest.mark.parametrize("stage", STAGES)
def test_noise_on_frozen_weights_is_that_under_ddp(stage):
    cases = [(Case(stage, options={"frozen": frozen}),) for frozen in (False, True, "copy")]
    without, noisy, copied = run_each(2, whole_and_engine, cases, timeout=100, keep_group=True)
    for start, plain, engine in (*without, *noisy, *copied):
        torch.testing.assert_close(engine, plain, rtol=1e-4, atol=1e-6)
        for name in ("pos", "layers.0.up.weight"):
            assert torch.equal(engine[name], start[name])
    assert_same(noisy[0][2], noisy[1][2])
    apart = [(without[0][2][name] - noisy[0][2][name]).abs().max() for name in ("head.weight", "norm.weight")]
    assert min(apart) > 1e-4  # the frozen weights' noise is in the others' gradients


class Normed(Net):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.batch_norm(x))


def buffers_of(case: Case) -> list[reference.Tensors]:
    """The buffers after a step, and once they are the same everywhere."""
    torch.manual_seed(0)
    net = Normed()
    optimizer = built(case, net)
    engine = engine_of(case, net, optimizer)
    for index in range(case.accumulation):
        x, y = batch(case, index)
        engine.backward(mse_loss(engine(x), y))
        engine.step()
    found = []
    for _ in range(2):
        found.append({name: buffer.clone() for name, buffer in net.named_buffers()})
        optimizer.sync_buffers()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_are_those_of_each_rank_until_all_get_the_clean_ones(stage):
    case = Case(stage)
    for ranks in run_each(2, buffers_of, [(case,)], timeout=100, keep_group=True):
        for own, (before, _) in enumerate(ranks):
            x, _ = batch(case, 0, own)
            torch.testing.assert_close(before["batch_norm.running_mean"], 0.1 * x.mean((0, 2)))
        for _, after in ranks:
            assert_same(after, ranks[0][0])


def buffers_by_turns(case: Case) -> reference.Tensors:
    return buffers_of(case)[0]


def test_buffers_are_updated_by_clean_passes_where_roles_take_turns():
    case = Case(2, world=1, accumulation=2)
    (found,) = run(1, buffers_by_turns, case, timeout=100, keep_group=True)
    x, _ = batch(case, 0, 0)
    assert found["batch_norm.num_batches_tracked"] == 1
    torch.testing.assert_close(found["batch_norm.running_mean"], 0.1 * x.mean((0, 2)))


# Checkpoints in another layout


def trained(case: Case, **options: str) -> list[Run]:
    return run(case.world, record, case, *options.values(), timeout=100, keep_group=True)


@pytest.mark.parametrize(("stage", "other"), [(1, 2), (2, 1)])
def test_another_stage_goes_on_with_the_same_noise(tmp_path, stage, other):
    case = Case(stage, windows=4, momentum=0.9, options={"seed": 7})
    whole = trained(case, save=str(tmp_path))
    again = trained(replace(case, stage=other, gamma=0.4, options={"seed": 8}), save="", load=str(tmp_path))
    for one, its in zip(whole, again, strict=True):
        assert its.state == one.state
        torch.testing.assert_close(its.last, one.last, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(its.windows[-1].seen, one.windows[-1].seen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "world", "other", "others", "match"),
    [
        (1, 2, 1, 1, "used a DP world size of 2 but the current world size is 1"),
        (2, 1, 2, 2, "used a DP world size of 1 but the current world size is 2"),
        (0, 2, 1, 2, "No such file .*zero_pp_rank_"),
        (1, 2, 0, 2, "ValueError: .*ZeRO-1 and 2 write it in partitions, which ZeRO-0 does not read"),
    ],
)
def test_another_number_of_processes_and_zero_0s_own_checkpoints_are_refused(
    tmp_path, stage, world, other, others, match
):
    """By DeepSpeed itself, ZeRO-0 by the wrapper; the recipes refuse them by name, ahead of both."""
    case = Case(stage, world=world, accumulation=3 - world, windows=4, momentum=0.9)
    trained(case, save=str(tmp_path))
    with pytest.raises(RuntimeError, match=match):
        trained(replace(case, stage=other, world=others, accumulation=3 - others), save="", load=str(tmp_path))


# Around the engine


class Task(nn.Module):
    """A model, and a loss's own weights around it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.proxies = nn.Parameter(torch.randn(TARGETS, TARGETS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) @ self.proxies


def around(stage: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Of weights around the wrapped model, which the engine steps by no optimizer: their gradient, what torch makes of
    this process's part, and whether it was perturbed."""
    case = Case(stage)
    torch.manual_seed(0)
    task = Task(Net())
    proxies = task.proxies.detach().clone().requires_grad_()
    optimizer = RWP(torch.optim.SGD(task.net.parameters(), lr=RATE), task.net, gamma=case.gamma, alpha=case.alpha)
    engine = engine_of(case, task, optimizer)
    features: list[torch.Tensor] = []
    task.net.register_forward_hook(lambda *args: features.append(args[-1].detach()))
    x, y = batch(case, 0)
    engine.backward(mse_loss(engine(x), y))
    mse_loss(features[0] @ proxies, y).backward()
    return task.proxies.grad, proxies.grad, optimizer.role.perturbed


@pytest.mark.parametrize("stage", STAGES)
def test_weights_around_the_model_get_an_ordinary_gradient(stage):
    """ZeRO-1 and 2 average those that their optimizer has."""
    ranks = run(2, around, stage, timeout=100, keep_group=True)
    assert [perturbed for *_, perturbed in ranks] == [False, True]
    mean = torch.stack([own for _, own, _ in ranks]).mean(0)
    for gradient, own, _ in ranks:
        torch.testing.assert_close(gradient, own if stage else mean, rtol=1e-5, atol=1e-6)


def evaluated(case: Case, when: str) -> reference.Tensors:
    """The weights after training. when: an evaluation is ahead of the wrapper, of the engine, or nowhere."""
    torch.manual_seed(0)
    net = Net()

    def evaluate() -> None:
        net.eval()
        with torch.no_grad():
            net(torch.zeros(1, 5, 6))
        net.train()

    if when == "wrapper":
        evaluate()
    optimizer = built(case, net)
    if when == "engine":
        evaluate()
    engine = engine_of(case, net, optimizer)
    for index in range(case.windows):
        x, y = batch(case, index)
        engine.backward(mse_loss(engine(x), y))
        engine.step()
    assert optimizer.report()["slots"] == {"clean": 3, "perturbed": 3}
    return reference.snapshot(net)


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_ahead_of_the_wrapper_or_the_engine_changes_no_bit(stage):
    cases = [(Case(stage), when) for when in ("", "wrapper", "engine")]
    plain, *others = run_each(2, evaluated, cases, timeout=100, keep_group=True)
    for other in others:
        assert_same(other, plain)


# What is written


def exported(case: Case, folder: str) -> tuple[reference.Tensors, reference.Tensors]:
    """The clean weights in the midst of a micro-step, and after it. Both of them are written."""
    model, optimizer = build(case)
    engine = engine_of(case, model, optimizer)
    found = []
    x, y = batch(case, 0)
    loss = mse_loss(engine(x), y)
    for name, of in (("between", model), ("after", engine)):
        if name == "after":
            engine.backward(loss)
            engine.step()
        save_any(of, Path(folder) / f"{name}-{rank()}")
        found.append({key: value.clone() for key, value in model.state_dict().items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.push.push", lambda *_, **__: "address")
        if rank() == 0:
            assert push_to_hub(model, "ada/net", folder=Path(folder) / "pushed") == "address"
    return tuple(found)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_exported_and_pushed_is_whole_and_clean(tmp_path, stage):
    start = build(Case(stage))[0].state_dict()
    ranks = run(2, exported, Case(stage), str(tmp_path), timeout=100, keep_group=True)
    for own, (between, after) in enumerate(ranks):
        assert_same(between, dict(start))
        assert_same(load_file(tmp_path / f"between-{own}" / "model.safetensors"), between)
        assert_same(load_file(tmp_path / f"after-{own}" / "model.safetensors"), after)
        assert not torch.equal(after["head.weight"], between["head.weight"])
    assert_same(load_file(tmp_path / "pushed" / "model.safetensors"), ranks[0][1])


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Each with an input."""
    torch.manual_seed(0)
    plain = llama(dtype=torch.float32)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return {
        "timm": (timm.create_model("test_vit", num_classes=4), torch.randn(2, 3, 160, 160)),
        "transformers": (llama(tied=True, dtype=torch.float32), sentences(2)),
        "peft": (adapted, sentences(2)),
    }


def exported_kinds(stage: int, folder: str) -> dict[str, reference.Tensors]:
    """What the first process wrote."""
    weights = {}
    for name, (model, inputs) in models().items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = engine_of(Case(stage), model, RWP(torch.optim.SGD(trained, lr=RATE), model, gamma=0.1))
        output = engine(inputs)
        engine.backward(getattr(output, "logits", output).square().mean())
        engine.step()
        if rank() == 0:
            save_any(engine, Path(folder) / name)
        weights[name] = {key: value.clone() for key, value in model.state_dict().items()}
    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_all_kinds_of_models_come_out_whole(tmp_path, stage):
    weights, _ = run(2, exported_kinds, stage, str(tmp_path), timeout=100, keep_group=True)
    found = {
        "timm": timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True),
        "transformers": PreciseLlamaForCausalLM.from_pretrained(tmp_path / "transformers"),
        "peft": peft.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "peft"),
    }
    before = models()
    for name, model in found.items():
        assert_same(dict(model.state_dict()), weights[name])
        assert any(not torch.equal(before[name][0].state_dict()[of], weight) for of, weight in weights[name].items())


class Half(TrainerCallback):
    """Pushes in the midst of training, when the first step is done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.trainer.push_to_hub()
            self.weights = reference.snapshot(self.trainer.model)


def pushed_by_trainer(stage: int, folder: str) -> tuple[int, list[reference.Tensors]]:
    """How often the process pushed, copies of which are kept; the weights at the first push, and at the last."""
    accelerate_on_cpus()
    pushed: list[Path] = []

    def note(source: Path, *_: Any, **__: Any) -> None:
        pushed.append(source)
        shutil.copytree(source, Path(folder) / f"pushed-{len(pushed)}")

    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    data = [{"input_ids": ids, "labels": ids} for ids in sentences(20)]
    half = Half()
    options = {"use_cpu": False, "deepspeed": config, "rwp": True, "rwp_gamma": 0.2, "callbacks": [half]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.push.push", note)
        trainer = make(llama(tied=True, dtype=torch.float32), folder, train_dataset=data, **options)
        half.trainer = trainer
        trainer.train()
        trainer.push_to_hub()
    trainer.save_model(f"{folder}/saved")
    return len(pushed), [half.weights, reference.snapshot(trainer.model)]


@pytest.mark.parametrize("stage", STAGES)
def test_what_trainer_saves_and_pushes_is_whole_and_clean(tmp_path, stage):
    (pushes, weights), (others, twins) = run(2, pushed_by_trainer, stage, str(tmp_path), timeout=100, keep_group=True)
    assert (pushes, others) == (2, 0)
    assert_same(twins, weights)
    for name, index in {"pushed-1": 0, "pushed-2": 1, "saved": 1}.items():
        model = PreciseLlamaForCausalLM.from_pretrained(tmp_path / name)
        assert_same(reference.snapshot(model), weights[index])
    assert not torch.equal(*(own["model.embed_tokens.weight"] for own in weights))
