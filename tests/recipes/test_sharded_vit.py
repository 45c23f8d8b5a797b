"""recipes/vit_rwp.py where processes hold the weights together: FSDP2 and HSDP as recipes/accelerate has them."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run, stop
from imagenet import few_digits, results
from launched import train_vit
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from vit import SCRATCH, cut_back, load_vit_recipe, trained_vit

from hf_rwp.runs.parsing import parse_arguments

# 100 images: four steps an epoch on four processes.
FLAGS = [*SCRATCH, "--per_device_train_batch_size=8", "--save_strategy=steps", "--save_steps=3", "--save_total_limit=9"]
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
BLOCKS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViTLayer"}


@pytest.fixture(autouse=True)
def new_processes():
    """DTensor caches plans with the names of process groups, which a test before this one may have ended."""
    stop(0)


def start(file, changed, folder, *flags):
    assert run(4, train_vit, file, changed, str(folder), *FLAGS, *flags, timeout=180) == [""] * 4
    return results(folder)


@pytest.mark.parametrize(
    ("file", "changed"), [("hsdp_2x8", BLOCKS), pytest.param("fsdp2_8", FULL, marks=pytest.mark.slow)]
)
def test_a_run_its_checkpoints_and_its_model(file, changed, tmp_path):
    whole = start(file, changed, tmp_path / "whole")
    final, parallel = whole["final"], file == "hsdp_2x8"
    assert final["rwp"]["placement"] == ("parallel" if parallel else "sequential")
    assert final["rwp"]["slots"]["clean"] == final["rwp"]["slots"]["perturbed"] == final["step"]
    assert whole["hardware"]["replicas"] == (2 if parallel else 1)
    assert len(whole["replicas_sha256"]) == 1

    again = start(file, changed, cut_back(tmp_path / "whole", tmp_path / "again", 3), "--resume_from_checkpoint=latest")
    assert again["replicas_sha256"] == whole["replicas_sha256"]
    assert again["weights_sha256"] == whole["weights_sha256"]

    # The model is whole: what one process, without a mesh, makes of it and of a checkpoint.
    folder = tmp_path / "whole" / "model"
    assert AutoModelForImageClassification.from_pretrained(folder).num_labels == 10
    recipe = load_vit_recipe()
    recipe.load_images = lambda **_: few_digits()
    flags = ["--eval_only", "--report_to=none", f"--output_dir={tmp_path / 'eval'}"]
    recipe.main(parse_arguments(recipe.Arguments, [*flags, f"--model_name_or_path={folder}"]))
    found = json.loads(Path(tmp_path, "eval", "eval.json").read_text())
    assert found["eval_loss"] == pytest.approx(final["eval_loss"], rel=1e-5)


def test_lora_with_noise_on_a_sharded_base_writes_a_whole_adapter_and_a_whole_model(tmp_path):
    pytest.importorskip("peft")
    trained = trained_vit(tmp_path / "trained")
    flags = ["--per_device_train_batch_size=8", "--num_train_epochs=1", "--report_to=none", "--save_strategy=no"]
    flags += [f"--model_name_or_path={trained}", "--lora_r=2", "--rwp_frozen"]
    assert run(4, train_vit, "hsdp_2x8", None, str(tmp_path / "out"), *flags, timeout=180) == [""] * 4
    run_of = results(tmp_path / "out")
    assert "base_model.model.vit.embeddings" in run_of["final"]["rwp"]["relative_noise"]["largest"]["name"]
    assert len(run_of["replicas_sha256"]) == 1
    before = load_file(trained / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tuple(weight.shape) for name, weight in adapter.items() if "lora_A" in name} == {(2, 16), (2, 32)}
    merged = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {name: weight.shape for name, weight in merged.items() if "classifier" not in name} == {
        name: weight.shape for name, weight in before.items() if "classifier" not in name
    }
    norms = [name for name in before if "layernorm" in name]
    assert norms
    assert all(torch.equal(merged[name], before[name]) for name in norms)  # the base is clean, and was not trained
