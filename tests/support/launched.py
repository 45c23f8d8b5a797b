"""A recipe on gloo ranks under a file of recipes/accelerate that shards weights, as `accelerate launch` would start it.

`environment_of` is what Accelerate's launcher makes of the file; `under` gives it to a rank of `distributed.run`, where
Accelerate takes the group for one of GPUs (see `engines.on_cpus`), and everything after that is its own code.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import imagenet
import vit
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from engines import on_cpus

STARTS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
# Of each file the sizes that fit on four processes, and modules as small as those of the tests' models.
SMALL = {
    "fsdp2_8": {"FSDP_MIN_NUM_PARAMS": "1000"},
    "hsdp_2x8": {"FSDP_MIN_NUM_PARAMS": "1000", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
}


def environment_of(file: str) -> dict[str, str]:
    """What the launcher adds to the environment of a process for `file`, a name in recipes/accelerate."""
    path = imagenet.RECIPES / "accelerate" / f"{file}.yaml"
    options = ["--config_file", str(path), "--main_process_ip", "127.0.0.1", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    args.main_process_port = 0  # any
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(STARTS)}


@contextmanager
def under(file: str, changed: Mapping[str, str] | None = None) -> Iterator[None]:
    """A process that was launched with `file`, cut down to `SMALL`. changed: further variables."""
    before = dict(os.environ)
    AcceleratorState._reset_state(True)
    on_a_cpu = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    os.environ.update({**environment_of(file), **SMALL[file], **on_a_cpu, **(changed or {})})
    try:
        with on_cpus():
            yield
    finally:
        AcceleratorState._reset_state(True)
        os.environ.clear()
        os.environ.update(before)


def train_imagenet(file: str, changed: Mapping[str, str] | None, folder: str, *flags: str) -> str:
    """`imagenet.train_on_rank` in a process `under` the file: what it ended with, "" for success."""
    with under(file, changed):
        return imagenet.train_on_rank(folder, *flags)


def train_vit(file: str, changed: Mapping[str, str] | None, folder: str, *flags: str) -> str:
    """`vit.train_on_rank` in a process `under` the file: what it ended with, "" for success."""
    with under(file, changed):
        return vit.train_on_rank(folder, *flags)
