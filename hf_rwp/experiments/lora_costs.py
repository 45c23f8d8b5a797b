"""What noise on a frozen base costs under LoRA: the pieces of recipes/benchmark.py for models of two kinds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rwp.analysis.frozen_cost import KINDS, RANK, TOKENS, Adapted, Loss, frozen_costs, linear_layers
from hf_rwp.analysis.pieces import round_done
from hf_rwp.analysis.timing import WARM_UP

LENGTH = 512  # tokens of a sequence
SMOLLM2_135M = {  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def llama(tokens: int = TOKENS, **shape: Any) -> tuple[nn.Module, Loss]:
    """A Llama of SmolLM2-135M's shape, with random weights, whose linear layers but the head are adapted; and the loss
    of a step.

    tokens: of a step. shape: what its configuration has otherwise.
    """
    model: Any = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2_135M, **shape})).requires_grad_(False)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in [*block.named_children()]:
                if isinstance(linear, nn.Linear):
                    setattr(block, name, Adapted(linear, RANK))
    ids = torch.randint(model.config.vocab_size, (max(tokens // LENGTH, 1), min(tokens, LENGTH)))

    def loss(model: nn.Module) -> Tensor:
        own = ids.to(next(model.parameters()).device)
        found: Tensor = model(input_ids=own, labels=own).loss
        return found

    return model, loss


@dataclass(frozen=True)
class Measured:
    """build: a model, and the loss of a step. times: rounds to one of the benchmark's. kinds: of noise.

    long: whether it takes minutes on a CPU.
    """

    build: Callable[[], tuple[nn.Module, Loss]]
    times: int
    kinds: tuple[str, ...] = KINDS
    long: bool = False

    def rounds(self, of_benchmark: int) -> int:
        """Of work, those included that are not counted."""
        return WARM_UP + self.times * of_benchmark


MODELS = {  # by their names in a record
    "frozen": Measured(linear_layers, 4),  # short rounds, of kinds that are close together
    "llama": Measured(llama, 2, ("plain", "drawn"), long=True),
}


def run_lora(name: str, _: int, ranks: int, args: Any, folder: str) -> None:
    """Write `frozen_costs` of one of MODELS to the folder, measured with the threads of a single process.

    args: of the benchmark.
    """
    torch.set_num_threads(args.threads * args.ranks // ranks)
    torch.manual_seed(0)
    measured = MODELS[name]
    model, loss = measured.build()
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
    found = frozen_costs(model, loss, measured.times * args.rounds, measured.kinds, partial(round_done, folder))
    Path(folder, "0").write_text(json.dumps(found))
