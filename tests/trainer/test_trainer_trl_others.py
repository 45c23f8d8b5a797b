"""What RWPTrainerMixin refuses, counts and says in front of TRL's Trainers: preferences, rewards, policies, packing."""

import logging
from dataclasses import dataclass

import pytest
from datasets import Dataset
from small_language import llama, texts, tokenizer
from test_trainer_trl import RWPSFTConfig, RWPSFTTrainer
from trainer_runs import LOUD, Watch, logged, make
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from hf_rwp import RWPArguments, RWPTrainerMixin


class RWPDPOTrainer(RWPTrainerMixin, DPOTrainer): ...


class RWPRewardTrainer(RWPTrainerMixin, RewardTrainer): ...


class RWPGRPOTrainer(RWPTrainerMixin, GRPOTrainer): ...


@dataclass
class RWPDPOConfig(RWPArguments, DPOConfig): ...


@dataclass
class RWPRewardConfig(RWPArguments, RewardConfig): ...


@dataclass
class RWPGRPOConfig(RWPArguments, GRPOConfig): ...


def rows(count, **columns):
    """columns: by name, the number of words from which the rows have them."""
    return Dataset.from_dict(
        {
            name: [" ".join(f"w{(i + j * first) % 20}" for j in range(2 + i % 3)) for i in range(count)]
            for name, first in columns.items()
        }
    )


def by_length(completions, **_):
    return [float(len(completion)) for completion in completions]


def scorer():
    base = llama()
    model = LlamaForSequenceClassification(base.config.__class__(**{**base.config.to_dict(), "num_labels": 1}))
    model.model.load_state_dict(base.model.state_dict())
    return model


ANSWERS = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2, "temperature": 1.0}
KINDS = {
    "dpo": (llama, RWPDPOTrainer, RWPDPOConfig, rows(4, prompt=1, chosen=3, rejected=7), {}, {"ref_model": llama()}),
    "reward": (scorer, RWPRewardTrainer, RWPRewardConfig, rows(4, chosen=3, rejected=7), {}, {}),
    "grpo": (llama, RWPGRPOTrainer, RWPGRPOConfig, rows(4, prompt=1), ANSWERS, {"reward_funcs": by_length}),
}


def trainer_of(folder, kind, **options):
    model, trainer, arguments, data, more, given = KINDS[kind]
    common = {"per_device_train_batch_size": 2, "bf16": False, **LOUD, **more, **options}
    common |= {"train_dataset": data, "processing_class": tokenizer()}
    return make(
        model(),
        folder,
        lambda model, args, **kwargs: trainer(model=model, args=args, **kwargs, **given),
        arguments,
        **common,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_cannot_be_split_are_refused_ahead_of_all_work(tmp_path, monkeypatch, kind):
    _, trainer, *_ = KINDS[kind]
    plain = trainer.__mro__[2]

    def work(*_, **__):
        raise AssertionError("the Trainer began its own work")

    monkeypatch.setattr(plain, "__init__", work)
    with pytest.raises(
        ValueError, match=rf"^a batch of {trainer.__name__} .* gradient_accumulation_steps=2.*rwp_alpha=1"
    ):
        trainer_of(tmp_path, kind)
    for works in ({"gradient_accumulation_steps": 2}, {"rwp_alpha": 1.0}, {"rwp_gamma": 0.0}, {"rwp": False}):
        with pytest.raises(AssertionError, match="its own work"):
            trainer_of(tmp_path, kind, **works)


@pytest.mark.parametrize("kind", KINDS)
def test_with_accumulation_batches_take_turns(tmp_path, kind):
    steps = {"max_steps": 2, "gradient_accumulation_steps": 2, "callbacks": [Watch()]}
    trainer = trainer_of(tmp_path, kind, **steps)
    trainer.train()
    assert trainer.rwp.report()["slots"] == {"clean": 2, "perturbed": 2}
    assert len(logged(trainer, "loss_clean")) == len(logged(trainer, "loss_perturbed")) == 2
    assert len(logged(trainer, "loss_gap")) == (0 if kind == "grpo" else 2)  # of other answers: not sharpness


def test_an_epochs_last_batch_of_answers_is_an_ordinary_step(tmp_path):
    trainer = trainer_of(tmp_path, "grpo", gradient_accumulation_steps=4, num_train_epochs=2, steps_per_generation=1)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.rwp.report()["slots"] == {"clean": 4, "perturbed": 4}
    trainer = trainer_of(tmp_path, "grpo", gradient_accumulation_steps=3, num_train_epochs=2, steps_per_generation=1)
    trainer.train()  # three prompts, and one
    assert trainer.state.global_step == 4
    assert trainer.rwp.report()["slots"] == {"clean": 4, "perturbed": 2}


def sft(folder, **options):
    options = {"train_dataset": texts(6), "processing_class": tokenizer(), "bf16": False, **LOUD, **options}
    return make(llama(), folder, RWPSFTTrainer, RWPSFTConfig, **options)


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_of_a_batch_are_counted_once_however_it_is_taken(tmp_path, size):
    """A lone sample is taken twice, two are split."""
    counted = []
    for rwp in (False, True):
        trainer = sft(tmp_path, rwp=rwp, per_device_train_batch_size=size)
        trainer.train()
        counted.append(logged(trainer, "num_tokens"))
    assert counted[0] == counted[1]
    assert trainer.rwp.report()["slots"] == {"clean": 6 // size, "perturbed": 6 // size}


def test_packing_on_one_process_is_said_once_and_takes_batches_twice(tmp_path, caplog, monkeypatch):
    options = {"packing": True, "max_length": 16}
    with caplog.at_level(logging.WARNING, "hf_rwp"):
        trainer = sft(tmp_path, **options)
        assert [line.startswith("packing,") for line in caplog.messages if "at twice the cost" in line] == [True]
        trainer.train()
    assert len([line for line in caplog.messages if "at twice the cost" in line]) == 1
    slots = trainer.rwp.report()["slots"]
    assert slots["clean"] == slots["perturbed"] == trainer.state.global_step
    plain = sft(tmp_path, rwp=False, **options)
    plain.train()
    assert logged(plain, "num_tokens") == logged(trainer, "num_tokens")


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"rwp_alpha": 1.0}, {"packing_strategy": "wrapped"}]
)
def test_packing_is_not_mentioned_where_it_costs_nothing(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING, "hf_rwp"):
        sft(tmp_path, packing=True, max_length=16, **options)
    assert not [line for line in caplog.messages if "at twice the cost" in line]
