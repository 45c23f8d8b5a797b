"""recipes/accelerate/deepspeed_zero2.yaml, and the recipes under it.

How to run the tests that need deepspeed on a CPU is in tests/core/test_deepspeed.py.
"""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
import vit
import zero
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from distributed import run, stop
from imagenet import RECIPES, results

from hf_rwp.runs.launch import check_launch

FILE = RECIPES / "accelerate" / "deepspeed_zero2.yaml"
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not INSTALLED, reason="deepspeed is not installed; see tests/core/test_deepspeed.py"
)


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """Those that have had DeepSpeed in them serve nobody else."""
    yield
    if INSTALLED:
        stop()


def environment() -> dict[str, str]:
    """What Accelerate's launcher makes of the file for its processes."""
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FILE), "--main_process_port", "0", "script.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    return {name: value for name, value in prepare_deepspeed_cmd_env(args)[1].items() if name.startswith("ACCELERATE_")}


def test_the_launch_file_is_what_accelerate_reads(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"  # Trainer's max_grad_norm


def test_a_loop_that_steps_by_itself_refuses_deepspeed():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r"DeepSpeed does both inside of backward\(\): take vit_rwp.py .* or FSDP2"):
        check_launch(accelerator, "rwp", {})


def train_vit(folder: str, *flags: str) -> None:
    os.environ.update(environment())
    zero.accelerate_on_cpus()
    vit.train(folder, *vit.SCRATCH, "--rwp_gamma=0.2", *flags)


@needs_deepspeed
def test_vit_rwp_trains_under_zero_2_and_resumes_to_the_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(2, train_vit, str(whole), timeout=100, keep_group=True)
    report = results(whole)["final"]["rwp"]
    assert (report["placement"], report["slots"]) == ("parallel", {"clean": 4, "perturbed": 4})
    vit.cut_back(whole, cut, 2)
    resumed = f"--resume_from_checkpoint={cut / 'checkpoint-2'}"
    run(2, train_vit, str(cut), resumed, timeout=100, keep_group=True)
    one, other = (
        torch.load(next((folder / "checkpoint-4").glob("*/mp_rank_00_model_states.pt")), weights_only=False)
        for folder in (whole, cut)
    )
    assert one["module"].keys() == other["module"].keys()
    assert all(torch.equal(other["module"][name], weight) for name, weight in one["module"].items())
