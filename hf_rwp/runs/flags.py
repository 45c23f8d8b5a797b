"""The flags of a recipe, its dataclass, as a parser: `--help` in groups below the commands that people want."""

import argparse
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_rwp.runs.mistakes import PROGRAM, Parser

_OTHERS = "other flags of Trainer"
# A class of flags names the group that they are in as `help_group`; these are where they are told by name.
GROUPS = ("comparison", "model", "data", "training", "RWP", "run", "Hub", _OTHERS)
_BY_NAME = {
    "model": "model|model_.*|pretrained|drop|drop_path|channels_last|torch_compile|mixed_precision|sync_bn|small_stem|"
    "base_dir|base_steps|use_peft|lora_.*|use_dora|load_in_.*|bf16|gradient_checkpointing|attn_implementation|dtype",
    "data": "data_.*|dataset|dataset_.*|max_length",
    "training": "epochs|num_train_epochs|max_steps|learning_rate|lr_scheduler_type|warmup_.*|optim|adam_.*|"
    "weight_decay|per_device_.*|gradient_accumulation_steps|max_grad_norm|seed",
    "RWP": "rwp|rwp_.*|method|sam_rho",
    "run": "output_dir|overwrite_output_dir|resume_from_checkpoint|eval_only|config|config_ignore_unknown|report_to|"
    "output|results|name|device|logging_steps|logging_strategy|save_.*|eval_strategy|deterministic|disable_tqdm|help|"
    "checkpointing_steps|quick",
    "Hub": "hub_.*|push_to_hub.*",
}
_ELSEWHERE = ("transformers.", "trl.")
_EXAMPLE = re.compile(r"^(?:# (?P<said>.*)\n)?```bash\n(?P<command>(?:.*\n)*?)```$", re.MULTILINE)
_LAUNCHER = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:accelerate launch|python)(?P<options>.*?) recipes/\w+\.py")
_LONG = 50  # characters of choices, which then stand in the help and not beside the flag
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class FlagParser(Parser, HfArgumentParser):  # type: ignore[misc]
    """`HfArgumentParser` for the dataclass `kind`, with `--config`. A mistake raises ValueError.

    doc: the recipe's docstring: a line, then blocks of a comment and its commands, of which help shows the first three.
    """

    def __init__(self, kind: type[Any], doc: str = "") -> None:
        super().__init__(kind, allow_abbrev=False, formatter_class=Formatter)  # type: ignore[arg-type]
        self.kind, self.doc = kind, doc
        self.prog = os.environ.get(PROGRAM, self.prog)
        self.add_argument("--config", metavar="FILE.yaml", help="A file of flags, `name: value`; flags given here win.")
        self.add_argument(
            "--config_ignore_unknown", action="store_true", help="Whether to pass over names in it that are not flags."
        )

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.doc.partition("\n")[0] or None)
        head = f"usage: {self.prog} [--flag value ...]\n\n{formatter.format_help()}"
        examples = "".join(f"\n{example}\n" for example in examples_in(self.doc, self.prog)[:3])
        formatter, groups = self._get_formatter(), dict[str, list[argparse.Action]]()
        for action in self._actions:
            if action.option_strings and not action.option_strings[0].startswith("--no_"):
                groups.setdefault(group_of(self.kind, action.dest), []).append(action)
        for title in sorted(groups, key=lambda title: GROUPS.index(title) if title in GROUPS else -1):
            formatter.start_section(title)
            formatter.add_arguments(groups[title])
            formatter.end_section()
        told = "\nA flag for true or false is also true without a value, and false as --no_NAME.\n"
        return f"{head}{examples}\n{formatter.format_help()}{told}"


class Formatter(argparse.HelpFormatter):
    """A flag once, with what kind of value it takes; its default, where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size((80, 24)).columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0] if action.dest != "help" else ", ".join(action.option_strings)
        if getattr(action.type, "__name__", "") == "string_to_bool":
            return f"{flag} [true|false]" if action.nargs == "?" else f"{flag} true|false"
        if len(_choices(action)) > _LONG:
            return f"{flag} NAME"
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{flag} {values}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(action.type, "VALUE")  # type: ignore[arg-type, call-overload, no-any-return]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, said = getattr(action.default, "value", action.default), action.help or ""
        if len(_choices(action)) > _LONG:
            said = f"{said} One of {_choices(action)}."
        if default is None or default is argparse.SUPPRESS or default in ("", [], {}) or action.nargs == 0:
            return said
        told = str(default).lower() if isinstance(default, bool) else str(default)
        if isinstance(default, list):
            told = " ".join(map(str, default))
        return f"{said} (default: {told.replace('%', '%%')})"


def _choices(action: argparse.Action) -> str:
    return ", ".join(map(str, action.choices or ()))


def group_of(kind: type[Any], name: str) -> str:
    """The title that a flag stands below."""
    owner = next((base for base in reversed(kind.__mro__) if name in inspect.get_annotations(base)), kind)
    own = vars(owner).get("help_group", "training")
    if own != "training":
        return str(own)
    named = next((title for title, names in _BY_NAME.items() if re.fullmatch(names, name)), None)
    return named or (_OTHERS if owner.__module__.startswith(_ELSEWHERE) else "training")


def examples_in(doc: str, prog: str, width: int = 80) -> list[str]:
    """What each block of commands in a docstring is for, and the commands, called as this program is."""
    return ["\n".join(_example(found["said"] or "", found["command"], prog, width)) for found in _EXAMPLE.finditer(doc)]


def _example(said: str, commands: str, prog: str, width: int) -> Iterable[str]:
    yield from textwrap.wrap(said, width, initial_indent="  # ", subsequent_indent="  # ")
    for command in commands.replace("\\\n", "").splitlines():
        command = " ".join(command.partition("  #")[0].split())
        if not Path(prog).suffix:  # `hf-rwp COMMAND`
            command = _LAUNCHER.sub(lambda found: f"{prog}{found['options']}", command)
        command = re.sub(r"(?<= )(--\S+) (?!-)", r"\1\0", command)  # a flag and its value stay together
        wrap = textwrap.TextWrapper(width - 2, "  ", "      ", break_long_words=False, break_on_hyphens=False)
        yield " \\\n".join(wrap.wrap(command)).replace("\0", " ")
