"""What noise on a frozen base costs: the models that are measured."""

import torch

from hf_rwp.analysis.frozen_cost import Adapted, frozen_costs, frozen_ratios
from hf_rwp.experiments.lora_costs import llama


def test_a_llama_has_adapters_on_all_linear_layers_but_the_head_and_its_largest_weight_is_what_a_draw_takes():
    torch.manual_seed(0)
    model, loss = llama(tokens=8, num_hidden_layers=2, vocab_size=1024)
    adapted = [name for name, module in model.named_modules() if isinstance(module, Adapted)]
    own = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert adapted == [f"model.layers.{layer}.{name}" for layer in range(2) for name in own]
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == {f"{name}.{way}.weight" for name in adapted for way in ("down", "up")}
    told = []
    found = frozen_costs(model, loss, 1, ("plain", "drawn"), lambda: told.append(None))
    assert len(told) == 3
    assert {kind: len(times) for kind, times in found["seconds"].items()} == {"plain": 1, "drawn": 1}
    assert set(frozen_ratios(found)) == {"drawn"}
    assert found["layer_bytes"] == 576 * 1536 * 4
    extra = found["peak_bytes"]["drawn"] - found["peak_bytes"]["plain"]
    assert 0 < extra < 1.5 * found["layer_bytes"]
