"""RWPTrainer on one process: the flag, the split of a batch, clean weights, every option of Trainer, resumption.

That its step is the paper's on one replica and on several is test_trainer_distributed's.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import distributed
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load, load_file
from torch import nn
from trainer_runs import (
    LOUD,
    WORDS,
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
    snapshot,
    tags,
    tensors,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    trainer_utils,
)
from transformers import trainer as trainer_module
from transformers.training_args import ParallelMode

from hf_rwp import RWP, RWPTrainer, RWPTrainingArguments

# The flag


def run_of(folder, kind, **flags):
    model = Tagger()
    options = {"train_dataset": sentences(13), "eval_dataset": sentences(5, seed=1), "eval_strategy": "steps"}
    options |= {
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
    }
    trainer = make(model, folder, kind, **options, **flags, num_train_epochs=2)
    trainer.train()
    return trainer


def without_times(logs):
    return [{key: value for key, value in line.items() if not key.endswith(("runtime", "per_second"))} for line in logs]


@pytest.mark.parametrize(
    "flags",
    [{}, {"rwp": True, "rwp_gamma": 0.0}, {"rwp": True, "rwp_alpha": 0.0}, {**LOUD, "rwp_start": 1.0}],
    ids=["no flag", "gamma 0", "alpha 0", "before the start fraction"],
)
def test_without_noise_it_is_trainer_bit_for_bit(tmp_path, flags):
    plain, ours = run_of(tmp_path / "plain", Trainer), run_of(tmp_path / "ours", RWPTrainer, **flags)
    assert without_times(ours.state.log_history) == without_times(plain.state.log_history)
    assert same(tensors(ours.model), tensors(plain.model))
    for name in ("model.safetensors", "scheduler.pt", "rng_state.pth", *(["optimizer.pt"] if not flags else [])):
        assert (tmp_path / "ours/checkpoint-6" / name).read_bytes() == (
            tmp_path / "plain/checkpoint-6" / name
        ).read_bytes(), name
    assert {path.name for path in (tmp_path / "ours").rglob("*")} == {
        path.name for path in (tmp_path / "plain").rglob("*")
    }


def test_the_schedule_moves_gamma_with_trainers_steps(tmp_path):
    gammas = []

    class Reads(TrainerCallback):
        def on_optimizer_step(self, *_, optimizer, **__):
            gammas.append([group["rwp_gamma"] for group in optimizer.param_groups])

    options = {"rwp_schedule": "linear", "rwp_growth": 2.0, "rwp_start": 0.3, "callbacks": [Reads()]}
    trainer = make(Tagger(), tmp_path, **LOUD, **options, train_dataset=sentences(25))
    trainer.train()
    expected = [0.0, 0.0, *(0.2 * (1 + 2 * step / 5) for step in (2, 3, 4))]
    assert [group[0] for group in gammas] == pytest.approx(expected)
    assert trainer.rwp.report()["slots"] == {"clean": 3, "perturbed": 3}
    assert len(logged(trainer)) == 5
    assert len(logged(trainer, "loss_gap")) == 3


def test_every_gradient_is_perturbed_at_alpha_one_and_no_batch_split(tmp_path):
    watch = Watch()
    make(Tagger(), tmp_path, **LOUD, rwp_alpha=1.0, train_dataset=sentences(13), callbacks=[watch]).train()
    assert [[len(inputs["ids"]) for _, inputs in step.slots] for step in watch.steps] == [[5], [5], [3]]
    assert all(step.roles == [True] for step in watch.steps)


def test_tensorboard_shows_the_losses(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(Tagger(), tmp_path, **LOUD, report_to=["tensorboard"], train_dataset=sentences(13))
    trainer.train()
    (file,) = tmp_path.rglob("events.out.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    for name in ("loss", "loss_clean", "loss_perturbed", "loss_gap"):
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged(trainer, name)), name


class Twice(RWPTrainer):
    def training_step(self, *inputs):
        return super().training_step(*inputs) + super().training_step(*inputs)


def test_a_trainer_that_takes_more_gradients_than_batches_is_refused(tmp_path):
    trainer = make(Tagger(), tmp_path, Twice, **LOUD, gradient_accumulation_steps=2, train_dataset=sentences(10))
    with pytest.raises(RuntimeError, match=r"more often than get_batch_samples has fetched batches"):
        trainer.train()


# The split of a batch


def halves_of(folder, model, data, **options):
    watch = Watch()
    trainer = make(model, folder, **LOUD, train_dataset=data, callbacks=[watch], **options)
    trainer.train()
    return trainer, watch.steps


def test_the_first_half_is_clean_and_the_larger_one_and_one_sample_is_taken_twice(tmp_path):
    _, steps = halves_of(tmp_path, Tagger(), sentences(11))
    assert [[len(inputs["ids"]) for _, inputs in step.slots] for step in steps] == [[3, 2], [3, 2], [1, 1]]
    assert all(step.roles == [False, True] for step in steps)
    assert torch.equal(*(inputs["ids"] for _, inputs in steps[2].slots))
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=True))


def test_batch_norm_never_gets_a_half_of_one_sample(tmp_path):
    _, steps = halves_of(tmp_path, Classifier(), images(8))
    assert [[len(inputs["labels"]) for _, inputs in step.slots] for step in steps] == [[3, 2], [3, 3]]


def test_one_sample_to_a_step_is_warned_of(tmp_path, caplog):
    make(Tagger(), tmp_path, rwp=True, per_device_train_batch_size=1)
    assert "twice the cost" in caplog.text
    caplog.clear()
    make(Tagger(), tmp_path, rwp=True, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    make(Tagger(), tmp_path, rwp=False, per_device_train_batch_size=1)
    assert not caplog.records


class Takes(nn.Module):
    """A model that takes anything, and remembers what it took."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.took = []

    def forward(self, x, labels=None, **more):
        self.took.append({"x": x, **more})
        return {"loss": (self.weight * x).mean()}


