"""Every file in recipes/configs and recipes/accelerate is read whole, and starts what it is for."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from imagenet import RECIPES, load_recipe, results, undrawn
from launched import environment_of
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from vit import TINY, load_vit_recipe

from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
VIT_CONFIGS = sorted((RECIPES / "configs" / "vit").glob("*.yaml"))
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(32):
        path = folder / ("train" if number < 24 else "validation") / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_starts(config, pictures, tmp_path):
    """Two steps of it, on small images, a CPU and in full precision; what it says of the rest is taken as it is."""
    recipe = load_recipe()
    recipe.load_images = load_images
    settings = yaml.safe_load(config.read_text())
    small = ["--epochs=1", "--batch_size=12", "--mixed_precision=no", "--workers=0", "--report_to=none"]
    small += [f"--data_dir={pictures}", f"--img_size={min(settings['img_size'], 32)}", f"--output_dir={tmp_path}"]
    for kind, few in (("resnet50", {"layers": [1, 1, 1, 1]}), ("deit", {"depth": 2})):
        if settings["model"].startswith(kind):
            assert "model_kwargs" not in settings
            small.append(f"--model_kwargs={few}")
    with undrawn(recipe):
        recipe.main(parse_whole(recipe, config, small))
    assert results(tmp_path)["final"]["rwp"]["slots"] == {"clean": 2, "perturbed": 2}


def parse_whole(recipe, config, flags):
    """The arguments of a configuration, once all of it is seen to have reached them; flags win."""
    args = parse_arguments(recipe.Arguments, [f"--config={config}", *flags])
    for name, value in yaml.safe_load(config.read_text()).items():
        if not any(flag.startswith(f"--{name}=") for flag in flags):
            kept = getattr(args, name)
            if isinstance(kept, float):
                value = float(value)  # 1e-4 is a string to YAML 1.1
            if isinstance(value, dict):
                kept = json.loads(kept) if isinstance(kept, str) else kept
                value = {key: float(item) for key, item in value.items()}
            assert kept == value, name
    return args


@pytest.mark.parametrize("config", VIT_CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_for_vits_starts(config, pictures, tmp_path):
    """The same, with random weights: those of a tiny ViT where the configuration names trained ones."""
    recipe = load_vit_recipe()
    recipe.load_images = load_images
    settings = yaml.safe_load(config.read_text())
    small = ["--max_steps=2", "--per_device_train_batch_size=12", "--bf16=false", "--dataloader_num_workers=0"]
    small += ["--dataloader_persistent_workers=false", "--report_to=none", f"--data_dir={pictures}"]
    if "/" in settings["model_name_or_path"]:
        folder = tmp_path / "trained"
        ViTForImageClassification(ViTConfig(**TINY, image_size=32)).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        small.append(f"--model_name_or_path={folder}")
    else:
        small += ["--img_size=32", f"--model_kwargs={settings['model_kwargs'] | {'depth': 2}}"]
    with undrawn(recipe):
        recipe.main(parse_whole(recipe, config, [*small, f"--output_dir={tmp_path / 'out'}"]))
    assert results(tmp_path / "out")["final"]["rwp"]["slots"] == {"clean": 2, "perturbed": 2}


def test_the_digits_file_says_what_no_flag_means():
    recipe = load_recipe()
    spelled = parse_arguments(recipe.Arguments, [f"--config={RECIPES / 'configs' / 'digits.yaml'}"])
    plain = parse_arguments(recipe.Arguments, [])
    plain.rwp_gamma = 0.01  # its default depends on the mode of the noise
    assert spelled == plain


@pytest.mark.parametrize(("file", "replicas", "shards"), [("fsdp2_8", 1, 8), ("hsdp_2x8", 2, 8)])
def test_a_launch_file_that_shards_weights_is_what_accelerate_reads(file, replicas, shards, monkeypatch):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{file}.yaml"))
    assert (config.distributed_type, config.num_processes) == (DistributedType.FSDP, replicas * shards)
    assert config.num_machines == replicas
    for name, value in environment_of(file).items():
        monkeypatch.setenv(name, value)
    plugin, mesh = FullyShardedDataParallelPlugin(), ParallelismConfig()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is size_based_auto_wrap_policy
    assert plugin.min_num_params == 2 * 10**6
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is False
    if replicas > 1:  # without a mesh FSDP2 shards over all processes
        assert mesh.active_mesh_dims == ["dp_replicate", "dp_shard"]
        assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.total_size) == (replicas, shards, config.num_processes)


@pytest.mark.parametrize("config", LAUNCHES, ids=lambda path: path.stem)
def test_the_precision_of_a_launch_file_reaches_its_processes(config):
    expected = load_config_from_file(str(config)).mixed_precision or "no"
    assert environment_of(config.stem)["ACCELERATE_MIXED_PRECISION"] == expected


# Accelerate refuses a mesh, and DeepSpeed is not there, where there is no GPU. On a CPU the files of GPUs start what
# cpu_2 does, which test_imagenet_resuming.py starts; of several machines test_nodes.py has the launches.
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [pytest.param(path, id=path.stem) for path in LAUNCHES if path.stem not in ("hsdp_2x8", "deepspeed_zero2")],
)
def test_a_launch_file_starts_its_replicas(config, tmp_path):
    """On CPUs, with at most two processes; several machines are two launches on this one."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        f"started = Path({str(tmp_path)!r}, f'rank_{{accelerator.process_index}}')\n"
        "started.write_text(f'{accelerator.num_processes} {accelerator.mixed_precision}')\n"
    )
    expected = load_config_from_file(str(config))
    sizes = {"cpu_2": 2, "gpu_1": 1, "gpu_8": 8, "fsdp2_8": 8, "multi_node": 16}
    assert vars(expected)["num_processes"] == sizes[config.stem]
    processes = min(expected.num_processes, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}"]
    command += [f"--num_processes={processes}"]
    if processes > 1:
        command += [f"--main_process_port={port}", "--main_process_ip=127.0.0.1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launches = [
        subprocess.Popen(
            [*command, *([f"--machine_rank={rank}"] if expected.num_machines > 1 else []), str(script)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(expected.num_machines)
    ]
    said = "".join(launch.communicate(timeout=200)[0] for launch in launches)
    assert [launch.returncode for launch in launches] == [0] * expected.num_machines, said
    precision = expected.mixed_precision or "no"
    started = {path.name: path.read_text() for path in tmp_path.glob("rank_*")}
    assert started == {f"rank_{rank}": f"{processes} {precision}" for rank in range(processes)}
