"""Export and push of models whose weights a mesh of processes holds together: whole, by the first process."""

from pathlib import Path

import peft
import pytest
import timm
import torch
from distributed import run, stop
from engines import PreciseLlamaForCausalLM, llama, sentences
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_rwp import push_to_hub
from hf_rwp.hub.export import save_any


def models():
    """Each with an input."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return {
        "timm": (timm.create_model("test_vit", num_classes=4), torch.randn(2, 3, 160, 160)),
        "pytorch": (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), torch.randn(2, 5)),
        "transformers": (llama(tied=True), sentences(2)),
        "peft": (adapted, sentences(2)),
    }


def export(folder):
    """What `save_any` and `push_to_hub` returned, after an evaluation that leaves all weights of the root gathered."""
    facts, pushed = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.push.push", lambda folder, *_, **__: pushed.append(str(folder)) or "address")
        for name, (model, inputs) in models().items():
            fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
            with torch.no_grad():
                model.eval()(inputs)
            facts[name] = save_any(model, Path(folder) / name)
        address = push_to_hub(model, "ada/net", folder=Path(folder) / "pushed")
    return facts, pushed, address


def test_all_kinds_of_models_come_out_whole(tmp_path):
    stop(0)  # DTensor caches plans with the names of process groups, which a test before this one may have ended
    (facts, pushed, address), (others, nothing, no_address) = run(2, export, tmp_path, timeout=60)
    assert facts == others
    assert {name: own["library"] for name, own in facts.items()} == {name: name for name in models()}
    architectures = ["test_vit", "Sequential", *["PreciseLlamaForCausalLM"] * 2]
    assert [own["architecture"] for own in facts.values()] == architectures
    assert (pushed, address, nothing, no_address) == ([str(tmp_path / "pushed")], "address", [], "")
    plain = {name: model.state_dict() for name, (model, _) in models().items()}
    found = {
        "timm": timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).state_dict(),
        "pytorch": load_file(tmp_path / "pytorch" / "model.safetensors"),
        "transformers": PreciseLlamaForCausalLM.from_pretrained(tmp_path / "transformers").state_dict(),
        "peft": peft.PeftModel.from_pretrained(llama(), tmp_path / "peft").state_dict(),
    }
    for name, weights in found.items():
        assert weights.keys() == plain[name].keys()
        assert all(torch.equal(weights[of], weight) for of, weight in plain[name].items())
