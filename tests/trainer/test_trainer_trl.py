"""RWPTrainerMixin in front of another library's Trainer: TRL's SFTTrainer, with and without PEFT's LoRA."""

from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch
from distributed import run
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_language import llama, texts, tokenizer
from trainer_runs import LOUD, Watch, assert_gradient, logged, make, paper, same, snapshot, tensors
from trl import SFTConfig, SFTTrainer

from hf_rwp import RWPArguments, RWPFactory, RWPTrainerMixin
from hf_rwp.hub.card import add_card
from hf_rwp.hub.export import save_any


class RWPSFTTrainer(RWPTrainerMixin, SFTTrainer): ...


@dataclass
class RWPSFTConfig(RWPArguments, SFTConfig): ...


def own_loss(call, inputs):
    """The model's own loss, as a sum over the tokens that it is a mean over."""
    count = int((inputs["labels"][:, 1:] != -100).sum())
    return call(**inputs)["loss"] * count, count


def fine_tune(folder, world=1, **options):
    watch = Watch()
    options = {"train_dataset": texts(13 * world), "processing_class": tokenizer(), "bf16": False, **options}
    trainer = make(llama(), folder, RWPSFTTrainer, RWPSFTConfig, **LOUD, **options, callbacks=[watch])
    trainer.train()
    return trainer, watch.steps


def assert_paper(trainer, steps):
    for step, loss in zip(steps, logged(trainer), strict=True):
        assert step.roles == [False, True]
        expected = paper(llama(), step.clean, step.slots, 0.5, tokens=True, loss=own_loss)
        assert_gradient(step, expected, rtol=1e-3, atol=1e-6)
        assert loss == pytest.approx(expected["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_takes_the_papers_gradient_over_tokens(tmp_path, accumulation):
    trainer, steps = fine_tune(tmp_path, gradient_accumulation_steps=accumulation)
    assert len(steps) == (3 if accumulation == 1 else 2)
    assert_paper(trainer, steps)
    assert len(logged(trainer, "loss_gap")) == len(logged(trainer, "mean_token_accuracy")) == len(steps)


def test_without_the_flag_it_is_sft_trainer(tmp_path):
    options = {"train_dataset": texts(13), "bf16": False}
    plain = make(llama(), tmp_path, SFTTrainer, SFTConfig, **options, processing_class=tokenizer())
    ours = make(llama(), tmp_path, RWPSFTTrainer, RWPSFTConfig, **options, processing_class=tokenizer())
    for trainer in (plain, ours):
        trainer.train()
    assert same(tensors(ours.model), tensors(plain.model))
    assert logged(ours) == logged(plain)


def is_adapter(name):
    return "lora_" in name


@pytest.mark.parametrize("lora", [False, True])
def test_an_unmodified_sft_trainer_takes_the_factory_which_weighs_batches_by_their_tokens(tmp_path, lora):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights="gaussian") if lora else None
    watch = Watch()
    factory = (RWPFactory, {"optim": "adamw_torch", "gamma": 0.2})
    options = {"train_dataset": texts(20), "processing_class": tokenizer(), "bf16": False, "peft_config": config}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "optimizer_cls_and_kwargs": factory}
    trainer = make(llama(), tmp_path, SFTTrainer, SFTConfig, **options, callbacks=[watch])
    trainer.train()
    assert len(watch.steps) == len(logged(trainer, "mean_token_accuracy")) == 2
    assert type(trainer.optimizer.optimizer.base) is torch.optim.AdamW
    assert trainer.optimizer.optimizer.report()["slots"] == {"clean": 2, "perturbed": 2}
    for step in watch.steps:
        assert step.roles == [False, True]
        tokens = sum(int((inputs["labels"][:, 1:] != -100).sum()) for _, inputs in step.slots)

        def share(call, inputs, half=tokens / 2):
            return own_loss(call, inputs)[0], half

        model = get_peft_model(llama(), config) if lora else llama()
        expected = paper(model, step.clean, step.slots, 0.5, tokens=False, loss=share)
        assert_gradient(step, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_perturbs_the_adapters_and_on_demand_the_base_which_is_bit_equal_afterwards(tmp_path, frozen):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights="gaussian")
    trainer, steps = fine_tune(
        tmp_path,
        peft_config=config,
        rwp_frozen=frozen,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
    )
    assert isinstance(trainer.model, PeftModel)
    base = snapshot(llama())
    for step in steps:
        for name, noise in step.slots[1][0].items():
            is_zero = is_adapter(name) and not step.clean[name].any()  # lora_B begins as zeros, and has no size
            assert noise.any() == ((frozen or is_adapter(name)) and not is_zero), name
        expected = paper(get_peft_model(llama(), config), step.clean, step.slots, 0.5, tokens=True, loss=own_loss)
        assert set(step.gradient) == set(filter(is_adapter, step.clean))
        assert_gradient(step, expected, rtol=1e-3, atol=1e-6)
    for name, weight in snapshot(trainer.model).items():
        if is_adapter(name):
            assert steps[-1].gradient[name].any()
            if "lora_B" in name:  # a first step of lora_A may be too small to show
                assert not torch.equal(weight, steps[0].clean[name])
        else:
            assert torch.equal(weight, base[name.replace("base_model.model.", "", 1).replace("base_layer.", "")])
    saved = load_file(tmp_path / "checkpoint-1/adapter_model.safetensors")
    for name, weight in saved.items():
        assert torch.equal(weight, steps[1].clean[name.replace(".weight", ".default.weight")])