def collated(**more):
    def collate(rows):
        return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.ones(len(rows)), **more}

    return collate


def train_with(folder, **more):
    model = Takes()
    data = [{"x": torch.full((3,), float(i))} for i in range(4)]
    options = {"data_collator": collated(**more), "per_device_train_batch_size": 4, "remove_unused_columns": False}
    make(model, folder, **LOUD, train_dataset=data, **options).train()
    return model.took


def test_what_has_the_batchs_length_is_split_and_what_is_a_mere_switch_goes_to_both(tmp_path):
    more = {"names": ["a", "b", "c", "d"], "deep": {"y": torch.arange(8).view(4, 2), "z": None}, "flag": True}
    clean, perturbed = train_with(tmp_path, **more, kind="text")
    assert sorted(clean["x"][:, 0].tolist() + perturbed["x"][:, 0].tolist()) == [0, 1, 2, 3]
    assert (clean["names"], perturbed["names"]) == (["a", "b"], ["c", "d"])
    assert clean["deep"]["y"].tolist() == [[0, 1], [2, 3]]
    assert perturbed["deep"]["y"].tolist() == [[4, 5], [6, 7]]
    for half in (clean, perturbed):
        assert (half["flag"], half["kind"], half["deep"]["z"]) == (True, "text", None)
        assert len(half["x"]) == 2


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (torch.zeros(5), r"a Tensor of shape \(5,\)"),
        (torch.zeros(1, 3), r"a Tensor of shape \(1, 3\)"),
        (torch.tensor(4), r"a Tensor of shape \(\)"),
        (4, "a int"),
        (["a", "b"], "a list"),
        (object(), "a object"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(tmp_path, value, seen):
    with pytest.raises(
        ValueError, match=rf"inputs\['deep'\]\['odd'\] is {seen}, and a batch of 4 .* Set gradient_accumulation_steps=2"
    ):
        train_with(tmp_path, deep={"odd": value})


def test_a_batch_that_is_no_mapping_is_refused(tmp_path):
    trainer = make(Tagger(), tmp_path, **LOUD, train_dataset=sentences(5), data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match=r"^inputs is a list, and a batch of unknown length"):
        trainer.train()


class Untagged(Tagger):
    """Accepts `num_items_in_batch` and pays no attention, as many models do."""

    def forward(self, ids, labels=None, num_items_in_batch=None):
        return super().forward(ids, labels)


def test_the_halves_of_a_model_that_ignores_the_count_do_not_add_up_to_twice_the_gradient(tmp_path):
    _, steps = halves_of(tmp_path, Untagged(), sentences(10))
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=False))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_role_without_tags_leaves_the_step_to_the_other(tmp_path, accumulation):
    data = [{"ids": ids["ids"], "labels": ids["labels"]} for ids in sentences(8)]
    for row in data[4:]:
        row["labels"] = torch.full((6,), -100)
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    collate = {"data_collator": lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}}

    class InOrder(RWPTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    watch = Watch()
    trainer = make(Tagger(), tmp_path, InOrder, **LOUD, **sizes, **collate, train_dataset=data, callbacks=[watch])
    trainer.train()
    (step,) = watch.steps
    assert step.roles == [False, True]
    expected = paper(Tagger(), step.clean, step.slots[:1], 0.5, tokens=True)
    assert_gradient(step, expected)
    assert logged(trainer) == pytest.approx([expected["loss"].item()], rel=1e-6)
    assert logged(trainer, "loss_clean") == pytest.approx([expected["loss"].item()], rel=1e-6)


# Models


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 16, "patch_size": 8, "num_labels": 3}
    return ViTForImageClassification(
        ViTConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).double()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, num_labels=TAGS_OF_TEXT, **sizes, **dropout)
    ).double()


