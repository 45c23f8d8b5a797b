"""Noise on a frozen base under LoRA in TRL's Trainers, some of which ask the base what it says between the passes."""

import pytest
import torch
from peft import LoraConfig
from test_trainer_trl import RWPSFTConfig, RWPSFTTrainer, llama, texts, tokenizer
from test_trainer_trl_others import KINDS as OTHERS
from test_trainer_trl_others import rows
from trainer_runs import LOUD, logged, make

from hf_rwp import RWPArguments

DATA = {
    "sft": texts(8),
    "dpo": rows(8, prompt=1, chosen=3, rejected=7),
    "reward": rows(8, chosen=3, rejected=7),
    "grpo": rows(8, prompt=1),
}
KINDS = {"sft": (llama, RWPSFTTrainer, RWPSFTConfig, None, {}, {}), **OTHERS}
OPTIONS = RWPArguments.rwp_options.fget


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def seen_without_gradients(model):
    """What the model's layers give wherever nothing is learned from it, by their inputs: a list that grows."""
    seen = []

    def look(module, args, kwargs, output):
        if not torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
            seen.append((kwargs["input_ids"].clone(), kwargs["attention_mask"], output.last_hidden_state.clone()))

    model.model.register_forward_hook(look, with_kwargs=True)
    return seen


def fine_tune(folder, kind, frozen, monkeypatch, checkpoints=False):
    monkeypatch.setattr(RWPArguments, "rwp_options", property(lambda args: {**OPTIONS(args), "frozen": frozen}))
    model, trainer, arguments, _, more, given = KINDS[kind]
    given = {name: value for name, value in given.items() if name != "ref_model"}  # the base without adapters is it
    more = more | ({"beta": 0.1} if kind == "grpo" else {})
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    model, config = model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    seen = seen_without_gradients(model)
    options = {"train_dataset": DATA[kind], "processing_class": tokenizer(), "bf16": False, "peft_config": config}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2, **more, **LOUD}
    options |= {"learning_rate": 0.05, "gradient_checkpointing": checkpoints, "rwp_frozen": bool(frozen)}
    made = make(
        model, folder, lambda model, args, **own: trainer(model, args=args, **own, **given), arguments, **options
    )
    made.train()
    for name, value in made.model.state_dict().items():
        plain = name.replace("base_model.model.", "", 1).replace("base_layer.", "")
        assert plain not in base or "score" in name or torch.equal(value, base[plain]), name
    return logged(made), adapters(made.model), made.rwp.report(), seen


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_copy_of_the_base_to_the_bit(tmp_path, monkeypatch, kind, checkpoints):
    drawn, copied, without = (
        fine_tune(tmp_path, kind, frozen, monkeypatch, checkpoints) for frozen in (True, "copy", False)
    )
    assert drawn[0] == copied[0]
    assert all(torch.equal(value, copied[1][name]) for name, value in drawn[1].items())
    assert drawn[2] == copied[2]
    assert drawn[2]["slots"] == {"clean": 2, "perturbed": 2}
    assert "lora" not in drawn[2]["relative_noise"]["largest"]["name"]
    assert any(not torch.equal(value, without[1][name]) for name, value in drawn[1].items())


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_whose_adapters_are_switched_off_is_the_clean_base(tmp_path, monkeypatch, kind):
    *_, seen = fine_tune(tmp_path, kind, True, monkeypatch)
    base = llama().model.eval()
    like_the_base = []
    for ids, mask, states in seen:
        with torch.no_grad():
            expected = base(input_ids=ids, attention_mask=mask).last_hidden_state
        like_the_base.append(torch.allclose(states, expected, atol=1e-6))
    assert sum(like_the_base) >= 4  # of each micro-step, two of which have noise