def test_frozen_weights_are_copied_where_graphs_are_compiled():
    @dataclass
    class Compiled(RWPArguments):
        torch_compile: bool = False

    assert [Compiled(rwp_frozen=True, torch_compile=on).rwp_options["frozen"] for on in (False, True)] == [True, "copy"]
    assert Compiled(torch_compile=True).rwp_options["frozen"] is False


def test_lora_keeps_no_copy_of_the_base(tmp_path):
    config = LoraConfig(target_modules="all-linear", r=2)
    trainer, _ = fine_tune(tmp_path, peft_config=config, rwp_frozen=True, gradient_checkpointing=True)
    perturbation = trainer.rwp._windows.perturbation
    base = sum(p.numel() for name, p in trainer.model.named_parameters() if not is_adapter(name) and p.ndim > 1)
    copied = sum(clean.numel() for clean in perturbation._clean)
    adapters = sum(p.numel() for name, p in trainer.model.named_parameters() if is_adapter(name) or p.ndim < 2)
    assert copied == adapters + sum(buffer.numel() for buffer in trainer.model.buffers()) < base


def on_ranks(folder):
    trainer, steps = fine_tune(folder, world=2)
    return steps, tensors(trainer.model)


@pytest.mark.slow
def test_sft_on_two_ranks_takes_the_papers_gradient_over_tokens(tmp_path):
    ranks = run(2, on_ranks, tmp_path, timeout=120)
    assert same(ranks[0][1], ranks[1][1])
    for steps in zip(*(steps for steps, _ in ranks), strict=True):
        slots = [slot for step in steps for slot in step.slots]
        assert [noise is not None for noise, _ in slots] == [False, True]
        for step in steps:
            expected = paper(llama(), step.clean, slots, 0.5, tokens=True, loss=own_loss)
            assert_gradient(step, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_the_card_names_task_class_and_the_versions_of_trl_and_peft(tmp_path, lora):
    options = {"train_dataset": texts(8), "processing_class": tokenizer(), "bf16": False}
    options |= {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if lora else {}
    trainer = make(llama(), tmp_path / "run", RWPSFTTrainer, RWPSFTConfig, **LOUD, **options)
    facts = save_any(trainer.model, tmp_path / "model")
    add_card(tmp_path / "model", trainer._results(), base_model="ada/base", **facts)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "peft" if lora else "transformers")
    assert f"{'AutoPeftModelForCausalLM' if lora else 'AutoModelForCausalLM'}.from_pretrained(" in card.text
    (versions,) = [row for row in card.text.splitlines() if row.startswith("| versions |")]
    assert f"trl {version('trl')}" in versions
    assert (f"peft {version('peft')}" in versions) == lora
