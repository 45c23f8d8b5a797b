"""How a recipe reads its flags, from the command line and from a file."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None, description: str = "") -> Arguments:
    """An instance of the dataclass `kind` from the command line, and from the file that `--config FILE.yaml` names.

    The file maps the same names to values; a flag on the command line overrides it. argv: None is the process's own.
    Exits with a usage message for a flag or value that argparse refuses; raises ValueError for an unknown flag and for
    a file of something else.
    """
    parser = HfArgumentParser(kind, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="A file of flags, `name: value`; flags given here win.")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = parser.parse_known_args(argv)[0].config
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {} if config else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds no flags: each must be a line of its own, `name: value`")
    # As flags ahead of the others they are checked and converted alike, and the later flag wins.
    flags = [flag for name, value in settings.items() if value is not None for flag in _flags(name, value)]
    parsed: Arguments = parser.parse_args_into_dataclasses(flags + argv, look_for_args_file=False)[0]
    return parsed


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