TAGS_OF_TEXT = 3


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **sizes)).double()


def texts(count, causal):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(WORDS, (2 + i % 5,), generator=generator) for i in range(count)]
    return [{"input_ids": ids, "labels": ids if causal else len(ids) % TAGS_OF_TEXT} for ids in rows]


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = ids.where(mask > 0, -100) if isinstance(rows[0]["labels"], torch.Tensor) else None
    labels = torch.tensor([row["labels"] for row in rows]) if labels is None else labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MODELS = {
    "resnet": (
        lambda: Classifier().double(),
        lambda: [{**row, "pixel_values": row["pixel_values"].double()} for row in images(13)],
        None,
    ),
    "vit": (vit, lambda: [{**row, "pixel_values": row["pixel_values"].double()} for row in images(13, 16)], None),
    "bert": (bert, lambda: texts(13, causal=False), pad),
    "llama": (llama, lambda: texts(13, causal=True), pad),
}


def own_loss(call, inputs):
    """The model's own loss, taken as a sum over what it is a mean over."""
    labels = inputs["labels"][..., 1:] if inputs["labels"].ndim > 1 else inputs["labels"]
    count = int((labels != -100).sum())
    return call(**inputs)["loss"] * count, count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_gets_the_papers_gradient(tmp_path, name, accumulation):
    build, data, collate = MODELS[name]
    model, watch = build(), Watch()
    options = {"train_dataset": data(), "callbacks": [watch], "gradient_accumulation_steps": accumulation}
    make(model, tmp_path, **LOUD, rwp_alpha=0.3, **options, data_collator=collate, learning_rate=0.01).train()
    assert [len(step.slots) for step in watch.steps] == ([2, 2, 2] if accumulation == 1 else [2, 2])
    for number, step in enumerate(watch.steps):
        assert step.roles == [False, True]
        expected = paper(build(), step.clean, step.slots, 0.3, tokens=name != "resnet", loss=own_loss)
        # BERT takes `num_items_in_batch` and ignores it: Trainer adds its means up, with RWP or without.
        factor = 2 if name == "bert" and accumulation == 2 and number == 0 else 1
        rtol, atol = (1e-5, 1e-6) if name == "llama" else (1e-8, 1e-11)  # Llama's rotations are in float32
        assert_gradient(step, expected, rtol, atol, factor)


def test_batch_norm_statistics_come_from_clean_passes_alone(tmp_path):
    model = Classifier()
    make(model, tmp_path, **LOUD, train_dataset=images(10), gradient_accumulation_steps=2).train()
    assert {int(module.num_batches_tracked) for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1}


# Clean weights


EVENTS = {"on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step"}
EVENTS |= {"on_optimizer_step", "on_step_end", "on_log", "on_prediction_step", "on_evaluate", "on_save"}
EVENTS |= {"on_epoch_end", "on_train_end"}


class AtEveryEvent(TrainerCallback):
    """Calls `act(event, model)` at each of Trainer's events."""

    def __init__(self, act):
        self.act = act

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)
        return lambda *_, model, **__: super(AtEveryEvent, self).__getattribute__("act")(name, model)


def eventful(folder, act=lambda *_: None, watch=None, **options):
    model = Tagger(dtype=torch.float32)
    settings = {"train_dataset": sentences(20), "eval_dataset": sentences(5, seed=1), "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    callbacks = [AtEveryEvent(act), *([watch] if watch else [])]
    return make(model, folder, **{**LOUD, **settings, **options}, callbacks=callbacks)


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory):
    """The weights before each step of an undisturbed run of `eventful`, and at its end."""
    watch = Watch()
    trainer = eventful(tmp_path_factory.mktemp("undisturbed"), watch=watch)
    trainer.train()
    assert [step.roles for step in watch.steps] == [[False, True]] * 2
    return [*(step.clean for step in watch.steps), tensors(trainer.model)]


