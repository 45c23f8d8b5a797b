"""Noise on the base weights under PEFT's adapters: as the copy mechanism's to the bit, and the base as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_rwp import RWP

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SIZES = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}


def llama():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32, **dict.fromkeys(DROPOUTS, 0.0))
    )


MODELS = {"llama": (llama, ["q_proj", "v_proj", "up_proj"]), "gpt2": (gpt2, ["c_attn", "c_proj"])}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "dropout": {"lora_dropout": 0.5}}


def adapted(name, **options):
    torch.manual_seed(0)
    make, names = MODELS[name]
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=names, **options))
    for weight_name, weight in model.named_parameters():  # lora_B begins as zeros
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def fine_tune(model, frozen, steps=2, reference=False):
    """Losses, adapters and what RWP did. reference: whether each micro-step asks the base what it says, as DPO does."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rwp = RWP(torch.optim.AdamW(own, lr=1e-2), model, frozen=frozen, gamma=0.1, accumulation_steps=2)
    generator, losses = torch.Generator().manual_seed(1), []
    torch.manual_seed(1)  # of dropout
    for _ in range(2 * steps):
        ids = torch.randint(3, 32, (2, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        if reference:
            with torch.no_grad(), model.disable_adapter():
                before = model(input_ids=ids, labels=ids).loss
            loss = loss - 0.1 * before
        loss.backward()
        losses.append(loss.item())
        if len(losses) % 2 == 0:
            rwp.step()
            rwp.zero_grad()
    for name, parameter in model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name
    return losses, [parameter.detach().clone() for parameter in own], rwp.report()


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(map(torch.equal, one[1], other[1]))
    assert one[2] == other[2]


def fine_tuned(name, kind, reentrant=None, **options):
    found = []
    for frozen in (True, "copy", False):
        model = adapted(name, **KINDS[kind])
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found.append(fine_tune(model, frozen, **options))
    return found


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_trained_as_with_a_copy_of_the_base_to_the_bit(name, kind, reentrant):
    drawn, copied, plain = fine_tuned(name, kind, reentrant)
    assert_same(drawn, copied)
    assert drawn[0][0] == plain[0][0]  # of the clean gradient
    assert drawn[0][1] != plain[0][1]
    largest = drawn[2]["relative_noise"]["largest"]
    assert "lora" not in largest["name"]
    weight = adapted(name, **KINDS[kind]).get_parameter(largest["name"])
    assert largest["size"] == pytest.approx(0.1 * weight.shape[1] ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_a_reference_pass_with_the_adapters_switched_off_sees_the_clean_base(name):
    """The second forward pass of a micro-step is under no_grad: clean weights, and the backward pass as before."""
    drawn, copied, _ = fine_tuned(name, "lora", reference=True)
    assert_same(drawn, copied)
    model, ids = adapted(name), torch.arange(8)[None] + 3
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
    rwp = RWP(torch.optim.SGD(own, lr=0.1), model, frozen=True, alpha=1.0, gamma=0.1)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
    loss.backward()
    rwp.remove()


def test_merging_after_training_takes_the_base_as_it_was():
    model = adapted("llama")
    fine_tune(model, True)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    product = own[f"{layer}.lora_B.default.weight"] @ own[f"{layer}.lora_A.default.weight"]
    merged = model.merge_and_unload()
    expected = own[f"{layer}.base_layer.weight"] + product * (8 / 2)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight.detach(), expected)
