"""RWPFactory: RWP as one argument of a Trainer that knows nothing of it."""

import logging
import pickle

import pytest
import torch
from distributed import run
from trainer_runs import (
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
from transformers.training_args import ParallelMode

from hf_rwp import RWP, RWPFactory, RWPTrainer

OPTIONS = {"gamma": 0.2, "alpha": 0.7, "seed": 5}
ADAMW = {"optim": "sgd", "learning_rate": 0.02, "adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.05}
ADAMW |= {"gradient_accumulation_steps": 2}


def trainer_of(folder, model=None, kind=Trainer, given=None, **options):
    """given: the factory's options."""
    given = {**OPTIONS, **(given or {})}
    options = {"train_dataset": sentences(40), "gradient_accumulation_steps": 2, **options}
    return make(model or Tagger(counts=False), folder, kind, optimizer_cls_and_kwargs=(RWPFactory, given), **options)


def trained(*args, **options):
    watch = Watch()
    trainer = trainer_of(*args, callbacks=[watch], **options)
    trainer.train()
    return trainer, watch.steps


def wrapper_of(trainer):
    return trainer.optimizer.optimizer


def test_gradients_are_the_mix(tmp_path):
    trainer, steps = trained(tmp_path)
    assert len(steps) == 4
    for step in steps:
        assert step.roles == [False, True]
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.7, tokens=False))
    assert wrapper_of(trainer).report()["slots"] == {"clean": 4, "perturbed": 4}


def test_it_is_bit_for_bit_the_wrapper_around_the_trainers_own_optimizer(tmp_path):
    ours, steps = trained(tmp_path, given={"optim": "adamw_torch"}, **ADAMW)
    model, watch = Tagger(counts=False), Watch()
    decay = {"params": [model.words.weight, model.head.weight], "weight_decay": 0.05}
    groups = [decay, {"params": [model.head.bias], "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9))
    optimizer = RWP(base, model, accumulation_steps=2, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = {"train_dataset": sentences(40), "callbacks": [watch]}
    make(model, tmp_path, Trainer, optimizers=(optimizer, scheduler), **data, **ADAMW).train()
    for step, expected in zip(steps, watch.steps, strict=True):
        assert same(step.gradient, expected.gradient)
    assert same(tensors(ours.model), tensors(model))
    for group, expected in zip(wrapper_of(ours).param_groups, optimizer.param_groups, strict=True):
        assert {**group, "params": len(group["params"])} == {**expected, "params": len(expected["params"])}


def test_without_a_name_the_base_is_the_one_of_the_trainers_arguments(tmp_path):
    trainer, _ = trained(tmp_path, optim="adagrad")
    assert type(wrapper_of(trainer).base) is torch.optim.Adagrad
    assert trainer.args.optim == "adagrad"


def test_alpha_1_takes_one_gradient_a_step(tmp_path):
    _, steps = trained(tmp_path, given={"alpha": 1.0}, gradient_accumulation_steps=1)
    assert len(steps) == 8
    for step in steps:
        assert step.roles == [True]
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 1.0, tokens=False))


def test_gamma_0_is_the_trainer_without_it(tmp_path):
    ours, _ = trained(tmp_path, given={"optim": "adamw_torch", "gamma": 0.0})
    options = {"train_dataset": sentences(40), "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    plain = make(Tagger(counts=False), tmp_path, Trainer, **options)
    plain.train()
    assert same(tensors(ours.model), tensors(plain.model))
    assert logged(ours) == logged(plain)
    assert [line.keys() for line in ours.state.log_history] == [line.keys() for line in plain.state.log_history]


@pytest.mark.parametrize(("count", "last"), [(55, [False, True, False]), (50, [False, True])])
def test_an_epochs_short_last_step_is_mixed_by_the_batches_that_it_has(tmp_path, count, last):
    _, steps = trained(tmp_path, train_dataset=sentences(count), gradient_accumulation_steps=4, num_train_epochs=2)
    assert [step.roles for step in steps] == 2 * [*2 * [[False, True, False, True]], last]
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.7, tokens=False))