def test_weights_are_clean_at_every_event(tmp_path, boundaries):
    seen = []
    eventful(tmp_path, lambda event, model: seen.append((event, snapshot(model)))).train()
    assert {event for event, _ in seen} == EVENTS
    after = {"on_optimizer_step": 1, "on_train_end": 0}
    step = 0
    for event, weights in seen:
        step += after.get(event, 0)
        assert same(weights, boundaries[step]), event
    assert step == 2


def test_saved_weights_are_clean(tmp_path, boundaries):
    eventful(tmp_path).train()
    for step in (1, 2):
        assert same(load_file(tmp_path / f"checkpoint-{step}/model.safetensors"), boundaries[step])


class FaultError(Exception):
    pass


def raising(error, nth):
    """A hook that raises at its nth call."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == nth:
            raise error

    return hook


@pytest.mark.parametrize("error", [FaultError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "loss", "loader", *sorted(EVENTS)])
def test_an_exception_anywhere_leaves_clean_weights_and_no_hooks(tmp_path, boundaries, place, error):
    fault = raising(error, 2)
    noisy = []

    def act(event, _):
        if event == place:
            fault()

    trainer = eventful(tmp_path, act)
    model = trainer.model

    def inside(*_):
        if model.training:
            noisy.append(not any(same(snapshot(model), clean) for clean in boundaries))
            fault()

    if place == "forward":
        model.head.register_forward_pre_hook(inside)
    elif place == "backward":
        model.head.register_full_backward_hook(inside)
    elif place == "loss":
        trainer.compute_loss_func = lambda outputs, labels, **_: (inside(), outputs["logits"].sum())[1]
    elif place == "loader":
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: (fault(), collate(rows))[1]
    elif place in {"on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end"}:
        fault()  # it comes once
    with pytest.raises(error):
        trainer.train()
    assert noisy in ([], [False, True])  # within a pass it was the perturbed one that failed
    assert any(same(snapshot(model), clean) for clean in boundaries)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    if place == "forward":  # and training may go on, with whole windows
        fault, watch = None, Watch()
        model.head._forward_pre_hooks.clear()
        trainer.add_callback(watch)
        trainer.train()
        for step in watch.steps:
            expected = paper(Tagger(), step.clean, step.slots, 0.5, tokens=True)
            assert_gradient(step, expected, rtol=1e-4, atol=1e-6)


# Trainer's options


def smoothed(call, inputs):
    labels = tags(inputs["ids"])
    log = F.log_softmax(call(ids=inputs["ids"])["logits"], -1)[labels != -100]
    labels = labels[labels != -100]
    return -0.8 * log[torch.arange(len(labels)), labels].sum() - 0.2 * log.mean(-1).sum(), len(labels)


def squared(outputs, labels, num_items_in_batch=None):
    wrong = (outputs["logits"].softmax(-1) - F.one_hot(labels.clamp(min=0), 4)).square().sum(-1)
    return (wrong * (labels != -100)).sum() / num_items_in_batch


def summed_squares(call, inputs):
    labels = tags(inputs["ids"])
    return squared(call(ids=inputs["ids"]), labels, 1), int((labels != -100).sum())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("options", "loss"),
    [({"label_smoothing_factor": 0.2}, smoothed), ({"compute_loss_func": squared}, summed_squares)],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_other_losses_are_mixed_alike(tmp_path, options, loss, accumulation):
    trainer, steps = halves_of(tmp_path, Tagger(), sentences(28), **options, gradient_accumulation_steps=accumulation)
    for step, logs in zip(steps, logged(trainer), strict=True):
        expected = paper(Tagger(), step.clean, step.slots, 0.5, tokens=True, loss=loss)
        assert_gradient(step, expected, rtol=1e-6, atol=1e-9)  # LabelSmoother sums in float32
        assert logs == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_clipping_sees_the_mixed_gradient(tmp_path):
    trainer, steps = halves_of(tmp_path, Tagger(), sentences(10), max_grad_norm=0.01)
    for step, norm in zip(steps, logged(trainer, "grad_norm"), strict=True):
        expected = paper(Tagger(), step.clean, step.slots, 0.5, tokens=True)
        full = torch.cat([gradient.flatten() for gradient in expected["gradient"].values()])
        assert norm == pytest.approx(full.norm().item())
        clipped = torch.cat([gradient.flatten() for gradient in step.gradient.values()])
        torch.testing.assert_close(clipped, full * 0.01 / full.norm(), rtol=1e-3, atol=1e-9)


def relative_error(step, expected):
    ours, theirs = (
        torch.cat([g.flatten().double() for g in grads.values()]) for grads in (step.gradient, expected["gradient"])
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_bf16(tmp_path):
    _, steps = halves_of(tmp_path, Tagger(dtype=torch.float32), sentences(10), bf16=True)
    for step in steps:
        assert step.roles == [False, True]
        mix, clean = (
            paper(Tagger(), step.clean, slots, 0.5, tokens=True)
            for slots in (step.slots, [(None, x) for _, x in step.slots])
        )
        assert relative_error(step, mix) < 0.02 < 0.1 < relative_error(step, clean)


def test_fp16_unscales_the_mix_and_goes_on_after_an_overflow(tmp_path):
    """Trainer makes the scaler on a GPU alone; this one is a CPU's, in the same place."""
    watch, skipped = Watch(), []

    class Skips(TrainerCallback):
        def on_optimizer_step(self, *_, optimizer, **__):
            skipped.append(optimizer.step_was_skipped)

    trainer = make(
        Tagger(dtype=torch.float32), tmp_path, **LOUD, train_dataset=sentences(30), callbacks=[watch, Skips()]
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
    before = tensors(trainer.model)
    trainer.train()
    assert skipped[0]
    assert not skipped[-1]
    overflows = sum(skipped)
    assert len(watch.steps) == len(skipped) - overflows >= 2
    passes = len(watch.steps[0].slots)
    watch.steps[0].slots = watch.steps[0].slots[-2:]  # before come those of the steps that were skipped
    assert passes == 2 * (overflows + 1)
    assert same(watch.steps[0].clean, before)
    for step in watch.steps:
        assert step.roles == [False, True]
        assert relative_error(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=True)) < 0.005


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(tmp_path, use_reentrant):
    _, data, _ = MODELS["vit"]
    model, watch = vit(), Watch()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    make(model, tmp_path, **LOUD, **options, train_dataset=data(), callbacks=[watch], learning_rate=0.01).train()
    assert model.is_gradient_checkpointing
    for step in watch.steps:
        assert step.roles == [False, True]
        assert_gradient(step, paper(vit(), step.clean, step.slots, 0.5, True, own_loss), rtol=1e-8, atol=1e-11)


