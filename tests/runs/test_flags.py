"""runs/flags.py: `--help`, of every recipe."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from distributed import night

from hf_rwp.cli import RECIPES
from hf_rwp.core.arguments import RWPArguments
from hf_rwp.images.arguments import ImageArguments
from hf_rwp.runs.flags import FlagParser, examples_in

FOLDER = Path(__file__).parents[2] / "recipes"
HEAVY = {"torch", "timm", "datasets", "accelerate", "matplotlib", "scipy"}
OF_TRAINER = {"torch", "accelerate", "scipy"}  # what its own flags import
# What each imports before it has read its flags, of all that takes long.
NEEDED = {"vit": OF_TRAINER, "lora": OF_TRAINER}
GROUPS = {
    "train": ["model", "data", "training", "RWP", "run", "Hub"],
    "vit": ["model", "data", "training", "RWP", "run", "Hub", "other flags of Trainer"],
}
DOC = """Train it.

# First, on whatever this machine has
```bash
accelerate launch recipes/imagenet_rwp.py
accelerate launch recipes/imagenet_rwp.py --rwp false                  # to compare
```

# Then, on eight of them
```bash
OMP_NUM_THREADS=1 accelerate launch --config_file recipes/accelerate/gpu_8.yaml recipes/imagenet_rwp.py \\
    --config recipes/configs/imagenet_resnet50.yaml --dataset ILSVRC/imagenet-1k
```
"""


@dataclass
class Flags(ImageArguments, RWPArguments):
    rwp: bool = field(default=True, metadata={"help": "Whether to perturb."})
    lr: float = field(default=0.1, metadata={"help": "Learning rate."})
    scale: list[float] = field(default_factory=lambda: [0.1, 1.0], metadata={"help": "Two numbers."})
    name: str | None = field(default=None, metadata={"help": "Of the run."})


@pytest.mark.parametrize("command", night(RECIPES, ["lora"]))
def test_help_has_three_commands_on_top_then_flags_in_groups_and_imports_little(command):
    program = (
        f"import runpy, sys; sys.argv = [{str(FOLDER / RECIPES[command][0])!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    print(*sorted({HEAVY} & {{*sys.modules}}), file=sys.stderr)"
    )
    environment = {**os.environ, "HF_RWP_PROGRAM": f"hf-rwp {command}", "COLUMNS": "80"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=500)
    assert run.returncode == 0, run.stderr
    assert set(run.stderr.splitlines()[-1].split()) <= NEEDED.get(command, set())
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"usage: hf-rwp {command} [--flag value ...]"
    groups = [line[:-1] for line in lines if re.fullmatch(r"\w[\w ]*:", line)]
    assert groups == GROUPS.get(command, groups)
    assert {"run"} <= {*groups}
    top = run.stdout.partition(f"\n{groups[0]}:\n")[0]
    assert len(re.findall(rf"^  hf-rwp {command}\b", top, re.MULTILINE)) >= (2 if command == "demo" else 3)
    flags = re.findall(r"^  (--\w+)", run.stdout, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 6
    assert not [flag for flag in flags if flag.startswith("--no_")]


def test_a_flag_is_one_line_with_its_values_and_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(FlagParser(Flags).format_help().split())
    for said in (
        "--rwp [true|false] Whether to perturb. (default: true)",
        "--lr X Learning rate. (default: 0.1)",
        "--scale X [X ...] Two numbers. (default: 0.1 1.0)",
        "--name TEXT Of the run. --",
        "--rwp_noise {filter,filter_normalized} What",
        "false as --no_NAME.",
    ):
        assert said in text
    assert "--rwp-noise" not in text
    assert "None" not in text


def test_what_help_says_of_true_and_false_is_so():
    for words, value in (([], True), (["--rwp"], True), (["--rwp", "false"], False), (["--no_rwp"], False)):
        assert FlagParser(Flags).parse_args_into_dataclasses(words, look_for_args_file=False)[0].rwp is value


def test_examples_are_those_of_the_docstring_called_as_the_program_was():
    first, second = examples_in(DOC, "hf-rwp train", width=60)
    assert first == "  # First, on whatever this machine has\n  hf-rwp train\n  hf-rwp train --rwp false"
    assert second == (
        "  # Then, on eight of them\n"
        "  hf-rwp train --config_file recipes/accelerate/gpu_8.yaml \\\n"
        "      --config recipes/configs/imagenet_resnet50.yaml \\\n"
        "      --dataset ILSVRC/imagenet-1k"
    )
    assert examples_in(DOC, "imagenet_rwp.py")[0].splitlines()[1] == "  accelerate launch recipes/imagenet_rwp.py"
