"""What a run was, without a trace of whose machine it was, and files of such records."""

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from hf_rwp.core.sharding import whole_of
from hf_rwp.runs.files import without_nan as without_nan
from hf_rwp.runs.sharded import processes_per_replica, replicas_of_run

_PLACE = re.compile(r"""\w[\w+.-]*://[^\s'",;|]+|(?<![\w./<~*)\]-])(~\w*|\.{1,2})?/[^\s'",;|:{}()\[\]]+""")
_OF_THE_HUB = ("hf://", "https://huggingface.co/")
_BRACES = re.compile(r"\{[^{}\s]*\}")  # of WebDataset's {000..099}
_PRIVATE = re.compile(r"(^|_)(token|url|host|hostname|endpoint|address|addr|ip|password|secret|api_key)$")
_PACKAGES = ("accelerate", "timm", "transformers", "datasets", "hf-rwp")


class ByClass(TypedDict):
    """How the held-out images of each class fared, in the classes' order; not kept of more than 100 classes."""

    names: list[str]
    images: list[int]  # that could be read
    accuracy: list[float | None]  # top-1, a fraction in [0, 1]; None for a class without images
    confusion: list[list[int]]  # row i, column j: images of class i that were taken for class j


class Row(TypedDict, total=False):
    """An epoch of a run. Accuracies are fractions in [0, 1], losses means; `_ema` stands for averaged weights."""

    epoch: float  # that are behind the run with this one
    step: int  # optimizer steps that are behind the run
    method: str  # base, rwp or sam
    train_loss: float  # over the epoch's gradients, clean and perturbed ones alike
    loss_clean: float
    loss_perturbed: float
    loss_gap: float  # loss_perturbed - loss_clean
    learning_rate: float  # the largest of any group, at the end
    seconds: float  # of training, without evaluation
    images_per_second: float  # over all replicas, in those seconds
    unreadable_images: int  # of the training split, since the run began
    top1: float
    top5: float
    eval_loss: float  # cross-entropy
    unreadable_eval_images: int
    top1_ema: float
    top5_ema: float
    eval_loss_ema: float
    unreadable_eval_images_ema: int
    by_class: ByClass  # only while a run is under way, of its last epoch and the best one
    by_class_ema: ByClass
    rwp: dict[str, Any]  # `RWP.report()` since the run began, and `gamma`


class Results(TypedDict, total=False):
    """What results.json holds. Everything but `arguments` may be missing where it is not known."""

    final: Row  # of the weights that are described: the last epoch's, or the best one's
    best: dict[str, Any]  # `checkpoint`, and its figures, where another one than the last was chosen
    chosen: str  # `best`, where `final` is of the best weights
    history: list[Row]
    by_class: ByClass  # of the weights that are described
    seconds: float  # of training, without evaluation
    weights_sha256: str  # `weights_digest` of the weights that are described
    replicas_sha256: list[str]  # that of each replica's, each value once: one, as long as all are bit-equal
    arguments: dict[str, Any]  # the flags, `scrub_paths` of them
    command: str  # that gives the same run
    base_model: str | None  # what training started from, by its id on the Hub
    data: dict[str, dict[str, Any]]  # by role, train and validation: `images`, None for a stream, and the `split`
    found: dict[str, Any]  # more of them: classes with counts, columns, files left out, notes (`data_facts`)
    model: dict[str, Any]  # `name`, number of `weights`, where they are `from`; how many are `trained` if not all
    images_per_step: dict[str, Any] | None  # `step_facts`
    hardware: dict[str, Any]  # this and what follows: `environment`
    versions: dict[str, str]
    git_commit: str | None
    date: str


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the run ran on and with: hardware, versions, and the commit of the code, None where git does not know."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cuda = accelerator.device.type == "cuda"
    return {
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "replicas": replicas_of_run(accelerator),
            **({"processes": accelerator.num_processes} if processes_per_replica(accelerator) > 1 else {}),
            "mixed_precision": accelerator.mixed_precision,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": commit or None,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers: equal for models that are equal to the bit. Collective for sharded ones."""
    sha = hashlib.sha256()
    for tensor in map(whole_of, module.state_dict().values()):
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def scrub_paths(value: Any) -> Any:
    """An argument's value without a trace of a machine: of each path, and of each address but the Hub's, the last part.

    In lists and mappings of any depth. Of a mapping, what is a token or names a machine is left out.
    """
    if isinstance(value, Mapping):
        return {name: scrub_paths(item) for name, item in value.items() if not _PRIVATE.search(str(name))}
    if isinstance(value, (list, tuple)):
        return type(value)(map(scrub_paths, value))
    if not isinstance(value, str):
        return value
    pattern = _BRACES.sub("*", value)
    if value.startswith(("/", "~", "./", "../")) or (os.sep in pattern and glob.glob(pattern)):
        return Path(value).name
    return _PLACE.sub(_last_part, value)


def hub_id(name: str | None) -> str | None:
    """The name of a model if it can only be one on the Hub, and is not a path on this machine."""
    return name if name and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else None


def base_of(model: nn.Module) -> str | None:
    """What a transformers model was fine-tuned from, by its id on the Hub; None where it has none."""
    return hub_id(getattr(getattr(model, "config", None), "_name_or_path", None))


def _last_part(place: re.Match[str]) -> str:
    text = place[0]
    path = re.sub(r"^\w[\w+.-]*://[^/]*|[?#].*", "", text)
    return text if text.startswith(_OF_THE_HUB) else path.rstrip("/").rpartition("/")[2]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, none without a file; a last line that a kill cut short is left out.

    Raises ValueError for a line that is not JSON.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(
                f"{path}, line {number} is not a record ({error}): remove that line, or name another file"
            ) from error
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a .jsonl file, made if missing, and have it on disk; what a kill cut short there is cut off.

    Other processes may append too. Raises ValueError for a number that JSON does not have, see `without_nan`, and for
    a file of something else.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"  # before the file is touched
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    with FileLock(Path(tempfile.gettempdir()) / f"hf_rwp_{name}.lock"), path.open("a+b") as file:
        count = len(read_records(path))
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if len(lines) > count:
            file.truncate(sum(map(len, lines[:count])))
        elif lines and not lines[-1].endswith(b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def repeatable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that another run needs to be the same, `scrub_paths` of them: none of its places."""
    places = ("rwp", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "push_to_hub")
    kept = {name: value for name, value in arguments.items() if name not in places and not name.startswith("hub_")}
    scrubbed: dict[str, Any] = scrub_paths(kept)
    return scrubbed


def command_of(start: str, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command line that a run's arguments amount to, after its `start`, without those that have their default."""
    words = shlex.split(start)
    for name, value in arguments.items():
        if value != defaults[name] and value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(item) for item in values)]
    return shlex.join(words)


def with_by_class(results: Results) -> Results:
    """`results` with the figures by class of what `final` describes, an average where there is one, beside the rows.

    Those of the rows themselves, which hold them while a run is under way, are left out.
    """
    final = results["final"]
    found = final.get("by_class_ema", final.get("by_class"))
    rows = {"final": without_by_class(final), "history": [without_by_class(row) for row in results["history"]]}
    others = {name: value for name, value in results.items() if name != "by_class"}  # may be of other weights
    return {**others, **rows, **({"by_class": found} if found else {})}  # type: ignore[typeddict-item]


def without_by_class(row: Row) -> Row:
    """A row without its figures by class."""
    return {name: value for name, value in row.items() if not name.startswith("by_class")}  # type: ignore[return-value]


def aligned(rows: Mapping[str, Any]) -> str:
    """Two columns of text."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
