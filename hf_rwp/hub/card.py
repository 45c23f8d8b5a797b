"""The model card: rendered from facts, and put beside a model's weights with the figures and pictures it shows."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from hf_rwp.hub.facts import PAPER, PICTURES, Facts, build_facts, plain
from hf_rwp.runs.files import as_json, write

TEMPLATE = Path(__file__).with_name("model_card.md")
RESULTS, EVALUATIONS = "results.json", ".eval_results"


def render_card(facts: Facts) -> str:
    """The model card, Markdown with a YAML head."""
    evaluation = [EvalResult(**result) for result in facts.evaluation]
    head = ModelCardData(model_name=facts.name, eval_results=evaluation or None, **facts.metadata)
    if not evaluation:
        head.model_name = None  # which the Hub knows only with results
    card = ModelCard.from_template(head, template_path=str(TEMPLATE), facts=facts, cell=cell, paper=PAPER)
    return str(card).rstrip() + "\n"


def add_card(
    folder: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    pictures: Sequence[str | os.PathLike[str]] = (),
    logs: str | os.PathLike[str] | None = None,
    **facts: Any,
) -> None:
    """Complete a folder with weights: README.md, results.json and pictures, which the card shows by their names.

    Beside the `model-index` of the card, the accuracy on the held-out part of a data set of the Hub goes into a file of
    .eval_results, from which the Hub makes leaderboards: https://huggingface.co/docs/hub/eval-results.

    logs: a folder with TensorBoard's files, which the Hub shows; copied without the machine's name, which they carry in
    theirs. facts: as `build_facts` takes them.
    """
    folder = Path(folder)
    for picture in pictures:
        write(folder / Path(picture).name, Path(picture).read_bytes())
    if logs is not None:
        shutil.rmtree(folder / "logs", ignore_errors=True)
        for number, file in enumerate(sorted(Path(logs).rglob("events.out.tfevents.*"))):
            copied = folder / "logs" / f"run_{number}" / f"events.out.tfevents.{file.name.split('.')[3]}.{number}"
            copied.parent.mkdir(parents=True)
            shutil.copyfile(file, copied)
    shown = [name for name in PICTURES if (folder / name).exists()]
    write(folder / RESULTS, as_json(plain(results)))
    known = build_facts(results, pictures=shown, **facts)
    write(folder / "README.md", render_card(known))
    if known.benchmark is not None:
        name = str(known.dataset).split("/")[-1]
        entries = eval_result_entries_to_yaml([EvalResultEntry(**known.benchmark)])
        write(folder / EVALUATIONS / f"{name}.yaml", yaml_dump(entries))


def card_of_record(records: Path) -> str:
    """The card of the last record in a file."""
    last = json.loads(records.read_text(encoding="utf-8").splitlines()[-1])
    return render_card(build_facts(last, name=records.stem, note=last.get("note")))


def with_picture(card: str, file: str) -> str:
    """A card that shows one more of `PICTURES`, ahead of the section on training; all else it says is kept."""
    if f"]({file})" in card:
        return card
    before, section, after = card.partition("\n## Training\n")
    return f"{before.rstrip()}\n\n![{PICTURES[file].format(kind='images')}]({file})\n{section}{after}"


def cell(text: Any) -> str:
    """One cell of a Markdown table, whatever the text."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")