def test_torch_compile(tmp_path):
    torch._dynamo.reset()
    _, steps = halves_of(
        tmp_path,
        Tagger(),
        sentences(12),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        per_device_train_batch_size=4,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for step in steps:
        assert step.roles == [False, True]
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=True))


def test_the_best_model_of_an_early_stop_is_loaded_clean(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = eventful(tmp_path, **options, num_train_epochs=20)  # the best loss is the greatest: so it soon stops
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    assert trainer.state.global_step == trainer.state.best_global_step + 2 < 40
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert same(tensors(trainer.model), best)


class OutOfMemory(Tagger):
    def forward(self, ids, labels=None, num_items_in_batch=None):
        if len(ids) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(ids, labels, num_items_in_batch)


def test_auto_find_batch_size_finds_one_on_one_process(tmp_path):
    trainer, steps = halves_of(tmp_path, OutOfMemory(), sentences(12), auto_find_batch_size=True)
    assert trainer._train_batch_size == 4
    assert [[len(inputs["ids"]) for _, inputs in step.slots] for step in steps] == [[2, 2]] * 3
    assert same(steps[0].clean, tensors(Tagger()))
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=True))


def test_push_to_hub_uploads_clean_weights(tmp_path, monkeypatch, boundaries):
    pushed = []

    class Hub:
        def create_repo(self, *_, **__):
            return type("Url", (), {"repo_id": "someone/model"})

        def upload_folder(self, folder_path, **_):
            pushed.append(load((Path(folder_path) / "model.safetensors").read_bytes()))
            return type("Job", (), {"done": lambda _: True, "result": lambda _: None})()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("hf_rwp.hub.push.push", lambda folder, *_, **__: Hub().upload_folder(folder))
    trainer = eventful(tmp_path, push_to_hub=True, hub_always_push=True)  # whether or not one is under way
    trainer.train()
    trainer.push_to_hub()
    assert len(pushed) == 3
    for weights, expected in zip(pushed, [*boundaries[1:], boundaries[2]], strict=True):
        assert same(weights, expected)


