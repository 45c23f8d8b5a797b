"""RWPTrainer on 1, 2 and 3 replicas, on real gloo groups: its step is the paper's, its logs are the plain losses."""

import itertools
import json
from types import SimpleNamespace

import distributed
import pytest
import torch
from distributed import Collectives, run
from trainer_runs import (
    LOUD,
    Classifier,
    Tagger,
    Watch,
    assert_gradient,
    images,
    logged,
    make,
    paper,
    same,
    sentences,
    tensors,
)
from transformers import Trainer, TrainerCallback

from hf_rwp import RWP, RWPTrainer, RWPTrainerMixin

BATCHES = {1: 3, 2: 3, 3: 4}  # on every replica, by accumulation: the last window is short
REPO = SimpleNamespace(repo_id="ada/net")
REMAINDER = 3  # sentences in the last batch, so that halves are odd
# alpha, accumulation, whether Trainer counts tokens, and whether it does so across replicas
CASES = [(0.3, *case, True) for case in itertools.product([1, 2, 3], [True, False])]
CASES += [(0.3, 1, True, False), (1.0, 1, True, True), (1.0, 2, False, True)]


def train(folder, world, alpha, accumulation, tokens, across):
    """What a run did: initial weights, steps, final weights and logs of this rank."""
    watch, model = Watch(), Tagger(tokens)
    start = tensors(model)
    trainer = make(
        model,
        folder,
        **LOUD,
        rwp_alpha=alpha,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=across,
        train_dataset=sentences(world * (5 * BATCHES[accumulation] - 5 + REMAINDER)),
        callbacks=[watch],
    )
    trainer.train()
    names = ("loss", "loss_clean", "loss_perturbed", "loss_gap")
    return start, watch.steps, tensors(model), {name: logged(trainer, name) for name in names}


def train_all(folder, world):
    return [train(folder, world, *case) for case in CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By world and case, what every rank saw: a world's cases in one go, as starting costs more than training."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = {world: run(world, train_all, folder, world) for world in (1, 2, 3)}
    return {world: dict(zip(CASES, zip(*ranks[world], strict=True), strict=True)) for world in ranks}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_is_the_papers_loop_in_float64(runs, world, case):
    alpha, accumulation, counts, across = case
    tokens = counts and (across or world == 1)
    ranks = runs[world][case]
    weights = ranks[0][0]
    lengths = set()
    for number, steps in enumerate(zip(*(rank[1] for rank in ranks), strict=True)):
        slots = [slot for step in steps for slot in step.slots]
        lengths.add(len(steps[0].slots))
        for rank, step in enumerate(steps):
            of_index = [rank] * len(step.slots) if world > 1 else range(len(step.slots))
            assert step.roles == [alpha == 1 or index % 2 == 1 for index in of_index]
        expected = paper(Tagger(), weights, slots, alpha, tokens)
        for step in steps:
            assert_gradient(step, expected)
        # The loop goes on from its own weights, not from those it is to judge.
        weights = {name: weight - 0.1 * expected["gradient"][name] for name, weight in weights.items()}
        logs = {name: values[number] for name, values in ranks[0][3].items() if values}
        if alpha == 1:
            assert logs.keys() == {"loss", "loss_perturbed"}
        else:
            assert logs.pop("loss_gap") == pytest.approx(logs["loss_perturbed"] - logs["loss_clean"])
        halves = world == 1 and alpha < 1 and (accumulation == 1 or number == len(ranks[0][1]) - 1)
        if halves and not tokens:
            clean, perturbed = (len(inputs["ids"]) for _, inputs in slots)
            total = clean * expected["loss_clean"] + perturbed * expected["loss_perturbed"]
            expected["loss"] = total / (clean + perturbed)
        for name, value in logs.items():
            assert value == pytest.approx(expected[name].item(), rel=1e-6), name
    for rank in ranks:
        for name, weight in weights.items():
            torch.testing.assert_close(rank[2][name], weight, rtol=1e-10, atol=1e-12)
        assert same(rank[2], ranks[0][2])
    short = 2 if world == 1 and alpha < 1 else 1  # a batch alone is split
    assert lengths == ({short} if accumulation == 1 else {accumulation, short})


# The flag's two sides: with it the same images, without it Trainer


def sides(folder, world):
    result = {}
    for side, kind, flags in (("trainer", Trainer, {}), ("off", RWPTrainer, {"rwp": False}), ("on", RWPTrainer, LOUD)):
        watch, model = Watch(), Tagger()
        data = sentences(world * 13)
        trainer = make(model, folder, kind, **flags, train_dataset=data, callbacks=[watch], seed=5)
        with Collectives() as mode:
            trainer.train()
        result[side] = watch.steps, tensors(model), logged(trainer), mode.counts
    return result


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return {world: run(world, sides, tmp_path_factory.mktemp("sides"), world) for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
def test_without_the_flag_it_is_trainer(both, world):
    for rank in both[world]:
        (_, expected, losses, _), (_, weights, mine, _) = rank["trainer"], rank["off"]
        assert same(weights, expected)
        assert mine == losses


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_takes_the_images_that_trainer_takes(both, world):
    for rank in both[world]:
        plain, rwp = (
            [torch.cat([inputs["ids"] for _, inputs in step.slots]) for step in rank[side][0]]
            for side in ("trainer", "on")
        )
        assert len(plain) == 3
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rwp, plain, strict=True))


def test_no_collective_more_than_trainers_but_one_for_each_log_and_a_report_at_last(both):
    for rank in both[2]:
        more = rank["on"][3] - rank["trainer"][3]
        assert not rank["trainer"][3] - rank["on"][3]
        assert sum(rank["trainer"][3].values()) > 0
        sums = {name: count for name, count in more.items() if name.endswith("[(3, 2)]")}
        assert [*sums.values()] == [3]  # LossTracker's, once for each of the three logs
        assert [count for name, count in more.items() if name not in sums] == [1, 1]  # an object: its size, and itself


