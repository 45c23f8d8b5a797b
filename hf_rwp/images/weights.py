"""Where trained weights are, of all that people name: a folder, a run's, a file, or an id on the Hub."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """path: a folder with a config.json, or a file of weights without one; None for `hub_id`.

    config: what config.json says; empty for a file, and on the Hub before it is asked.
    """

    path: Path | None
    hub_id: str | None
    config: dict[str, Any]

    @property
    def is_file(self) -> bool:
        return self.path is not None and self.path.is_file()

    @property
    def library(self) -> str | None:
        """timm, transformers, or None where that is not known yet."""
        if not self.config:
            return None
        return "timm" if "architecture" in self.config else "transformers"

    @property
    def kind(self) -> str:
        """transformers' name of the model's class."""
        return str((self.config.get("architectures") or [self.config.get("model_type", "a model")])[0])


def find_weights(named: str, flag: str) -> Source:
    """What a flag names. A run's folder stands for its `model`, a file beside a config.json for its folder.

    Raises ValueError for a path that leads nowhere or to no weights.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        return Source(*_model_folder(path, named, flag))
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{flag}={named!r} is not a file of weights ({', '.join(SUFFIXES)}): name a folder with a config.json, "
                "or such a file"
            )
        if (path.parent / "config.json").is_file():
            return Source(*_model_folder(path.parent, str(path.parent), flag))
        return Source(path, None, {})
    looks_local = named.startswith(("/", "~", ".")) or named.count("/") > 1 or path.suffix in SUFFIXES
    beside = [item.name for item in path.parent.iterdir()] if "/" in named and path.parent.is_dir() else []
    mistyped = difflib.get_close_matches(path.name, beside, n=1)
    if looks_local or mistyped or path.parts[0] == "outputs" or not _HUB_ID.fullmatch(named):
        raise ValueError(f"{flag}={named!r} does not exist{_nearest(path)}")
    return Source(None, named, {})


def _model_folder(path: Path, named: str, flag: str) -> tuple[Path, None, dict[str, Any]]:
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder, None, _read(folder / "config.json")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{flag}={named!r} is a LoRA adapter, which is not a model by itself: vit_rwp.py leaves the merged model "
            "beside it, in `model`"
        )
    if (path / "adapter" / "adapter_config.json").is_file():
        raise ValueError(f"{flag}={named!r} is a run of a language model, an adapter: name a model of images")
    if (path / "checkpoints").is_dir() or list(path.glob("checkpoint-*")):
        raise ValueError(
            f"{flag}={named!r} is a run that has not finished: go on with --resume_from_checkpoint {named}, or name a "
            "file of weights in one of its checkpoints"
        )
    from hf_rwp.images.found import listed  # which imports datasets

    files = sorted(file.name for file in path.iterdir())
    raise ValueError(f"{flag}={named!r} holds no model, which has a config.json: it holds {listed(files, 5)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error
    return config if isinstance(config, dict) else {}


def _nearest(path: Path) -> str:
    """What there is in place of a path that leads nowhere."""
    known = path
    while not known.exists() and known.parent != known:
        known = known.parent
    missing = path.relative_to(known).parts[0] if known != path and known in path.parents else path.name
    names = sorted(item.name for item in known.iterdir()) if known.is_dir() else []
    near = difflib.get_close_matches(missing, names, n=3, cutoff=0.5) or names[:3]
    return f": {known} holds no {missing!r}" + (f" (there are: {', '.join(near)})" if near else "")
