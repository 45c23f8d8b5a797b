"""Accelerate's FSDP2, HSDP, tensor and context parallelism on gloo ranks, with a small Llama.

Accelerate leaves its FSDP2 plugin aside where there is no accelerator, and refuses a mesh. `on_cpus` has it believe in
one; everything after that is its own code, and FSDP2's, on a CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import reference
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from sharded import whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer  # noqa: F401  Trainer: ranks import once what is imported here
from transformers.distributed.tensor_parallel import ColwiseParallel

# One rank has a word less than its peers, unless transformers refuses that under tensor parallelism, as 5.18 does.
WORDS, LENGTH = 16 if "validate_param" in vars(ColwiseParallel) else 13, 7


@contextmanager
def on_cpus() -> Iterator[None]:
    """Accelerate, and Trainer's arguments, take this process's gloo group for one of GPUs."""
    plain = PartialState.__init__

    def believing(self: PartialState, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    with patch.object(PartialState, "__init__", believing), patch.dict(os.environ):  # Accelerate leaves notes there
        yield


def accelerator_of(fsdp: dict[str, Any] | None, sizes: dict[str, int], **options: Any) -> Accelerator:
    """fsdp: of FSDP2's plugin, None for none. sizes: of the mesh's dimensions, as ParallelismConfig names them."""
    plugin = None
    if fsdp is not None:
        policy = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **{"reshard_after_forward": True, **policy, **fsdp})
    mesh = ParallelismConfig(**sizes) if sizes else None
    return Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=mesh, **options)


class PreciseLlamaForCausalLM(LlamaForCausalLM):
    """Without the steps in float32 that Llama takes in any precision. Its loss is one over all words of the step."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.loss_function = words_loss
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(parent, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))


def llama(tied: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> PreciseLlamaForCausalLM:
    """Two layers; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            **{"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "use_cache": False},
            **{"tie_word_embeddings": tied, "initializer_range": 0.3, "attn_implementation": "sdpa"},
            **options,
        )
        return PreciseLlamaForCausalLM(config).to(dtype)


def load_llama(folder: str, **sizes: int) -> PreciseLlamaForCausalLM:
    """A saved one, sharded by transformers as it loads it. sizes: of its `DistributedConfig`."""
    from transformers.distributed import DistributedConfig

    options = {"dtype": torch.float64, "attn_implementation": "sdpa"}
    return PreciseLlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes), **options)


def sentences(count: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def next_word_loss(output: Any, ids: Tensor) -> Tensor:
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def words_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> Tensor:
    """transformers' ForCausalLMLoss in the logits' own precision."""
    targets = labels[:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def snapshot(model: nn.Module) -> reference.Tensors:
    """All parameters, whole. Collective."""
    return {plain_name(name): whole(parameter) for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> reference.Tensors:
    named = {plain_name(name): parameter.grad for name, parameter in model.named_parameters()}
    return {name: whole(gradient) for name, gradient in named.items() if gradient is not None}


@contextmanager
def seen_weights(model: nn.Module) -> Iterator[list[reference.Tensors]]:
    """The whole weights that the layers find in each training forward pass, by name: a list that grows."""
    seen: list[reference.Tensors] = []
    names = {id(module): plain_name(f"{name}.") for name, module in model.named_modules()}
    own = {plain_name(name) for name, _ in model.named_parameters()}  # a tied one has a single name

    def training(module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    def begin(module: nn.Module, *_: Any) -> None:
        if training(module):
            seen.append({})

    def look(module: nn.Module, *_: Any) -> None:
        if training(module):
            for name, parameter in module.named_parameters(recurse=False):
                if names[id(module)] + name in own:
                    seen[-1][names[id(module)] + name] = whole(parameter)

    leaves = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [model.register_forward_pre_hook(begin)]
    handles += [module.register_forward_pre_hook(look) for module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