# BatchNorm


class Buffers(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_evaluate(self, *_, model, **__):
        self.seen.append(tensors(model))

    on_save = on_evaluate


def batch_norm(folder, kind):
    """The buffers at every evaluation, at every save, and at the end of a run with neither."""
    seen = []
    for when in ({"eval_strategy": "steps", "eval_steps": 1}, {"save_strategy": "steps", "save_steps": 1}, {}):
        buffers, model = Buffers(), Classifier()
        flags = {**when, **(LOUD if kind is RWPTrainer else {}), "callbacks": [buffers], "learning_rate": 0.01}
        data = {"train_dataset": images(20), "eval_dataset": images(4)}
        make(model, folder / kind.__name__, kind, **flags, **data).train()
        seen += buffers.seen if when else [tensors(model)]
    return seen


def test_batch_norm_buffers_agree_at_every_evaluation_and_save_and_at_the_end(tmp_path):
    for ours, theirs in zip(*run(2, batch_norm, tmp_path, RWPTrainer), strict=True):
        assert same(ours, theirs)
    apart = run(2, batch_norm, tmp_path, Trainer)
    assert len(apart[0]) == 5
    assert not any(same(ours, theirs) for ours, theirs in zip(*apart, strict=True))  # or there is nothing to repair


# The Hub


def push_alone(folder):
    """What the main process pushes by itself, after training and in it, while the other goes on."""
    pushed = []

    def note(folder, *_, **__):
        pushed.append(json.loads((folder / "results.json").read_text())["final"])

    class Saves(TrainerCallback):
        def on_step_end(self, *_, **__):
            if distributed.rank() == 0:
                trainer.save_model()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.push.push", note)
        patch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(create_repo=lambda *_, **__: REPO))
        options = {"push_to_hub": True, "hub_model_id": REPO.repo_id, "max_steps": 2, "callbacks": [Saves()]}
        trainer = make(Classifier(), folder, **LOUD, **options, train_dataset=images(20))
        trainer.train()
        if distributed.rank() == 0:
            trainer.push_to_hub()
    return pushed


def test_the_main_process_may_push_alone(tmp_path):
    (*during, last), others = run(2, push_alone, tmp_path, timeout=10)
    assert [final["step"] for final in during] == [1, 2]
    assert last["rwp"]["slots"] == {"clean": 2, "perturbed": 2}
    assert last["rwp"]["relative_noise"]
    assert others == []


# An unmodified Trainer, resumption, refusals


def unmodified(folder, alpha):
    watch, model = Watch(), Tagger(counts=False)
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.2, alpha=alpha)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    options = {"train_dataset": sentences(40), "callbacks": [watch], "gradient_accumulation_steps": 2}
    make(model, folder, Trainer, optimizers=(optimizer, scheduler), **options).train()
    return watch.steps


def test_an_unmodified_trainer_takes_the_mix(tmp_path):
    for steps in zip(*run(2, unmodified, tmp_path, 0.7), strict=True):
        slots = [slot for step in steps for slot in step.slots]
        assert [noise is not None for noise, _ in slots] == [False, False, True, True]
        for step in steps:
            assert_gradient(step, paper(Tagger(), step.clean, slots, 0.7, tokens=False))


class CountsItself(Trainer):
    """Counts across replicas in its own way, whatever the arguments say."""

    def _get_num_items_in_batch(self, batch_samples, device):
        tokens = sum((batch["labels"] != -100).sum() for batch in batch_samples)
        return self.accelerator.gather(tokens).sum()


class RWPCountsItself(RWPTrainerMixin, CountsItself): ...


def count_itself(folder):
    watch = Watch()
    options = {"train_dataset": sentences(20), "callbacks": [watch], "gradient_accumulation_steps": 2}
    make(Tagger(), folder, RWPCountsItself, **LOUD, **options).train()
    return watch.steps


def test_a_trainer_that_counts_tokens_in_its_own_way_keeps_its_count(tmp_path):
    for steps in zip(*run(2, count_itself, tmp_path), strict=True):
        slots = [slot for step in steps for slot in step.slots]
        for step in steps:
            assert_gradient(step, paper(Tagger(), step.clean, slots, 0.5, tokens=True))


def stop_and_resume(folder):
    results = []
    for name, resume in (("whole", None), ("again", str(folder / "whole" / "checkpoint-2"))):
        torch.manual_seed(0)
        model = Tagger()
        options = {"train_dataset": sentences(50), "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        options |= {"rwp_schedule": "cosine", "rwp_growth": 1.0, "rwp_eta": 0.5, "num_train_epochs": 2}
        trainer = make(model, folder / name, **LOUD, **options)
        trainer.train(resume_from_checkpoint=resume)
        results.append((tensors(model), logged(trainer), logged(trainer, "loss_perturbed")))
    return results


def test_resume_in_the_middle_of_an_epoch_is_bit_exact(tmp_path):
    for whole, again in run(2, stop_and_resume, tmp_path):
        assert same(again[0], whole[0])
        assert again[1:] == whole[1:]
        assert len(whole[1]) == 10


def find_batch_size(folder):
    with pytest.raises(ValueError, match=r"auto_find_batch_size on 2 processes.*Set per_device_train_batch_size"):
        make(Tagger(), folder, rwp=True, auto_find_batch_size=True)
    make(Tagger(), folder, rwp=False, auto_find_batch_size=True)


def test_auto_find_batch_size_is_refused_on_several_processes(tmp_path):
    run(2, find_batch_size, tmp_path)
