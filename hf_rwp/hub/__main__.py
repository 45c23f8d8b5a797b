"""Push a folder that a run left, keep a record of it, and render the cards of records: `hf-rwp push`, `record`, `card`.

`python -m hf_rwp.hub COMMAND` does the same.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_rwp.hub.card import card_of_record
from hf_rwp.hub.push import PushError, push
from hf_rwp.runs.files import write
from hf_rwp.runs.mistakes import Parser, told_in_a_line
from hf_rwp.runs.started import announce


def push_folder(argv: Sequence[str]) -> None:
    """Exits with status 1 for a push that fails: what is on disk is complete, and how to finish it is said."""
    parser = Parser(prog="hf-rwp push", description="Push a folder that a run left, in one commit.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="What holds the model, such as outputs/RUN/model.")
    parser.add_argument("repo_id", metavar="USER/NAME", help="Where it goes on the Hub; made if missing.")
    parser.add_argument("--revision", help="A branch, made if missing.")
    parser.add_argument("--tag", help="For the commit.")
    parser.add_argument("--private", action="store_true", default=None, help="Whether one that is made is private.")
    parser.add_argument("--message", default="Upload model", help="The commit's.")
    options = vars(parser.parse_args(argv))
    if not options["folder"].is_dir():
        raise ValueError(
            f"there is no folder {options['folder']}: name one that holds a model, such as outputs/RUN/model"
        )
    try:
        print(f"Pushed to {push(**options)}")
    except PushError as error:
        raise SystemExit(f"error: {error}") from None


def record(argv: Sequence[str]) -> None:
    parser = Parser(prog="hf-rwp record", description="Append a run's results.json to a file of records.")
    parser.add_argument("results", type=Path, metavar="RUN", help="The folder of a run, or its results.json.")
    parser.add_argument("records", type=Path, metavar="RECORDS.jsonl", help="What it is appended to; made if missing.")
    parser.add_argument("--dataset", metavar="ID", help="What `--data_dir` held, by its id on the Hub.")
    parser.add_argument("--note", help="What the figures do not say, for the card.")
    options = parser.parse_args(argv)
    if sys.stderr.isatty():
        announce("record")
    from hf_rwp.runs.records import append_record  # which imports torch

    own = {name: value for name in ("dataset", "note") if (value := getattr(options, name))}
    file = options.results / "results.json" if options.results.is_dir() else options.results
    append_record(options.records, _read(file, _json, "a run's results.json") | own)
    print(f"Appended {file} to {options.records}")


def card(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="hf-rwp card", description="Render the card of the last record in each file, as FOLDER/NAME.md."
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS.jsonl", help="What `hf-rwp record` wrote.")
    parser.add_argument(
        "--folder", type=Path, default=Path("model_cards"), help="Where cards go; model_cards if not set."
    )
    options = parser.parse_args(argv)
    for records in options.records:
        rendered = _read(records, card_of_record, "a file of records of runs")
        place = options.folder / f"{records.stem}.md"
        write(place, rendered)
        print(f"Wrote {place}")


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _read(file: Path, parsed: Callable[[Path], Any], what: str) -> Any:
    """What a file holds. Raises ValueError for one that is not there or holds something else."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: name {what}")
    try:
        return parsed(file)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is not {what} ({type(error).__name__}: {error})") from error


def main(argv: Sequence[str] | None = None) -> None:
    commands = {"push": push_folder, "record": record, "card": card}
    parser = Parser(prog="python -m hf_rwp.hub", description=__doc__, add_help=True)
    parser.add_argument("command", choices=commands)
    words = list(sys.argv[1:] if argv is None else argv)
    with told_in_a_line():
        commands[parser.parse_args(words[:1]).command](words[1:])


if __name__ == "__main__":
    main()
