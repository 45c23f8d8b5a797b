"""What noise on a frozen base costs: the kinds that are compared, and the figures that come of them."""

import pytest
import torch
from torch import nn

from hf_rwp.analysis import frozen_cost
from hf_rwp.analysis.costs import rows
from hf_rwp.analysis.frozen_cost import Adapted, frozen_costs, frozen_ratios, linear_layers


@pytest.fixture(scope="module")
def found():
    return frozen_costs(*linear_layers(tokens=16, width=512), rounds=2)


def test_a_copy_takes_the_base_and_a_draw_one_weight(found):
    layer, plain = found["layer_bytes"], found["peak_bytes"]["plain"]
    extra = {kind: peak - plain for kind, peak in found["peak_bytes"].items()}
    assert layer == 512 * 512 * 4
    assert 0.9 * layer < extra["drawn"] < 1.5 * layer
    assert extra["copy"] > frozen_cost.LAYERS * layer
    assert 0 < extra["flat_lora"] < 3 * layer


def test_figures_are_relative_to_plain_lora(found):
    ratios = frozen_ratios(found)
    assert set(ratios) == {"drawn", "copy", "flat_lora"}
    times, memory = ratios["drawn"]
    assert times == [
        drawn / plain for drawn, plain in zip(found["seconds"]["drawn"], found["seconds"]["plain"], strict=True)
    ]
    weights, peaks = found["weights_bytes"], found["peak_bytes"]
    assert memory[0] == (weights + peaks["drawn"]) / (weights + peaks["plain"])
    assert memory[0] < ratios["copy"][1][0]


def test_rows_have_their_limits(found):
    record = {
        "device_type": "cpu",
        "measurements": [],
        "loop_images_per_second": {"imagenet_rwp": [1.0, 1.0], "timm": [1.0, 1.0]},
        "host_milliseconds": {},
        "import_seconds": {"hf_rwp": [0.1, 0.1], "RWP": [1.0, 1.0]},
    }
    by_what = {row["what"]: row for row in rows(record | {"frozen": found})}
    assert by_what["step, base noise (drawn) / plain LoRA"]["limit"] == 1.15
    memory = by_what["memory, base noise (drawn) / plain LoRA"]
    assert memory["limit"] == pytest.approx(1.05 + found["layer_bytes"] / found["weights_bytes"])
    assert by_what["step, base noise (copy) / plain LoRA"]["limit"] is None
    assert len(rows(record)) == len(by_what) - 6


def test_flat_lora_leaves_another_base_in_bfloat16_and_ours_does_not():
    """Why it is not what RWP does: it subtracts the noise."""
    changed = {}
    for kind, make in (("flat_lora", frozen_cost._flat_lora_step), ("drawn", frozen_cost._rwp_step)):
        torch.manual_seed(0)
        model = nn.Sequential(*[Adapted(nn.Linear(64, 64, bias=False), 4) for _ in range(2)]).to(torch.bfloat16)
        before = model[0].base.weight.clone()
        options = {} if kind == "flat_lora" else {"frozen": True}
        x = torch.randn(8, 64, dtype=torch.bfloat16)
        step = make(model, lambda model, x=x: model(x).square().mean(), **options)
        for _ in range(20):
            step()
        changed[kind] = (model[0].base.weight != before).float().mean().item()
    assert changed["drawn"] == 0
    assert changed["flat_lora"] > 0.01