def test_a_push_without_rwp_hands_on_what_trainers_own_knows(tmp_path, monkeypatch):
    """transformers 5.18 has no `private`; later ones do."""
    told = []

    def push(self, commit_message="End of training", blocking=True, token=None, revision=None, **facts):
        told.append((commit_message, facts))

    monkeypatch.setattr(Trainer, "push_to_hub", push)
    trainer = make(Tagger(), tmp_path, train_dataset=sentences(4), rwp=False)
    trainer.push_to_hub("done")
    trainer.push_to_hub("done", private=True)
    assert told == [("done", {}), ("done", {"private": True})]


@dataclasses.dataclass
class Served(RWPTrainingArguments):
    vllm_server_host: str = "gpu7.lab"
    vllm_server_base_url: str = "http://gpu7.lab:8000"
    train_file: str = "file:///home/someone/pets.json"


def pushed_by(trainer, monkeypatch):
    """results.json and the card, of a push that goes nowhere."""
    folders = []
    monkeypatch.setattr("hf_rwp.hub.push.push", lambda folder, *_, **__: folders.append(folder))
    trainer.push_to_hub()
    return json.loads((folders[0] / "results.json").read_text()), (folders[0] / "README.md").read_text()


def test_the_card_of_the_best_weights_has_their_figures(tmp_path, monkeypatch):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "greater_is_better": False}
    steps = itertools.count(1)
    trainer = make(
        Classifier(),
        tmp_path,
        **{**LOUD, **options, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        train_dataset=images(15),
        eval_dataset=images(6),
        compute_metrics=lambda _: {"accuracy": next(steps) / 4, "score": 0.0},  # the first one stays the best
    )
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (3, 1)
    results, card = pushed_by(trainer, monkeypatch)
    assert (results["final"]["step"], results["final"]["accuracy"], results["chosen"]) == (1, 0.25, "best")
    assert len(results["history"]) == 3
    assert results["seconds"] > 0
    assert "25.00 %" in card
    assert "Epochs, up to the best evaluation" in card
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert same(load_file(tmp_path / "hub" / "model.safetensors"), best)


def test_an_accuracy_of_earlier_weights_is_not_on_the_card(tmp_path, monkeypatch):
    """Pushed after step 2, and ahead of its evaluation."""
    found = []

    class Pushes(TrainerCallback):
        def on_step_end(self, args, state, *_, **__):
            if state.global_step == 2:
                found.append(pushed_by(trainer, monkeypatch))

    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": images(6), "train_dataset": images(15)}
    figures = {"compute_metrics": lambda _: {"accuracy": 0.25}, "callbacks": [Pushes()]}
    trainer = make(Classifier(), tmp_path, **LOUD, **options, **figures)
    trainer.train()
    ((results, card),) = found
    assert results["final"]["step"] == 2
    assert "train_loss" in results["final"]
    assert not {"accuracy", "eval_loss"} & results["final"].keys()
    assert "25.00 %" not in card


def test_a_trainers_card_names_its_base_model_and_no_machine(tmp_path, monkeypatch):
    trainer = make(Classifier(), tmp_path, arguments=Served, **LOUD, train_dataset=images(5))
    trainer.model.config = SimpleNamespace(_name_or_path="ada/base")
    results, card = pushed_by(trainer, monkeypatch)
    assert "base_model: ada/base" in card
    (tmp_path / "ada" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    here = pushed_by(trainer, monkeypatch)
    assert "base_model" not in here[1]
    text = json.dumps([results, here]) + card
    assert not re.search(rf"gpu7|someone|{re.escape(str(tmp_path))}|hub_token", text)


def test_hyperparameter_search_wraps_each_trials_model_with_its_own_flags(tmp_path, monkeypatch):
    """Over a backend in optuna's place that tries what it is given."""
    seen = []

    class Trial(dict):
        number, params = 0, {}

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, *_, **__):
            for number in range(n_trials):
                trial = Trial()
                trial.number = number
                trainer.train(trial=trial)
                seen.append((trainer.model, trainer.rwp, trainer.rwp and trainer.rwp.report()["slots"]))
            return trainer_utils.BestRun("0", 0.0, {})

    monkeypatch.setitem(
        trainer_module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, trainer_utils.HPSearchBackend.OPTUNA, Backend
    )
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # which knows those of packages installed
    trials = [{"rwp": True, "rwp_gamma": 0.1}, {"rwp": True, "rwp_gamma": 0.3, "rwp_alpha": 1.0}, {"rwp": False}]
    trainer = make(None, tmp_path, **LOUD, model_init=lambda: Tagger(), train_dataset=sentences(10))
    trainer.hyperparameter_search(hp_space=lambda trial: trials[trial.number], n_trials=3, backend="optuna")
    models, wrappers, slots = zip(*seen, strict=True)
    assert len(set(map(id, models))) == 3
    assert [wrapper.param_groups[0]["rwp_gamma"] for wrapper in wrappers[:2]] == [0.1, 0.3]
    assert [wrapper.model for wrapper in wrappers[:2]] == list(models[:2])
    assert slots == ({"clean": 2, "perturbed": 2}, {"clean": 0, "perturbed": 2}, None)


def test_training_again_goes_on_with_the_same_wrapper(tmp_path):
    trainer, steps = halves_of(tmp_path, Tagger(), sentences(10))
    wrapper = trainer.rwp
    trainer.train()
    assert trainer.rwp is wrapper
    assert len(steps) == 4
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.5, tokens=True))


