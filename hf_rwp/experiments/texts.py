"""Texts for a causal language model: what to learn, with wrong labels, what to measure on, and what judges."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rwp.images.weights import find_weights
from hf_rwp.runs.determinism import derive_seed
from hf_rwp.trainer.language import known_texts, make_tokenizer, small_llama


class TextTask:
    """Lines of a file, or generated sentences, and a model from `--pretrained` or a small Llama.

    args: the flags of `recipes/gamma.py`. Every token after a text's first is a label; a share `label_noise` of those
    that are learned are drawn at random. Raises ValueError for a file without text.
    """

    def __init__(self, args: Any, device: torch.device) -> None:
        self.args, self.device, self.learned = args, device, args.pretrained is not None
        source = find_weights(args.pretrained, "pretrained") if args.pretrained else None
        place = source and (source.path or source.hub_id)
        self.tokenizer = AutoTokenizer.from_pretrained(place) if place else make_tokenizer()
        self.place, count = place, args.train_images or 2000
        if args.text_file == "generated":
            texts = known_texts(2 * (count + (args.test_images or 400)), args.data_seed)[::2]  # the sentences
        else:
            lines = Path(args.text_file).read_text(encoding="utf-8").splitlines()
            texts = [line for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"text_file={args.text_file!r} has no line with text")
        self.train, self.held_out = self.encoded(texts[:count]), self.encoded(texts[count:])
        self.judges = max(0, len(texts) - count)
        generator = torch.Generator().manual_seed(args.data_seed)
        wrong = torch.rand(self.train["labels"].shape, generator=generator) < args.label_noise
        random = torch.randint(len(self.tokenizer), wrong.shape, generator=generator)
        self.train["labels"] = torch.where(wrong & (self.train["labels"] != -100), random, self.train["labels"])

    def encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if not texts:
            return {}
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ended = [text + (self.tokenizer.eos_token or "") for text in texts]
        tokens = self.tokenizer(ended, return_tensors="pt", padding=True, padding_side="right", truncation=True)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def __len__(self) -> int:
        return len(self.train["labels"])

    def create(self, seed: int) -> nn.Module:
        set_seed(seed)
        if self.place:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(self.place, dtype=torch.float32)
        else:
            model = small_llama(self.tokenizer, **yaml.safe_load(self.args.model_kwargs))
        return model.to(self.device)

    def batch(self, number: int, seed: int) -> dict[str, Tensor]:
        epoch, place = divmod(number, max(1, len(self) // self.args.batch_size))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(derive_seed(seed, epoch, 0)))
        return self.rows(self.train, order[place * self.args.batch_size :][: self.args.batch_size])

    def batches(self) -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(len(self)).split(self.args.batch_size):
            yield self.rows(self.train, rows)

    def rows(self, split: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Some texts, as long as the longest of them."""
        length = int(split["attention_mask"][rows].sum(1).max())
        return {name: values[rows, :length].to(self.device) for name, values in split.items()}

    @torch.no_grad()
    def accuracy(self, module: nn.Module) -> float:
        module.eval()
        right, count = 0, 0
        for rows in torch.arange(len(self.held_out["labels"])).split(64):
            batch = self.rows(self.held_out, rows)
            labels = batch.pop("labels")[:, 1:]
            found = module(**batch).logits[:, :-1].argmax(-1)
            right, count = right + int((found == labels).sum()), count + int((labels != -100).sum())
        return right / count
