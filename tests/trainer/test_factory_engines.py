"""RWPFactory where a mesh holds the weights, and on DeepSpeed's engine, in a Trainer that knows nothing of it.

Those of DeepSpeed run where it is installed; tests/engines/test_deepspeed.py says how.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zero
from distributed import chosen, night, rank, run, run_each, stop
from engines import on_cpus
from test_trainer_deepspeed import Steps, config_of
from test_trainer_sharded import BATCH, CASES, Case, Watch, of_words, words
from trainer_runs import Tagger, assert_gradient, make, paper, sentences
from transformers import Trainer, TrainingArguments

from hf_rwp import RWPFactory

NAMES = ["hsdp", "hsdp, accumulation", "fsdp, accumulation", "fsdp, alpha 1", "fsdp and tp, accumulation"]
NAMES += ["loaded hsdp, accumulation", "hsdp and tp", "tp, accumulation"]
NAMES = [name for name in NAMES if name in CASES]
NIGHT = [name for name in NAMES if name in ("hsdp", "fsdp, alpha 1", "hsdp and tp", "loaded hsdp, accumulation")]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def plain(case: Case) -> Case:
    """The loss is a mean over a batch, as the factory mixes."""
    return replace(case, tokens=False)


def train(case: Case, folder: str, loaded: str) -> Any:
    watch = Watch()
    with on_cpus():
        model = case.model(loaded)
        model.accepts_loss_kwargs = False
        factory = (RWPFactory, {"optim": "sgd", "gamma": 0.2, "alpha": case.alpha})
        trainer = make(
            model,
            Path(folder) / str(rank()),
            Trainer,
            TrainingArguments,
            **case.flags,
            optimizer_cls_and_kwargs=factory,
            gradient_accumulation_steps=case.accumulation,
            per_device_train_batch_size=BATCH,
            train_dataset=words(case.world // case.peers * BATCH * 2 * case.accumulation),
            callbacks=[watch],
        )
        trainer.train()
    return watch.steps, trainer.optimizer.optimizer.report()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    CASES["fsdp, halves"].model().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(request, saved):
    """By case, what every rank saw."""
    names, found = chosen(request, "name"), {}
    for world in (4, 2):
        cases = {name: plain(CASES[name]) for name in NAMES if CASES[name].world == world and name in names}
        calls = [(case, str(saved), str(saved / "model")) for case in cases.values()]
        found |= dict(zip(cases, run_each(world, train, calls, timeout=240, keep_group=True), strict=True))
    return found


@pytest.mark.parametrize("name", night(NAMES, NIGHT))
def test_gradients_are_the_mix(runs, name):
    case, ranks = plain(CASES[name]), runs[name]
    assert len(ranks[0][0]) == 2
    for steps in zip(*(steps for steps, _ in ranks), strict=True):
        for index, step in enumerate(steps):
            replica = index * case.replicas // case.world
            order = [replica] * len(step.slots) if case.replicas > 1 else range(len(step.slots))
            assert [noise is not None for noise, _ in step.slots] == [case.alpha == 1 or at % 2 == 1 for at in order]
        slots = [slot for step in steps[:: case.peers] for slot in step.slots]
        expected = paper(case.model(), steps[0].clean, slots, case.alpha, False, of_words)
        for step in steps:
            assert_gradient(step, expected, rtol=1e-9, atol=1e-12)
    assert ranks[0][1]["replicas"] == case.replicas


def test_one_copy_of_the_weights_without_accumulation_has_nothing_to_mix(saved):
    stop(0)  # DTensor caches plans with the names of process groups, which a test before this one may have ended
    with pytest.raises(RuntimeError, match=r"nothing to mix: .* 2 process\(es\) that hold the weights once"):
        run(2, train, Case(2, tokens=False), str(saved), str(saved / "model"), timeout=120)
    stop(0)


def zero_run(folder: str, config: dict[str, Any], accumulation: int) -> Any:
    zero.accelerate_on_cpus()
    model = Tagger(False, torch.float32)
    watch = Steps(model)
    factory = (RWPFactory, {"optim": "sgd", "gamma": 0.2, "alpha": 0.3})
    options = {"use_cpu": False, "deepspeed": config, "callbacks": [watch], "train_dataset": sentences(40)}
    options |= {"gradient_accumulation_steps": accumulation, "optimizer_cls_and_kwargs": factory}
    watch.trainer = make(model, folder, Trainer, TrainingArguments, **options)
    watch.trainer.train()
    return watch.steps


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_under_zero_are_the_mix(tmp_path, stage, accumulation):
    stop()
    ranks = run(2, zero_run, str(tmp_path), config_of(stage), accumulation, timeout=120, keep_group=True)
    stop()
    assert len(ranks[0]) == 4 // accumulation
    for steps in zip(*ranks, strict=True):
        slots = [slot for step in steps for slot in step.slots]
        assert [noise is not None for noise, _ in slots] == [False] * accumulation + [True] * accumulation
        expected = paper(Tagger(False), steps[0].clean, slots, 0.3, False)
        for step in steps:
            assert_gradient(step, expected, rtol=1e-5, atol=1e-6)


@needs_deepspeed
def test_zero_3_is_refused_by_name(tmp_path):
    stop()
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*What works is DeepSpeed ZeRO up to stage 2"):
        run(2, zero_run, str(tmp_path), config_of(3), 1, timeout=120, keep_group=True)
    stop()