def test_passes_after_training_are_ordinary_ones(tmp_path):
    trainer, _ = halves_of(tmp_path, Tagger(), sentences(10))
    model, seen = trainer.model.train(), []
    model.head.register_forward_pre_hook(lambda *_: seen.append(snapshot(model)))
    weights = snapshot(model)
    model(**trainer.data_collator(sentences(5)))["loss"].backward()
    assert same(seen[0], weights)


def test_a_given_optimizer_and_scheduler_are_wrapped_and_used(tmp_path):
    model = Tagger()
    base = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5)
    trainer, steps = halves_of(tmp_path, model, sentences(10), optimizers=(base, scheduler))
    assert trainer.rwp.base is base
    assert logged(trainer, "learning_rate") == [0.4, 0.2]
    for name, weight in steps[1].clean.items():
        torch.testing.assert_close(weight, steps[0].clean[name] - 0.4 * steps[0].gradient[name])


# Resumption


def long_run(folder, progress=None):
    """Train to the end, from the last whole checkpoint in `folder`. progress: gets each step and micro-step."""

    class Says(TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            progress.send(state.global_step)
            time.sleep(0.005)

        on_substep_end = on_step_end

    torch.manual_seed(0)
    model = nn.ModuleDict({"tagger": Tagger(dtype=torch.float32), "dropout": nn.Dropout(0.2)})
    model.forward = lambda ids, labels: model["tagger"](
        ids.where(model["dropout"](torch.ones(ids.shape)) > 0, 0), labels
    )
    options = {"rwp_schedule": "cosine", "rwp_growth": 1.0, "rwp_eta": 1.0, "rwp_start": 0.05, "optim": "adamw_torch"}
    options |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    options |= {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4, "save_total_limit": 3}
    trainer = make(
        model,
        folder,
        **LOUD,
        **options,
        max_steps=int((folder / "steps").read_text()),
        train_dataset=sentences(50),  # 7 steps to an epoch, the last of a single batch of 2
        callbacks=[Says()] if progress else [],
    )
    whole = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    while whole and not is_json(whole[-1]):
        whole.pop()
    trainer.train(resume_from_checkpoint=str(whole[-1].parent) if whole else None)
    torch.save((tensors(model), logged(trainer), trainer.rwp.state_dict()), folder / "final.pt")


def is_json(path):
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


@pytest.mark.slow  # one kill is in test_trainer_resume
def test_random_kills_and_resumes_end_bit_equal(tmp_path):
    kills = 30
    chance, finals, began = random.Random(kills), {}, []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "steps").write_text(str(8 * (kills + 1)))
        for attempt in range(kills + 1 if name == "killed" else 1):
            ours, theirs = distributed._context.Pipe(duplex=False)
            process = distributed.context().Process(target=long_run, args=(folder, theirs))
            process.start()
            theirs.close()
            last = name == "whole" or attempt == kills
            try:
                began.append(ours.recv())
                victim = began[-1] + chance.randint(5, 9)  # one checkpoint further, at least
                while not last and ours.recv() < victim:
                    pass
                if not last:
                    time.sleep(chance.uniform(0, 0.02))
                    os.kill(process.pid, signal.SIGKILL)
                else:
                    while ours.recv():
                        pass
            except EOFError:
                assert last
            process.join(60)
            assert process.exitcode == (0 if last else -signal.SIGKILL)
            assert (folder / "final.pt").exists() == last
        finals[name] = torch.load(folder / "final.pt", weights_only=False)
    resumed = began[1:]
    assert len(set(resumed)) == len(resumed) == kills + 1
    assert same(finals["killed"][0], finals["whole"][0])
    assert finals["killed"][1] == finals["whole"][1]
    ours, theirs = (finals[name][2]["rwp"] for name in ("killed", "whole"))
    assert same(ours.pop("fisher"), theirs.pop("fisher"))
    assert ours == theirs


