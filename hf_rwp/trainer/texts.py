"""The texts that a language model is fine-tuned on: which there are, as flags, and what is held out of them.

Nothing heavy is imported for the flags.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rwp.core.checks import check_all

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}  # for `datasets`
_HELD_OUT = 200
_COLUMNS = (("messages",), ("prompt", "completion"), ("text",))


@dataclass
class TextArguments:
    """Raises ValueError for a value out of range, and for a file that is not there or of another kind."""

    help_group = "data"

    dataset: str | None = field(default=None, metadata={"help": "An id on the Hub; sums in words if none is set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    data_file: str | None = field(
        default=None, metadata={"help": f"Instead of it a file: {', '.join(KINDS)}; of .txt each line is a text."}
    )
    train_samples: int | None = field(
        default=None, metadata={"help": "At most so many samples to train on; of the sums 1000 if not set."}
    )
    held_out: int | None = field(
        default=None,
        metadata={
            "help": f"Samples that are held out, to evaluate on; {_HELD_OUT}, a fifth of fewer than "
            f"{5 * _HELD_OUT:,}, if not set."
        },
    )
    known_file: str | None = field(
        default=None,
        metadata={
            "help": "A text file of lines that the base knows, to measure forgetting; the embedded base's own text "
            "if it is trained."
        },
    )

    def __post_init__(self) -> None:
        check_all(
            self,
            ("held_out", self.held_out is None or self.held_out >= 1, "at least 1"),
            ("train_samples", self.train_samples is None or self.train_samples >= 1, "at least 1"),
            ("data_file", not (self.data_file and self.dataset), "unset where dataset is set"),
        )
        for name in ("data_file", "known_file"):
            file = getattr(self, name)
            if file is not None and not Path(file).expanduser().is_file():
                is_folder = Path(file).expanduser().is_dir()
                raise ValueError(
                    f"{name}={file!r} " + ("is a folder: name a file in it" if is_folder else "is not there")
                )
        if self.data_file is not None and Path(self.data_file).suffix not in KINDS:
            raise ValueError(f"data_file={self.data_file!r} must end in one of {', '.join(KINDS)}")

    @property
    def embedded(self) -> bool:
        """Whether the data are sums in words."""
        return not (self.data_file or self.dataset)


def load_texts(args: TextArguments, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What to train on, and what is held out. Raises ValueError for other columns, and for a file that is damaged."""
    if args.embedded:
        from hf_rwp.trainer.language import sums_in_words

        return sums_in_words(args.train_samples or 1000, args.held_out or _HELD_OUT, seed)
    rows = _rows(args)
    columns = next((names for names in _COLUMNS if set(names) <= set(rows.column_names)), None)
    if columns is None:
        raise ValueError(
            f"{args.data_file or args.dataset} has the columns {', '.join(rows.column_names)}: SFT needs `messages`, "
            "`prompt` and `completion`, or `text`. Rename them"
        )
    held_out = args.held_out or max(1, min(_HELD_OUT, len(rows) // 5))
    if len(rows) <= held_out:
        raise ValueError(
            f"{args.data_file or args.dataset} has {len(rows)} samples, of which --held_out {held_out} leaves none to "
            "train on" + (": lower it" if len(rows) > 1 else ": two or more are needed")
        )
    parts = rows.select_columns(list(columns)).train_test_split(held_out, seed=seed)
    train: list[dict[str, Any]] = parts["train"].to_list()
    return train[: args.train_samples], parts["test"].to_list()


def _rows(args: TextArguments) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if args.data_file is None:
        return load_dataset(args.dataset, args.dataset_config, split=args.dataset_train_split)
    file = Path(args.data_file).expanduser()
    try:
        rows = load_dataset(KINDS[file.suffix], data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError) as error:  # the latter by datasets before 5
        raise ValueError(f"{args.data_file}{_damage(file, error)}") from error
    return rows.filter(lambda row: row["text"].strip()) if file.suffix == ".txt" else rows


def _damage(file: Path, error: Exception) -> str:
    """Where a file is not what its name says, and why."""
    if file.suffix == ".jsonl":
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as found:
                return f', line {number}: not JSON ({found}). Each line is an object, such as {{"text": "..."}}'
    return f" could not be read as {file.suffix[1:]}: {error.__cause__ or error}"
