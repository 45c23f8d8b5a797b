"""Push a folder that a run left, keep a record of it, and render the cards of records."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_rwp.hub.card import card_of_record
from hf_rwp.hub.push import PushError, push
from hf_rwp.runs.files import write


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_rwp.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_push = commands.add_parser("push", help="Push a folder that a run left, in one commit.")
    of_push.add_argument("folder", type=Path)
    of_push.add_argument("repo_id", metavar="USER/NAME")
    of_push.add_argument("--revision", help="A branch, made if missing.")
    of_push.add_argument("--tag", help="For the commit.")
    of_push.add_argument("--private", action="store_true", default=None)
    of_push.add_argument("--message", default="Upload model")
    of_record = commands.add_parser("record", help="Append a run's results.json to a file of records.")
    of_record.add_argument("results", type=Path, metavar="RESULTS.json")
    of_record.add_argument("records", type=Path, metavar="RECORDS.jsonl")
    of_record.add_argument("--dataset", metavar="ID", help="What `--data_dir` held, by its id on the Hub.")
    of_record.add_argument("--note", help="What the figures do not say, for the card.")
    of_card = commands.add_parser("card", help="Render the card of the last record in each file, as FOLDER/NAME.md.")
    of_card.add_argument("records", type=Path, nargs="+", metavar="RECORDS.jsonl")
    of_card.add_argument("--folder", type=Path, default=Path("model_cards"))
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    if command == "push":
        try:
            print(f"Pushed to {push(**options)}")
        except PushError as error:
            raise SystemExit(f"error: {error}") from None
    elif command == "record":
        from hf_rwp.runs.records import append_record

        record = json.loads(options["results"].read_text(encoding="utf-8"))
        append_record(
            options["records"], record | {name: options[name] for name in ("dataset", "note") if options[name]}
        )
    else:
        for records in options["records"]:
            write(options["folder"] / f"{records.stem}.md", card_of_record(records))


if __name__ == "__main__":
    main()
