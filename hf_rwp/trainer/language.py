"""A small language model that is made here, text and sums that it knows, and what a fine-tuned one knows and forgets.

The base is a Llama of a few hundred thousand weights over characters. It learns sentences of a small grammar and sums
(`12+35=47`); fine-tuning then poses sums in words (`12 plus 35 is`), with answers that the base can compute and a
form that it has never seen. All of it is generated, so that a recipe needs no network.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rwp.runs.files import replacing_folder, write

_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,+=-"
_NOUNS = ("fox", "bird", "child", "river", "stone", "garden", "horse", "cloud", "teacher", "boat", "tree", "lamp")
_ADJECTIVES = ("red", "small", "old", "quiet", "bright", "tall", "cold", "kind", "slow", "round")
_VERBS = ("sees", "finds", "follows", "likes", "carries", "passes", "hears", "draws")
_PLACES = ("near the hill", "at night", "in the rain", "by the road", "after school", "under the bridge")


def sentence(dice: random.Random) -> str:
    """A sentence of the grammar."""
    subject, verb = f"the {dice.choice(_ADJECTIVES)} {dice.choice(_NOUNS)}", dice.choice(_VERBS)
    return f"{subject} {verb} a {dice.choice(_ADJECTIVES)} {dice.choice(_NOUNS)} {dice.choice(_PLACES)}."


def addition(dice: random.Random) -> str:
    """A sum as the base knows it."""
    one, other = dice.randrange(50), dice.randrange(50)
    return f"{one}+{other}={one + other}"


def known_texts(count: int, seed: int) -> list[str]:
    """What the base knows: sentences and sums in turn."""
    dice = random.Random(seed)
    return [(sentence, addition)[number % 2](dice) for number in range(count)]


def sums_in_words(count: int, held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Prompts and completions, `count` to train on and `held_out` others, none of whose sums is in both.

    Raises ValueError for more than there are.
    """
    if count + held_out > 2500:
        raise ValueError(f"there are 2,500 sums in words, and {count} to train on and {held_out} held out are more")
    pairs = random.Random(seed).sample([(one, other) for one in range(50) for other in range(50)], count + held_out)
    rows = [{"prompt": f"{one} plus {other} is ", "completion": str(one + other)} for one, other in pairs]
    return rows[:count], rows[count:]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL.values(), *_LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **_SPECIAL)


def small_llama(tokenizer: Any, **options: Any) -> LlamaForCausalLM:
    """A Llama of 0.6 million weights, as the random numbers have them. options: of LlamaConfig, to change that."""
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes |= {"intermediate_size": 384, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": True, **sizes, **ids, **options}))


def make_base(folder: Path, steps: int, seed: int) -> Path:
    """A folder with the base and its tokenizer, trained for `steps` of 64 texts: what `folder` has, or made anew."""
    said = {"steps": steps, "seed": seed}
    note = folder / "made.json"
    if note.is_file() and json.loads(note.read_text()) == said:
        return folder
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    dice = random.Random(seed)
    for step in tqdm(range(steps), desc="a small language model, made once", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        texts = [sentence(dice) for _ in range(16)], [addition(dice) for _ in range(48)]  # of different lengths
        torch.cat([_loss(model, *_batch(tokenizer, some)) for some in texts]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.random.set_rng_state(generator)
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write(partial / note.name, json.dumps(said))
    return folder


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64, max_length: int = 512) -> float:
    """The cross-entropy per token of whole texts, in eval mode."""
    was, losses = model.training, []
    model.eval()
    for begin in range(0, len(texts), batch_size):
        ids, mask = _batch(tokenizer, texts[begin : begin + batch_size], max_length)
        losses.append(_loss(model, ids.to(model.device), mask.to(model.device)).cpu())
    model.train(was)
    return float(torch.cat(losses).mean())


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    batch_size: int = 64,
    max_new_tokens: int = 16,
    answer: Callable[[str], str] = str.strip,
) -> float:
    """The fraction of prompts that the model completes as `rows` say, by greedy decoding. answer: what of a completion
    is compared."""
    was, right = model.training, 0
    model.eval()
    for begin in range(0, len(rows), batch_size):
        some = rows[begin : begin + batch_size]
        prompts = tokenizer([row["prompt"] for row in some], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        prompts.pop("token_type_ids", None)
        output = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer(text) == answer(row["completion"]) for text, row in zip(texts, some, strict=True))
    model.train(was)
    return right / max(1, len(rows))


def _batch(tokenizer: Any, texts: Sequence[str], max_length: int = 128) -> tuple[Tensor, Tensor]:
    """Token ids of texts and an end each, (texts, length), and where they are."""
    ended = [text + tokenizer.eos_token for text in texts]
    tokens = tokenizer(
        ended, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=max_length
    )
    return tokens["input_ids"], tokens["attention_mask"]


def _loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The cross-entropy of every token after the first, flat."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses[mask[:, 1:].flatten().bool()]
