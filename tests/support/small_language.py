"""A language model of a few thousand weights, its tokenizer of 20 words, and sentences of them, for TRL's Trainers."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer():
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(20))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def texts(count):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(20, (3 + 2 * i % 7,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in row) for row in rows]})


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, num_key_value_heads=2, pad_token_id=0, **sizes))