# What cannot work is refused at construction


@pytest.mark.parametrize(
    ("kind", "plugin", "match"),
    [
        (DistributedType.FSDP, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, 'version 1, .*"version": 2'),
        (DistributedType.DEEPSPEED, {"deepspeed_plugins": SimpleNamespace(zero_stage=3)}, "ZeRO-3, .*up to stage 2"),
        (DistributedType.XLA, {}, "XLA. What works is DistributedDataParallel, FSDP2"),
    ],
)
def test_other_engines_are_refused_by_name_with_what_works(tmp_path, kind, plugin, match):
    class Elsewhere(RWPTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            PartialState._shared_state["distributed_type"] = kind  # where Accelerate itself keeps it
            AcceleratorState._shared_state.update(plugin)

    with pytest.raises(NotImplementedError, match=f"work with .*{match}"):
        make(Tagger(), tmp_path, Elsewhere, rwp=True)
    AcceleratorState._reset_state(True)
    make(Tagger(), tmp_path, Elsewhere, rwp=False)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        (ParallelMode.NOT_DISTRIBUTED, "DataParallel.*use DistributedDataParallel"),
        (ParallelMode.TPU, "does not work with tpu. What works is one process, DistributedDataParallel .*FSDP2"),
    ],
)
def test_data_parallel_and_other_modes_are_refused_by_name(tmp_path, monkeypatch, mode, match):
    monkeypatch.setattr(RWPTrainingArguments, "parallel_mode", mode)
    with pytest.raises(NotImplementedError, match=match):
        make(Tagger(), tmp_path, rwp=True)
    make(Tagger(), tmp_path, rwp=False)


def test_arguments_without_the_flags_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"TrainingArguments has no flags of RWP: use RWPTrainingArguments"):
        RWPTrainer(Tagger(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_an_optimizer_is_not_wrapped_twice(tmp_path):
    model = Tagger()
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1), model, accumulation_steps=2)
    with pytest.raises(ValueError, match=r"optimizers holds an RWP.*give the base optimizer"):
        make(model, tmp_path, **LOUD, optimizers=(optimizer, None), train_dataset=sentences(10)).train()


class Pairs(torch.nn.Module):
    """Rows for a model of preferences: the chosen ones first, then the rejected."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        chosen, rejected = self.linear(x).chunk(2)
        return {"loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean()}


def pairs_of(samples):
    return {"x": torch.cat([torch.stack([s[name] for s in samples]) for name in ("chosen", "rejected")])}


def make_pairs(folder, count, **options):
    data = [{"chosen": torch.randn(3), "rejected": torch.randn(3)} for _ in range(count)]
    options = {"data_collator": pairs_of, "per_device_train_batch_size": 4, "remove_unused_columns": False, **options}
    return make(Pairs(), folder, **LOUD, train_dataset=data, **options)


def test_rows_that_are_no_samples_are_not_split(tmp_path):
    with pytest.raises(ValueError, match=r"at most 4 samples has 8 rows.* gradient_accumulation_steps=2"):
        make_pairs(tmp_path / "alone", 8).train()
    trainer = make_pairs(tmp_path / "turns", 12, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.model.seen == [8, 8, 8, 8]  # an epoch's last batch, alone in its step, is taken whole, twice


@pytest.mark.parametrize(("flags", "named"), [({"rwp_gamma": 0.5}, "rwp_gamma=0.2"), ({"rwp_seed": 5}, "rwp_seed=0")])
def test_what_a_checkpoint_keeps_cannot_be_changed_on_resuming(tmp_path, flags, named):
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    data = [{"x": torch.randn(3)} for _ in range(8)]
    settings = {"rwp": True, "rwp_gamma": 0.2}
    make(Takes(), tmp_path, **settings, **options, train_dataset=data, remove_unused_columns=False).train()
    changed = {**settings, **flags}
    with pytest.raises(ValueError, match=f"written with {named}, which it keeps"):
        make(Takes(), tmp_path, **changed, **options, train_dataset=data, remove_unused_columns=False).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_rwp_switched_off_is_a_plain_trainer(tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "remove_unused_columns": False}
    data = [{"x": torch.randn(3)} for _ in range(8)]
    trainer = make(Takes(), tmp_path, **LOUD, **options, train_dataset=data)
    trainer.train()
    trainer.args.rwp = False
    trainer.model.took.clear()
    trainer.train()
    assert trainer.rwp is None
    assert [len(batch["x"]) for batch in trainer.model.took] == [4, 4]
