"""Files and folders that are whole or not there: written beside their place, then moved into it; and JSON."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"\[\n(?:null|[-+.\deE,\s])*\]")  # in a string a line's end is two characters


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` at the end; after an error what was there stays."""
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write(file: Path, content: str | bytes) -> None:
    """Put `content` in place of what `file` held, which whoever is reading it goes on reading."""
    with replacing(file) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end; after an error what was there stays."""
    partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "removed"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def as_json(value: Any) -> str:
    """JSON that any reader takes, indented, a list of numbers in one line: `without_nan`."""
    text = json.dumps(without_nan(value), indent=2, allow_nan=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)


def without_nan(value: Any) -> Any:
    """`value` with None for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def recipes_folder() -> Path:
    """The recipes: beside the package in a checkout, within it where it was installed."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
