"""`hf-rwp COMMAND`: the recipes and the commands of `hf_rwp.hub`, without a launcher.

A recipe runs in this process, or, with `--processes` or `--config_file`, in those that Accelerate starts.
"""

import argparse
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_rwp import EXTRAS, __version__, missing

RECIPES = {
    "train": ("imagenet_rwp.py", "a timm model on images, with RWP, plainly or with SAM"),
    "vit": ("vit_rwp.py", "a vision transformer on images, with Trainer"),
    "lora": ("lora_rwp.py", "a language model with LoRA, with TRL's SFTTrainer"),
    "compare": ("compare.py", "plain training, SAM and RWP under equal terms"),
    "landscape": ("landscape.py", "the loss around trained weights"),
    "benchmark": ("benchmark.py", "what a step costs on this machine"),
}
HUB = {
    "push": "a folder that a run left, to the Hub",
    "record": "append a run's results.json to a file of records",
    "card": "render the model cards of records",
}
EPILOG = """\
hf-rwp COMMAND --help lists a command's flags. Ahead of a recipe's: --processes N,
--config_file FILE.yaml (Accelerate's), as in hf-rwp train --processes 2 --epochs 3
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-rwp",
        description="Random Weight Perturbation: train, compare, measure, publish.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, said) in RECIPES.items():
        recipe_parser = commands.add_parser(name, help=said, add_help=False, allow_abbrev=False)
        recipe_parser.add_argument("--processes", type=int, default=1)
        recipe_parser.add_argument("--config_file")
    for name, said in HUB.items():
        commands.add_parser(name, help=said, add_help=False, allow_abbrev=False)
    options, flags = parser.parse_known_args(argv)
    if options.command in HUB:
        from hf_rwp.hub.__main__ import main as hub

        hub([options.command, *flags])
        return
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    refuse_missing(options.command)
    recipe, flags = recipes_folder() / RECIPES[options.command][0], [located(flag) for flag in flags]
    if options.processes > 1 or options.config_file:
        launch(recipe, flags, options.processes, options.config_file)
    else:
        sys.argv = [str(recipe), *flags]
        sys.path.insert(0, str(recipe.parent))  # as for `python recipe.py`
        runpy.run_path(str(recipe), run_name="__main__")


def refuse_missing(command: str, module: str = "__main__") -> None:
    """Exit, ahead of any work, where a package that a recipe needs is not installed.

    module: who asks; a recipe that is not the program but imported by it fails as any import does.
    """
    if module != "__main__":
        return
    own = {"compare": ("compare",), "benchmark": ("compare",), "lora": ("lora",)}
    for extra in ("recipes", *own.get(command, ())):
        for package in EXTRAS[extra]:
            if importlib.util.find_spec(package) is None:
                raise SystemExit(missing(f"hf-rwp {command}", package, extra))
    announce(command)


def announce(command: str) -> None:
    """Say that a recipe was started, ahead of imports that take seconds: once, on the main process, not for --help."""
    started, ranks = "HF_RWP_STARTED", ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "LOCAL_RANK")
    rank = next((os.environ[name] for name in ranks if name in os.environ), "0")
    if rank == "0" and started not in os.environ and not {"-h", "--help"} & {*sys.argv}:
        print(f"hf-rwp {command}: loading PyTorch and what else it needs", file=sys.stderr, flush=True)
    os.environ[started] = command  # for the processes that this one starts


def recipes_folder() -> Path:
    """Beside the package in a checkout, within it where it was installed."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def located(path: str) -> str:
    """`recipes/...` as the documentation has it, wherever the recipes are; all else as it is."""
    _, start, rest = path.partition("recipes/")
    installed = recipes_folder() / rest
    return str(installed) if path == start + rest and rest and installed.exists() and not Path(path).exists() else path


def launch(recipe: Path, flags: Sequence[str], processes: int, config_file: str | None) -> None:
    """`accelerate launch`, told all that it would warn about. A config file's number of processes is what it says.

    Exits with the status of the first process that failed, or of the signal, without the launcher's own tracebacks.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if config_file:
        options = ["--config_file", located(config_file)]
        options += ["--num_processes", str(processes)] if processes > 1 else []
    else:
        options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if not torch.accelerator.is_available() or torch.backends.mps.is_available():  # a machine has one of the latter
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # with --cpu Accelerate would start one process
    try:
        launch_command(launch_command_parser().parse_args([*options, str(recipe), *flags]))
    except (KeyboardInterrupt, SignalException) as stopped:  # the processes were told as well, and say what they do
        raise SystemExit(128 + getattr(stopped, "sigval", signal.SIGINT)) from None
    except (ChildFailedError, subprocess.CalledProcessError) as error:  # which they have told
        failed = error.get_first_failure()[1].exitcode if isinstance(error, ChildFailedError) else error.returncode
        raise SystemExit(failed if failed > 0 else 128 - failed) from None


if __name__ == "__main__":
    main()
