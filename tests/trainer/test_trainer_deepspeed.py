"""RWPTrainer with DeepSpeed's ZeRO: `deepspeed=...` and the flag, on two gloo ranks; skipped where it is not installed.

How to run these tests on a CPU is in tests/engines/test_deepspeed.py.
"""

import importlib.util
from typing import Any

import pytest
import torch
import zero
from distributed import run, stop
from reference import noises, seen_weights, snapshot
from torch import nn
from trainer_runs import LOUD, Step, Tagger, assert_gradient, logged, make, paper, sentences
from transformers import TrainerCallback

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; see tests/engines/test_deepspeed.py",
)

RATE = 0.1
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Those that have had DeepSpeed in them serve nobody else."""
    yield
    stop()


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(AUTO, "auto"), "zero_optimization": {"stage": stage}, **more}


class Steps(TrainerCallback):
    """What a rank's optimizer steps had: the clean weights, the gradient, and every slot's noise and inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[Step] = []
        self._inputs: list[Any] = []
        self._seen = seen_weights(model)
        self._passes = self._seen.__enter__()
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._model, engine = model, self.trainer.model_wrapped
        step = engine.step
        engine.step = lambda *given: (self._step(), step(*given))

    def _forward(self, module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self._inputs.append({name: kwargs[name].clone() for name in ("ids", "labels")})

    def _step(self) -> None:
        clean = snapshot(self._model)
        slots = list(zip(noises(self._passes, clean), self._inputs, strict=True))
        self.steps.append(Step(clean, zero.gradient_of(self._model), slots))
        self._passes.clear()
        self._inputs = []


def train(folder: str, config: dict[str, Any], counts: bool = True, resume: str = "", **options: Any) -> Any:
    zero.accelerate_on_cpus()
    model = Tagger(counts, torch.float32)
    watch = Steps(model)
    quiet = {"use_cpu": False, "deepspeed": config, "callbacks": [watch], "train_dataset": sentences(40), **LOUD}
    trainer = make(model, folder, **{**quiet, "learning_rate": RATE, "rwp_alpha": 0.3, **options})
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resume or None)
    report = trainer.rwp.report() if trainer.rwp else None
    return watch.steps, report, logged(trainer), snapshot(model)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_is_the_mix_and_the_loss_the_plain_one(tmp_path, stage, counts, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    ranks = run(2, _train, str(tmp_path), config_of(stage), counts, options, timeout=60, keep_group=True)
    assert ranks[0][1]["windows"] == len(ranks[0][0]) == 4 // accumulation
    assert ranks[0][1]["slots"] == {"clean": 4, "perturbed": 4}
    for index, steps in enumerate(zip(*(steps for steps, *_ in ranks), strict=True)):
        slots = [slot for step in steps for slot in step.slots]
        assert [noise is not None for noise, _ in slots] == [False] * accumulation + [True] * accumulation
        expected = paper(Tagger(counts), steps[0].clean, slots, 0.3, counts)
        for step in steps:
            assert_gradient(step, expected, rtol=1e-5, atol=1e-6)
        assert ranks[0][2][index] == pytest.approx(float(expected["loss"]), rel=1e-4)


def _train(folder: str, config: dict[str, Any], counts: bool, options: dict[str, Any]) -> Any:
    return train(folder, config, counts, **options)


def resumed(folder: str, stage: int, other: dict[str, Any]) -> Any:
    """Weights and logs of a whole run, and of one that goes on from its second step."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "rwp_schedule": "cosine"}
    whole = train(folder, config_of(stage), **saving)
    again = train(folder, config_of(stage), resume=f"{folder}/checkpoint-2", **{**saving, **other})
    return [(report, losses, weights) for _, report, losses, weights in (whole, again)]


@pytest.mark.parametrize("stage", [0, 2])
def test_resume_is_bit_exact(tmp_path, stage):
    for whole, again in run(2, resumed, str(tmp_path), stage, {}, timeout=60, keep_group=True):
        assert whole[1] == again[1]
        assert all(torch.equal(again[2][name], weight) for name, weight in whole[2].items())
        assert again[0]["windows"] == whole[0]["windows"]


def test_resume_with_another_seed_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"ValueError: .*written with rwp_seed=0.*and not with 5"):
        run(2, resumed, str(tmp_path), 2, {"rwp_seed": 5}, timeout=60, keep_group=True)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (config_of(2, optimizer={"type": "AdamW"}), r'an "optimizer" in .*What works is .*delete the entry'),
        (config_of(3), r"ZeRO-3.*What works is DeepSpeed ZeRO up to stage 2"),
    ],
    ids=["optimizer", "ZeRO-3"],
)
def test_configurations_that_cannot_work_are_refused_at_construction(tmp_path, config, match):
    with pytest.raises(RuntimeError, match=match) as refusal:
        run(2, train, str(tmp_path), config, timeout=60, keep_group=True)
    assert "check_supported" in str(refusal.value)


def plain_and_ours_without_the_flag(folder: str, stage: int) -> Any:
    return [train(folder, config_of(stage), **options)[2:] for options in ({"rwp": False}, {"rwp_gamma": 0.0})]


def test_gamma_zero_is_trainer_by_itself_to_the_bit(tmp_path):
    for plain, ours in run(2, plain_and_ours_without_the_flag, str(tmp_path), 2, timeout=60, keep_group=True):
        assert plain[0] == ours[0]
        assert all(torch.equal(ours[1][name], weight) for name, weight in plain[1].items())
