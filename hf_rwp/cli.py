"""`hf-rwp COMMAND`: the recipes and the package's own commands, without a launcher.

A recipe runs in this process, or, with `--processes` or `--config_file`, in those that Accelerate starts. A user's
mistake ends all of it with one line and status 2 (`runs.mistakes`).
"""

import argparse
import importlib
import importlib.util
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_rwp import EXTRAS, __version__, missing
from hf_rwp.runs.files import recipes_folder
from hf_rwp.runs.hints import meant
from hf_rwp.runs.mistakes import (
    OF_THE_LAUNCHER,
    PROGRAM,
    STATUS,
    Parser,
    refuse,
    shows_all,
    tell,
    told_by_processes,
    told_in_a_line,
)
from hf_rwp.runs.started import announce

RECIPES = {  # the file, and what it is for
    "train": ("imagenet_rwp.py", "a timm model on images, with RWP, plainly or with SAM"),
    "vit": ("vit_rwp.py", "a vision transformer on images, with Trainer"),
    "lora": ("lora_rwp.py", "a language model with LoRA, with TRL's SFTTrainer"),
    "demo": ("demo.py", "what RWP does, beside plain training and SAM, in two minutes"),
    "gamma": ("gamma.py", "which gamma suits a model and its data"),
    "compare": ("compare.py", "plain training, SAM and RWP under equal terms"),
    "landscape": ("landscape.py", "the loss around trained weights"),
    "benchmark": ("benchmark.py", "what a step costs on this machine"),
}
COMMANDS = {  # module:function, which is called with the words after the command, and what it is for
    "predict": ("hf_rwp.trainer.predict:main", "the classes that a trained model sees in images"),
    "curves": ("hf_rwp.hub.curves:main", "the curves of runs over one another, in one picture"),
    "push": ("hf_rwp.hub.__main__:push_folder", "a folder that a run left, to the Hub"),
    "record": ("hf_rwp.hub.__main__:record", "append a run's results.json to a file of records"),
    "card": ("hf_rwp.hub.__main__:card", "render the model cards of records"),
}
WITH_RECIPES = ("predict", "curves")  # commands that need the packages of the recipes
# Whose flags are read within a second, see flags_first.
LIGHT_FLAGS = ("train", "gamma", "compare", "landscape", "benchmark", "demo", "report", *WITH_RECIPES)
EPILOG = "Ahead of a recipe's flags: --processes N, --config_file FILE.yaml (Accelerate's)"


class Aligned(argparse.RawDescriptionHelpFormatter):
    """Each command in one line: argparse forgets that commands are indented once more than flags."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(map(len, {**RECIPES, **COMMANDS})) + 4

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.dest == "command" and action.nargs else text


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_a_line():
        start(sys.argv[1:] if argv is None else argv)


def start(argv: Sequence[str]) -> None:
    """Run a command. Raises ValueError for what is none."""
    parser = Parser(
        prog="hf-rwp",
        usage="%(prog)s COMMAND ...    (its flags: hf-rwp COMMAND --help)",
        description="Random Weight Perturbation: train, compare, measure, publish.",
        epilog=EPILOG,
        formatter_class=Aligned,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    table = {**RECIPES, **COMMANDS}
    for name, (_, said) in table.items():
        commands.add_parser(name, help=said, add_help=False, allow_abbrev=False)
    if not argv or (argv[0] not in table and argv[0] not in ("-h", "--help", "--version")):
        raise ValueError(no_command(argv, table))
    command, words = parser.parse_args(argv[:1]).command, list(argv[1:])
    os.environ[PROGRAM] = f"hf-rwp {command}"  # for what the command says of itself
    if command in WITH_RECIPES:
        refuse_missing(command)
    if command in COMMANDS:
        module, _, function = COMMANDS[command][0].partition(":")
        getattr(importlib.import_module(module), function)(words)
        return
    refuse_missing(command)
    ahead = Parser(prog="hf-rwp", add_help=False, allow_abbrev=False)
    ahead.add_argument("--processes", type=int, default=1)
    ahead.add_argument("--config_file")
    options, flags = ahead.parse_known_args(words)
    if options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    if options.config_file and not Path(located(options.config_file)).is_file():
        raise ValueError(f"--config_file {options.config_file}: there is no such file; recipes/accelerate has some")
    recipe, flags = recipes_folder() / RECIPES[command][0], [located(flag) for flag in flags]
    if options.processes > 1 or options.config_file:
        announce(command)
        launch(recipe, flags, options.processes, options.config_file)
    else:
        sys.argv = [str(recipe), *flags]
        sys.path.insert(0, str(recipe.parent))  # as for `python recipe.py`
        runpy.run_path(str(recipe), run_name="__main__")


def no_command(argv: Sequence[str], names: Collection[str]) -> str:
    """What to say of words that do not begin with a command."""
    listed = "hf-rwp --help lists the commands"
    if not argv:
        return f"hf-rwp needs a command, such as train: {listed}"
    if argv[0].startswith("-"):
        return f"a command comes ahead of {argv[0]}: {listed}"
    name = meant(argv[0], names)
    return f"no command {argv[0]}" + (f"; did you mean {name}?" if name else f": {listed}")


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
                who = f"hf-rwp {command}" if command in {**RECIPES, **COMMANDS} else f"{command}.py"
                refuse(missing(who, package, extra), everywhere=True)
    if command not in LIGHT_FLAGS:
        announce(command)


def located(path: str) -> str:
    """`recipes/...` as the documentation has it, wherever the recipes are; all else as it is."""
    _, start, rest = path.partition("recipes/")
    installed = recipes_folder() / rest
    return str(installed) if path == start + rest and rest and installed.exists() and not Path(path).exists() else path


def launch(recipe: Path, flags: Sequence[str], processes: int, config_file: str | None) -> None:
    """`accelerate launch`, told all that it would warn about. A config file's number of processes is what it says.

    Exits with the status of the first process that failed, or of the signal, without the launcher's own reports: what
    the processes refuse is said here, once they have ended.
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
    before = logging.root.manager.disable
    if not shows_all():
        os.environ[OF_THE_LAUNCHER] = "1"
        logging.disable(logging.ERROR)  # the agent's, of processes that have failed
    try:
        launch_command(launch_command_parser().parse_args([*options, str(recipe), *flags]))
    except (KeyboardInterrupt, SignalException) as stopped:  # the processes were told as well, and say what they do
        raise SystemExit(128 + getattr(stopped, "sigval", signal.SIGINT)) from None
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        if shows_all():
            raise
        failed = error.get_first_failure()[1].exitcode if isinstance(error, ChildFailedError) else error.returncode
        if isinstance(error, ChildFailedError) and (line := told_by_processes(error.failures.values())):
            failed = STATUS
            tell(line)
        raise SystemExit(failed if failed > 0 else 128 - failed) from None
    finally:
        logging.disable(before)
        os.environ.pop(OF_THE_LAUNCHER, None)


if __name__ == "__main__":
    main()