def test_a_last_step_of_one_batch_is_an_ordinary_one_and_said(tmp_path, caplog):
    trainer, steps = trained(tmp_path, train_dataset=sentences(25), num_train_epochs=2)
    assert [step.roles for step in steps] == 2 * [[False, True], [False, True], [False]]
    for step in steps:
        assert_gradient(step, paper(Tagger(), step.clean, step.slots, 0.7, tokens=False))
    assert len([record for record in caplog.records if "an ordinary step" in record.message]) == 1
    assert wrapper_of(trainer).alpha == 0.7


def test_one_process_without_accumulation_has_nothing_to_mix(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=1)
    with pytest.raises(RuntimeError, match=r"nothing to mix: alpha=0\.7 .* gradient_accumulation_steps=2.*alpha=1"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("given", [{}, {"alpha": 1.0}, {"gamma": 0.0}])
def test_that_tokens_are_not_counted_is_said_once_where_it_matters(tmp_path, caplog, counts, given):
    trainer = trainer_of(tmp_path, Tagger(counts), given=given)
    trainer.train()
    trainer.train()
    said = [line for line in caplog.messages if "RWPFactory mixes by batch" in line]
    assert len(said) == (counts and not given)


def test_the_trainers_schedule_moves_the_bases_learning_rate(tmp_path):
    trainer, _ = trained(tmp_path, lr_scheduler_type="linear", num_train_epochs=2)
    assert logged(trainer, "learning_rate") == pytest.approx([0.1 * (1 - step / 8) for step in range(8)])
    assert wrapper_of(trainer).base.param_groups[0]["lr"] == 0


def test_resumption_is_bit_exact(tmp_path):
    options = {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "given": {"optim": "adamw_torch", "eta": 10.0}}
    options["train_dataset"] = sentences(25)  # the third step of an epoch has one batch
    whole, _ = trained(tmp_path, save_strategy="steps", save_steps=3, **options)
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        resumed = trainer_of(tmp_path, save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert same(tensors(resumed.model), tensors(whole.model))


def test_a_second_training_goes_on_with_the_same_wrapper(tmp_path):
    trainer, steps = trained(tmp_path)
    wrapper = wrapper_of(trainer)
    trainer.train()
    assert wrapper_of(trainer) is wrapper
    assert wrapper.report()["slots"] == {"clean": 8, "perturbed": 8}
    assert [step.roles for step in steps] == 8 * [[False, True]]


def test_after_training_a_pass_leaves_the_weights_clean(tmp_path):
    trainer, _ = trained(tmp_path)
    before = tensors(trainer.model)
    trainer.model.train()
    trainer.model(**{name: value[None] for name, value in sentences(1)[0].items()})
    assert same(tensors(trainer.model), before)


def test_after_an_interrupt_the_wrappers_eval_makes_them_clean(tmp_path):
    class Interrupts(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.clean, self.passes = tensors(model), 0
            self.handle = model.words.register_forward_hook(self.interrupt) if state.global_step == 2 else None

        def interrupt(self, *_):
            self.passes += 1
            if self.passes == 2:
                raise KeyboardInterrupt

    callback = Interrupts()
    trainer = trainer_of(tmp_path, callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    wrapper_of(trainer).eval()
    assert same(tensors(trainer.model), callback.clean)


class Seen(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.pickled = pickle.loads(pickle.dumps(args))


def test_arguments_are_pickled_and_logged_as_without_it(tmp_path):
    seen = Seen()
    trainer = trainer_of(tmp_path, callbacks=[seen], save_strategy="steps", save_steps=2)
    before = trainer.args.to_dict()
    trainer.train()
    assert seen.pickled.to_dict() == trainer.args.to_dict() == before
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.to_dict() == before
    assert trainer.optimizer_cls_and_kwargs == (RWPFactory, OPTIONS)
    assert "_Windows" not in (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gama": 0.1}, TypeError, r"no option gama; did you mean gamma\? It has optim, alpha, antithetic"),
        ({"rwp_alpha": 0.1}, TypeError, "no option rwp_alpha; did you mean alpha"),
        ({"zzz": 1}, TypeError, r"no option zzz\. It has optim"),
        ({"accumulation_steps": 2}, TypeError, "set the Trainer's gradient_accumulation_steps"),
        ({"gamma": -1.0}, ValueError, "gamma must be"),
        ({"optim": "adam"}, ValueError, r"optim='adam' is not .* did you mean adamw_torch\?"),
        ({"optim": "adamw_toch"}, ValueError, r"optim='adamw_toch' is not .* did you mean adamw_torch\?"),
        ({"optim": "adalomo"}, NotImplementedError, "'adalomo', which steps inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, NotImplementedError, "steps inside the backward pass"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, given=given).train()


def test_without_a_trainer_it_says_what_to_do():
    with pytest.raises(TypeError, match="called by something else than a Trainer"):
        RWPFactory()(Tagger(), gamma=0.1)


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.NOT_DISTRIBUTED)
    with pytest.raises(NotImplementedError, match="DataParallel"):
        trainer.create_optimizer()


def test_a_trainer_that_would_wrap_it_again_refuses(tmp_path):
    with pytest.raises(ValueError, match="rwp=True would wrap it again"):
        trainer_of(tmp_path, kind=RWPTrainer, rwp=True).train()


def test_batch_norm_and_evaluation(tmp_path, caplog):
    options = {"train_dataset": images(20), "eval_dataset": images(6), "eval_strategy": "epoch"}
    options["given"] = {"gamma": 0.01}
    with caplog.at_level(logging.WARNING, "hf_rwp"):
        trainer, steps = trained(tmp_path, Classifier(), **options)
    assert [step.roles for step in steps] == 2 * [[False, True]]
    assert len(logged(trainer, "eval_loss")) == 1
    assert not [record for record in caplog.records if record.name.startswith("hf_rwp")]


class Buffers(TrainerCallback):
    """BatchNorm's statistics where Trainer has just evaluated or saved."""

    def __init__(self):
        self.seen = []

    def look(self, args, state, control, model, **kwargs):
        self.seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    on_evaluate = on_save = look


def with_batch_norm(folder):
    buffers = Buffers()
    options = {"train_dataset": images(40), "eval_dataset": images(4), "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1, "given": {"gamma": 0.01}, "ddp_broadcast_buffers": False}
    trainer = trainer_of(folder, Classifier(), gradient_accumulation_steps=1, callbacks=[buffers], **options)
    trainer.train()
    return [*buffers.seen, {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}]


def test_buffers_are_equal_on_two_ranks_wherever_they_are_evaluated_or_saved(tmp_path):
    one, other = run(2, with_batch_norm, tmp_path)
    assert len(one) == len(other) == 7  # four saved, two evaluated, and what training ends with
    for mine, others in zip(one, other, strict=True):
        assert same(mine, others)


def on_ranks(folder, accumulation):
    trainer, steps = trained(folder, gradient_accumulation_steps=accumulation, train_dataset=sentences(50))
    return steps, tensors(trainer.model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_take_the_mix(tmp_path, accumulation):
    ranks = run(2, on_ranks, tmp_path, accumulation)
    assert same(ranks[0][1], ranks[1][1])
    for steps in zip(*(steps for steps, _ in ranks), strict=True):
        slots = [slot for step in steps for slot in step.slots]
        half = len(slots) // 2
        assert [noise is not None for noise, _ in slots] == [False] * half + [True] * half
        for step in steps:
            assert_gradient(step, paper(Tagger(), step.clean, slots, 0.7, tokens=False))
